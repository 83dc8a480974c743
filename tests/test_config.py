"""A configuration is right, or an error of one line that says what to write instead."""

import dataclasses
import math

import pytest
import yaml
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from octavo.config import (
    KNOWN,
    SECTIONS,
    Config,
    DataConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    build_config,
    load_config,
    to_yaml,
)
from octavo.errors import ConfigError
from octavo.model_config import RopeScaling

S2 = """\
model:
  d_model: 256        # Model dimension
  n_heads: 8          # Number of attention heads
  n_layers: 6         # Number of transformer blocks
  block_size: 256     # Context length
  dropout: 0.1        # Dropout rate

training:
  batch_size: 32
  learning_rate: 3.0e-4
  max_iters: 10000
"""


@pytest.fixture
def load(tmp_path):
    def load(text, *overrides):
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(path, overrides)

    return load


# What the seed projects write runs as it stands.


def test_s2s_own_configuration(load):
    """The YAML of the seed's page, verbatim."""
    config = load(S2)
    assert config.model == ModelConfig(
        d_model=256, n_head=8, n_layer=6, block_size=256, dropout=0.1
    )
    assert config.train == TrainConfig(micro_batch_size=32, max_steps=10000)
    assert config.optim == OptimConfig(lr=3e-4)


def test_s2_at_gpt2_size(load):
    config = load("""\
model:
  d_model: 768
  n_heads: 12
  n_layers: 12
  block_size: 1024
  vocab_size: 50257  # GPT-2 BPE vocab

training:
  batch_size: 12  # Adjust for your GPU
  learning_rate: 2.5e-4
  max_iters: 600000
  warmup_iters: 2000
""")
    assert (config.model.vocab_size, config.model.d_ff, config.optim.warmup) == (50257, 2048, 2000)


def test_s2s_other_keys(load):
    config = load(
        "training: {eval_interval: 7, save_interval: 8, log_interval: 9, weight_decay: 0.2,"
        " grad_clip: 0.5, seed: 3, gradient_accumulation_steps: 4}\n"
        "advanced: {gradient_checkpointing: true, compile: false}"
    )
    assert (config.eval.every, config.checkpoint.every, config.log.every) == (7, 8, 9)
    assert (config.optim.weight_decay, config.optim.grad_clip) == (0.2, 0.5)
    assert (config.train.seed, config.train.grad_accum) == (3, 4)
    assert (config.train.grad_checkpoint, config.train.compile) == (True, False)


def test_s3s_names_from_python():
    config = ModelConfig(
        block_size=128,
        vocab_size=65,
        n_layer=4,
        n_head=4,
        d_model=128,
        dropout=0.1,
        d_ff=None,
        activation_function="gelu_new",
    )
    assert (config.mlp, config.d_ff) == ("gelu_tanh", 512)
    assert ModelConfig(activation_function="gelu", d_ff=None).mlp == "gelu"
    assert ModelConfig(n_embd=64, n_heads=4, n_layers=2, n_kv_heads=1, pos="none") == ModelConfig(
        d_model=64, n_head=4, n_layer=2, n_kv_head=1, position="none"
    )


# Defaults and what follows from them.


def test_the_defaults_are_a_stock_llama():
    model = Config().model
    assert (model.position, model.norm, model.norm_position, model.mlp) == (
        "rope",
        "rmsnorm",
        "pre",
        "swiglu",
    )
    assert not model.bias
    assert not model.qk_norm
    assert model.tie_embeddings
    assert (model.n_kv_head, model.head_dim, model.d_ff) == (6, 64, 1024)
    assert load_config() == Config()


@pytest.mark.parametrize("nothing", ["0", "null", "auto", "~", ""])
def test_derived_settings_can_be_left_to_be_derived(load, nothing):
    fields = ("n_kv_head", "d_ff", "head_dim", "vocab_size")
    text = "model:\n" + "".join(f"  {name}: {nothing}\n" for name in fields)
    assert load(text).model == ModelConfig()


def test_norm_bias_follows_bias_unless_said():
    assert ModelConfig(bias=True).norm_bias is True
    assert ModelConfig(bias=True, norm_bias=False).norm_bias is False
    assert ModelConfig(norm_bias=True).norm_bias is True


@pytest.mark.parametrize("text", ["3e-4", "'3e-4'", "3.0e-4", "0.0003", "3E-4", "+3e-4"])
def test_scientific_notation_is_a_number(load, text):
    """YAML 1.1 reads 3e-4 as text; a trainer that then multiplies it is a classic."""
    assert load(f"optim: {{lr: {text}}}").optim.lr == 3e-4
    assert load("", f"optim.lr={text}").optim.lr == 3e-4


def test_whole_numbers_may_be_written_large(load):
    assert load("train: {max_steps: 1e5}").train.max_steps == 100_000
    assert load("train: {max_steps: 2_000.0}").train.max_steps == 2000
    with pytest.raises(ConfigError, match=r"train\.max_steps is 2\.5; .*; give a whole number"):
        load("train: {max_steps: 2.5}")


# Overrides.


def test_overrides_come_in_order_and_win(load):
    config = load("model: {n_layer: 3, n_head: 2}", "model.n_layer=4", "model.n_layer=5")
    assert (config.model.n_layer, config.model.n_head) == (5, 2)
    assert load_config(None, ["log.to=[wandb]", "log.run_name=first"]).log == LogConfig(
        to=["wandb"], run_name="first"
    )
    assert load_config(None, ["training.batch_size=3"]).train.micro_batch_size == 3


def test_overrides_reach_into_groups_and_leave_the_rest(load):
    text = "model: {rope_scaling: {type: yarn, factor: 4}}"
    config = load(text, "model.rope_scaling.factor=8", "model.rope_scaling.beta_slow=2")
    assert config.model.rope_scaling == RopeScaling(type="yarn", factor=8.0, beta_slow=2.0)
    assert load(text, "model.rope_scaling=null").model.rope_scaling is None
    assert load("", "model.rope_scaling.factor=2").model.rope_scaling == RopeScaling(factor=2.0)


def test_an_override_needs_a_value():
    with pytest.raises(ConfigError, match=r"'model\.n_layer' has no value; write NAME=VALUE"):
        load_config(None, ["model.n_layer"])


# Keys nobody knows.


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("model.n_layr=3", "model.n_layer"),
        ("model.n_embed=3", "model.n_embd"),
        ("training.batchsize=3", "training.batch_size"),
        ("modl.n_layer=3", "model"),
        ("model.rope_scaling.facto=3", "model.rope_scaling.factor"),
        ("lr=3", "optim.lr"),
        ("d_modl=3", "model.d_model"),
        ("learning_rate=3", "training.learning_rate"),
        ("train.lr=3", "optim.lr"),
        ("model.weight_decay=3", "optim.weight_decay"),
    ],
)
def test_an_unknown_key_names_the_one_meant(load, word, meant):
    with pytest.raises(ConfigError, match="unknown key") as caught:
        load_config(None, [word])
    assert str(caught.value).endswith(f"did you mean {meant}?")
    key, _, value = word.partition("=")
    for name in reversed(key.split(".")):
        value = {name: value}
    with pytest.raises(ConfigError, match=r"unknown key .*config\.yaml"):
        load(yaml.safe_dump(value))


def test_an_unknown_key_like_no_other_lists_what_there_is():
    with pytest.raises(ConfigError, match=r"unknown key model\.zzz; known: .*d_model.*n_layer"):
        load_config(None, ["model.zzz=1"])


def test_unknown_names_from_python_too():
    with pytest.raises(ConfigError, match=r"did you mean model\.n_layer\?"):
        ModelConfig(n_layr=3)


def test_one_setting_under_two_names_is_refused(load):
    with pytest.raises(ConfigError, match=r"model\.d_model is given twice.*remove model\.n_embd"):
        load("model: {d_model: 64, n_embd: 32}")
    with pytest.raises(ConfigError, match=r"train\.compile is given twice"):
        load("training: {compile: true}\nadvanced: {compile: false}")


# Values of the wrong kind or size.


@pytest.mark.parametrize(
    ("word", "complaint"),
    [
        ("model.d_model=wide", "model.d_model is 'wide'; give a whole number"),
        ("model.d_model=true", "model.d_model is True; give a whole number"),
        ("model.d_model=", "model.d_model is None; give a whole number"),
        ("model.d_model=[1]", "model.d_model is [1]; give a whole number"),
        ("model.d_model=-4", "model.d_model is -4; give a whole number of at least 1"),
        ("model.bias=1", "model.bias is 1; give true or false"),
        ("model.mlp=gelou", "model.mlp is 'gelou'; give one of gelu, gelu_tanh, relu"),
        ("model.dropout=1.5", "model.dropout is 1.5; give a number from 0 to 0.999"),
        ("model.rope_scaling=3", "model.rope_scaling is 3; give settings or null"),
        ("model.rope_scaling.factor=x", "model.rope_scaling.factor is 'x'; give a number"),
        ("model.rope_scaling.factor=0.5", "factor is 0.5; give a number from 1 to 1e+06"),
        ("model.rope_scaling.type=dynamic", "give one of linear, ntk, yarn, llama3"),
        ("model.rope_scaling.low_freq_factor=9", "high_freq_factor is not above low_freq_factor"),
        ("optim.lr=fast", "optim.lr is 'fast'; give a number"),
        ("optim.lr=nan", "optim.lr is 'nan'; give a number"),
        ("optim.lr=.nan", "optim.lr is nan; give a number"),
        ("optim.lr=-.inf", "optim.lr is -inf; give a number"),
        ("optim.betas=[0.9]", "optim.betas is [0.9]; give a list, each a number"),
        ("optim.betas=[0.9, 1]", "optim.betas is 1.0; give a number from 0 to 0.999999"),
        ("train.compile=maybe", "train.compile is 'maybe'; give auto or true or false"),
        ("train.seed=-1", "train.seed is -1; give a whole number"),
        ("data.source=3", "data.source is 3; give text or a list, each text or null"),
        ("log.to=wandb", "log.to is 'wandb'; give a list, each one of tensorboard, wandb"),
        ("optim=3", "optim is 3, not settings; write 'optim.NAME=VALUE'"),
        ("model.n_layer=1" + "0" * 400, "model.n_layer is 1000000"),
        ("model.n_layer=0x" + "f" * 9000, "model.n_layer is a huge number"),
    ],
)
def test_a_wrong_value_says_what_is_wanted(word, complaint):
    with pytest.raises(ConfigError) as caught:
        load_config(None, [word])
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
    assert caught.value.exit_code == 2


def test_the_same_from_python():
    for wrong in (
        lambda: ModelConfig(mlp="gelou"),
        lambda: ModelConfig(d_model=64.5),
        lambda: ModelConfig(dropout=math.nan),
        lambda: ModelConfig(n_layer=10**5000),
        lambda: OptimConfig(betas=(0.9, 0.9, 0.9)),
        lambda: DataConfig(source=3),
        lambda: Config(model=3),
        lambda: ModelConfig(rope_scaling={"facto": 2}),
    ):
        with pytest.raises(ConfigError):
            wrong()
    assert Config(model={"n_layer": 2}).model == ModelConfig(n_layer=2)


@pytest.mark.parametrize("section", SECTIONS)
def test_every_number_is_bounded(section):
    """NaN, infinity and what no machine can hold end before step 0, wherever they are put."""
    for name in KNOWN[section]:
        for value in (math.nan, math.inf, -math.inf, 1e290, -1e290, 10**400, "nan", "1e999"):
            if isinstance(value, str) and "str" in str(SECTIONS[section].__annotations__[name]):
                continue
            with pytest.raises(ConfigError):
                build_config({section: {name: value}})


# Shapes that cannot be.


def test_width_and_heads_must_fit():
    with pytest.raises(ConfigError, match=r"not divisible by model\.n_head=6; try d_model=102"):
        ModelConfig(d_model=100, n_head=6)
    assert ModelConfig(d_model=100, n_head=6, head_dim=16).head_dim == 16
    with pytest.raises(ConfigError, match=r"not a multiple of model\.n_kv_head=4"):
        ModelConfig(n_head=6, n_kv_head=4)


def test_an_odd_head_cannot_be_rotated():
    with pytest.raises(ConfigError, match=r"head_dim is 15, an odd number; d_model=60, n_head=4"):
        ModelConfig(d_model=60, n_head=4)
    assert ModelConfig(d_model=60, n_head=4, position="learned").head_dim == 15


def test_rope_scaling_needs_rope():
    with pytest.raises(ConfigError, match="no effect with position=learned"):
        ModelConfig(position="learned", rope_scaling=RopeScaling(factor=2.0))


# Files.


@pytest.mark.parametrize("text", ["", "# nothing\n", "model:\n", "model: {}\ntrain:\n"])
def test_an_empty_configuration_is_the_default(load, text):
    assert load(text) == Config()


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read .*nowhere\.yaml: No such file"):
        load_config(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match="Is a directory"):
        load_config(tmp_path)
    with pytest.raises(ConfigError, match="cannot read"):
        load_config("\0")
    (tmp_path / "latin.yaml").write_bytes(b"log: {run_name: \xe9}")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(tmp_path / "latin.yaml")


def test_an_error_says_which_file(load):
    with pytest.raises(ConfigError, match=r"n_layer is 0; in .*config\.yaml; give"):
        load("model: {n_layer: 0}")
    with pytest.raises(ConfigError, match=r"in .*config\.yaml and the words after it"):
        load("model: {n_head: 4}", "model.n_layer=0")


# Nothing else ever escapes.

MANY = max(300, hypothesis_settings.default.max_examples)  # and 10,000 by `make faults`
NAMES = [f"{section}.{name}" for section, names in KNOWN.items() for name in names]
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**400), 10**400)
    | st.floats()
    | st.text(max_size=8)
    | st.dates()
    | st.sampled_from(["auto", "yarn", "rope", "swiglu", "1e3", "0x10", "nan", "1:30"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SCALARS, inner, max_size=3),
    max_leaves=5,
)
DOCUMENTS = st.dictionaries(
    st.sampled_from(list(SECTIONS)) | SCALARS,
    st.dictionaries(
        st.sampled_from([name.split(".")[1] for name in NAMES]) | SCALARS, VALUES, max_size=4
    )
    | VALUES,
    max_size=3,
)


@pytest.fixture(scope="session")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "config.yaml"


def only_config_errors(path, overrides=()):
    complaint = ""
    try:
        assert isinstance(load_config(path, overrides), Config)
    except ConfigError as error:
        complaint = str(error)
    assert "\n" not in complaint


@hypothesis_settings(max_examples=MANY)
@given(document=DOCUMENTS)
def test_any_document_loads_or_complains(scratch, document):
    scratch.write_text(yaml.safe_dump(document, allow_unicode=True), encoding="utf-8")
    only_config_errors(scratch)


@hypothesis_settings(max_examples=MANY)
@given(data=st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
@example(data=b"a: &x [1]\nb: *x")
@example(data=b"a: !!python/object:os.system {}")
@example(data=b"model: {d_model: 1, d_model: 2}")
@example(data=b"[" * 3000)
@example(data=b"{" * 3000)
@example(data=b"? " * 3000)
@example(data=b"model: " + b"9" * 5000)
@example(data=b"- 2001-99-99")
@example(data=b"? [a]\n: b")
@example(data=b"model: {? [a] : b}")
@example(data=b"model: {<<: {d_model: 3}}")
@example(data=b"=: 3")
def test_any_bytes_load_or_complain(scratch, data):
    scratch.write_bytes(data)
    only_config_errors(scratch)


@hypothesis_settings(max_examples=MANY)
@given(
    st.lists(
        st.builds("{}={}".format, st.sampled_from(NAMES) | st.text(max_size=9), VALUES)
        | st.text(max_size=20),
        max_size=3,
    )
)
def test_any_words_load_or_complain(words):
    only_config_errors(None, words)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("model: {n_layer: 2, n_layer: 3}", "the key 'n_layer' stands twice"),
        ("model:\n  n_layer: 2\nmodel:\n  n_head: 3\n", r"the key 'model' stands twice; .*line 3"),
        ("a: &x {}\nb: *x", "anchors and aliases are not supported"),
        ("a: !!python/name:os.system", "could not determine a constructor"),
        ("model: [", "invalid YAML: .*line 1"),
        ("model:\n\tn_layer: 2", "invalid YAML: .*line 2"),
        ("- a\n- b", "a configuration is a mapping of sections"),
        ("just words", "a configuration is a mapping of sections"),
    ],
)
def test_yaml_is_read_strictly(load, text, complaint):
    with pytest.raises(ConfigError, match=complaint):
        load(text)


def test_an_alias_bomb_costs_nothing(load):
    bomb = "a: &a [x, x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(20)
    )
    with pytest.raises(ConfigError, match="anchors"):
        load(bomb)


# What is written is what is read.

FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "n_layer": st.integers(1, 99),
        "dropout": st.floats(0, 0.999),
        "norm_eps": st.floats(0, 1),
        "rope_theta": st.floats(2, 1e15),
        "norm": st.sampled_from(["layernorm", "rmsnorm"]),
        "mlp": st.sampled_from(["gelu", "geglu"]),
        "norm_bias": st.none() | st.booleans(),
        "rope_scaling": st.none()
        | st.builds(
            RopeScaling,
            type=st.sampled_from(["linear", "yarn", "llama3"]),
            factor=st.floats(1, 1e6),
        ),
    },
)


@given(
    model=st.builds(lambda fields: ModelConfig(**fields), FIELDS),
    data=st.builds(
        DataConfig, source=st.none() | st.text(max_size=9) | st.lists(st.text(max_size=9))
    ),
    optim=st.builds(
        OptimConfig,
        lr=st.floats(0, 1e3),
        betas=st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)),
        eps=st.floats(0, 1),
    ),
    log=st.builds(
        LogConfig,
        to=st.lists(st.sampled_from(["wandb", "tensorboard"])),
        run_name=st.none() | st.text(max_size=9),
        sample_prompt=st.text(max_size=20) | st.sampled_from(["null", "1e5", "yes", "\n", ""]),
    ),
    train=st.builds(
        TrainConfig,
        compile=st.sampled_from(["auto", True, False]),
        dropout_final=st.none() | st.floats(0, 0.999),
    ),
)
def test_a_written_configuration_reads_back_equal(scratch, model, data, optim, log, train):
    config = Config(model=model, data=data, optim=optim, log=log, train=train)
    scratch.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(scratch) == config


def test_everything_is_written_out():
    written = yaml.safe_load(to_yaml(Config()))
    assert list(written) == list(SECTIONS)
    for section, names in KNOWN.items():
        assert list(written[section]) == names


def test_every_setting_has_its_reason():
    """The field's docstring is what `--help` shows."""
    from octavo.settings import field_docs

    for cls in (*SECTIONS.values(), RopeScaling):
        docs = field_docs(cls)
        for field in dataclasses.fields(cls):
            assert docs.get(field.name), f"{cls.__name__}.{field.name}"


def test_configurations_do_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().model.n_layer = 3
    assert dataclasses.replace(ModelConfig(), n_layer=3) == ModelConfig(n_layer=3)


def test_the_seeds_lora_switch_and_width_are_one_setting_here():
    on = load_config(None, ["advanced={use_lora: true, lora_rank: 4, lora_alpha: 8}"]).lora
    assert (on.rank, on.alpha) == (4, 8.0)
    assert load_config(None, ["advanced.use_lora=true"]).lora.rank == 8
    assert load_config(None, ["advanced={use_lora: false, lora_rank: 4}"]).lora.rank == 0
