"""transformers' stock classes in small, no parameter at its default, and ours beside them."""

import pytest
import torch
from model_kit import perturb

transformers = pytest.importorskip("transformers")

SMALL = dict(vocab_size=31, block_size=24, n_layer=2, n_head=4, d_model=32, d_ff=56)
GPT2 = dict(position="learned", norm="layernorm", mlp="gelu_tanh")
NEOX = dict(norm="layernorm", mlp="gelu")
THEIRS = {
    "GPT2LMHeadModel": dict(n_inner=None, activation_function="gelu_new"),
    "GPTBigCodeForCausalLM": dict(multi_query=True),
    "GPTNeoXForCausalLM": dict(use_parallel_residual=False, rotary_pct=1.0),
    "Starcoder2ForCausalLM": dict(num_key_value_heads=2, use_bias=True),
    "StableLmForCausalLM": dict(num_key_value_heads=2, partial_rotary_factor=1.0),
    "LlamaForCausalLM": dict(num_key_value_heads=2, attention_bias=True, head_dim=6),
    "Qwen3ForCausalLM": dict(num_key_value_heads=2, head_dim=12),
}


def stock(name, **options):
    """A model of the class, as transformers itself makes it."""
    shape = dict(vocab_size=31, max_position_embeddings=24, num_hidden_layers=2, hidden_size=32)
    shape |= dict(num_attention_heads=4, bos_token_id=None, eos_token_id=None)
    cls = getattr(transformers, name)
    if "n_inner" not in cls.config_class().to_dict():
        shape["intermediate_size"] = 56
    return perturb(cls(cls.config_class(**(shape | THEIRS[name] | options))))


def ids():
    return torch.randint(0, 31, (2, 24), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def assert_same_logits(ours, theirs, tolerance=1e-5):
    """Equal to ``tolerance`` of the largest; gives theirs."""
    wanted, given = theirs(ids()).logits, ours(ids())
    assert (given - wanted).abs().max() <= tolerance * wanted.abs().max()
    assert wanted.std() > 0.1  # the comparison is of something
    return wanted
