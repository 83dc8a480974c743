"""The way out: what transformers loads is what was trained, or nothing is there."""

import json

import numpy as np
import pytest
import torch
from model_kit import random_model

from octavo.errors import ConfigError, MissingExtraError, ParityError
from octavo.exchanging import exporting
from octavo.exchanging.exporting import export_huggingface
from octavo.exchanging.parity import random_rows
from octavo.model_config import ModelConfig
from octavo.text.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")

TEXT = "Zażółć gęślą jaźń, the quick brown fox said 12 times: 'it's done'. 🙂\n\n  Yes.\n" * 3
LEARNED = dict(position="learned", norm="layernorm", mlp="gelu_tanh", bias=True)


def model(vocab_size, **switches):
    shape = dict(block_size=32, n_layer=2, n_head=2, d_model=16, vocab_size=vocab_size)
    return random_model(ModelConfig(**(shape | switches)), 5, noise=0.2)


def export(made, tokenizer, target, **options):
    rows = random_rows(made.config.vocab_size, 32, tokenizer)
    if tokenizer is not None:
        ids = np.resize(tokenizer.encode_array(TEXT), (2, 33))
        rows = ids.astype(np.int64)
    return export_huggingface(made, tokenizer, target, rows, "a text", name="it", **options)


TOKENIZERS = {
    "characters": lambda: Tokenizer.char(TEXT),
    "characters with a separator": lambda: Tokenizer.char(TEXT, separator=True),
    "characters, others replaced": lambda: Tokenizer.char(TEXT, unseen="replace"),
    "bytes": lambda: Tokenizer.byte(),
    "bytes with a separator": lambda: Tokenizer.byte(separator=True),
    "bpe": lambda: Tokenizer.train_bpe([TEXT], 300),
}


@pytest.mark.parametrize("switches", [LEARNED, {}], ids=["gpt2", "llama"])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_every_tokenizer_goes_out_as_what_autotokenizer_gives_back(kind, switches, tmp_path):
    """transformers rebuilds tokenizers of well-known classes by their class's rules, not the file's."""  # noqa: E501
    tokenizer = TOKENIZERS[kind]()
    export(model(tokenizer.vocab_size, **switches), tokenizer, tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs(TEXT).input_ids == tokenizer.encode(TEXT)
    assert theirs.decode(tokenizer.encode(TEXT)) == TEXT
    assert theirs.eos_token_id == tokenizer.eot_id
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.eos_token_id == loaded.generation_config.eos_token_id == tokenizer.eot_id


def test_all_files_are_there_and_no_other(tmp_path):
    tokenizer = Tokenizer.byte(separator=True)
    exported = export(model(257), tokenizer, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "README.md",
    }
    assert Tokenizer.load(tmp_path / "out").fingerprint == tokenizer.fingerprint
    assert (exported["architecture"], exported["text"]) == ("LlamaForCausalLM", "a text")
    assert (exported["tokens"], exported["greedy_tokens"]) == (64, 24)


def test_large_weights_go_out_in_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "SHARD", "10KB")
    made = model(257)
    export(made, None, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.get_input_embeddings().weight, made.tok_emb.weight)


def test_a_chat_template_goes_along(tmp_path):
    template = (
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{{ eos_token }}{% endfor %}"
    )
    settings = {"chat_template": template}
    tokenizer = Tokenizer.byte(separator=True)
    export(model(257), tokenizer, tmp_path / "out", tokenizer_config=settings)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    turns = [{"role": "user", "content": "Hello"}]
    said = theirs.apply_chat_template(turns, tokenize=False)
    assert said == "[user] Hello<|endoftext|>"


def test_no_stock_class_is_a_refusal_that_leaves_nothing(tmp_path):
    with pytest.raises(ConfigError, match=r"no stock class.*would need"):
        export(model(31, position="learned"), None, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_without_transformers_the_extra_is_named(tmp_path, monkeypatch):
    made = model(31)
    rows = random_rows(31, 32)
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"octavo\[hf\]"):
        export_huggingface(made, None, tmp_path / "out", rows, "ids", name="it")
    assert not list(tmp_path.iterdir())


def spoil_weights(directory):
    from safetensors.torch import load_file, save_file

    weights = load_file(directory / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(
        weights | {name: weights[name] + 0.1}, directory / "model.safetensors", {"format": "pt"}
    )


def spoil_config(directory):
    options = json.loads((directory / "config.json").read_bytes())
    content = json.dumps(options | {"rms_norm_eps": 0.5})
    (directory / "config.json").write_text(content, encoding="utf-8")


def spoil_tokenizer(directory):
    content = (directory / "tokenizer.json").read_text(encoding="utf-8")
    content = content.replace('"a": 97', '"a": 98').replace('"b": 98', '"b": 97')
    (directory / "tokenizer.json").write_text(content, encoding="utf-8")


def lose_weights(directory):
    (directory / "model.safetensors").unlink()


SPOILERS = {
    spoil_weights: "the logits of transformers",
    spoil_config: "the logits of transformers",
    spoil_tokenizer: "the tokenizers",
    lose_weights: r"transformers [\d.]+ cannot use what was written",
}


@pytest.mark.parametrize("spoil", SPOILERS, ids=lambda spoil: spoil.__name__)
@pytest.mark.parametrize("force", [False, True])
def test_whatever_goes_wrong_on_the_way_nothing_is_left(spoil, force, tmp_path, monkeypatch):
    """The files are spoilt between writing and reading back, as a bug or a disk would."""
    write = exporting._write

    def write_and_spoil(directory, *rest):
        write(directory, *rest)
        spoil(directory)

    monkeypatch.setattr(exporting, "_write", write_and_spoil)
    if force:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "config.json").write_text("old", encoding="utf-8")
    with pytest.raises(ParityError, match=SPOILERS[spoil]) as caught:
        export(model(257), Tokenizer.byte(separator=True), tmp_path / "out", force=force)
    assert caught.value.exit_code == 8
    assert [path.name for path in tmp_path.iterdir()] == ["out"] * force
    if force:
        assert (tmp_path / "out" / "config.json").read_text(encoding="utf-8") == "old"


def test_a_directory_that_is_not_empty_needs_force(tmp_path):
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match="not empty"):
        export(model(31), None, tmp_path)
    export(model(31), None, tmp_path, force=True)
    assert (tmp_path / "notes.txt").read_text(encoding="utf-8") == "mine"
    assert (tmp_path / "config.json").exists()


def test_adapters_and_heads_are_not_lost_on_the_way(tmp_path):
    """Without the refusal a fine-tuned model would go out as its base."""
    from octavo.adapting.lora import add_adapter

    made = model(31)
    add_adapter(made, rank=2)
    with pytest.raises(ConfigError, match=r"not a weight of a plain model.*octavo merge"):
        export(made, None, tmp_path / "out")
    assert not list(tmp_path.iterdir())
