"""What the terminal shows fits it and says what matters."""

import io

import pytest
from rich.console import Console

from octavo.evaluating.perplexity import Score
from octavo.training.display import Display, clock, facts_of

VALUES = {"loss": 1.2345, "grad_norm": 0.4567, "tokens_per_s": 123456.7, "memory_bytes": 1.234e9}


def test_facts_are_what_was_measured_and_nothing_that_is_not_known():
    assert facts_of(VALUES, None) == [
        "loss 1.234", "grad norm 0.457", "123,457 tokens/s", "1.23 GB"
    ]  # fmt: skip
    assert facts_of(VALUES | {"mfu": 0.4123}, 1.3)[1:2] == ["val 1.300"]
    assert "MFU 41%" in facts_of(VALUES | {"mfu": 0.4123}, 1.3)


@pytest.mark.parametrize("width", [80, 120])
def test_bar_and_facts_fit_the_terminal(width):
    screen = io.StringIO()
    with Display() as display:
        display.console = Console(file=screen, force_terminal=True, width=width, color_system=None)
        display.start(0, 100_000)
        display.validated(500, Score(1.3, 1, 0), True)
        display.advance(1000, 100_000, VALUES | {"mfu": 0.4123})
    lines = screen.getvalue().replace("\r", "\n").splitlines()
    bars = [line for line in lines if "step 1,000/100,000" in line]
    facts = [line for line in lines if "loss 1.234" in line]
    assert bars
    assert "ETA" in bars[-1]
    assert "1 %" in bars[-1]
    assert facts
    whole = "loss 1.234  val 1.300  grad norm 0.457  123,457 tokens/s  MFU 41%  1.23 GB"
    assert facts[-1].rstrip().endswith(whole)
    assert all(len(line.rstrip()) <= width + 10 for line in bars), "and what moves the cursor"


def test_without_a_terminal_a_line_now_and_then(capsys, monkeypatch):
    clocks = iter([0.0, 0.0, 1.0, 20.0])
    monkeypatch.setattr("octavo.training.display.time.monotonic", lambda: next(clocks))
    display = Display()
    display.start(0, 100)
    display.advance(5, 100, VALUES)
    display.advance(10, 100, VALUES)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("step 10/100  loss 1.234  grad norm 0.457")
    assert line.endswith("ETA 3:00")


def test_time_is_said_as_clocks_do():
    assert [clock(seconds) for seconds in (5, 65, 3661)] == ["0:05", "1:05", "1:01:01"]
