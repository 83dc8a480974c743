"""What a run writes down while it goes: figures, layers, and a page that follows it."""

import pytest
import torch
from test_spike import config
from training_kit import before_steps, events

from octavo.model.gpt import GPT
from octavo.model_config import ModelConfig
from octavo.training.loop import train
from octavo.training.metrics import last_event, layer_updates, weights_before

LAYERS = {"blocks.0", "blocks.1", "rest"}


def test_an_update_is_a_share_of_what_was_there_before():
    model = GPT(ModelConfig(vocab_size=9, n_layer=2, n_head=2, d_model=8, block_size=8))
    parameters = dict(model.named_parameters())
    before = weights_before(parameters)
    with torch.no_grad():
        for parameter in model.blocks[1].parameters():
            parameter *= 1.01
    assert layer_updates(parameters, before) == pytest.approx(
        {"blocks.0": 0.0, "blocks.1": 0.01, "rest": 0.0}, rel=1e-3, abs=1e-9
    )


def test_a_line_torn_within_a_letter_hides_no_other(tmp_path):
    """A full disk ends a write anywhere, and the log of a run that is over is read again."""
    log = tmp_path / "metrics.jsonl"
    log.write_bytes('{"event": "sample", "text": "ä'.encode()[:-1])
    assert last_event(log) == ""
    log.write_bytes(log.read_bytes() + b'\n{"event": "end", "step": 3}\n')
    assert last_event(log) == "end"


@pytest.mark.parametrize("layers", [False, True])
def test_metrics_carry_memory_and_mfu_and_layers_when_asked(text, tmp_path, layers):
    settings = ("train.max_steps=4", "log.every=2", f"log.layers={str(layers).lower()}")
    train(config(text, *settings), tmp_path / "run", quiet=True)
    told = events(tmp_path / "run", "train")
    assert [event["step"] for event in told] == [2, 4]
    for event in told:
        assert event["memory_bytes"] > 10e6
        assert event["mfu"] > 0
        assert set(event.get("layers", {})) == (LAYERS if layers else set())
        assert set(event.get("updates", {})) == (LAYERS if layers else set())
        assert all(0 < share < 1 for share in event.get("updates", {}).values())
    assert events(tmp_path / "run")[0]["environment"]["peak"].endswith(" TFLOP/s")


def test_the_page_follows_the_run_and_rests_when_it_is_over(text, tmp_path, monkeypatch):
    seen, page = [], tmp_path / "run" / "report.html"

    def look(step):
        seen.append(page.read_text(encoding="utf-8") if page.exists() else "")

    before_steps(monkeypatch, look)
    train(config(text, "train.max_steps=3"), tmp_path / "run", quiet=True)
    assert seen[0] == ""
    assert 'http-equiv="refresh"' in seen[1]
    assert "Training goes on" in seen[1]
    assert seen[2] == seen[1], "drawn every so often, not every step"
    over = page.read_text(encoding="utf-8")
    assert 'http-equiv="refresh"' not in over
    assert "Finished after 3 steps." in over
