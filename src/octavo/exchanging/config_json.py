"""A Hugging Face ``config.json`` read without transformers.

A file may leave out what its class assumes, and older files spell options otherwise. What comes out
answers, under the names a `Family` asks for, as the class's own configuration would. Code that a
file points to is never fetched and never run.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from octavo.errors import CheckpointError, ConfigError
from octavo.exchanging.families import Family, find_family
from octavo.manifest import read_json
from octavo.model_config import ModelConfig

# What each class assumes where its file is silent, where that is not what `Family.required` wants.
# Sizes have no default here: a file without them would be a guess.
GPT2 = {
    "n_inner": None,
    "activation_function": "gelu_new",
    "resid_pdrop": 0.1,
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
}
LLAMA = {
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "GPT2LMHeadModel": GPT2,
    "GPTBigCodeForCausalLM": {**GPT2, "activation_function": "gelu_pytorch_tanh"},
    "GPTNeoXForCausalLM": {
        "hidden_act": "gelu",
        "hidden_dropout": 0.0,
        "layer_norm_eps": 1e-5,
        "use_parallel_residual": True,
        "rotary_pct": 0.25,
        "tie_word_embeddings": False,
    },
    "LlamaForCausalLM": LLAMA,
    "Qwen3ForCausalLM": {**LLAMA, "num_key_value_heads": 32, "head_dim": 128},
    "StableLmForCausalLM": {
        "num_key_value_heads": 32,
        "hidden_act": "silu",
        "hidden_dropout": 0.0,
        "layer_norm_eps": 1e-5,
        "partial_rotary_factor": 0.25,
        "tie_word_embeddings": False,
    },
    "Starcoder2ForCausalLM": {
        "num_key_value_heads": 2,
        "hidden_act": "gelu_pytorch_tanh",
        "residual_dropout": 0.0,
        "norm_epsilon": 1e-5,
        "use_bias": True,
        "tie_word_embeddings": True,
    },
}
# GPT-2's and GPT-NeoX's own names for what the others agree on.
SYNONYMS = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
    "rotary_emb_base": "rope_theta",
    "rotary_pct": "partial_rotary_factor",
}


def read_config(directory: Path) -> tuple[Family, SimpleNamespace]:
    """The family that ``config.json`` names, and its options under the class's names.

    Raises `ConfigError` where there is none or its architecture is unknown, which names the
    nearest, and `CheckpointError` where it is damaged.
    """
    if not (directory / "config.json").is_file():
        raise ConfigError(f"{directory} is not a Hugging Face directory", "no config.json")
    given = read_json(directory / "config.json")
    architectures = given.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        raise ConfigError("config.json names no architecture", f"in {directory}")
    if given.get("quantization_config") is not None:
        raise ConfigError(
            "the weights are quantized (quantization_config)",
            f"in {directory}",
            "import the model it was made from",
        )
    family = find_family(str(architectures[0]))
    options = family.required | DEFAULTS[family.name] | given
    options |= {ours: options[own] for own, ours in SYNONYMS.items() if own in options}
    options["rope_parameters"] = _rope_parameters(options)
    return family, SimpleNamespace(**options)


def to_config(family: Family, theirs: SimpleNamespace, directory: Path) -> ModelConfig:
    """Our configuration; `CheckpointError` for a missing option or one of another type."""
    try:
        return family.config(theirs)
    except AttributeError as error:
        missing = f"config.json does not give {error.name}"
        raise CheckpointError(missing, f"in {directory}") from None
    except (LookupError, TypeError) as error:
        raise CheckpointError(
            f"config.json does not describe a {family.name} ({type(error).__name__}: {error})",
            f"in {directory}",
        ) from None


def _rope_parameters(options: dict[str, Any]) -> Any:
    """RoPE's settings as transformers 5 keeps them; before, they lay in three places."""
    given = options.get("rope_scaling") or options.get("rope_parameters") or {}
    if not isinstance(given, dict):
        return given
    outside = {
        "rope_type": given.get("type", "default"),
        "rope_theta": options.get("rope_theta", 10_000.0),
        "partial_rotary_factor": options.get("partial_rotary_factor", 1.0),
    }
    return outside | given
