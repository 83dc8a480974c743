"""Parameters to the unit, against published numbers and against the modules themselves."""

import pytest
import torch

from octavo.model.counts import cache_bytes, count_parameters
from octavo.model.gpt import GPT
from octavo.model_config import ModelConfig

GPT2 = dict(position="learned", norm="layernorm", mlp="gelu_tanh", bias=True)
LAYERNORM = dict(norm="layernorm", mlp="gelu")
S1 = dict(vocab_size=50304, block_size=1024, n_layer=12, n_head=12, d_model=768, **LAYERNORM)
S2_GPT2 = dict(vocab_size=50257, block_size=1024, n_layer=12, n_head=12, d_model=768)
S3 = dict(vocab_size=65, block_size=128, n_layer=4, n_head=4, d_model=128)
STOCK = dict(S3, norm_bias=True)

PUBLISHED = [
    # GPT-2, as OpenAI released it
    (124_439_808, dict(S2_GPT2, **GPT2)),
    (354_823_168, dict(S2_GPT2, **GPT2, n_layer=24, n_head=16) | dict(d_model=1024)),
    (774_030_080, dict(S2_GPT2, **GPT2) | dict(n_layer=36, n_head=20, d_model=1280)),
    (1_557_611_200, dict(S2_GPT2, **GPT2) | dict(n_layer=48, n_head=25, d_model=1600)),
    # S1, without and with biases
    (123_587_328, S1),
    (123_689_472, dict(S1, bias=True)),
    # S2 at GPT-2's size: its hidden width decides whether it is one
    (123_551_232, S2_GPT2),
    (151_862_784, dict(S2_GPT2, d_ff=3072)),
    # S3's example, and with a norm on both sides of each sublayer
    (818_048, dict(S3, **GPT2)),
    (820_096, dict(S3, **GPT2, norm_position="sandwich")),
    # the stock class of each combination
    (801_664, dict(S3, **LAYERNORM, bias=True)),
    (702_592, dict(S3, **LAYERNORM, bias=True, n_kv_head=1)),
    (764_288, dict(STOCK, norm="layernorm", n_kv_head=1)),
    (763_136, dict(S3, n_kv_head=1)),
    (861_696, dict(S3, qk_norm=True)),
    (718_976, dict(S3, **GPT2, n_kv_head=1)),
]

# S2's presets (d_model, n_layer, n_head, block_size), each at 65 and 256 symbols.
PRESETS = {
    (128, 4, 4, 128): {
        "as it is": (861_440, 885_888),
        "d_ff = 4 d": (1_058_048, 1_082_496),
        "multi-query": (763_136, 787_584),
        "gelu": (795_904, 820_352),
    },
    (256, 6, 8, 256): {
        "as it is": (4_836_864, 4_885_760),
        "d_ff = 4 d": (6_311_424, 6_360_320),
        "multi-query": (4_148_736, 4_197_632),
        "gelu": (4_738_560, 4_787_456),
    },
    (512, 12, 8, 512): {
        "as it is": (38_581_248, 38_679_040),
        "d_ff = 4 d": (50_377_728, 50_475_520),
        "multi-query": (33_076_224, 33_174_016),
        "gelu": (37_794_816, 37_892_608),
    },
    (768, 24, 12, 1024): {
        "as it is": (169_956_864, 170_103_552),
        "d_ff = 4 d": (226_579_968, 226_726_656),
        "multi-query": (144_004_608, 144_151_296),
        "gelu": (169_956_864, 170_103_552),
    },
}


def on_meta(config):
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in GPT(config).parameters())


@pytest.mark.parametrize(("wanted", "switches"), PUBLISHED, ids=lambda case: str(case)[:13])
def test_published_counts(wanted, switches):
    config = ModelConfig(**switches)
    assert count_parameters(config).total == wanted
    assert on_meta(config) == wanted


@pytest.mark.parametrize("shape", PRESETS)
def test_presets_have_twice_the_parameters_their_readme_says(shape):
    d_model, n_layer, n_head, block_size = shape
    switches = {
        "as it is": {},
        "d_ff = 4 d": dict(d_ff=4 * d_model),
        "multi-query": dict(n_kv_head=1),
        "gelu": dict(mlp="gelu"),
    }
    for name, wanted in PRESETS[shape].items():
        for vocab_size, total in zip((65, 256), wanted, strict=True):
            config = ModelConfig(
                vocab_size=vocab_size,
                block_size=block_size,
                n_layer=n_layer,
                n_head=n_head,
                d_model=d_model,
                **switches[name],
            )
            assert count_parameters(config).total == total
            assert on_meta(config) == total


def test_tying_saves_the_whole_head():
    """S1's page says 13 million; that would be a width of 256."""
    tied, untied = (ModelConfig(**S1, tie_embeddings=tie) for tie in (True, False))
    assert count_parameters(untied).total - count_parameters(tied).total == 38_633_472
    assert count_parameters(tied).head == 0


def test_groups_are_the_modules(make_model):
    model = make_model(position="both", tie_embeddings=False, bias=True, qk_norm=True)
    count = count_parameters(model.config)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}

    def total(*parts):
        return sum(size for name, size in sizes.items() if any(part in name for part in parts))

    assert count.token_embedding == total("tok_emb")
    assert count.position_embedding == total("pos_emb")
    assert count.attention == total("q_proj", "k_proj", "v_proj", "o_proj")
    assert count.mlp == total("mlp.")
    assert count.norm == total("_norm", "norm_f")
    assert count.head == total("lm_head")
    assert count.total == sum(sizes.values())
    assert count.non_embedding == count.total - count.token_embedding - count.position_embedding


@pytest.mark.parametrize("norm_position", ["pre", "post", "sandwich"])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mlp", ["relu", "geglu"])
@pytest.mark.parametrize("position", ["learned", "none"])
def test_the_formula_is_the_model(norm_position, norm, bias, mlp, position):
    config = ModelConfig(
        vocab_size=19,
        block_size=24,
        n_layer=3,
        n_head=4,
        n_kv_head=2,
        d_model=24,
        head_dim=10,
        d_ff=36,
        norm_position=norm_position,
        norm=norm,
        bias=bias,
        norm_bias=not bias,
        mlp=mlp,
        position=position,
    )
    assert count_parameters(config).total == on_meta(config)


def test_multi_query_shrinks_the_cache_by_the_number_of_heads():
    """124M in bf16 at 1,024 tokens: 37.7 MB become 3.15 MB."""
    multi_head, grouped, multi_query = (
        cache_bytes(ModelConfig(**S2_GPT2, n_kv_head=n), bytes_a_number=2) for n in (12, 4, 1)
    )
    assert multi_head == 37_748_736
    assert grouped == multi_head // 3
    assert multi_query == multi_head // 12 == 3_145_728
