"""Models out to GGUF, the file of llama.cpp, Ollama and LM Studio: one file, weights and tokenizer.

The model is first put into the shape that an architecture of llama.cpp has, then rounded to the
file's types, written, read back by others' code and compared (`gguf_check`); only then does the
file appear. Needs the extra ``hf``, imported on use.
"""

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from octavo import disk
from octavo.errors import ConfigError, MissingExtraError
from octavo.exchanging.families import QKV, Family, choose_family
from octavo.exchanging.gguf_vocabulary import Vocabulary, make_vocabulary
from octavo.exchanging.parity import random_rows
from octavo.model.gpt import GPT
from octavo.model.layers import ntk_theta, rope_frequencies
from octavo.model_config import ModelConfig
from octavo.text.tokenizer import Tokenizer

Kind = Literal["F32", "F16", "Q8_0", "Q4_0"]
FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "Q4_0": 2}
BLOCK = 32  # weights that share a scale in Q8_0 and Q4_0
STATES_A_WIDTH = 64  # hidden states for each of their dimensions, to fit an output row to
FAR_BELOW = 10.0  # the likeliest logit: a probability below e^-10
YARN_BETAS = (32.0, 1.0)  # llama.cpp has no others for these architectures


class Exportable(Protocol):
    """A `LanguageModel`, or anything of its shape."""

    @property
    def config(self) -> ModelConfig:
        """The model's."""
        ...

    @property
    def model(self) -> GPT:
        """The module."""
        ...

    @property
    def tokenizer(self) -> Tokenizer:
        """What its ids mean."""
        ...


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's, where it differs from the class of transformers it belongs to."""

    name: str
    fused: bool = False
    """q, k and v are one matrix, one after the other."""
    interleaved: bool = False
    """RoPE turns neighbours (x_2i, x_2i+1), not halves (x_i, x_i+E/2)."""
    biases: bool = False
    """Linear layers must have biases."""
    own_head: bool = False
    """The head must be there, be it the embedding over again."""
    in_transformers: bool = True
    """transformers reads the architecture's files, too."""


ARCHITECTURES = {
    "GPT2LMHeadModel": Architecture("gpt2", fused=True, biases=True),
    "GPTBigCodeForCausalLM": Architecture(
        "starcoder", fused=True, biases=True, in_transformers=False
    ),
    "GPTNeoXForCausalLM": Architecture(
        "gptneox", fused=True, biases=True, own_head=True, in_transformers=False
    ),
    "Starcoder2ForCausalLM": Architecture("starcoder2", biases=True),
    "StableLmForCausalLM": Architecture("stablelm", own_head=True),
    "LlamaForCausalLM": Architecture("llama", interleaved=True),
    "Qwen3ForCausalLM": Architecture("qwen3"),
}
MODULES = {
    "tok_emb": "token_embd",
    "pos_emb": "position_embd",
    "norm_f": "output_norm",
    "lm_head": "output",
    "attn_norm": "attn_norm",
    "attn.q_proj": "attn_q",
    "attn.k_proj": "attn_k",
    "attn.v_proj": "attn_v",
    "attn.o_proj": "attn_output",
    "attn.q_norm": "attn_q_norm",
    "attn.k_norm": "attn_k_norm",
    "mlp_norm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def export_gguf(
    lm: Exportable,
    path: Path | str,
    kind: Kind = "F16",
    *,
    rows: np.ndarray | None = None,
    text: str = "random ids",
    architecture: str | None = None,
) -> dict[str, Any]:
    """Write ``lm`` into the file ``path`` and return what is to be said about it.

    It is compared on ``rows`` (N, T + 1) of ids, which ``text`` describes. The class of
    transformers that ``architecture`` names, or the first that holds the model, decides between
    llama.cpp's. Raises `ConfigError` for what llama.cpp has no word for, `ParityError` where what
    was written computes something else, `MissingExtraError` without the library ``gguf``.
    """
    from octavo.exchanging.gguf_check import check

    if not isinstance(lm.model, GPT):
        raise ConfigError("a classifier writes no text", fix="export its base")
    family = choose_family(lm.config, architecture)
    arch = ARCHITECTURES[family.name]
    refuse_unknown(lm.config, arch)
    vocabulary = make_vocabulary(lm.tokenizer)
    if rows is None:
        rows = random_rows(lm.tokenizer.vocab_size, lm.config.block_size, lm.tokenizer)
    stock = stock_model(lm.model, arch, vocabulary)
    path = Path(os.path.realpath(path))
    with disk.errors(f"write {path}"), disk.scratch(path.parent, "gguf") as temp:
        tensors = {n: pack(n, t.numpy(), kind) for n, t in named_tensors(stock, arch)}
        write(temp / path.name, stock.config, family, vocabulary, tensors, kind)
        disk.sync(temp / path.name)
        parity = check(temp / path.name, lm, stock, family, vocabulary, rows, kind)
        os.replace(temp / path.name, path)
        disk.sync(path.parent)
    types = [name for name, _ in tensors.values()]
    return {
        "file_bytes": path.stat().st_size,
        "architecture": arch.name,
        "tensors": {name: types.count(name) for name in sorted(set(types))},
        "compared_on": text,
        **parity,
        "remarks": _remarks(lm.config, stock.config, vocabulary, tensors, kind),
    }


def refuse_unknown(config: ModelConfig, arch: Architecture) -> None:
    """Raise `ConfigError` for mathematics that llama.cpp's architecture does not have."""
    scaling = config.rope_scaling
    kind = scaling.type if scaling else "none"
    unknown = ""
    if config.mlp not in ("swiglu", "gelu_tanh", "gelu"):
        unknown = f"mlp={config.mlp}"
    elif kind == "llama3" and arch.name != "llama":
        unknown = "rope_scaling.type=llama3"
    elif scaling and kind == "yarn" and (scaling.beta_fast, scaling.beta_slow) != YARN_BETAS:
        unknown = f"rope_scaling.beta_fast={scaling.beta_fast}, beta_slow={scaling.beta_slow}"
    if unknown:
        raise ConfigError(
            f"llama.cpp's architecture {arch.name} does not have {unknown}", fix="export --to hf"
        )


def stock_model(model: GPT, arch: Architecture, vocabulary: Vocabulary) -> GPT:
    """``model`` in the architecture's shape, in fp32 on the CPU, in evaluation mode.

    Biases it must have and ours lacks are zeros. Padded ids, which llama.cpp would write, are left
    out. GELU is of the tanh form, which is the one that llama.cpp computes. Raises `ConfigError`
    where modules are not a plain model's.
    """
    config = model.config
    stock = GPT(
        replace(
            config,
            vocab_size=len(vocabulary.tokens),
            bias=config.bias or arch.biases,
            norm_bias=config.norm == "layernorm",
            tie_embeddings=config.tie_embeddings and not (arch.own_head or vocabulary.end_is_new),
            mlp="gelu_tanh" if config.mlp == "gelu" else config.mlp,
        )
    )
    given, ours = model.state_dict(), stock.state_dict()
    if foreign := given.keys() - ours.keys():
        raise ConfigError(
            f"{min(foreign)} is not a weight of a plain model", fix="merge its adapters first"
        )
    for name, value in ours.items():
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
    x = states.double().cpu()
    gram, wanted = x.T @ x, x.new_full((len(x),), -100.0)
    ridge = 1e-6 * gram.diagonal().mean() * torch.eye(len(gram))
    fitted = torch.linalg.solve(gram + ridge, x.T @ wanted)
    fits = ((x @ fitted) < best.cpu() - FAR_BELOW).all()
    embedding, head = stock.tok_emb.weight, stock.lm_head.weight
    embedding.data[-1] = embedding[:-1].mean(dim=0)
    head.data[-1] = fitted.float() if fits else head[:-1].mean(dim=0)


def named_tensors(stock: GPT, arch: Architecture) -> Iterator[tuple[str, Tensor]]:
    """The weights under llama.cpp's names, in its layout."""
    config, weights = stock.config, stock.state_dict()
    if config.tie_embeddings:
        del weights["lm_head.weight"]
    for name, value in weights.items():
        if arch.interleaved and re.search(r"attn\.[qk]_proj", name):
            value = _neighbours(value, config.head_dim)
        if not arch.fused or not re.search(r"attn\.[qkv]_proj", name):
            yield gguf_name(name), value
        elif "q_proj" in name:
            names = [name.replace("attn.q_proj", module) for module in QKV]
            fused = torch.cat([weights[part] for part in names])
            yield gguf_name(name).replace("attn_q", "attn_qkv"), fused
    if config.rope_scaling and config.rope_scaling.type == "llama3":
        plain, _ = rope_frequencies(replace(config, rope_scaling=None))
        yield "rope_freqs.weight", plain / rope_frequencies(config)[0]


def gguf_name(name: str) -> str:
    """Our name of a weight as llama.cpp's: ``blocks.0.attn.q_proj.bias``, ``blk.0.attn_q.bias``."""
    parts = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+)\.(weight|bias)", name)
    assert parts is not None, name
    layer, module, kind = parts.groups()
    return f"blk.{layer}." * (layer is not None) + f"{MODULES[module]}.{kind}"


def _neighbours(rows: Tensor, head_dim: int) -> Tensor:
    """Rows of q or k, so that what RoPE turns together in each head lies side by side."""
    heads = rows.unflatten(0, (-1, 2, head_dim // 2))  # (H, 2, E/2, ...)
    return heads.transpose(1, 2).flatten(0, 2)


def storage(name: str, shape: tuple[int, ...], kind: Kind) -> Kind:
    """The type a tensor is stored in: vectors and positions stay exact, odd widths become F16."""
    if len(shape) == 1 or name == "position_embd.weight":
        return "F32"
    if kind in ("Q8_0", "Q4_0") and shape[-1] % BLOCK:
        return "F16"
    if kind == "Q4_0" and name in ("token_embd.weight", "output.weight"):
        return "Q8_0"  # where four bits would cost most
    return kind


def pack(name: str, values: np.ndarray, kind: Kind) -> tuple[Kind, np.ndarray]:
    """A tensor's type in the file, and its bytes there."""
    gguf = import_gguf()
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
    gguf = import_gguf()
    writer = gguf.GGUFWriter(path, ARCHITECTURES[family.name].name)
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
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.block_size)
    writer.add_block_count(config.n_layer)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.n_kv_head)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    if config.norm == "rmsnorm":
        writer.add_layer_norm_rms_eps(config.norm_eps)
    else:
        writer.add_layer_norm_eps(config.norm_eps)
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
        writer.add_rope_scaling_type(import_gguf().RopeScalingType(scaling.type))
        writer.add_rope_scaling_factor(scaling.factor)
    if scaling and scaling.type == "yarn":
        writer.add_rope_scaling_orig_ctx_len(scaling.original_block_size or config.block_size)
        given, usual = rope_frequencies(config)[1], 0.1 * math.log(scaling.factor) + 1.0
        writer.add_rope_scaling_attn_factors(given / usual)


def _remarks(
    config: ModelConfig,
    stock: ModelConfig,
    vocabulary: Vocabulary,
    tensors: dict[str, tuple[Kind, np.ndarray]],
    kind: Kind,
) -> list[str]:
    """What is different in the file, and why."""
    remarks = list(vocabulary.remarks)
    if config.mlp == "gelu":
        remarks.append("llama.cpp computes GELU in its tanh form; mlp=gelu_tanh would be exact")
    if (padding := config.vocab_size - stock.vocab_size + vocabulary.end_is_new) > 0:
        remarks.append(f"{padding} padded ids are left out")
    if vocabulary.end_is_new:
        remarks.append("an end-of-text token was added, because llama.cpp wants one")
    if kind in ("Q8_0", "Q4_0"):
        odd = [n for n, (t, data) in tensors.items() if t == "F16"]
        if odd:
            remarks.append(f"{len(odd)} tensors are F16: their widths are no multiple of {BLOCK}")
    return remarks


def import_gguf() -> Any:
    """The library; `MissingExtraError` where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise MissingExtraError("hf", "GGUF") from None
    return gguf
