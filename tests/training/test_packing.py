"""What is packed computes the same as what was trained, or nothing is packed."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from command_kit import octavo as octavo_exit
from training_kit import config_of, events

import octavo
from octavo import packed
from octavo.adapting import quantize as quantizing
from octavo.adapting.quantize import load_quantized
from octavo.checkpoint import Run, weights_sha256
from octavo.config import load_config
from octavo.errors import CheckpointError, ConfigError, NonFiniteError, ParityError
from octavo.model.gpt import GPT
from octavo.training import keeper
from octavo.training.loop import train
from octavo.training.packing import pack_run, weights_of

TEXT = "She sells sea shells by the sea shore; the shells she sells are sea shells.\n" * 30
SMALL = [
    "model.block_size=16", "model.n_layer=1", "model.n_head=2", "model.d_model=32",
    "train.max_steps=4", "train.micro_batch_size=4", "eval.windows=4", "log.sample_tokens=5",
]  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "sea.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def train_run(text, out, *settings):
    return train(config_of(text, *SMALL, *settings), out, quiet=True).run


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    return train_run(text, tmp_path_factory.mktemp("packing") / "sea")


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def pack(path, precision):
    lm = octavo.load(path, device="cpu")
    return pack_run(lm, weights_of(lm), precision)


def logits(model):
    with torch.inference_mode():
        return model(torch.arange(10)[None] % model.config.vocab_size)


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_a_packed_run_computes_nearly_what_the_run_computes(run, precision):
    facts = pack(run, precision)
    wanted, found = logits(octavo.load(run).model), logits(load_quantized(Run.open(run), precision))
    worst = {"fp16": 1e-3, "int8": 1e-2, "int4": 0.2}[precision]
    assert 0 < (wanted - found).abs().max() <= worst * wanted.abs().max()
    assert facts["step"] == 4
    assert facts["weights_sha256"] == weights_sha256(Run.open(run).best)
    said = json.loads((run / "packed" / f"{precision}.json").read_text(encoding="utf-8"))
    assert {name: said[name] for name in facts} == facts
    assert said["file"]["bytes"] >= facts["packed_bytes"]


def test_sizes_are_a_quarter_and_a_seventh_of_fp32():
    """Of a GPT-2: its positions stay fp32 and its tied head is stored once."""
    shape = dict(vocab_size=50257, block_size=1024, n_layer=12, n_head=12, d_model=768, bias=True)
    switches = dict(position="learned", norm="layernorm", mlp="gelu_tanh")
    with torch.device("meta"):
        state = GPT(octavo.ModelConfig(**shape, **switches)).state_dict()
    state.pop("lm_head.weight")
    ones = {name: np.broadcast_to(np.float32(1), tensor.shape) for name, tensor in state.items()}
    total = {"fp32": sum(4 * one.size for one in ones.values())}
    for precision in ("int8", "int4"):
        storages, remarks = quantizing.choose_storage(ones, precision)
        assert not remarks
        total[precision] = sum(kept.bytes(ones[name].shape) for name, kept in storages.items())
    assert 3.89 < total["fp32"] / total["int8"] < 4
    assert 6.8 < total["fp32"] / total["int4"] < 7.1


def test_packing_twice_gives_the_same_bytes(run):
    pack(run, "int4")
    before = packed.packed_path(run, "int4").read_bytes()
    pack(run, "int4")
    assert packed.packed_path(run, "int4").read_bytes() == before
    assert not list((run / "packed").glob(".*"))


def test_a_packing_that_does_not_compute_the_same_is_not_kept(run, monkeypatch):
    """Nibbles swapped on the way to the file: sizes and hashes are sound, logits are not."""
    pack(run, "int4")
    before = packed.packed_path(run, "int4").read_bytes()
    plain = packed.pack

    def swapped(values, scale):
        data, scales = plain(values, scale)
        return (data << 4 | data >> 4 if data.dtype == np.uint8 else data), scales

    monkeypatch.setattr(packed, "pack", swapped)
    with pytest.raises(ParityError, match="what was packed gives logits that differ"):
        pack(run, "int4")
    assert packed.packed_path(run, "int4").read_bytes() == before
    assert not list((run / "packed").glob(".*"))


def test_what_a_killed_process_left_is_swept(run):
    (run / "packed" / ".tmp-int8-dead").mkdir(parents=True)
    (run / "packed" / ".tmp-int4-alive").mkdir()
    pack(run, "int8")
    assert [path.name for path in (run / "packed").glob(".*")] == [".tmp-int4-alive"]


def test_weights_that_are_no_numbers_are_refused(run):
    lm = octavo.load(run, device="cpu")
    weights = {**weights_of(lm), "norm_f.weight": np.full(32, np.nan, np.float32)}
    with pytest.raises(NonFiniteError, match=r"norm_f.weight holds NaN"):
        pack_run(lm, weights, "int8")
    assert not packed.packed_path(run, "int8").exists()


def test_packed_weights_do_not_serve_a_run_trained_on(text, run):
    pack(run, "int8")
    old = weights_sha256(Run.open(run).best)
    config = load_config(run / "config.yaml", ["train.max_steps=8"])
    train(config, run, resume=True, quiet=True)
    new = weights_sha256(Run.open(run).best)
    assert new != old
    with pytest.raises(CheckpointError) as refused:
        load_quantized(Run.open(run), "int8")
    for part in (old[:16], new[:16], f"octavo quantize {run} --to int8"):
        assert part in str(refused.value)


def test_an_adapter_is_merged_into_a_packed_copy_of_its_own(text, run, tmp_path):
    words = ["train.max_steps=3", "train.micro_batch_size=4", "log.sample_tokens=5", "optim.lr=0.1"]
    assert octavo_exit("finetune", run, text, *words, "--out", tmp_path / "tuned", "--quiet") == 0
    base, tuned = octavo.load(run, device="cpu"), octavo.load(tmp_path / "tuned", device="cpu")
    wanted = logits(tuned.model)
    facts = pack(tmp_path / "tuned", "int8")
    assert facts["weights_sha256"] == weights_sha256(tuned.checkpoint)
    found = logits(load_quantized(Run.open(tmp_path / "tuned"), "int8"))
    near = (wanted - found).abs().max() / wanted.abs().max()
    far = (wanted - logits(base.model)).abs().max() / wanted.abs().max()
    assert near < 0.02 < far


def test_only_runs_that_write_can_be_packed(trained):
    lm = octavo.load(trained, device="cpu")
    with pytest.raises(ConfigError, match="only a run's weights can be packed"):
        weights_of(octavo.LanguageModel(lm.config, None, model=lm.model))
    config = lm.run.config
    sorts = dataclasses.replace(config.finetune, labels=["a", "b"])
    lm.run.__dict__["config"] = dataclasses.replace(config, finetune=sorts)
    with pytest.raises(ConfigError, match="a classifier writes nothing"):
        weights_of(lm)


def test_training_packs_its_best_weights_at_the_end(text, tmp_path):
    out = train_run(text, tmp_path / "run", "train.quantize=int4")
    facts = json.loads((out / "packed" / "int4.json").read_text(encoding="utf-8"))
    assert facts["weights_sha256"] == weights_sha256(Run.open(out).best)
    assert load_quantized(Run.open(out), "int4").config.d_model == 32


def test_s2s_spelling_packs_too(text, tmp_path):
    recipe = tmp_path / "s2.yaml"
    recipe.write_text("advanced: {quantize: int8}\n", encoding="utf-8")
    out = tmp_path / "run"
    assert octavo_exit("train", recipe, text, *SMALL, "--out", out, "--quiet") == 0
    assert (out / "packed" / "int8.json").exists()


def test_a_run_is_none_the_worse_for_a_packing_that_fails(text, tmp_path, monkeypatch, capsys):
    def refuse(*args):
        raise ParityError("no luck")

    monkeypatch.setattr(keeper, "pack_run", refuse)
    config = config_of(text, *SMALL)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, quantize="int8"))
    result = train(config, tmp_path / "run")
    assert result.reason == "finished"
    said = " ".join(capsys.readouterr().out.split())
    assert "warning: not packed: no luck" in said
    assert f"octavo quantize {tmp_path / 'run'} --to int8" in said
    assert events(tmp_path / "run")[-1]["event"] == "end"
