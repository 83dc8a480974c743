"""nanoGPT's checkpoints: the same function, and never a line of theirs executed."""

import math
import pickle
import zipfile

import pytest
import torch
import torch.nn.functional as F
from run_kit import Canary

from octavo.errors import CheckpointError
from octavo.exchanging.nanogpt import as_gpt2, read_nanogpt

ARGS = dict(n_layer=2, n_head=4, n_embd=32, block_size=24, bias=True, vocab_size=31, dropout=0.1)


def checkpoint(prefix="", masks=False, **changes):
    """What nanoGPT's train.py saves, with every number of its own."""
    args = {key: value for key, value in (ARGS | changes).items() if value is not None}
    D, generator = args["n_embd"], torch.Generator().manual_seed(11)

    def random(*shape):
        return torch.randn(shape, generator=generator) * 0.2

    model = {"transformer.wte.weight": random(args["vocab_size"], D)}
    model["transformer.wpe.weight"] = random(args["block_size"], D)
    shapes = {"attn.c_attn": (3 * D, D), "attn.c_proj": (D, D)}
    shapes |= {"mlp.c_fc": (4 * D, D), "mlp.c_proj": (D, 4 * D)}
    for layer in range(args["n_layer"]):
        h = f"transformer.h.{layer}"
        for norm in ("ln_1", "ln_2"):
            model[f"{h}.{norm}.weight"] = 1 + random(D)
            model[f"{h}.{norm}.bias"] = random(D)
        for name, shape in shapes.items():
            model[f"{h}.{name}.weight"] = random(*shape)
            model[f"{h}.{name}.bias"] = random(shape[0])
        if masks:
            model[f"{h}.attn.bias"] = torch.ones(24, 24).tril()[None, None]
    model["transformer.ln_f.weight"], model["transformer.ln_f.bias"] = 1 + random(D), random(D)
    model["lm_head.weight"] = model["transformer.wte.weight"]
    if not args.get("bias", True):
        model = {name: t for name, t in model.items() if not name.endswith(".bias")}
    model = {prefix + name: tensor for name, tensor in model.items()}
    return {
        "model": model,
        "optimizer": {"state": {0: {"step": torch.tensor(5.0)}}, "param_groups": []},
        "model_args": args,
        "iter_num": 5,
        "best_val_loss": torch.tensor(1.5),
        "config": {"dataset": "shakespeare_char", "learning_rate": 1e-3, "compile": False},
    }


def save(folder, content):
    torch.save(content, folder / "ckpt.pt")
    return folder / "ckpt.pt"


def nanogpt(content, idx, gelu=F.gelu):
    """Its model.py's forward pass, written as it is there."""
    model, args = content["model"], content["model_args"]
    model = {name.removeprefix("_orig_mod."): tensor for name, tensor in model.items()}

    def linear(x, name):
        return F.linear(x, model[f"{name}.weight"], model.get(f"{name}.bias"))

    def norm(x, name):
        weight = model[f"{name}.weight"]
        return F.layer_norm(x, weight.shape, weight, model.get(f"{name}.bias"), 1e-5)

    B, T = idx.shape
    C, n_head = args["n_embd"], args["n_head"]
    x = model["transformer.wte.weight"][idx] + model["transformer.wpe.weight"][:T]
    for layer in range(args["n_layer"]):
        h = f"transformer.h.{layer}"
        q, k, v = linear(norm(x, f"{h}.ln_1"), f"{h}.attn.c_attn").split(C, dim=2)
        q, k, v = (y.view(B, T, n_head, C // n_head).transpose(1, 2) for y in (q, k, v))
        att = (q @ k.transpose(-2, -1)) / math.sqrt(C // n_head)
        att = att.masked_fill(torch.ones(T, T).tril() == 0, float("-inf")).softmax(dim=-1)
        y = (att @ v).transpose(1, 2).reshape(B, T, C)
        x = x + linear(y, f"{h}.attn.c_proj")
        x = x + linear(gelu(linear(norm(x, f"{h}.ln_2"), f"{h}.mlp.c_fc")), f"{h}.mlp.c_proj")
    return F.linear(norm(x, "transformer.ln_f"), model["lm_head.weight"])


def ids():
    return torch.randint(0, 31, (2, 24), generator=torch.Generator().manual_seed(1))


CASES = {
    "plain": {},
    "compiled": dict(prefix="_orig_mod."),
    "without biases": dict(bias=False),
    "with the masks of slow attention": dict(masks=True),
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_are_those_of_its_own_forward_pass(case, tmp_path):
    content = checkpoint(**CASES[case])
    model, _ = read_nanogpt(save(tmp_path, content))
    wanted = nanogpt(content, ids())
    assert (model(ids()) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert not model.training
    assert model.config.tie_embeddings
    assert model.config.dropout == 0.1


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_transformers_gpt2_computes_the_same(bias, tmp_path):
    """What `octavo import` compares with."""
    transformers = pytest.importorskip("transformers")
    model, weights = read_nanogpt(save(tmp_path, checkpoint(bias=bias)))
    theirs = as_gpt2(transformers, model.config, weights)(ids()).logits
    assert (model(ids()) - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@torch.no_grad()
def test_files_older_than_the_switch_for_biases(tmp_path):
    """They have biases, and GELU's tanh form."""
    content = checkpoint(bias=None)
    model, _ = read_nanogpt(save(tmp_path, content))
    wanted = nanogpt(content, ids(), gelu=lambda x: F.gelu(x, approximate="tanh"))
    assert (model(ids()) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_a_head_of_its_own(tmp_path):
    content = checkpoint()
    content["model"]["lm_head.weight"] = content["model"]["lm_head.weight"] + 1
    model, _ = read_nanogpt(save(tmp_path, content))
    assert not model.config.tie_embeddings
    assert torch.equal(model.lm_head.weight, content["model"]["lm_head.weight"])


@pytest.mark.parametrize("place", ["beside", "in the arguments", "among the weights", "old format"])
def test_a_pickle_with_code_in_it_is_never_run(place, tmp_path):
    content, canary = checkpoint(), tmp_path / "canary"
    where = {"beside": content, "in the arguments": content["model_args"]}
    where.get(place, content["model"])["x"] = Canary(canary)
    torch.save(content, tmp_path / "ckpt.pt", _use_new_zipfile_serialization=place != "old format")
    with pytest.raises(CheckpointError, match="holds more than data, and was not run"):
        read_nanogpt(tmp_path / "ckpt.pt")
    assert not canary.exists()


def test_a_bare_pickle_is_never_run(tmp_path):
    canary = tmp_path / "canary"
    (tmp_path / "ckpt.pt").write_bytes(pickle.dumps(Canary(canary)))
    with pytest.raises(CheckpointError, match="was not run"):
        read_nanogpt(tmp_path / "ckpt.pt")
    assert not canary.exists()


def test_an_archive_whose_entries_climb_out_leaves_nothing(tmp_path):
    (tmp_path / "in").mkdir()
    file = tmp_path / "in" / "ckpt.pt"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("../canary", "x")
        archive.writestr("ckpt/../../canary", "x")
        archive.writestr("ckpt/data.pkl", pickle.dumps({"model": {}, "model_args": {}}))
    with pytest.raises(CheckpointError):
        read_nanogpt(file)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_what_is_no_checkpoint_of_nanogpt(tmp_path):
    for content in ([1, 2], {"weights": 1}, {"model": {}, "model_args": None}):
        with pytest.raises(CheckpointError, match="no nanoGPT checkpoint"):
            read_nanogpt(save(tmp_path, content))
    (tmp_path / "ckpt.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="damaged"):
        read_nanogpt(tmp_path / "ckpt.pt")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["model_args"].pop("n_head"), "model_args lacks n_head"),
        (lambda c: c["model"].pop("lm_head.weight"), r"misses lm_head\.weight"),
        (lambda c: c["model"].pop("transformer.h.1.attn.c_attn.bias"), r"misses .*c_attn\.bias"),
        (lambda c: c["model"].update(sink=torch.ones(2)), "has an unknown sink"),
        (lambda c: c["model_args"].update(block_size=25), r"\(24, 32\), not \(25, 32\)"),
        (lambda c: c["model_args"].update(n_layer=3), "misses layer 2 of 3"),
    ],
)
def test_what_is_missing_left_over_or_of_another_shape(change, words, tmp_path):
    content = checkpoint()
    change(content)
    with pytest.raises(CheckpointError, match=words):
        read_nanogpt(save(tmp_path, content))
