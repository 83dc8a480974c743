"""`octavo generate` on the native engine never imports torch, which costs seconds and 220 MB."""

import subprocess
import sys

import numpy as np
import pytest

from octavo.checkpoint import Run
from octavo.config import Config
from octavo.generating.native_tables import tensor_shapes
from octavo.model_config import ModelConfig
from octavo.text.tokenizer import Tokenizer

TEXTS = {
    "char": Tokenizer.char("abcdefgh \n"),
    "bpe": Tokenizer.train_bpe(["the cat sat on the mat and that is that " * 9], 280),
}


def make_run(path, tokenizer):
    """A run with random weights, made without torch too."""
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, block_size=16, n_layer=2, n_head=2, d_model=16
    )
    rng = np.random.default_rng(0)
    weights = {
        name: rng.standard_normal(shape, dtype=np.float32)
        for name, shape in tensor_shapes(config).items()
    }
    weights["lm_head.weight"] = weights["tok_emb.weight"]
    return Run.create_with_weights(path, Config(model=config), tokenizer, {}, weights)


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize(
    "options",
    [
        ["--prompt", "a b", "--max-new-tokens", "40", "--top-p", "0.9"],
        ["--n", "3", "--max-new-tokens", "20", "--json"],
        ["--prompt", "a", "--stream", "--speculate", "lookup"],
    ],
    ids=lambda options: options[-1],
)
def test_the_command_writes_without_torch(tmp_path, kind, options):
    run = make_run(tmp_path / "run", TEXTS[kind])
    program = f"""
import sys
from octavo.cli import main
try:
    main(["generate", {str(run.path)!r}, *{options!r}])
except SystemExit as end:
    assert not end.code, end.code
assert "torch" not in sys.modules, "torch was imported"
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout
