"""How each stock class of Hugging Face transformers spells our switches and our weights.

A `Family` is a table; both directions are read off it, so that what goes out comes back. Options
that change the mathematics and that we have no word for are refused by name, never ignored.
transformers itself is not needed here: configurations are attributes, weights are tensors by name.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from octavo.errors import ConfigError
from octavo.model.rope import ntk_theta
from octavo.model_config import ModelConfig, RopeScaling
from octavo.settings import nearest

# Our nonlinearities under transformers' names; in gated MLPs the one on the gate.
PLAIN = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
}
GATED = {"swiglu": "silu", "geglu": "gelu"}
SYNONYMS = {
    "gelu_python": "gelu",
    "gelu_new": "gelu_pytorch_tanh",
    "gelu_fast": "gelu_pytorch_tanh",
    "gelu_accurate": "gelu_pytorch_tanh",
    "gelu_python_tanh": "gelu_pytorch_tanh",
    "swish": "silu",
}

# Settings every family has, ours to theirs; GPT-2's own names (n_embd) answer to these too.
COMMON = {
    "vocab_size": "vocab_size",
    "block_size": "max_position_embeddings",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "d_model": "hidden_size",
    "tie_embeddings": "tie_word_embeddings",
}
# RoPE scaling: the type is called the same, its numbers are not.
ROPE = {"factor": "factor", "original_block_size": "original_max_position_embeddings"}
ROPE_TYPES = {
    "linear": ROPE,
    "yarn": {n: n for n in ("beta_fast", "beta_slow", "attention_factor")} | ROPE,
    "llama3": {n: n for n in ("low_freq_factor", "high_freq_factor")} | ROPE,
}

QKV = ("attn.q_proj", "attn.k_proj", "attn.v_proj")


@dataclass(frozen=True, kw_only=True)
class Family:
    """One class of transformers: the models it holds, its options' names, its weights' names."""

    name: str
    """The class."""
    switches: dict[str, Any]
    """Our settings that the class implies."""
    fields: dict[str, str]
    """Our settings under its names, beyond `COMMON`."""
    activation: str
    """Its option for the nonlinearity."""
    activations: dict[str, str]
    """The nonlinearities it can have, ours to theirs."""
    dropouts: tuple[str, ...]
    """Its dropout options; the first speaks for all."""
    kv_heads: Literal["all", "one", "any"] = "all"
    """Key/value heads: as many as query heads, a single one, or any number."""
    biases: Literal["always", "never"] | tuple[str, ...] = "always"
    """Whether linear layers have biases, or the options that say so."""
    required: dict[str, Any] = field(default_factory=dict)
    """Options that must have these values for the mathematics to be ours."""
    outer: dict[str, str]
    """Our modules outside the blocks under its names."""
    layers: str
    """Its list of blocks."""
    inner: dict[str, str]
    """Our modules in a block under its names; ``attn.qkv`` is the fused projection of all three."""
    transposed: bool = False
    """Whether the blocks' matrices are stored (in, out)."""
    qkv_by_head: bool = False
    """Whether a fused projection holds q, k, v of each head in turn, not all q, all k, all v."""

    def misfits(self, config: ModelConfig) -> list[str]:
        """What this class would want different in ``config``; empty if it holds it."""
        kv_heads = {"all": config.n_head, "one": 1, "any": config.n_kv_head}[self.kv_heads]
        wanted = {"norm_position": "pre", "n_kv_head": kv_heads, **self.switches}
        if self.biases == "never":
            wanted["bias"] = False
        if "head_dim" not in self.fields:
            wanted["head_dim"] = config.d_model / config.n_head
        misfits = [
            f"{name}={value}" for name, value in wanted.items() if vars(config)[name] != value
        ]
        if config.mlp not in self.activations:
            misfits.append(f"mlp={' or '.join(self.activations)}")
        if config.d_model % config.n_head:
            misfits.append("a d_model divisible by n_head")
        return misfits

    def options(self, config: ModelConfig) -> dict[str, Any]:
        """Arguments of the class's configuration that make it ``config``."""
        ours = vars(config)
        flags = self.biases if isinstance(self.biases, tuple) else ()
        options = {theirs: ours[name] for name, theirs in (COMMON | self.fields).items()}
        options |= dict.fromkeys(self.dropouts, config.dropout) | dict.fromkeys(flags, config.bias)
        options |= {self.activation: self.activations[config.mlp], **self.required}
        if config.uses_rope:
            options["rope_parameters"] = rope_parameters(config)
        # The tokenizer's business; the classes' defaults lie outside a small vocabulary.
        return options | dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))

    def config(self, theirs: Any) -> ModelConfig:
        """Our configuration of a model with the configuration ``theirs``."""
        for option, wanted in self.required.items():
            if (given := getattr(theirs, option)) != wanted:
                raise self.refusal(option, given)
        ours = {name: getattr(theirs, own) for name, own in (COMMON | self.fields).items()}
        given = getattr(theirs, self.activation)
        names = {activation: name for name, activation in self.activations.items()}
        if SYNONYMS.get(given, given) not in names:
            raise self.refusal(self.activation, given)
        ours["mlp"] = names[SYNONYMS.get(given, given)]
        ours["dropout"] = getattr(theirs, self.dropouts[0]) or 0.0
        ours["bias"] = self.biases == "always"
        if isinstance(self.biases, tuple):
            ours["bias"] = any(getattr(theirs, option) for option in self.biases)
        if self.kv_heads == "one":
            ours["n_kv_head"] = 1
        if self.switches["position"] == "rope":
            ours |= self._rope_settings(dict(theirs.rope_parameters))
        has_norm_bias = self.switches["norm"] == "layernorm"
        return ModelConfig(**ours, **self.switches, norm_bias=has_norm_bias)

    def refusal(self, option: str, value: Any) -> ConfigError:
        """The error for an option of theirs that our model has no word for."""
        return ConfigError(f"{self.name} with {option}={value!r} is not a model octavo has")

    def to_theirs(self, config: ModelConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our weights under their names, in their layout."""
        result = {}
        for ours, theirs, groups in self._weights(config):
            if ours[0] in weights:
                parts = [weights[name].unflatten(0, (groups, -1)) for name in ours]
                result[theirs] = self._turned(ours, torch.cat(parts, dim=1).flatten(0, 1))
        return result

    def to_ours(self, config: ModelConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Their weights under our names, in our layout; what has no place here is left out."""
        result = {}
        rows = [n * config.head_dim for n in (config.n_head, config.n_kv_head, config.n_kv_head)]
        for ours, theirs, groups in self._weights(config):
            if theirs in weights:
                whole = self._turned(ours, weights[theirs])
                sizes = [n // groups for n in rows] if len(ours) > 1 else [whole.size(0)]
                parts = whole.unflatten(0, (groups, -1)).split(sizes, dim=1)
                result |= {name: part.flatten(0, 1) for name, part in zip(ours, parts, strict=True)}
        return result

    def modules(self, n_layer: int) -> Iterator[tuple[tuple[str, ...], str]]:
        """Our module names, several where theirs is fused, with their module's name."""
        for ours, theirs in self.outer.items():
            yield (ours,), theirs
        for layer in range(n_layer):
            for ours, theirs in self.inner.items():
                names = QKV if ours == "attn.qkv" else (ours,)
                yield (
                    tuple(f"blocks.{layer}.{name}" for name in names),
                    f"{self.layers}.{layer}.{theirs}",
                )

    def _weights(self, config: ModelConfig) -> Iterator[tuple[list[str], str, int]]:
        """Weights as `modules`, and of how many groups, each of q, k and v, a fused one is."""
        for ours, theirs in self.modules(config.n_layer):
            groups = config.n_head if len(ours) > 1 and self.qkv_by_head else 1
            for kind in ("weight", "bias"):
                yield [f"{name}.{kind}" for name in ours], f"{theirs}.{kind}", groups

    def _turned(self, ours: list[str], weight: Tensor) -> Tensor:
        inside = ours[0].startswith("blocks.")
        return weight.T if self.transposed and inside and weight.dim() == 2 else weight

    def _rope_settings(self, given: dict[str, Any]) -> dict[str, Any]:
        """Our rope_theta and rope_scaling of their rope_parameters."""
        given.pop("type", None)  # the older spelling of rope_type
        kind, theta = given.pop("rope_type"), given.pop("rope_theta")
        if (part := given.pop("partial_rotary_factor", 1.0)) != 1.0:
            raise self.refusal("partial_rotary_factor", part)
        if kind == "default":
            return {"rope_theta": theta}
        if kind not in ROPE_TYPES:
            raise self.refusal("rope_type", kind)
        known = {ours: given.pop(theirs, None) for ours, theirs in ROPE_TYPES[kind].items()}
        scaling = {name: value for name, value in known.items() if value is not None}
        for option, value in given.items():
            if value is not None and (option, value) != ("truncate", True):
                raise self.refusal(f"rope_parameters.{option}", value)
        return {"rope_theta": theta, "rope_scaling": RopeScaling(type=kind, **scaling)}


def rope_parameters(config: ModelConfig) -> dict[str, Any]:
    """Our RoPE in transformers' words."""
    plain = {
        "rope_type": "default",
        "rope_theta": config.rope_theta,
        "partial_rotary_factor": 1.0,
    }
    if (scaling := config.rope_scaling) is None:
        return plain
    if scaling.type == "ntk":  # no name there, but it is nothing but another theta
        theta = ntk_theta(config.rope_theta, scaling.factor, config.head_dim)
        return {**plain, "rope_theta": theta}
    full = replace(scaling, original_block_size=scaling.original_block_size or config.block_size)
    numbers = {theirs: vars(full)[ours] for ours, theirs in ROPE_TYPES[scaling.type].items()}
    numbers = {theirs: value for theirs, value in numbers.items() if value}  # 0 is left to them
    if scaling.type == "linear":
        del numbers["original_max_position_embeddings"]
    return {**plain, "rope_type": scaling.type, **numbers}


GPT2 = Family(
    name="GPT2LMHeadModel",
    switches={"position": "learned", "norm": "layernorm", "qk_norm": False},
    fields={"d_ff": "n_inner", "norm_eps": "layer_norm_epsilon"},
    activation="activation_function",
    activations=PLAIN,
    dropouts=("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    required={
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    outer={
        "tok_emb": "transformer.wte",
        "pos_emb": "transformer.wpe",
        "norm_f": "transformer.ln_f",
        "lm_head": "lm_head",
    },
    layers="transformer.h",
    inner={
        "attn_norm": "ln_1",
        "attn.qkv": "attn.c_attn",
        "attn.o_proj": "attn.c_proj",
        "mlp_norm": "ln_2",
        "mlp.up_proj": "mlp.c_fc",
        "mlp.down_proj": "mlp.c_proj",
    },
    transposed=True,
)
BIGCODE = replace(
    GPT2,
    name="GPTBigCodeForCausalLM",
    kv_heads="one",
    required={"multi_query": True, "scale_attn_weights": True, "add_cross_attention": False},
    transposed=False,
)
NEOX = Family(
    name="GPTNeoXForCausalLM",
    switches={"position": "rope", "norm": "layernorm", "qk_norm": False},
    fields={"d_ff": "intermediate_size", "norm_eps": "layer_norm_eps"},
    activation="hidden_act",
    activations=PLAIN,
    dropouts=("hidden_dropout", "attention_dropout"),
    required={"use_parallel_residual": False},
    outer={
        "tok_emb": "gpt_neox.embed_in",
        "norm_f": "gpt_neox.final_layer_norm",
        "lm_head": "lm_head",
    },
    layers="gpt_neox.layers",
    inner={
        "attn_norm": "input_layernorm",
        "attn.qkv": "attention.query_key_value",
        "attn.o_proj": "attention.dense",
        "mlp_norm": "post_attention_layernorm",
        "mlp.up_proj": "mlp.dense_h_to_4h",
        "mlp.down_proj": "mlp.dense_4h_to_h",
    },
    qkv_by_head=True,
)
LLAMA = Family(
    name="LlamaForCausalLM",
    switches={"position": "rope", "norm": "rmsnorm", "qk_norm": False},
    fields={
        "d_ff": "intermediate_size",
        "n_kv_head": "num_key_value_heads",
        "norm_eps": "rms_norm_eps",
        "head_dim": "head_dim",
    },
    activation="hidden_act",
    activations=GATED,
    dropouts=("attention_dropout",),
    kv_heads="any",
    biases=("attention_bias", "mlp_bias"),
    outer={"tok_emb": "model.embed_tokens", "norm_f": "model.norm", "lm_head": "lm_head"},
    layers="model.layers",
    inner={
        "attn_norm": "input_layernorm",
        "attn.q_proj": "self_attn.q_proj",
        "attn.k_proj": "self_attn.k_proj",
        "attn.v_proj": "self_attn.v_proj",
        "attn.o_proj": "self_attn.o_proj",
        "mlp_norm": "post_attention_layernorm",
        "mlp.gate_proj": "mlp.gate_proj",
        "mlp.up_proj": "mlp.up_proj",
        "mlp.down_proj": "mlp.down_proj",
    },
)
QWEN3 = replace(
    LLAMA,
    name="Qwen3ForCausalLM",
    switches={"position": "rope", "norm": "rmsnorm", "qk_norm": True},
    biases="never",
    required={"use_sliding_window": False, "attention_bias": False},
    inner=LLAMA.inner | {"attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm"},
)
STABLELM = replace(
    LLAMA,
    name="StableLmForCausalLM",
    switches=NEOX.switches,
    fields=NEOX.fields | {"n_kv_head": "num_key_value_heads"},
    dropouts=("hidden_dropout", "attention_dropout"),
    biases="never",
    required={"use_parallel_residual": False, "qk_layernorm": False, "use_qkv_bias": False},
)
STARCODER2 = replace(
    STABLELM,
    name="Starcoder2ForCausalLM",
    fields=STABLELM.fields | {"norm_eps": "norm_epsilon"},
    activations=PLAIN,
    dropouts=("residual_dropout", "embedding_dropout", "attention_dropout"),
    biases=("use_bias",),
    required={"sliding_window": None},
    inner={name: own for name, own in LLAMA.inner.items() if not name.startswith("mlp.")}
    | {"mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj"},
)
# In the order in which an export tries them.
FAMILIES = (GPT2, BIGCODE, STARCODER2, NEOX, STABLELM, LLAMA, QWEN3)


def find_family(name: str) -> Family:
    """The family of a class of transformers; `ConfigError` names the nearest we know."""
    known = {family.name: family for family in FAMILIES}
    if name not in known:
        guess = nearest(name, known)
        raise ConfigError(
            f"octavo has no map for the architecture {name}",
            fix=f"the nearest it knows is {guess}" if guess else f"known: {', '.join(known)}",
        )
    return known[name]


def choose_family(config: ModelConfig, name: str | None = None) -> Family:
    """The first class that holds ``config``, or the one named; `ConfigError` says why none does."""
    families = FAMILIES if name is None else (find_family(name),)
    misfits = {family.name: family.misfits(config) for family in families}
    fewest = min(map(len, misfits.values()))
    if fewest:
        nearby = (item for item in misfits.items() if len(item[1]) == fewest)
        who = f"{name} does not hold" if name else "no stock class of transformers holds"
        raise ConfigError(
            f"{who} this model",
            fix="; ".join(f"{near} would need {', '.join(wishes)}" for near, wishes in nearby),
        )
    return next(family for family in families if not misfits[family.name])
