"""The way in: a run that says where it is from, or one line and nothing written."""

import hashlib
import json
import sys

import numpy as np
import pytest
import torch
from model_kit import random_model
from safetensors.torch import load_file, save_file

import octavo
from octavo.checkpoint import Run
from octavo.errors import CheckpointError, ConfigError, DataError, ParityError, ResourceError
from octavo.exchanging import importing
from octavo.exchanging.families import choose_family
from octavo.exchanging.importing import import_model
from octavo.model_config import ModelConfig
from octavo.text.tokenizer import Tokenizer

TEXT = "abcdefghij klmnop.\n"  # 19 characters


def source(folder, tokenizer=None, **switches):
    """A Hugging Face directory with weights of its own, written without transformers."""
    shape = dict(vocab_size=260, block_size=32, n_layer=2, n_head=2, d_model=16)
    model = random_model(ModelConfig(**(shape | switches)), 5, noise=0.2)
    family = choose_family(model.config)
    folder.mkdir()
    options = {"architectures": [family.name], "model_type": family.name.lower().split("for")[0]}
    options |= family.options(model.config)
    (folder / "config.json").write_text(json.dumps(options), encoding="utf-8")
    weights = family.to_theirs(model.config, model.state_dict())
    weights = {name: tensor.contiguous() for name, tensor in weights.items()}
    weights.pop("lm_head.weight") if model.config.tie_embeddings else None
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    if tokenizer is not None:
        tokenizer.save(folder)
    return model


def nanogpt(folder, vocab_size=19):
    args = dict(n_layer=1, n_head=2, n_embd=8, block_size=16, bias=False, vocab_size=vocab_size)
    generator = torch.Generator().manual_seed(11)
    shapes = {"wte": (vocab_size, 8), "wpe": (16, 8), "ln_f": (8,)}
    shapes |= {"h.0.ln_1": (8,), "h.0.ln_2": (8,), "h.0.attn.c_attn": (24, 8)}
    shapes |= {"h.0.attn.c_proj": (8, 8), "h.0.mlp.c_fc": (32, 8), "h.0.mlp.c_proj": (8, 32)}
    model = {
        f"transformer.{name}.weight": torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }
    model["lm_head.weight"] = model["transformer.wte.weight"]
    folder.mkdir(exist_ok=True)
    torch.save({"model": model, "model_args": args}, folder / "ckpt.pt")
    return folder / "ckpt.pt"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_run_writes_scores_and_says_where_it_is_from(tmp_path):
    tokenizer = Tokenizer.byte(separator=True)
    model = source(tmp_path / "theirs", tokenizer)
    imported = import_model(str(tmp_path / "theirs"), tmp_path / "run")
    lm = octavo.load(tmp_path / "run", device="cpu")
    for name, tensor in model.state_dict().items():
        assert torch.equal(lm.model.state_dict()[name], tensor), name
    assert isinstance(lm.generate("The ", max_new_tokens=5), str)
    assert lm.score("The quick").tokens == 8
    assert lm.tokenizer.fingerprint == tokenizer.fingerprint
    data = json.loads((tmp_path / "run" / "data.json").read_bytes())
    for name in ("config.json", "model.safetensors"):
        digest = hashlib.sha256((tmp_path / "theirs" / name).read_bytes()).hexdigest()
        assert data["imported"][name] == digest
    assert (data["name"], data["architecture"]) == ("theirs", "LlamaForCausalLM")
    assert data["folder"] == str(tmp_path / "theirs")
    assert data["largest_difference"] == imported["largest_difference"]
    assert imported["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    run = Run.open(tmp_path / "run")
    assert run.load().step == 0
    assert run.load().optimizer_tensors() == {}
    assert names(tmp_path) == ["run", "theirs"]


def test_the_comparison_is_with_transformers_and_its_figure_is_kept(tmp_path):
    transformers = pytest.importorskip("transformers")
    source(tmp_path / "theirs")
    imported = import_model(str(tmp_path / "theirs"), tmp_path / "run")
    assert imported["compared_with"] == f"transformers {transformers.__version__}"
    assert 0 <= imported["largest_difference"] < 1e-5


@pytest.mark.parametrize("kind", ["directory", "nanoGPT"])
def test_other_logits_are_refused_and_nothing_is_written(kind, tmp_path, monkeypatch):
    """As if a map exchanged gate and up: every name and every shape is right."""
    pytest.importorskip("transformers")
    if kind == "directory":
        source(tmp_path / "theirs")
    else:
        nanogpt(tmp_path / "theirs")
    read = importing.read_source

    def exchanged(name):
        found = read(name)
        first, last = found.model.blocks[0], found.model.blocks[-1]
        weights = (
            first.mlp.up_proj.weight,
            getattr(last.mlp, "gate_proj", last.mlp.up_proj).weight,
        )
        with torch.no_grad():
            weights[0].copy_(weights[1].flip(0))
        return found

    monkeypatch.setattr(importing, "read_source", exchanged)
    with pytest.raises(ParityError, match="the logits of transformers") as caught:
        import_model(str(tmp_path / "theirs"), tmp_path / "run")
    assert caught.value.exit_code == 8
    assert names(tmp_path) == ["theirs"]


def test_without_transformers_it_is_said_that_nothing_was_compared(tmp_path, monkeypatch):
    model = source(tmp_path / "theirs")
    monkeypatch.setitem(sys.modules, "transformers", None)
    imported = import_model(str(tmp_path / "theirs"), tmp_path / "run")
    assert imported["largest_difference"] is None
    assert any("not compared" in remark for remark in imported["remarks"])
    read = octavo.load(tmp_path / "run", device="cpu").model
    assert torch.equal(read.tok_emb.weight, model.tok_emb.weight)


def test_what_transformers_cannot_load_is_not_taken_on_trust(tmp_path):
    pytest.importorskip("transformers")
    source(tmp_path / "theirs")
    options = json.loads((tmp_path / "theirs" / "config.json").read_bytes())
    content = json.dumps(options | {"attention_dropout": "much"})
    (tmp_path / "theirs" / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises((CheckpointError, ConfigError)):
        import_model(str(tmp_path / "theirs"), tmp_path / "run")
    assert names(tmp_path) == ["theirs"]


def test_special_tokens_and_template_come_along(tmp_path):
    source(tmp_path / "theirs", Tokenizer.byte(separator=True))
    content = {
        "eos_token": "<|endoftext|>",
        "chat_template": "{{ messages }}",
        "auto_map": {"A": "b"},
    }
    file = tmp_path / "theirs" / "tokenizer_config.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    import_model(str(tmp_path / "theirs"), tmp_path / "run")
    kept = json.loads((tmp_path / "run" / "tokenizer_config.json").read_bytes())
    assert kept == {"eos_token": "<|endoftext|>", "chat_template": "{{ messages }}"}


def test_without_a_tokenizer_the_model_takes_and_gives_ids(tmp_path):
    source(tmp_path / "theirs")
    imported = import_model(str(tmp_path / "theirs"), tmp_path / "run")
    assert imported["tokenizer"] == "none: this model takes and gives ids"
    assert any(remark.startswith("no tokenizer: ") for remark in imported["remarks"])
    lm = octavo.load(tmp_path / "run", device="cpu")
    assert len(lm.generate_ids([[1, 2, 3]], max_new_tokens=4)[0]) == 4


def test_a_tokenizer_octavo_cannot_represent_is_left_out_and_named(tmp_path):
    source(tmp_path / "theirs")
    spec = {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": None}
    spec |= {"post_processor": None, "decoder": None, "model": {"type": "Unigram", "vocab": []}}
    (tmp_path / "theirs" / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    imported = import_model(str(tmp_path / "theirs"), tmp_path / "run")
    assert any("type Unigram" in remark for remark in imported["remarks"])
    assert not (tmp_path / "run" / "tokenizer.json").exists()


def test_a_tokenizer_with_more_ids_than_the_model_is_left_out(tmp_path):
    source(tmp_path / "theirs", Tokenizer.byte(separator=True), vocab_size=256)
    imported = import_model(str(tmp_path / "theirs"), tmp_path / "run")
    assert any("257 tokens, the model 256" in remark for remark in imported["remarks"])


def test_a_tokenizer_can_be_named(tmp_path):
    source(tmp_path / "theirs")
    Tokenizer.byte().save(tmp_path / "bytes.json")
    import_model(str(tmp_path / "theirs"), tmp_path / "run", tokenizer=str(tmp_path / "bytes.json"))
    assert octavo.load(tmp_path / "run").tokenizer.kind == "byte"


def test_nanogpt_with_the_characters_of_its_text(tmp_path):
    """Its meta.pkl is a pickle and stays shut; the sorted characters of the text are the same."""
    (tmp_path / "input.txt").write_text(TEXT, encoding="utf-8")
    file = nanogpt(tmp_path / "out")
    imported = import_model(str(file), tmp_path / "run", tokenizer=str(tmp_path / "input.txt"))
    assert imported["architecture"] == "nanoGPT"
    lm = octavo.load(tmp_path / "run", device="cpu")
    characters = sorted(set(TEXT))
    assert lm.tokenizer.encode("cab") == [characters.index(c) for c in "cab"]
    assert set(lm.generate("a", max_new_tokens=9)) <= set(TEXT)
    data = json.loads((tmp_path / "run" / "data.json").read_bytes())
    assert data["imported"] == {"ckpt.pt": hashlib.sha256(file.read_bytes()).hexdigest()}


def test_nanogpt_by_its_directory_and_without_a_tokenizer(tmp_path):
    nanogpt(tmp_path / "out")
    (tmp_path / "out" / "meta.pkl").write_bytes(b"never opened")
    imported = import_model(str(tmp_path / "out"), tmp_path / "run")
    assert any("meta.pkl" in remark for remark in imported["remarks"])
    if imported["largest_difference"] is not None:
        assert imported["largest_difference"] < 1e-5


def test_characters_of_another_text_are_refused_with_both_numbers(tmp_path):
    (tmp_path / "input.txt").write_text("ab", encoding="utf-8")
    file = nanogpt(tmp_path / "out")
    with pytest.raises(DataError, match=rf"2 tokens, the model {len(set(TEXT))}"):
        import_model(str(file), tmp_path / "run", tokenizer=str(tmp_path / "input.txt"))
    with pytest.raises(DataError, match="cannot read the text"):
        import_model(str(file), tmp_path / "run", tokenizer=str(tmp_path / "nowhere.txt"))
    assert not (tmp_path / "run").exists()


def test_gpt2s_vocabulary_is_known_by_its_size(tmp_path, monkeypatch):
    """nanoGPT pads it to 50,304; the padding is never written."""
    file = nanogpt(tmp_path / "out", vocab_size=50304)
    monkeypatch.setattr(Tokenizer, "gpt2", lambda: Tokenizer.byte(separator=True))
    imported = import_model(str(file), tmp_path / "run")
    assert any("taken to be GPT-2's" in remark for remark in imported["remarks"])

    def offline():
        raise ResourceError("cannot download GPT-2's tokenizer")

    monkeypatch.setattr(Tokenizer, "gpt2", offline)
    imported = import_model(str(file), tmp_path / "ids")
    assert "no tokenizer: cannot download GPT-2's tokenizer" in imported["remarks"]


@pytest.mark.parametrize("there", ["run/config.yaml", "run/notes.txt", "run"])
def test_nothing_is_written_over(there, tmp_path):
    (tmp_path / there).parent.mkdir(exist_ok=True)
    (tmp_path / there).write_text("precious", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"is a run|is not empty|is a file"):
        import_model("anything", tmp_path / "run")
    assert (tmp_path / there).read_text(encoding="utf-8") == "precious"


@pytest.mark.parametrize("name", ["model.zip", "model.tar.gz", "model.gguf", "model.safetensors"])
def test_files_that_are_no_checkpoint_of_nanogpt_are_not_opened(name, tmp_path):
    (tmp_path / name).write_bytes(b"PK\x03\x04../../canary")
    with pytest.raises(ConfigError, match="unpack archives first"):
        import_model(str(tmp_path / name), tmp_path / "run")


def test_a_run_is_no_source(tmp_path):
    source(tmp_path / "theirs")
    import_model(str(tmp_path / "theirs"), tmp_path / "run")
    with pytest.raises(ConfigError, match="is a run already"):
        import_model(str(tmp_path / "run"), tmp_path / "again")


def test_weights_that_are_not_finite_leave_no_half_run(tmp_path, monkeypatch):
    """The run appears with its weights or not at all: without them it would train from noise."""
    source(tmp_path / "theirs")
    file = tmp_path / "theirs" / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"][3] = np.nan
    save_file(weights, file, {"format": "pt"})
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ArithmeticError, match=r"norm_f\.weight holds NaN"):
        import_model(str(tmp_path / "theirs"), tmp_path / "run")
    assert names(tmp_path) == ["theirs"]


def test_offline_a_name_on_the_hub_is_answered_with_the_way_by_directory(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ResourceError, match=r"no directory nobody/nothing.*config\.json") as caught:
        import_model("nobody/nothing", tmp_path / "run")
    assert caught.value.exit_code == 6


def test_a_name_on_the_hub_is_fetched_without_pickles(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    source(tmp_path / "snapshot")
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(hub, "snapshot_download", download)
    import_model("somebody/llama", tmp_path / "run")
    assert asked["name"] == "somebody/llama"
    assert not any("bin" in pattern or "*.p" in pattern for pattern in asked["allow_patterns"])
    data = json.loads((tmp_path / "run" / "data.json").read_bytes())
    assert data["name"] == "somebody/llama"


def test_without_the_hubs_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match=r"no directory somebody/llama.*octavo\[hf\]"):
        import_model("somebody/llama", tmp_path / "run")


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/place", "ckpt.pt", "a/b/c"])
def test_what_can_only_be_a_path_is_not_looked_for_on_the_hub(name, tmp_path):
    with pytest.raises(ConfigError, match="there is no"):
        import_model(name, tmp_path / "run")
