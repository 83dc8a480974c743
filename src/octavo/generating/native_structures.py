"""The structures and functions of native.cpp as ctypes sees them: both sides change together."""

import ctypes
from ctypes import c_char_p, c_double, c_float, c_int32, c_int64, c_uint64, c_void_p

# The enumerations, each name at its number.
STORAGE = ("fp32", "fp16", "int8", "int4")
NORM_KINDS = ("layernorm", "rmsnorm")
NORM_POSITIONS = ("pre", "post", "sandwich")
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "relu2", "silu")
DONE, UNFINISHED, CANCELLED, BAD_ID, NOT_FINITE, NO_MEMORY = range(6)

GATES = {"swiglu": "silu", "geglu": "gelu"}  # the activation of a gated MLP
SIZES = (
    "n_layer", "n_head", "n_kv_head", "head_dim", "d_model", "d_ff", "vocab_size", "block_size",
)  # fmt: skip
NORMS = ("attn_norm", "mlp_norm", "attn_out_norm", "mlp_out_norm", "q_norm", "k_norm")
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj")
SAMPLING = (
    "temperature", "top_p", "min_p", "typical_p",
    "repetition_penalty", "presence_penalty", "frequency_penalty", "top_k", "seed",
)  # fmt: skip


class Matrix(ctypes.Structure):
    """Weights (rows, cols) in one `STORAGE`."""

    _fields_ = [
        *((name, c_int32) for name in ("storage", "group")),
        *((name, c_int64) for name in ("rows", "cols")),
        *((name, c_void_p) for name in ("data", "scales")),
    ]


class Linear(ctypes.Structure):
    """A linear layer; bias may be null."""

    _fields_ = [("weight", Matrix), ("bias", c_void_p)]


class NormWeights(ctypes.Structure):
    """A norm's weight and bias, null where there is none."""

    _fields_ = [("weight", c_void_p), ("bias", c_void_p)]


class Block(ctypes.Structure):
    """One layer of the model."""

    _fields_ = [
        *((name, NormWeights) for name in NORMS),
        *((name, Linear) for name in LINEARS),
    ]


class Model(ctypes.Structure):
    """A whole model."""

    _fields_ = [
        *((name, c_int32) for name in SIZES),
        *((name, c_int32) for name in ("norm", "norm_position", "activation", "gated")),
        ("norm_eps", c_float),
        *((name, c_void_p) for name in ("cos", "sin")),
        *((name, Matrix) for name in ("tok_emb", "pos_emb", "lm_head")),
        ("norm_f", NormWeights),
        ("blocks", c_void_p),
    ]


class Settings(ctypes.Structure):
    """How an engine is opened."""

    _fields_ = [
        *((name, c_int32) for name in ("slots", "vocab", "threads", "cache_storage", "chunk")),
        ("cache_budget", c_int64),
        ("cancel", c_void_p),
    ]


class Sampling(ctypes.Structure):
    """`octavo.generating.sampling.Sampling`."""

    _fields_ = [
        *((name, c_double) for name in SAMPLING[:-2]),
        ("top_k", c_int64),
        ("seed", c_uint64),
    ]


class Request(ctypes.Structure):
    """One slot in a step."""

    _fields_ = [
        *((name, c_int32) for name in ("index", "count", "draft_count", "prompt_length", "n")),
        *((name, c_int32) for name in ("logprobs", "left", "eot")),
        *((name, c_void_p) for name in ("ids", "draft")),
        ("sampling", Sampling),
        ("made", c_int32),
        *((name, c_void_p) for name in ("out", "top_counts", "top_ids", "top_logprobs", "logits")),
    ]


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Tell ctypes what the library's functions take and give."""
    functions = {
        "octavo_open": (c_void_p, c_void_p, c_void_p, c_char_p, c_void_p),
        "octavo_close": (None, c_void_p),
        "octavo_step": (c_int32, c_void_p, c_void_p, c_int32, c_int32, c_double),
        "octavo_logits": (c_int32, c_void_p, c_void_p, c_int32, c_void_p),
        "octavo_release": (None, c_void_p, c_int32),
        "octavo_share": (c_int32, c_void_p, c_int32, c_int32, c_int32),
        "octavo_detail": (c_int64, c_void_p),
        "octavo_pick": (
            c_int32, c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_int64, c_int64,
        ),
    }  # fmt: skip
    for name, (result, *arguments) in functions.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
