"""The gate of a GGUF file: read back by others' code, it must compute what the model computes.

The model is rounded in memory to the file's types, and the file is read three ways: by `gguf`'s own
reader into our model, by transformers where it knows the architecture, and by llama.cpp itself
where llama-cpp-python is installed. Each must give the same logits, perplexity and greedy text.
"""

import io
import math
from collections.abc import Iterator
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from octavo.errors import ParityError
from octavo.exchanging import parity
from octavo.exchanging.families import FAMILIES, Family
from octavo.exchanging.gguf import (
    ARCHITECTURES,
    INTERLEAVED,
    NORMS,
    SETTINGS,
    TURNED,
    Kind,
    namer,
    pack,
    plain_layout,
)
from octavo.exchanging.libraries import library, quiet
from octavo.exchanging.parity import REPORT, Figures, Logits, Reader, logits_of, prompt_length
from octavo.model.gpt import GPT
from octavo.model.rope import rope_frequencies
from octavo.model_config import ModelConfig, RopeScaling
from octavo.text.tokenizer import Tokenizer

# Largest difference of two logits, as a share of the largest.
EXACT = 1e-5  # fp32 sums in another order
TANH_GELU = 1e-2  # where the model has the exact GELU
LIKELIEST_END = 0.5  # the probability from which an added token would end greedy texts
# llama.cpp rounds activations, too: GELU by a table of F16, and inputs of quantized matrices.
LLAMA_CPP: dict[str, float] = {"F32": 1e-2, "F16": 1e-2, "Q8_0": 1e-1, "Q4_0": 1e-1}
UNKNOWN_TO_TRANSFORMERS = ("starcoder", "gptneox")


def check(
    path: Path,
    model: GPT,
    tokenizer: Tokenizer,
    stock: GPT,
    family: Family,
    rows: np.ndarray,
    kind: Kind,
) -> dict[str, Any]:
    """Compare the file with ``stock``, and that with ``model``, on ``rows`` (N, T + 1) of ids.

    An added end of text counts in the perplexity only: its logits, near -100, are no measure.
    Returns the figures. Raises `ParityError` for the first that is too large.
    """
    texts, vocab_size = parity.texts_of(rows), tokenizer.vocab_size
    tolerance = TANH_GELU if model.config.mlp == "gelu" else EXACT
    shaped = Reader("the model in llama.cpp's shape", _known(stock, vocab_size), tolerance)
    before = parity.compare(_known(model, vocab_size), shaped, texts).perplexity
    reference = rounded(stock, kind)
    begin, greedy = prompt_length(stock.config.block_size), _greedy_text(reference, texts[0])
    figures: dict[str, Figures] = {}
    allowed, ends = {}, []
    for reader in _readers(path, tokenizer, family, stock.config, kind):
        figures[reader.name] = parity.compare(logits_of(reference), reader, texts, vocab_size)
        allowed[reader.name] = reader.tolerance
        if stock.config.vocab_size > vocab_size:
            ends.append(_likeliest_end(reader, [*texts[:, :-1], greedy]))
        parity.check_greedy(reader.name, reader.logits(greedy), greedy, begin, reader.tolerance)
    return {
        "perplexity": before,
        "perplexity_of_the_file": next(iter(figures.values())).perplexity,
        "logits_differ_by": {name: found.difference for name, found in figures.items()},
        "allowed": allowed,
        "greedy_tokens_equal": len(greedy) - begin,
    } | ({"likeliest_end": max(ends)} if ends else {})


def rounded(stock: GPT, kind: Kind) -> GPT:
    """``stock`` with its weights as a file of this kind can hold them."""
    gguf = library("gguf", "GGUF")
    weights = {}
    for name, value in stock.state_dict().items():
        stored, packed = pack(name, value.numpy(), kind)
        weights[name] = torch.from_numpy(
            gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[stored])
        )
    model = GPT(stock.config).eval()
    model.load_state_dict(weights)
    return model


def read_gguf(path: Path) -> GPT:
    """The model in a file that `export_gguf` wrote, from nothing but the file."""
    gguf = library("gguf", "GGUF")
    reader = gguf.GGUFReader(path)
    fields = {name.partition(".")[2]: field.contents() for name, field in reader.fields.items()}
    tensors = {
        tensor.name: torch.from_numpy(
            gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()
        )
        for tensor in reader.tensors
    }
    family = next(f for f in FAMILIES if ARCHITECTURES[f.name] == fields["architecture"])
    config = _config(fields, tensors, family)
    tensors.setdefault("output.weight", tensors["token_embd.weight"])
    model = GPT(config)
    model.load_state_dict(_our_weights(model, tensors, family))
    if "rope_freqs.weight" in tensors:
        plain, _ = rope_frequencies(config)  # (E/2,)
        velocities = torch.from_numpy(plain) / tensors["rope_freqs.weight"]
        angles = torch.arange(config.block_size)[:, None] * velocities
        model.rope_cos, model.rope_sin = angles.cos(), angles.sin()
    return model.eval()


def _config(fields: dict[str, Any], tensors: dict[str, Tensor], family: Family) -> ModelConfig:
    """Our configuration, read off the file's settings and tensors."""
    scaling: dict[str, Any] = {}
    if kind := fields.get("rope.scaling.type"):
        scaling = {"type": kind, "factor": fields["rope.scaling.factor"]}
    if kind == "yarn":
        usual = 0.1 * math.log(scaling["factor"]) + 1.0
        scaling["original_block_size"] = fields["rope.scaling.original_context_length"]
        scaling["attention_factor"] = fields["rope.scaling.attn_factor"] * usual
    return ModelConfig(
        **{ours: fields[theirs] for ours, theirs in SETTINGS.items()},
        rope_theta=fields.get("rope.freq_base", 10_000.0),
        rope_scaling=RopeScaling(**scaling) if scaling else None,
        norm_eps=fields[f"attention.{NORMS[family.switches['norm']]}_epsilon"],
        mlp="swiglu" if "blk.0.ffn_gate.weight" in tensors else "gelu_tanh",
        bias="blk.0.ffn_down.bias" in tensors,
        norm_bias="output_norm.bias" in tensors,
        tie_embeddings="output.weight" not in tensors,
        **family.switches,
    )


def _our_weights(model: GPT, tensors: dict[str, Tensor], family: Family) -> dict[str, Tensor]:
    """The file's tensors under our names, in our layout."""
    config, layout = model.config, plain_layout(family)
    rename = namer(family, config.n_layer)
    names = layout.to_theirs(config, model.state_dict())
    weights = layout.to_ours(config, {name: tensors[rename(name)] for name in names})
    if ARCHITECTURES[family.name] == INTERLEAVED:
        for name in filter(TURNED.search, weights):
            pairs = weights[name].unflatten(0, (-1, config.head_dim // 2, 2))  # (H, E/2, 2, ...)
            weights[name] = pairs.transpose(1, 2).flatten(0, 2)
    return weights


def _readers(
    path: Path, tokenizer: Tokenizer, family: Family, config: ModelConfig, kind: Kind
) -> Iterator[Reader]:
    """Everyone at hand who reads the file."""
    yield Reader("gguf's reader", logits_of(read_gguf(path)), EXACT)
    transformers = library("transformers")
    if transformers is not None and ARCHITECTURES[family.name] not in UNKNOWN_TO_TRANSFORMERS:
        yield _transformers(transformers, path, family, config)
    if (llama_cpp := library("llama_cpp")) is not None:
        yield _llama_cpp(llama_cpp, path, tokenizer, config.block_size, kind)


def _transformers(transformers: Any, path: Path, family: Family, config: ModelConfig) -> Reader:
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
    return parity.reader_of(transformers, module, EXACT)


def _llama_cpp(
    llama_cpp: Any, path: Path, tokenizer: Tokenizer, block_size: int, kind: Kind
) -> Reader:
    """llama.cpp itself, having seen that it cuts a text into the same tokens."""
    llama = llama_cpp.Llama(
        str(path), n_ctx=block_size, logits_all=True, verbose=False, type_k=0, type_v=0
    )  # with keys and values in F32
    name = f"llama-cpp-python {llama_cpp.__version__}"
    text = tokenizer.decode(np.flatnonzero(tokenizer.byte_lengths())[: parity.LENGTH])
    if llama.tokenize(text.encode(), add_bos=False, special=False) != tokenizer.encode(text):
        raise ParityError(f"{name} gives other ids for the same text", fix=REPORT)

    def logits(ids: Tensor) -> Tensor:
        llama.reset()
        llama.eval(ids.tolist())
        return torch.from_numpy(llama.scores[: len(ids)].copy())

    return Reader(name, logits, LLAMA_CPP[kind])


def _known(model: GPT, vocab_size: int) -> Logits:
    """The logits of the ids that the tokenizer has: no padding, no added end of text."""
    logits = logits_of(model)
    return lambda ids: logits(ids)[:, :vocab_size]


def _greedy_text(model: GPT, text: Tensor) -> Tensor:
    """The beginning of ``text`` and what the model likes best after it."""
    ids, logits = text[: prompt_length(model.config.block_size)], logits_of(model)
    for _ in range(min(parity.WRITTEN, model.config.block_size - len(ids))):
        ids = torch.cat([ids, logits(ids)[-1:].argmax(dim=1)])
    return ids


def _likeliest_end(reader: Reader, texts: list[Tensor]) -> float:
    """The largest probability that an added end-of-text token ever has."""
    likeliest = max(reader.logits(ids).softmax(dim=1)[:, -1].max().item() for ids in texts)
    if not likeliest <= LIKELIEST_END:
        raise ParityError(
            f"llama.cpp wants an end-of-text token, and {reader.name} gives the one that was "
            f"added a probability of {likeliest:.2g}",
            fix="train with data.separator=true, so that the model knows one",
        )
    return likeliest
