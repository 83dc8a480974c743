"""`octavo quantize`: a run's weights are packed, and what that costs is printed."""

import pytest
from command_kit import complaint, figures, octavo, printed, sea_run

from octavo.commands.quantize import read_share
from octavo.errors import ConfigError
from octavo.studies import quantize_cost, quantize_search
from octavo.training.packing import pack_run


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(quantize_cost, "SPEED_TOKENS", 3)
    monkeypatch.setenv("OCTAVO_ENGINE", "torch")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    more = ["model.d_model=32", "train.max_steps=30", "eval.every=30", "optim.lr=1e-2"]
    return sea_run(tmp_path_factory.mktemp("quantize"), *more)


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4", "auto"])
def test_figures_are_one_json_object(run, capsys, precision):
    facts = figures(capsys, "quantize", run, "--to", precision)
    assert facts["perplexity"].keys() == {"before", "after", "rises_percent"}
    assert facts["kl_nats_per_token"] >= 0
    assert facts["tokens_per_s"].keys() >= {"before", "after"}
    assert facts["measured_on"] == "the run's validation text"
    assert facts["times_smaller"] > 1.5
    assert (run / "packed" / f"{precision}.safetensors").stat().st_size >= facts["packed_bytes"]


def test_a_person_reads_size_price_and_speed(run, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("She sells sea shells.\n" * 9, encoding="utf-8")
    said = printed(capsys, "quantize", run, "--to", "int8", "--text", tmp_path / "mine.txt")
    for part in (
        "packed bytes",
        "perplexity: before",
        "tokens per s: after",
        "mine.txt",
        "kl nats",
    ):
        assert part in said
    assert "sha256" not in said


def test_it_is_said_when_int4_is_slower_than_int8(run, capsys, monkeypatch):
    """On CPUs int4 is bound by arithmetic, and half the bytes need not be less time."""
    assert octavo("quantize", run, "--to", "int8") == 0
    capsys.readouterr()
    speeds = {"before": 1.0, "after": 2.0, "int8": 3.0}
    monkeypatch.setattr(quantize_search, "tokens_per_second", lambda writers: speeds)
    said = printed(capsys, "quantize", run, "--to", "int4")
    assert "slower than int8" in said
    assert "slower than before" not in said


def test_a_fixed_precision_only_warns(run, capsys, monkeypatch):
    monkeypatch.setattr(quantize_search, "WARN_ABOVE", -1.0)
    assert "perplexity rises by" in printed(capsys, "quantize", run, "--to", "int4")


def test_auto_refuses_a_bound_no_mix_can_keep(run, capsys, monkeypatch):
    plain = quantize_search.search
    monkeypatch.setattr(quantize_search, "search", lambda mix, judge, _: plain(mix, judge, -0.5))
    (run / "packed" / "auto.json").unlink(missing_ok=True)
    assert octavo("quantize", run, "--to", "auto", "--max-perplexity-increase", "0%") == 8
    said = capsys.readouterr().err
    assert "int8 alone raises perplexity by" in said
    assert "--max-perplexity-increase" in said
    assert not (run / "packed" / "auto.json").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "pack to what?; --to fp16, int8, int4 or auto"),
        (["--to", "int3"], "cannot pack to 'int3'"),
        (["--to", "int8", "--max-perplexity-increase", "1%"], "only auto keeps to a bound"),
        (["--to", "auto", "--max-perplexity-increase", "much"], "'much' is no share"),
        (["--to", "int8", "--text", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_what_cannot_be_is_one_line(run, capsys, words, said):
    code, error = complaint(capsys, "quantize", run, *words)
    assert code in (2, 3)
    assert said in error


def test_what_is_no_run_is_said(tmp_path, capsys):
    assert octavo("quantize", tmp_path, "--to", "int8") == 2
    assert "is no run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "share"), [("1%", 0.01), ("0.5 %", 0.005), (".02", 0.02), ("0", 0)]
)
def test_shares_are_read_as_people_write_them(text, share):
    assert read_share(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["", "1", "100%", "-1%", "nan", "1%%", "1e", "%", "inf"])
def test_what_is_no_share_is_refused(text):
    """1 may mean one per cent or a hundred: it has to be said."""
    with pytest.raises(ConfigError, match=r"is no share; write 1% or 0\.01"):
        read_share(text)


def test_an_interrupted_packing_leaves_what_was_packed_before(run, monkeypatch):
    assert octavo("quantize", run, "--to", "int8") == 0
    before = (run / "packed" / "int8.safetensors").read_bytes()

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(pack_run.__globals__["packed"], "publish", interrupt)
    assert octavo("quantize", run, "--to", "int8") == 130
    assert (run / "packed" / "int8.safetensors").read_bytes() == before
    assert not list((run / "packed").glob(".*"))
