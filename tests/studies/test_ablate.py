"""A study is fair, goes on where it was stopped, and takes no luck for a finding."""

import json
import os
import signal
import types

import numpy as np
import pytest
from training_kit import events

from octavo.checkpoint import Run
from octavo.errors import ConfigError, Preempted
from octavo.studies import ablate, ablation
from octavo.studies.ablate import Study, begin, measure_steps, plan_study, read_vary, train_runs
from octavo.studies.ablation import judge_study
from octavo.studies.ablation_picture import draw_ablation
from octavo.training import loop

TEXT = "She sells sea shells by the sea shore; the shells she sells are sea shells.\n" * 40
SMALL = [
    "model.block_size=16", "model.n_layer=1", "model.n_head=2", "model.d_model=16",
    "train.max_steps=6", "train.micro_batch_size=4", "eval.windows=12", "eval.every=0",
    "log.sample_tokens=1", "log.every=2", "optim.lr=1e-2",
]  # fmt: skip
TWO = ["model.position=learned,rope"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "sea.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    return trained(plan(text, tmp_path_factory.mktemp("study") / "done"))


def plan(text, out, vary=TWO, *settings, seeds=2, **how):
    varied = {word.partition("=")[0] for word in vary}
    words = [*(word for word in SMALL if word.partition("=")[0] not in varied), *settings]
    return plan_study([text], words, read_vary(vary, words), seeds, str(out), **how)


def trained(study):
    study = begin(study)
    list(train_runs(study))
    return study


def test_values_are_apart_by_commas_and_lists_keep_their_brackets():
    assert read_vary(["optim.lr=1e-3,3e-4"], []) == {"optim.lr": ["1e-3", "3e-4"]}
    assert read_vary(["lora.targets=[q_proj],[q_proj, v_proj]"], []) == {
        "lora.targets": [["q_proj"], ["q_proj", "v_proj"]]
    }
    assert list(read_vary([], [])) == ["model.position", "model.mlp", "model.norm"]
    assert list(read_vary([], ["model.norm=rmsnorm"])) == ["model.position", "model.mlp"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.position=rope"], "nothing to compare.*two values"),
        (["model.position"], "nothing to compare"),
        (["model.position=rope,rope"], "nothing to compare"),
        (["model.position=rope,none", "model.position=learned,rope"], "given twice"),
        (["model.n_head=1,2"], "model.n_head is given twice"),
        (["train.seed=1,2"], "--seeds"),
        (["train.max_steps=10,20"], "--equal"),
    ],
)
def test_what_varies_nothing_is_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        read_vary(words, SMALL)


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        (["model.positon=learned,rope"], "did you mean model.position"),
        (["model.position=learned,banana"], "in the arm banana.*one of learned"),
        (
            ["model.rope_theta=100,1000", "model.head_dim=8,7"],
            "in the arm rope_theta_100-head_dim_7",
        ),
        (["model.mlp=gelu_tanh,gelu_new"], "gelu_new is the same as another"),
        (["data.val_fraction=0.1,0"], "no.*validation text|there is none"),
    ],
)
def test_an_arm_that_cannot_be_is_named_before_anything_is_trained(text, tmp_path, vary, message):
    with pytest.raises(ConfigError, match=message):
        plan(text, tmp_path / "study", vary)
    assert not (tmp_path / "study").exists()


def test_equal_tokens_are_equal_whatever_a_step_holds(text, tmp_path):
    study = begin(
        plan(text, tmp_path / "s", ["model.block_size=16,8", "train.micro_batch_size=4,12"])
    )
    steps = {arm.name: (study.steps[arm.name], arm.tokens_a_step) for arm in study.arms}
    assert steps == {
        "block_size_16-micro_batch_size_4": (6, 64),
        "block_size_16-micro_batch_size_12": (2, 192),
        "block_size_8-micro_batch_size_4": (12, 32),
        "block_size_8-micro_batch_size_12": (4, 96),
    }


def test_equal_time_gives_each_arm_the_steps_it_has_time_for(text, tmp_path, monkeypatch):
    monkeypatch.setattr(ablate, "measure_steps", lambda arms: {"learned": 0.5, "rope": 1.0})
    study = begin(plan(text, tmp_path / "a", equal="time", minutes=1.0))
    assert study.steps == {"learned": 120, "rope": 60}
    assert study.config(study.arms[1], 7).train.max_steps == 60  # so its schedule ends there
    assert begin(plan(text, tmp_path / "b", equal="time")).steps == {"learned": 6, "rope": 3}
    with pytest.raises(ConfigError, match="--equal time"):
        plan(text, tmp_path / "c", minutes=1.0)


def test_the_probe_measures_every_arm(text, tmp_path, monkeypatch):
    monkeypatch.setattr(ablate, "PROBE_SECONDS", 0.02)
    monkeypatch.setattr(ablate, "PROBE_ROUNDS", 2)
    took = measure_steps(plan(text, tmp_path / "s").arms)
    assert took.keys() == {"learned", "rope"}
    assert all(0 < seconds < 1 for seconds in took.values())


def test_runs_are_ordinary_and_the_seeds_come_in_turn(finished):
    order = [(arm.name, seed) for arm, seed in finished.jobs]
    assert order == [("learned", 1337), ("rope", 1337), ("learned", 1338), ("rope", 1338)]
    for arm, seed in finished.jobs:
        run = Run.open(finished.out / arm.name / f"seed-{seed}")
        assert run.config.model.position == arm.values["model.position"]
        assert run.config.train.seed == seed
        assert run.load().step == 6


def test_a_stopped_study_goes_on_and_finds_what_an_undisturbed_one_finds(
    text, tmp_path, monkeypatch, finished
):
    """Ctrl-C in the middle of the second run, and a kill between two runs."""
    real_train, real_step, calls, steps = ablate.train, loop.optimizer_step, [], []

    def train(config, out, **kwargs):
        calls.append(out)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real_train(config, out, **kwargs)

    def step(*args):
        steps.append(1)
        if len(steps) == 6 + 3:
            os.kill(os.getpid(), signal.SIGINT)
        return real_step(*args)

    monkeypatch.setattr(ablate, "train", train)
    monkeypatch.setattr(loop, "optimizer_step", step)
    with pytest.raises(Preempted, match=r"step 3 of 6; 1 of 4 runs of the study .* same command"):
        trained(plan(text, tmp_path / "s"))
    with pytest.raises(KeyboardInterrupt):
        trained(plan(text, tmp_path / "s"))
    study = trained(plan(text, tmp_path / "s"))
    assert calls[1] == calls[2] != calls[0]  # the one that was stopped, not the finished one
    assert len(calls) == 6
    assert trained(plan(text, tmp_path / "s"))  # nothing is left to do
    assert len(calls) == 6
    assert len(steps) == 4 * 6
    one, other = judge_study(study), judge_study(finished)
    assert [row.losses for row in one.rows] == [row.losses for row in other.rows]


def test_another_study_in_the_same_place_is_refused_but_more_seeds_are_not(
    text, tmp_path, finished, monkeypatch
):
    with pytest.raises(ConfigError, match=r"optim.lr 0.01 -> 0.1.*choose another --out"):
        plan(text, finished.out, TWO, "optim.lr=0.1")
    with pytest.raises(ConfigError, match="arms learned, rope -> rope, none"):
        plan(text, finished.out, ["model.position=rope,none"])
    with pytest.raises(ConfigError, match="equal tokens -> time"):
        plan(text, finished.out, equal="time")
    more = plan(text, finished.out, seeds=3)
    assert [seed for _, seed in more.jobs][-2:] == [1339, 1339]
    assert more.steps == finished.steps
    (tmp_path / "file.txt").write_text("mine")
    with pytest.raises(ConfigError, match="something else than a study"):
        plan(text, tmp_path)


def test_a_bpe_is_learned_once_for_all_runs(text, tmp_path):
    study = trained(
        plan(text, tmp_path / "s", TWO, "data.tokenizer=bpe", "data.bpe_vocab_size=260", seeds=1)
    )
    texts = {(study.run(arm, seed) / "tokenizer.json").read_bytes() for arm, seed in study.jobs}
    assert texts == {(tmp_path / "s" / "tokenizer.json").read_bytes()}
    assert plan(text, tmp_path / "s", TWO, "data.tokenizer=bpe", "data.bpe_vocab_size=260").steps


def test_the_table_is_what_the_runs_logged(finished):
    found = judge_study(finished)
    for row, arm in zip(found.rows, finished.arms, strict=True):
        for loss, seed in zip(row.losses, finished.seeds, strict=True):
            last = events(finished.run(arm, seed), "eval")[-1]
            assert loss == pytest.approx(last["val_loss"], rel=1e-6)
        assert row.tokens == 6 * 4 * 16
        assert row.seconds > 0
    assert found.rows[0].against_first is None
    result = found.rows[1].against_first
    assert result.gain == pytest.approx(found.rows[0].loss - found.rows[1].loss)
    # Two arms of one setting: the arm's row and the setting's effect are the same comparison.
    assert found.effects[0].result == result
    text = "\n".join(found.lines())
    assert f"{found.rows[1].loss:.4f}" in text
    assert "Student's t with 1 degree of freedom" in text
    assert (
        json.loads(json.dumps(found.to_dict()))["arms"][1]["against_first"]["gain"] == result.gain
    )


def fake(vary, seeds, figures, monkeypatch, equal="tokens", seconds=lambda n: 10.0):
    """The findings of a study whose figures (A, S, N) are given."""
    values = [
        dict(zip(vary, each, strict=True)) for each in ablate.itertools.product(*vary.values())
    ]
    arms = [
        types.SimpleNamespace(
            name="-".join(map(str, v.values())), values=v, parameters=1, tokens_a_step=1
        )
        for v in values
    ]
    study = Study("nowhere", vary, arms, list(range(seeds)), equal, None, {a.name: 1 for a in arms})
    ruler = types.SimpleNamespace(
        weights=np.ones(figures.shape[2]), figures=None, unit="nats a token", units="windows",
        text="a text",
    )  # fmt: skip
    flat = figures.reshape(-1, figures.shape[2])
    monkeypatch.setattr(ablation, "_last", lambda *_: "run")
    monkeypatch.setattr(ablation, "load", lambda path: None)
    monkeypatch.setattr(ablation, "make_ruler", lambda *_, **__: ruler)
    monkeypatch.setattr(ablation, "judge_runs", lambda *_: [flat])
    monkeypatch.setattr(ablation, "training_seconds", lambda study, n, seed: seconds(n))
    return judge_study(study)


GRID = {"position": ["learned", "rope"], "norm": ["layernorm", "rmsnorm"]}


def grid_figures(rope=0.0, rmsnorm=0.0, luck=0.0, noise=0.001, seeds=4):
    """Losses of a 2 x 2 grid; ``luck`` is shared by both norms of one position and seed."""
    generator = np.random.default_rng(5)
    own = luck * generator.normal(size=(2, 1, seeds, 1))
    means = np.array([0, rope])[:, None, None, None] + np.array([0, rmsnorm])[None, :, None, None]
    figures = 3 - means + own + noise * generator.normal(size=(2, 2, seeds, 1))
    figures = figures + 0.01 * generator.normal(size=(2, 2, seeds, 200))
    return figures.reshape(4, seeds, 200)


def test_main_effects_are_found_and_recommended(monkeypatch):
    found = fake(GRID, 4, grid_figures(rope=0.1, rmsnorm=-0.1), monkeypatch)
    by_key = {effect.key: effect.result for effect in found.effects}
    assert by_key["position"].gain == pytest.approx(0.1, abs=0.005)
    assert by_key["norm"].gain == pytest.approx(-0.1, abs=0.005)
    assert found.recommended == {"position": "rope", "norm": "layernorm"}
    assert found.conclusion() == "recommended: position=rope norm=layernorm"


def test_no_effect_is_no_recommendation(monkeypatch):
    found = fake(GRID, 4, grid_figures(), monkeypatch)
    assert found.recommended == {}
    assert found.undecided == ["position", "norm"]
    assert "nothing is recommended" in found.conclusion()


def test_the_luck_that_arms_of_a_seed_share_is_not_counted_several_times(monkeypatch):
    """Both norms begin with the same weights: to take four arms for four draws made luck a finding.

    With the luck of seeds at 0.05, an advantage of 0.03 over four seeds is nothing to build on.
    """
    found = fake(GRID, 4, grid_figures(rope=0.03, rmsnorm=0.02, luck=0.05), monkeypatch)
    verdicts = {effect.key: effect.result.verdict for effect in found.effects}
    assert verdicts == {"position": "unknown", "norm": "better"}
    assert found.conclusion() == "recommended: norm=rmsnorm; not decided by this evidence: position"


def test_settings_hold_together_so_each_interval_is_wider(monkeypatch):
    figures = grid_figures(luck=0.02)
    both = fake(GRID, 4, figures, monkeypatch)
    alone = {"position": ["learned", "rope"]}
    one = fake(alone, 4, figures.reshape(2, 2, 4, 200).mean(1), monkeypatch)
    wide, narrow = both.effects[0].result, one.effects[0].result
    assert wide.gain == pytest.approx(narrow.gain)
    assert wide.high - wide.low > 1.15 * (narrow.high - narrow.low)


def test_unequal_time_recommends_nothing(monkeypatch):
    """On a busy machine one arm was stopped short by a probe that others disturbed, and "lost"."""
    figures = grid_figures(rope=0.5)
    for seconds, disturbed in ((lambda n: 10 + 0.2 * n, False), (lambda n: 10 + n, True)):
        found = fake(GRID, 4, figures, monkeypatch, "time", seconds)
        assert found.disturbed == disturbed
        assert ("nothing is recommended: the arms' times" in found.conclusion()) == disturbed
        assert found.to_dict()["recommended"] == ({} if disturbed else {"position": "rope"})


def test_one_seed_speaks_of_its_weights_only(monkeypatch):
    found = fake(GRID, 1, grid_figures(rope=0.1, seeds=1), monkeypatch)
    assert "one seed: this is about these weights" in found.scope()


def test_the_picture_is_drawn_and_the_same_every_time(monkeypatch, tmp_path):
    found = fake(GRID, 4, grid_figures(rope=0.1), monkeypatch)
    draw_ablation(found, tmp_path / "a.png")
    draw_ablation(found, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
