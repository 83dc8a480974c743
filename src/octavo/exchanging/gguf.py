"""Models out to GGUF, the file of llama.cpp, Ollama and LM Studio: one file, weights and tokenizer.

The model is first put into the shape that an architecture of llama.cpp has, then rounded to the
file's types, written, read back by others' code and compared (`gguf_check`); only then does the
file appear. Needs the extra ``hf``, imported on use.
"""

import math
import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from octavo import disk
from octavo.adapting.surgery import refuse_wrapped
from octavo.errors import ConfigError
from octavo.exchanging.families import Family, choose_family
from octavo.exchanging.gguf_vocabulary import Vocabulary, make_vocabulary
from octavo.exchanging.libraries import library
from octavo.model.gpt import GPT
from octavo.model.rope import ntk_theta, rope_frequencies
from octavo.model_config import ModelConfig
from octavo.text.tokenizer import Tokenizer

Kind = Literal["F32", "F16", "Q8_0", "Q4_0"]
FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "Q4_0": 2}
BLOCK = 32  # weights that share a scale in Q8_0 and Q4_0
STATES_A_WIDTH = 64  # hidden states for each of their dimensions, to fit an output row to
FAR_BELOW = 10.0  # the likeliest logit: a probability below e^-10
YARN_BETAS = (32.0, 1.0)  # llama.cpp has no others for these architectures

# llama.cpp's architecture for each class of transformers.
ARCHITECTURES = {
    "GPT2LMHeadModel": "gpt2",
    "GPTBigCodeForCausalLM": "starcoder",
    "GPTNeoXForCausalLM": "gptneox",
    "Starcoder2ForCausalLM": "starcoder2",
    "StableLmForCausalLM": "stablelm",
    "LlamaForCausalLM": "llama",
    "Qwen3ForCausalLM": "qwen3",
}
BIASED = ("gpt2", "starcoder", "gptneox", "starcoder2")  # linear layers must have biases
OWN_HEAD = ("gptneox", "stablelm")  # the head must be there, be it the embedding over again
INTERLEAVED = "llama"  # RoPE turns neighbours (x_2i, x_2i+1), not halves (x_i, x_i+E/2)
TURNED = re.compile(r"attn\.[qk]_proj\.")  # what RoPE turns

# Our settings under its names, and what it calls our norms.
SETTINGS = {
    "vocab_size": "vocab_size",
    "block_size": "context_length",
    "n_layer": "block_count",
    "d_model": "embedding_length",
    "d_ff": "feed_forward_length",
    "n_head": "attention.head_count",
    "n_kv_head": "attention.head_count_kv",
    "head_dim": "attention.key_length",
}
NORMS = {"rmsnorm": "layer_norm_rms", "layernorm": "layer_norm"}
# Weights by our name and by llama.cpp's.
POSITIONS = ("pos_emb.weight", "position_embd.weight")
EMBEDDINGS = ("tok_emb.weight", "lm_head.weight", "token_embd.weight", "output.weight")


def export_gguf(
    model: GPT,
    tokenizer: Tokenizer,
    path: Path | str,
    rows: np.ndarray,
    text: str,
    kind: Kind = "F16",
    architecture: str | None = None,
) -> dict[str, Any]:
    """Write ``model`` into the file ``path`` and return what is to be said about it.

    It is compared on ``rows`` (N, T + 1) of ids, which ``text`` describes. The class of
    transformers that ``architecture`` names, or the first that holds the model, decides between
    llama.cpp's. Raises `ConfigError` for what llama.cpp has no word for, `ParityError` where what
    was written computes something else, `MissingExtraError` without the library ``gguf``.
    """
    from octavo.exchanging.gguf_check import check

    refuse_wrapped(model)
    config = model.config
    family = choose_family(config, architecture)
    arch = ARCHITECTURES[family.name]
    refuse_unknown(config, arch)
    vocabulary = make_vocabulary(tokenizer)
    stock = stock_model(model, arch, vocabulary)
    path = Path(os.path.realpath(path))
    with disk.errors(f"write {path}"), disk.scratch(path.parent, "gguf") as temp:
        tensors = {n: pack(n, t.numpy(), kind) for n, t in named_tensors(stock, family).items()}
        write(temp / path.name, stock.config, family, vocabulary, tensors, kind)
        disk.sync(temp / path.name)
        parity = check(temp / path.name, model, tokenizer, stock, family, rows, kind)
        os.replace(temp / path.name, path)
        disk.sync(path.parent)
    types = Counter(stored for stored, _ in tensors.values())
    return {
        "file_bytes": path.stat().st_size,
        "architecture": arch,
        "tensors": dict(sorted(types.items())),
        "compared_on": text,
        **parity,
        "remarks": _remarks(config, vocabulary, types["F16"] if kind != "F16" else 0),
    }


def refuse_unknown(config: ModelConfig, arch: str) -> None:
    """Raise `ConfigError` for mathematics that llama.cpp's architecture does not have."""
    scaling = config.rope_scaling
    kind = scaling.type if scaling else "none"
    unknown = ""
    if config.mlp not in ("swiglu", "gelu_tanh", "gelu"):
        unknown = f"mlp={config.mlp}"
    elif kind == "llama3" and arch != "llama":
        unknown = "rope_scaling.type=llama3"
    elif scaling and kind == "yarn" and (scaling.beta_fast, scaling.beta_slow) != YARN_BETAS:
        unknown = f"rope_scaling.beta_fast={scaling.beta_fast}, beta_slow={scaling.beta_slow}"
    if unknown:
        raise ConfigError(
            f"llama.cpp's architecture {arch} does not have {unknown}", fix="export --to hf"
        )


def stock_model(model: GPT, arch: str, vocabulary: Vocabulary) -> GPT:
    """``model`` in the architecture's shape, in fp32 on the CPU, in evaluation mode.

    Biases it must have and ours lacks are zeros. Padded ids, which llama.cpp would write, are left
    out. GELU is of the tanh form, which is the one that llama.cpp computes.
    """
    config = model.config
    stock = GPT(
        replace(
            config,
            vocab_size=len(vocabulary.tokens),
            bias=config.bias or arch in BIASED,
            norm_bias=config.norm == "layernorm",
            tie_embeddings=config.tie_embeddings
            and not (arch in OWN_HEAD or vocabulary.end_is_new),
            mlp="gelu_tanh" if config.mlp == "gelu" else config.mlp,
        )
    )
    given = model.state_dict()
    for name, value in stock.state_dict().items():
        value.zero_()
        if name in given:
            n_rows = min(len(value), len(given[name]))
            value[:n_rows] = given[name][:n_rows]
    if vocabulary.end_is_new:
        _add_end(model, stock)
    return stock.eval()


@torch.inference_mode()
def _add_end(model: GPT, stock: GPT) -> None:
    """Give the last id, which octavo never writes, an output row that makes it improbable.

    The row of least squares over random ids gives it a logit near -100, if the model's states allow
    that; else it gets the average logit, which is at least never the largest.
    """
    config, device = model.config, model.tok_emb.weight.device
    vocab_size, n_rows = stock.config.vocab_size - 1, STATES_A_WIDTH * config.d_model
    shape = (math.ceil(n_rows / config.block_size), config.block_size)
    ids = torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(0))
    states = torch.cat([model.hidden(row[None].to(device))[0] for row in ids])  # (N, D)
    best = torch.cat([model.lm_head(s)[:, :vocab_size].amax(1) for s in states.split(1024)])
    x = states.cpu().double()
    gram, wanted = x.T @ x, x.new_full((len(x),), -100.0)
    ridge = 1e-6 * gram.diagonal().mean() * torch.eye(len(gram))
    fitted = torch.linalg.solve(gram + ridge, x.T @ wanted)
    fits = ((x @ fitted) < best.cpu() - FAR_BELOW).all()
    embedding, head = stock.tok_emb.weight, stock.lm_head.weight
    embedding.data[-1] = embedding[:-1].mean(dim=0)
    head.data[-1] = fitted.float() if fits else head[:-1].mean(dim=0)


def named_tensors(stock: GPT, family: Family) -> dict[str, Tensor]:
    """The weights under llama.cpp's names, in its layout."""
    config, weights = stock.config, stock.state_dict()
    if config.tie_embeddings:
        del weights["lm_head.weight"]
    if ARCHITECTURES[family.name] == INTERLEAVED:
        for name in filter(TURNED.search, weights):
            weights[name] = _neighbours(weights[name], config.head_dim)
    rename = namer(family, config.n_layer)
    theirs = plain_layout(family).to_theirs(config, weights)
    tensors = {rename(name): value for name, value in theirs.items()}
    if config.rope_scaling and config.rope_scaling.type == "llama3":
        plain, _ = rope_frequencies(replace(config, rope_scaling=None))
        tensors["rope_freqs.weight"] = torch.from_numpy(plain / rope_frequencies(config)[0])
    return tensors


def plain_layout(family: Family) -> Family:
    """``family`` with its names, but matrices as llama.cpp has all of them: (out, in), q, k, v."""
    return replace(family, transposed=False, qkv_by_head=False)


def namer(family: Family, n_layer: int) -> Callable[[str], str]:
    """What gives llama.cpp's name of a weight for the one it has in transformers."""
    gguf = library("gguf", "GGUF")
    arch = gguf.MODEL_ARCH[ARCHITECTURES[family.name].upper()]
    names = gguf.get_tensor_name_map(arch, n_layer)
    return lambda name: names.get_name(name, (".weight", ".bias"))


def _neighbours(rows: Tensor, head_dim: int) -> Tensor:
    """Rows of q or k, so that what RoPE turns together in each head lies side by side."""
    heads = rows.unflatten(0, (-1, 2, head_dim // 2))  # (H, 2, E/2, ...)
    return heads.transpose(1, 2).flatten(0, 2)


def storage(name: str, shape: tuple[int, ...], kind: Kind) -> Kind:
    """The type a tensor is stored in: vectors and positions stay exact, odd widths become F16."""
    if len(shape) == 1 or name in POSITIONS:
        return "F32"
    if kind in ("Q8_0", "Q4_0") and shape[-1] % BLOCK:
        return "F16"
    if kind == "Q4_0" and name in EMBEDDINGS:
        return "Q8_0"  # where four bits would cost most
    return kind


def pack(name: str, values: np.ndarray, kind: Kind) -> tuple[Kind, np.ndarray]:
    """A tensor's type in the file, and its bytes there."""
    gguf = library("gguf", "GGUF")
    kind = storage(name, values.shape, kind)
    packed = gguf.quants.quantize(
        np.ascontiguousarray(values, np.float32), gguf.GGMLQuantizationType[kind]
    )
    return kind, packed


def write(
    path: Path,
    config: ModelConfig,
    family: Family,
    vocabulary: Vocabulary,
    tensors: dict[str, tuple[Kind, np.ndarray]],
    kind: Kind,
) -> None:
    """Write the file."""
    gguf = library("gguf", "GGUF")
    writer = gguf.GGUFWriter(path, ARCHITECTURES[family.name])
    writer.add_type("model")
    writer.add_name(path.stem)
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _describe(writer, config, family)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    writer.add_bos_token_id(vocabulary.end)
    writer.add_eos_token_id(vocabulary.end)
    writer.add_add_bos_token(False)
    if vocabulary.end_is_new:  # llama.cpp's own programs then never write it
        writer.add_array("tokenizer.ggml.suppress_tokens", [vocabulary.end])
    for name, (stored, data) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[stored])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe(writer: Any, config: ModelConfig, family: Family) -> None:
    """The model's settings under llama.cpp's names."""
    arch = ARCHITECTURES[family.name]
    for ours, theirs in SETTINGS.items():
        writer.add_uint32(f"{arch}.{theirs}", getattr(config, ours))
    writer.add_value_length(config.head_dim)
    writer.add_float32(f"{arch}.attention.{NORMS[config.norm]}_epsilon", config.norm_eps)
    if "use_parallel_residual" in family.required:
        writer.add_parallel_residual(False)
    if config.uses_rope:
        writer.add_rope_dimension_count(config.head_dim)
        _describe_rope(writer, config)


def _describe_rope(writer: Any, config: ModelConfig) -> None:
    scaling, theta = config.rope_scaling, config.rope_theta
    if scaling and scaling.type == "ntk":  # which is nothing but another theta
        theta = ntk_theta(theta, scaling.factor, config.head_dim)
    writer.add_rope_freq_base(theta)
    if scaling and scaling.type in ("linear", "yarn"):
        writer.add_rope_scaling_type(library("gguf", "GGUF").RopeScalingType(scaling.type))
        writer.add_rope_scaling_factor(scaling.factor)
    if scaling and scaling.type == "yarn":
        writer.add_rope_scaling_orig_ctx_len(scaling.original_block_size or config.block_size)
        given, usual = rope_frequencies(config)[1], 0.1 * math.log(scaling.factor) + 1.0
        writer.add_rope_scaling_attn_factors(given / usual)


def _remarks(config: ModelConfig, vocabulary: Vocabulary, odd: int) -> list[str]:
    """What is different in the file, and why; ``odd`` tensors could not be of its kind."""
    remarks = list(vocabulary.remarks)
    if config.mlp == "gelu":
        remarks.append("llama.cpp computes GELU in its tanh form; mlp=gelu_tanh would be exact")
    if padding := config.vocab_size - len(vocabulary.tokens) + vocabulary.end_is_new:
        remarks.append(f"{padding} padded ids are left out")
    if vocabulary.end_is_new:
        remarks.append("an end-of-text token was added, because llama.cpp wants one")
    if odd:
        remarks.append(f"{odd} tensors are F16: their widths are no multiple of {BLOCK}")
    return remarks
