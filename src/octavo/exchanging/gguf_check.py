"""The gate of a GGUF file: read back by others' code, it must compute what the model computes.

The model is rounded in memory to the file's types, and the file is read three ways: by `gguf`'s own
reader into our model, by transformers where it knows the architecture, and by llama.cpp itself
where llama-cpp-python is installed. Each must give the same logits, perplexity and greedy text.
"""

import importlib
import io
import math
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.errors import ParityError
from octavo.exchanging.families import FAMILIES, QKV, Family
from octavo.exchanging.gguf import ARCHITECTURES, Exportable, Kind, gguf_name, import_gguf, pack
from octavo.exchanging.gguf_vocabulary import Vocabulary
from octavo.exchanging.parity import (
    LENGTH,
    REPORT,
    ROWS,
    WRITTEN,
    Stock,
    import_transformers,
    quiet,
)
from octavo.model.gpt import GPT
from octavo.model_config import ModelConfig, RopeScaling

PROMPT = 8
# Largest difference of two logits, as a share of the largest.
EXACT = 1e-5  # fp32 sums in another order
TANH_GELU = 1e-2  # where the model has the exact GELU
LIKELIEST_END = 0.5  # the probability from which an added token would end greedy texts
# llama.cpp rounds activations, too: GELU by a table of F16, and inputs of quantized matrices.
LLAMA_CPP: dict[str, float] = {"F32": 1e-2, "F16": 1e-2, "Q8_0": 1e-1, "Q4_0": 1e-1}


@dataclass(frozen=True)
class Runtime:
    """Somebody's code that read the file."""

    name: str
    logits: Callable[[Tensor], Tensor]
    """Ids (T,) to logits (T, V)."""
    tolerance: float


def check(
    path: Path,
    lm: Exportable,
    stock: GPT,
    family: Family,
    vocabulary: Vocabulary,
    rows: np.ndarray,
    kind: Kind,
) -> dict[str, Any]:
    """Compare the file with ``stock``, and that with ``lm``, on ``rows`` (N, T + 1) of ids.

    Returns the figures. Raises `ParityError` for the first that is too large.
    """
    texts = torch.from_numpy(rows[:ROWS, : LENGTH + 1].astype(np.int64))
    vocab_size = lm.tokenizer.vocab_size
    before = _check_stock(lm, stock, texts)
    reference = rounded(stock, kind)
    greedy = _greedy_text(reference, texts[0])
    losses = [_loss(_ours(reference, text[:-1]), text) for text in texts]
    differences, allowed, ends = {}, {}, []
    for runtime in _runtimes(path, lm, family, stock.config, kind):
        differences[runtime.name] = _compare(runtime, reference, texts, greedy, vocab_size)
        allowed[runtime.name] = runtime.tolerance
        if vocabulary.end_is_new:
            ends.append(_likeliest_end(runtime, [*texts[:, :-1], greedy]))
    figures = {
        "perplexity": before,
        "perplexity_of_the_file": math.exp(sum(losses) / len(losses)),
        "logits_differ_by": differences,
        "allowed": allowed,
        "greedy_tokens_equal": len(greedy) - _prompt_length(stock.config),
    }
    return figures | ({"likeliest_end": max(ends)} if ends else {})


def rounded(stock: GPT, kind: Kind) -> GPT:
    """``stock`` with its weights as a file of this kind can hold them."""
    gguf = import_gguf()
    weights = {}
    for name, value in stock.state_dict().items():
        stored, packed = pack(gguf_name(name), value.numpy(), kind)
        weights[name] = torch.from_numpy(
            gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[stored])
        )
    model = GPT(stock.config).eval()
    model.load_state_dict(weights)
    return model


def read_gguf(path: Path) -> GPT:
    """The model in a file that `export_gguf` wrote, from nothing but the file."""
    gguf = import_gguf()
    reader = gguf.GGUFReader(path)
    fields = {name.partition(".")[2]: field.contents() for name, field in reader.fields.items()}
    tensors = {
        tensor.name: torch.from_numpy(
            gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()
        )
        for tensor in reader.tensors
    }
    family = next(f for f in FAMILIES if ARCHITECTURES[f.name].name == fields["architecture"])
    model = GPT(_config(fields, tensors, family))
    model.load_state_dict(_our_weights(model, tensors, family))
    if "rope_freqs.weight" in tensors:
        angles = torch.arange(model.config.block_size)[:, None] * _frequencies(model, tensors)
        model.rope_cos, model.rope_sin = angles.cos(), angles.sin()
    return model.eval()


def _config(fields: dict[str, Any], tensors: dict[str, Tensor], family: Family) -> ModelConfig:
    """Our configuration, read off the file's settings and tensors."""
    scaling = None
    if "rope.scaling.type" in fields:
        factor = fields["rope.scaling.factor"]
        scaling = RopeScaling(type=fields["rope.scaling.type"], factor=factor)
        if scaling.type == "yarn":
            attention = fields["rope.scaling.attn_factor"] * (0.1 * math.log(factor) + 1.0)
            scaling = RopeScaling(
                type="yarn",
                factor=factor,
                original_block_size=fields["rope.scaling.original_context_length"],
                attention_factor=attention,
            )
    eps = "layer_norm_rms" if family.switches["norm"] == "rmsnorm" else "layer_norm"
    return ModelConfig(
        vocab_size=len(fields["ggml.tokens"]),
        block_size=fields["context_length"],
        n_layer=fields["block_count"],
        n_head=fields["attention.head_count"],
        n_kv_head=fields["attention.head_count_kv"],
        d_model=fields["embedding_length"],
        head_dim=fields["attention.key_length"],
        d_ff=fields["feed_forward_length"],
        rope_theta=fields.get("rope.freq_base", 10_000.0),
        rope_scaling=scaling,
        norm_eps=fields[f"attention.{eps}_epsilon"],
        mlp="swiglu" if "blk.0.ffn_gate.weight" in tensors else "gelu_tanh",
        bias="blk.0.ffn_down.bias" in tensors,
        norm_bias="output_norm.bias" in tensors,
        tie_embeddings="output.weight" not in tensors,
        **family.switches,
    )


def _our_weights(model: GPT, tensors: dict[str, Tensor], family: Family) -> dict[str, Tensor]:
    """The file's tensors under our names, in our layout."""
    arch, config = ARCHITECTURES[family.name], model.config
    heads = {"q_proj": config.n_head, "k_proj": config.n_kv_head, "v_proj": config.n_kv_head}
    weights = {}
    for name in model.state_dict():
        module = name.split(".")[-2]
        source = gguf_name(name)
        if name == "lm_head.weight" and config.tie_embeddings:
            source = "token_embd.weight"
        if arch.fused and module in heads:
            fused = tensors[source.replace(f"attn_{module[0]}", "attn_qkv")]
            parts = fused.split([n * config.head_dim for n in heads.values()])
            weights[name] = parts[QKV.index(f"attn.{module}")]
        elif arch.interleaved and module in ("q_proj", "k_proj"):
            pairs = tensors[source].unflatten(0, (heads[module], -1, 2))
            weights[name] = torch.cat([pairs[:, :, 0], pairs[:, :, 1]], dim=1).flatten(0, 1)
        else:
            weights[name] = tensors[source]
    return weights


def _frequencies(model: GPT, tensors: dict[str, Tensor]) -> Tensor:
    """RoPE's angular velocities (E/2,), divided as a tensor of the file says."""
    exponents = torch.arange(0, model.config.head_dim, 2) / model.config.head_dim
    return model.config.rope_theta**-exponents / tensors["rope_freqs.weight"]


def _runtimes(
    path: Path, lm: Exportable, family: Family, config: ModelConfig, kind: Kind
) -> Iterator[Runtime]:
    """Everyone at hand who reads the file."""
    ours = read_gguf(path)
    yield Runtime("gguf's reader", lambda ids: _ours(ours, ids), EXACT)
    transformers = import_transformers()
    if transformers is not None and ARCHITECTURES[family.name].in_transformers:
        yield _transformers(transformers, path, family, config)
    if (llama_cpp := _import_llama_cpp()) is not None:
        yield _llama_cpp(llama_cpp, path, lm, kind)


def _transformers(transformers: Any, path: Path, family: Family, config: ModelConfig) -> Runtime:
    """transformers, which has its own map of names and its own way to undo permutations."""
    cls = getattr(transformers, family.name)
    with quiet(transformers), redirect_stderr(io.StringIO()):  # there is a bar it does not hide
        module = cls.from_pretrained(
            path.parent,
            gguf_file=path.name,
            config=cls.config_class(**family.options(config)),
            local_files_only=True,
            dtype=torch.float32,
        )
    stock = Stock(module.eval())
    return Runtime(
        f"transformers {transformers.__version__}", lambda ids: stock(ids[None])[0], EXACT
    )


def _llama_cpp(llama_cpp: Any, path: Path, lm: Exportable, kind: Kind) -> Runtime:
    """llama.cpp itself, having seen that it cuts a text into the same tokens."""
    llama = llama_cpp.Llama(
        str(path), n_ctx=lm.config.block_size, logits_all=True, verbose=False, type_k=0, type_v=0
    )  # with keys and values in F32
    tokenizer, name = lm.tokenizer, f"llama-cpp-python {llama_cpp.__version__}"
    text = tokenizer.decode(np.flatnonzero(tokenizer.byte_lengths())[:LENGTH])
    if llama.tokenize(text.encode(), add_bos=False, special=False) != tokenizer.encode(text):
        raise ParityError(f"{name} gives other ids for the same text", fix=REPORT)

    def logits(ids: Tensor) -> Tensor:
        llama.reset()
        llama.eval(ids.tolist())
        return torch.from_numpy(llama.scores[: len(ids)].copy())

    return Runtime(name, logits, LLAMA_CPP[kind])


def _import_llama_cpp() -> Any:
    try:
        return importlib.import_module("llama_cpp")  # optional, and in no extra of ours
    except ImportError:
        return None


@torch.inference_mode()
def _ours(model: GPT, ids: Tensor) -> Tensor:
    """The logits (T, V) of our model after ``ids`` (T,), on the CPU."""
    return model(ids[None].to(model.tok_emb.weight.device))[0].float().cpu()


def _check_stock(lm: Exportable, stock: GPT, texts: Tensor) -> float:
    """See that the architecture's shape computes what ``lm`` does; return its perplexity."""
    vocab_size = lm.tokenizer.vocab_size
    tolerance = TANH_GELU if lm.config.mlp == "gelu" else EXACT
    shaped = Runtime("the model in llama.cpp's shape", lambda ids: _ours(stock, ids), tolerance)
    losses = []
    for text in texts:
        ours = _ours(lm.model, text[:-1])[:, :vocab_size]
        _difference(shaped, shaped.logits(text[:-1])[:, :vocab_size], ours)
        losses.append(_loss(ours, text))
    return math.exp(sum(losses) / len(losses))


def _greedy_text(model: GPT, text: Tensor) -> Tensor:
    """The beginning of ``text`` and what the model likes best after it."""
    ids = text[: _prompt_length(model.config)]
    for _ in range(min(WRITTEN, model.config.block_size - len(ids))):
        ids = torch.cat([ids, _ours(model, ids)[-1:].argmax(dim=1)])
    return ids


def _compare(
    runtime: Runtime, reference: GPT, texts: Tensor, greedy: Tensor, vocab_size: int
) -> float:
    """Hold ``runtime`` against the reference; return how far its logits are.

    An added end of text counts in the perplexity only: its logits, near -100, are no measure.
    """
    differences, here, there = [], [], []
    for text in texts:
        wanted, given = _ours(reference, text[:-1]), runtime.logits(text[:-1])
        differences.append(_difference(runtime, given[:, :vocab_size], wanted[:, :vocab_size]))
        here.append(_loss(wanted, text))
        there.append(_loss(given, text))
    ours, theirs = (math.exp(sum(losses) / len(losses)) for losses in (here, there))
    if not math.isclose(ours, theirs, rel_tol=runtime.tolerance):
        raise ParityError(
            f"{runtime.name} finds a perplexity of {theirs:.6g}, not {ours:.6g}", fix=REPORT
        )
    _compare_greedy(runtime, greedy, _prompt_length(reference.config))
    return max(differences)


def _compare_greedy(runtime: Runtime, greedy: Tensor, begin: int) -> None:
    """See that ``runtime`` would write the ids that ``greedy`` has from ``begin`` on."""
    wanted = greedy[begin:, None]
    logits = runtime.logits(greedy)
    allowed = 2 * runtime.tolerance * logits.abs().max()  # for ids that are as good as tied
    logits = logits[begin - 1 : -1]
    if (logits.amax(dim=1) - logits.gather(1, wanted)[:, 0] > allowed).any():
        raise ParityError(f"{runtime.name} writes another greedy text", fix=REPORT)


def _prompt_length(config: ModelConfig) -> int:
    """The ids that a greedy text begins with."""
    return max(min(PROMPT, config.block_size // 2), 1)


def _difference(runtime: Runtime, given: Tensor, wanted: Tensor) -> float:
    """The largest difference of two logits (T, V), as a share of the largest."""
    difference = ((given - wanted).abs().max() / wanted.abs().max()).item()
    if not difference <= runtime.tolerance:
        raise ParityError(
            f"the logits of {runtime.name} differ by {difference:.2g} of the largest, "
            f"{runtime.tolerance:g} is allowed",
            fix=REPORT,
        )
    return difference


def _loss(logits: Tensor, text: Tensor) -> float:
    """Nats a token of ``text`` (T + 1,) by the logits (T, V) after each of its tokens."""
    return F.cross_entropy(logits, text[1:]).item()


def _likeliest_end(runtime: Runtime, texts: list[Tensor]) -> float:
    """The largest probability that an added end-of-text token ever has."""
    likeliest = max(runtime.logits(ids).softmax(dim=1)[:, -1].max().item() for ids in texts)
    if not likeliest <= LIKELIEST_END:
        raise ParityError(
            f"llama.cpp wants an end-of-text token, and {runtime.name} gives the one that was "
            f"added a probability of {likeliest:.2g}",
            fix="train with data.separator=true, so that the model knows one",
        )
    return likeliest
