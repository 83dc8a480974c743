"""The card's numbers are the run's, and what is not known is not there."""

import json

from octavo.checkpoint import Run
from octavo.config import Config, ModelConfig
from octavo.exchanging.model_card import facts_of, write_card
from octavo.model.gpt import GPT
from octavo.text.tokenizer import Tokenizer

MODEL = ModelConfig(vocab_size=257, block_size=8, n_layer=1, n_head=2, d_model=16)
PARITY = {
    "against": "transformers 9.9", "text": "random ids", "tokens": 96, "greedy_tokens": 32,
    "largest_difference": 3.2e-7, "perplexity": 12.25, "perplexity_there": 12.5000001,
}  # fmt: skip
EVAL = {"event": "eval", "val_loss": 1.25, "val_ppl": 3.4903, "val_bpb": 1.8034}


def make_run(folder, step, data, events):
    config = Config(model=MODEL)
    files = {"data.json": json.dumps(data).encode()}
    run = Run.create(folder / "run", config, Tokenizer.byte(separator=True), files)
    checkpoint = run.save(step, GPT(MODEL).state_dict(), {}, {"tokens": 6400}, keep=1)
    lines = [json.dumps(event) for event in events]
    (run.path / "metrics.jsonl").write_text("\n".join([*lines, '{"torn']), encoding="utf-8")
    return run, checkpoint


def test_a_trained_run_tells_its_data_steps_and_validation(tmp_path):
    data = {"name": "fox", "sha256": "ab" * 32, "tokens": 12345}
    events = [EVAL | {"step": 50, "val_loss": 9.9}, EVAL | {"step": 100}, {"event": "end"}]
    assert facts_of(*make_run(tmp_path, 100, data, events)) == {
        "Text": "fox, 12,345 tokens",
        "SHA-256 of that text": f"`{'ab' * 32}`",
        "Steps": "100",
        "Tokens learned from": "6,400",
        "Validation loss": "1.2500 nats a token",
        "Validation perplexity": "3.490",
        "Validation bits per byte": "1.8034",
    }


def test_a_validation_of_other_weights_is_not_quoted(tmp_path):
    """Only the step that is exported counts, and its last validation after a rollback."""
    run, checkpoint = make_run(tmp_path, 100, {}, [EVAL | {"step": 50}, EVAL | {"step": 150}])
    assert facts_of(run, checkpoint).keys() == {"Steps", "Tokens learned from"}
    again = [EVAL | {"step": 100}, EVAL | {"step": 100, "val_loss": 1.125}]
    (run.path / "metrics.jsonl").write_text("\n".join(map(json.dumps, again)), encoding="utf-8")
    assert facts_of(run, checkpoint)["Validation loss"] == "1.1250 nats a token"


def test_a_loss_that_was_not_finite_is_no_number(tmp_path):
    events = [EVAL | {"step": 100}, EVAL | {"step": 100, "val_loss": None}]
    assert "Validation loss" not in facts_of(*make_run(tmp_path, 100, {}, events))


def test_an_imported_run_tells_where_it_is_from(tmp_path):
    data = {"name": "gpt2", "architecture": "GPT2LMHeadModel", "imported": {"config.json": "00"}}
    found = facts_of(*make_run(tmp_path, 0, data, []))
    assert found == {"Imported from": "gpt2 (GPT2LMHeadModel)"}


def test_the_card():
    tokenizer = Tokenizer.byte(separator=True)
    card = write_card("my", "LlamaForCausalLM", MODEL, tokenizer, {"Steps": "7"}, PARITY)
    assert card.startswith("---\nlibrary_name: transformers\n")
    n_parameters = sum(p.numel() for p in GPT(MODEL).parameters())
    for words in (
        "# my\n",
        f"| Parameters | {n_parameters:,} |",
        "| Context | 8 tokens |",
        "| Vocabulary | 257, bytes |",
        "| Steps | 7 |",
        "loaded by transformers 9.9",
        "96 tokens (random ids)",
        "at most 3.2e-07 of the largest (0.0001 is allowed)",
        "perplexity is 12.5 beside 12.25",
        "32 tokens of greedy text",
        "AutoTokenizer.from_pretrained",
    ):
        assert words in card, words
    assert "license" not in card  # not ours to choose
    without = write_card("my", "LlamaForCausalLM", MODEL, None, {}, PARITY)
    assert "takes and gives ids" in without
    assert "AutoTokenizer" not in without
