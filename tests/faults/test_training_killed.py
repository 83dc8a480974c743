"""A training run that is killed, at any named point or at any time, ends as if it never was."""

import pytest
import trials


@pytest.mark.timeout(300)
def test_killed_at_every_named_point_it_loses_nothing():
    """Every file is unsynced, synced, renamed; every line logged; what retires is renamed, gone."""
    found = trials.ask({"points": 1})["points"]
    assert found["lost"] == []
    assert found["different"] == []
    assert {
        "config.yaml-unsynced", "model.safetensors-unsynced", "optimizer.safetensors-synced",
        "manifest.json-synced", "scratch-synced", "checkpoints-unsynced", "best.json-prepared",
        "best.json-replaced", "trash-renamed", "trash-deleted", "swept", "validating",
        "logged-start", "logged-train", "logged-save", "logged-eval", "logged-sample",
        "logged-end", "report.html-replaced",
    } <= set(found["points"])  # fmt: skip


@pytest.mark.timeout(300 * trials.TIMES)
def test_kill_9_at_any_time_loses_nothing_and_changes_no_bit():
    found = trials.ask({"kills": 100 * trials.TIMES})["kills"]
    assert found["killed"] == 100 * trials.TIMES
    assert (found["lost"], found["different"]) == (0, 0)
    assert found["runs"] < found["killed"]  # most kills hit a run that was killed before


@pytest.mark.long
@pytest.mark.timeout(600 * trials.TIMES)
def test_a_compiled_run_that_is_killed_changes_no_bit():
    found = trials.ask({"kills": 3 * trials.TIMES}, "train.compile=true")["kills"]
    assert (found["lost"], found["different"]) == (0, 0)
