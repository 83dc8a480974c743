"""A config.json read by us means what transformers takes it to mean."""

import json

import pytest

from octavo.errors import CheckpointError, ConfigError
from octavo.exchanging.config_json import DEFAULTS, read_config, to_config
from octavo.exchanging.families import FAMILIES, find_family

SIZES = dict(vocab_size=31, num_hidden_layers=2, num_attention_heads=4, hidden_size=32)
SIZES |= dict(max_position_embeddings=24, intermediate_size=56)
GPT2_SIZES = dict(vocab_size=31, n_layer=2, n_head=4, n_embd=32, n_positions=24)
# Where a class's own default is one that our model has no word for.
NEEDED = {
    "GPTNeoXForCausalLM": dict(use_parallel_residual=False, rotary_pct=1.0),
    "StableLmForCausalLM": dict(partial_rotary_factor=1.0, num_key_value_heads=2),
    "Qwen3ForCausalLM": dict(num_key_value_heads=2),
}


def write(folder, **content):
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def sizes(name):
    return GPT2_SIZES if name.startswith("GPT2") or "BigCode" in name else SIZES


def ours(folder):
    family, theirs = read_config(folder)
    return to_config(family, theirs, folder)


def by_transformers(name, **given):
    transformers = pytest.importorskip("transformers")
    return find_family(name).config(getattr(transformers, name).config_class(**given))


@pytest.mark.parametrize("name", [family.name for family in FAMILIES])
def test_what_a_file_leaves_out_is_what_its_class_assumes(name, tmp_path):
    """Files are written as differences from the class; sizes alone must be enough."""
    given = sizes(name) | NEEDED.get(name, {})
    write(tmp_path, architectures=[name], **given)
    assert ours(tmp_path) == by_transformers(name, **given)


@pytest.mark.parametrize("name", ["GPTNeoXForCausalLM", "StableLmForCausalLM"])
def test_a_file_that_does_not_say_how_far_rope_turns_is_refused_by_its_default(name, tmp_path):
    """These classes turn a quarter of each head; ours would turn all of it."""
    needed = dict(use_parallel_residual=False, num_key_value_heads=2)
    write(tmp_path, architectures=[name], **SIZES, **needed)
    with pytest.raises(ConfigError, match=r"partial_rotary_factor=0\.25"):
        ours(tmp_path)


SPELLINGS = {
    "theta beside": dict(rope_theta=300.0),
    "none": dict(rope_theta=300.0, rope_scaling=None),
    "type": dict(rope_theta=300.0, rope_scaling={"type": "linear", "factor": 3.0}),
    "rope_type": dict(rope_scaling={"rope_type": "linear", "factor": 3.0}),
    "both": dict(rope_scaling={"type": "linear", "rope_type": "linear", "factor": 3.0}),
    "new": dict(rope_parameters={"rope_type": "linear", "rope_theta": 300.0, "factor": 3.0}),
    "new, plain": dict(rope_parameters={"rope_type": "default", "rope_theta": 300.0}),
    "yarn": dict(rope_theta=300.0, rope_scaling={"type": "yarn", "factor": 4.0}),
    "llama3": dict(
        rope_theta=500000.0,
        rope_scaling={
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_way_to_write_rope(spelling, tmp_path):
    given = SIZES | SPELLINGS[spelling]
    write(tmp_path, architectures=["LlamaForCausalLM"], **given)
    theirs = by_transformers("LlamaForCausalLM", **json.loads(json.dumps(given)))
    mine = ours(tmp_path)
    if mine.rope_scaling and not mine.rope_scaling.original_block_size:  # 0 stands for block_size
        assert theirs.rope_scaling.original_block_size in (0, 24)
        theirs = theirs.__class__(**(vars(theirs) | {"rope_scaling": mine.rope_scaling}))
    assert mine == theirs


def test_every_family_has_its_defaults():
    assert DEFAULTS.keys() == {family.name for family in FAMILIES}


def test_an_unknown_architecture_names_the_nearest(tmp_path):
    write(tmp_path, architectures=["Qwen2ForCausalLM"], **SIZES)
    with pytest.raises(ConfigError, match=r"Qwen2ForCausalLM.*Qwen3ForCausalLM"):
        read_config(tmp_path)


def test_code_that_a_file_points_to_is_not_run(tmp_path):
    """``auto_map`` asks transformers to import a Python file of the directory."""
    (tmp_path / "evil.py").write_text("open('canary', 'w')", encoding="utf-8")
    write(tmp_path, architectures=["EvilForCausalLM"], auto_map={"AutoModel": "evil.EvilModel"})
    with pytest.raises(ConfigError, match="no map for the architecture EvilForCausalLM"):
        read_config(tmp_path)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        (None, ConfigError, "not a Hugging Face directory"),
        ("{", CheckpointError, "it is no JSON"),
        ("[" * 100_000, CheckpointError, "it is no JSON"),
        ("[]", CheckpointError, "is no JSON object"),
        ("{}", ConfigError, "names no architecture"),
        ('{"architectures": "LlamaForCausalLM"}', ConfigError, "names no architecture"),
    ],
)
def test_what_is_no_configuration(content, error, words, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(error, match=words):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"hidden_size": ...}, CheckpointError, "does not give hidden_size"),
        ({"hidden_size": "wide"}, ConfigError, "d_model is 'wide'"),
        ({"hidden_act": ["silu"]}, CheckpointError, "does not describe a LlamaForCausalLM"),
        ({"rope_scaling": [1]}, CheckpointError, "does not describe a LlamaForCausalLM"),
        ({"rope_scaling": {"type": "linear"}, "num_attention_heads": 5}, ConfigError, "divisible"),
        ({"partial_rotary_factor": 0.5}, ConfigError, "partial_rotary_factor=0.5"),
        ({"quantization_config": {"bits": 4}}, ConfigError, "quantized"),
    ],
)
def test_options_that_are_missing_or_mistyped_are_named(change, error, words, tmp_path):
    content = SIZES | {"architectures": ["LlamaForCausalLM"]} | change
    write(tmp_path, **{key: value for key, value in content.items() if value is not ...})
    with pytest.raises(error, match=words):
        ours(tmp_path)
