"""`octavo profile`: a table that a terminal holds, and figures for programs."""

import json

import pytest
import torch
from command_kit import SMALL, figures, octavo, printed, sea_run

from octavo.explaining import profile, roofline
from octavo.linear import onednn_takes

LARGER = ["model.n_layer=2", "model.d_model=32", "train.max_steps=2", "train.micro_batch_size=8"]


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(profile, "WRITE_SECONDS", 0.02)
    monkeypatch.setattr(roofline, "MEASURE_SECONDS", 0.01)
    monkeypatch.setitem(roofline.SIZES, "cpu", (64, 1 << 12))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return sea_run(tmp_path_factory.mktemp("profile"), *LARGER)


def test_a_person_reads_where_the_time_goes(run, capsys):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    said = printed(capsys, "profile", run, "--steps", "1", "--device", "cpu")
    by_onednn = onednn_takes(torch.empty(128, 64), torch.empty(64, 64))
    product = "linear_pointwise" if by_onednn else "mm"
    for part in ("tokens/s", "FLOP/s", "backward", "projections", "optimizer", "2 layers", product):
        assert part in said
    table = said[said.index("part") : said.index("2 layers")]
    assert all(len(line) <= 80 for line in table.splitlines())
    assert "…" not in table
    assert said.rstrip().endswith(".")
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_figures_are_one_json_object(run, capsys, tmp_path):
    trace = tmp_path / "trace.json"
    facts = figures(capsys, "profile", run, "--steps", "1", "--trace", trace)
    assert sum(row["share"] for row in facts["rows"]) == pytest.approx(1)
    assert facts["flops"] == pytest.approx(sum(row["flops"] for row in facts["rows"]))
    assert facts["tokens_per_s"] == pytest.approx(facts["tokens"] / facts["seconds"])
    assert facts["machine_flops_per_s"] > 0
    assert json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]


def test_a_device_that_the_profiler_does_not_see_is_refused(run, capsys):
    """PyTorch's has no eyes on Apple's GPUs: it would time how they are asked."""
    assert octavo("profile", run, "--steps", "1", "--device", "meta") == 2
    assert "what meta does cannot be timed" in (said := capsys.readouterr().err)
    assert "--device cpu" in said


def test_the_text_of_a_run_may_be_gone(run, capsys):
    (run.parent / "sea.txt").rename(run.parent / "gone.txt")
    try:
        assert octavo("profile", run, "--steps", "1", "train.micro_batch_size=2") == 0
    finally:
        (run.parent / "gone.txt").rename(run.parent / "sea.txt")
    assert "tokens/s" in capsys.readouterr().out


def test_a_text_can_be_profiled_before_anything_is_trained(run, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = [run.parent / "sea.txt", *SMALL, *LARGER, "--steps", "1"]
    facts = figures(capsys, "profile", *words)
    assert facts["what"] == "train"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_writing_is_profiled_on_the_engine_that_writes(run, capsys, monkeypatch, engine):
    monkeypatch.setenv("OCTAVO_ENGINE", engine)
    words = ["profile", run, "--what", "generate", "--device", "cpu"]
    said = printed(capsys, *words)
    assert f"{engine} cpu" in said
    assert ("writing" if engine == "native" else "projections") in said
    assert figures(capsys, *words)["what"] == "generate"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--steps", "0"], "counts from 1"),
        (["--weights", "int8"], "add --what generate"),
        (["--what", "generate", "train.seed=1"], "training setting"),
        (["--trace", "absent/trace.json"], "absent is no directory"),
        (["--what", "fly"], "invalid choice"),
    ],
)
def test_what_cannot_be_is_said(run, capsys, words, said):
    assert octavo("profile", run, *words) == 2
    assert said in capsys.readouterr().err
