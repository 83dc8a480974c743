"""How soon a recipe comes to another's loss: which runs are made, and when they are enough."""

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import budget
import same_loss


def minutes_tried(monkeypatch: pytest.MonkeyPatch, enough: float) -> list[tuple[str, float]]:
    """The recipes and minutes of the runs, where the second recipe needs ``enough`` minutes."""
    tried = []

    def run(words: list[str], minutes: float, seed: int) -> dict[str, float]:
        recipe = "slow.yaml" if "slow.yaml" in words else "quick.yaml"
        tried.append((recipe, minutes))
        reached = recipe == "slow.yaml" or minutes >= enough
        return {"bits": 2.0 if reached else 2.1, "seconds": 60 * minutes}

    monkeypatch.setattr(budget, "run", run)
    settings: dict[str, Any] = {"target": "slow.yaml", "recipe": "quick.yaml", "text": "my.txt"}
    settings |= {"minutes": 16.0, "halvings": 4, "words": []}
    assert [recipe for recipe, _ in same_loss.runs(argparse.Namespace(**settings), seed=1)]
    return tried


def test_time_doubles_until_the_loss_is_reached(monkeypatch: pytest.MonkeyPatch):
    tried = minutes_tried(monkeypatch, enough=3.0)
    assert tried == [("slow.yaml", 16.0), *(("quick.yaml", of) for of in (1.0, 2.0, 4.0))]


def test_a_loss_that_is_never_reached_is_said(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(SystemExit, match=r"quick\.yaml does not come to 2\.0000 bits a byte"):
        minutes_tried(monkeypatch, enough=17.0)
