import json
import os
import sys
from pathlib import Path

import pytest
from command_kit import python

from octavo.errors import ConfigError, DataError
from octavo.reporting.report import draw_run, read_metrics, write_report


def write(run: Path, *events: dict | str) -> Path:
    """A run of nothing but metrics; strings are written as they are."""
    run.mkdir(exist_ok=True)
    lines = [event if isinstance(event, str) else json.dumps(event) + "\n" for event in events]
    (run / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
    return run


def line(event: str, step: int, **values: object) -> dict:
    return {"event": event, "step": step, "tokens": 64 * step, "seconds": step / 10} | values


def kinds(events: list[dict]) -> list[tuple[str, int]]:
    return [(event["event"], event["step"]) for event in events]


WHOLE = [line("start", 0), line("train", 10, loss=3.0), line("eval", 10, val_loss=3.1)]


@pytest.mark.parametrize("cut", range(1, len(json.dumps(WHOLE[-1])) + 1))
def test_a_line_torn_anywhere_by_kill_9_costs_only_itself(tmp_path: Path, cut: int):
    torn = json.dumps(WHOLE[-1])[:cut]
    kept = read_metrics(write(tmp_path / "run", *WHOLE[:-1], torn))
    whole = cut == len(json.dumps(WHOLE[-1]))
    assert kept == (WHOLE if whole else WHOLE[:-1])


def test_a_torn_line_that_a_resumed_run_wrote_on_after_is_passed_over(tmp_path: Path):
    again = line("start", 0)
    run = write(tmp_path, *WHOLE[:-1], '{"event": "ev\n', again, line("train", 10, loss=2.0))
    assert read_metrics(run) == [again, line("train", 10, loss=2.0)]


def test_a_line_torn_inside_a_character_and_zeros_of_a_power_cut_are_passed_over(tmp_path: Path):
    run = write(tmp_path, *WHOLE)
    with (run / "metrics.jsonl").open("ab") as file:
        file.write('{"event": "sample", "text": "é'.encode()[:-1])
    assert read_metrics(run) == WHOLE
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b"\n" + b"\0" * 100)
    assert read_metrics(run) == WHOLE


@pytest.mark.parametrize(
    ("lines", "number"),
    [
        ([WHOLE[0], '{"event": "tr\n', WHOLE[1]], 2),  # not before a start: no kill did this
        ([WHOLE[0], WHOLE[1], "loss 3.0\n"], 3),
        ([WHOLE[0], "[1, 2]\n"], 2),
        (['{"loss": 3.0}\n', WHOLE[0]], 1),
        (['{"event": "train", "step": "ten"}\n'], 1),
        (["\x89PNG\r\n"], 1),
    ],
)
def test_anything_else_is_an_error_that_names_the_line(tmp_path: Path, lines: list, number: int):
    with pytest.raises(DataError, match=rf"^line {number} is no event; in .*metrics\.jsonl"):
        read_metrics(write(tmp_path, *lines))


def test_a_resume_takes_back_what_came_after_its_checkpoint(tmp_path: Path):
    """The run was killed at step 30, had saved at 20, and goes on from there: 30 comes twice."""
    first = [line("start", 0), line("train", 10), line("train", 20), line("save", 20)]
    lost = [line("train", 30, loss=9.0), line("skip", 31), line("sample", 30, text="lost")]
    second = [line("start", 20, resumed_from=20), line("train", 30, loss=2.0), line("end", 30)]
    assert read_metrics(write(tmp_path, *first, *lost, *second)) == first + second


def test_only_what_is_written_again_at_the_step_of_the_resume_is_replaced(tmp_path: Path):
    """Killed between saving and validating: the train line of the step stays, others may change."""
    first = [line("start", 0), line("train", 20), line("eval", 20, val_loss=1.0)]
    second = [line("start", 20, resumed_from=20), line("eval", 20, val_loss=2.0)]
    events = read_metrics(write(tmp_path, *first, *second))
    assert kinds(events) == [("start", 0), ("train", 20), ("start", 20), ("eval", 20)]
    assert events[-1]["val_loss"] == 2.0


def test_samples_of_one_step_all_stay(tmp_path: Path):
    two = [line("sample", 10, prompt="a", text="b"), line("sample", 10, prompt="c", text="d")]
    assert read_metrics(write(tmp_path, line("start", 0), *two))[1:] == two


def test_a_finished_run_that_is_carried_on_has_not_ended(tmp_path: Path):
    first = [line("start", 0), line("train", 10), line("end", 10, reason="finished")]
    more = [line("start", 10, resumed_from=10), line("train", 20)]
    events = read_metrics(write(tmp_path, *first, *more))
    assert kinds(events) == [("start", 0), ("train", 10), ("start", 10), ("train", 20)]


def test_a_resume_from_step_0_begins_again(tmp_path: Path):
    again = [line("start", 0, parameters=2), line("train", 10, loss=2.0)]
    assert read_metrics(write(tmp_path, *WHOLE, *again)) == again


def test_a_rewind_takes_back_what_came_after_it_but_not_the_spike(tmp_path: Path):
    """The run went back from step 30 to 20 twice, and was killed and resumed after that."""
    first = [line("start", 0), line("train", 20), line("train", 29, loss=9.0)]
    spikes = [line("spike", 30, report=f"spikes/{name}.txt") for name in ("a", "b")]
    backs = [line("rewind", 20, skipped_rows=rows) for rows in (40, 80)]
    again = [line("train", 29, loss=2.0), line("train", 30)]
    told = [*first, spikes[0], backs[0], again[0], spikes[1], backs[1], *again]
    kept = [*first[:2], spikes[0], backs[0], spikes[1], backs[1], *again]
    assert read_metrics(write(tmp_path, *told)) == kept
    resumed = line("start", 20, resumed_from=20)
    assert kinds(read_metrics(write(tmp_path, *told, resumed, *told[3:]))) == kinds(
        [*first[:2], resumed, *kept[2:]]
    )


def test_the_run_and_its_metrics_file_are_the_same_thing(tmp_path: Path):
    run = write(tmp_path, *WHOLE)
    assert read_metrics(run) == read_metrics(run / "metrics.jsonl") == WHOLE
    assert write_report(str(run)) == write_report(run / "metrics.jsonl") == run / "report.html"


def test_no_metrics_and_no_events_are_told_apart(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"cannot read .*metrics\.jsonl: No such file"):
        write_report(tmp_path)
    with pytest.raises(DataError, match="nothing happened in this run yet"):
        write_report(write(tmp_path, '{"event": "st'))
    assert not (tmp_path / "report.html").exists()


def test_a_failing_write_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = write(tmp_path, *WHOLE)
    before = write_report(run).read_bytes()
    write(tmp_path, *WHOLE, line("train", 20, loss=2.0))

    def refuse(old: Path, new: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(Exception, match="No space left on device"):
        write_report(run)
    assert (run / "report.html").read_bytes() == before
    assert sorted(path.name for path in run.iterdir()) == ["metrics.jsonl", "report.html"]


def test_without_matplotlib_the_page_is_the_same_and_the_picture_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    page = draw_run(write(tmp_path, *WHOLE)).read_bytes()
    (tmp_path / "curve.png").unlink()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert draw_run(tmp_path).read_bytes() == page
    assert b"<svg" in page
    assert not (tmp_path / "curve.png").exists()


def test_reports_and_curves_need_neither_torch_nor_pyplot(tmp_path: Path):
    """The report of a finished run is drawn in a second: torch alone costs three to import."""
    script = (
        "import sys; from octavo.reporting.report import draw_run; draw_run(sys.argv[1]); "
        "sys.exit([m for m in ('torch', 'matplotlib.pyplot') if m in sys.modules] or 0)"
    )
    run = write(tmp_path / "run", *WHOLE)
    python(script, run)
    assert (run / "curve.png").read_bytes().startswith(b"\x89PNG")
