"""`octavo generate` on the native engine never imports torch, which costs seconds and 220 MB."""

import pytest
from command_kit import octavo_without_torch
from run_kit import make_run

from octavo.text.tokenizer import Tokenizer

TEXTS = {
    "char": Tokenizer.char("abcdefgh \n"),
    "bpe": Tokenizer.train_bpe(["the cat sat on the mat and that is that " * 9], 280),
}


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
    run = make_run(tmp_path / "run", TEXTS[kind], block_size=16, tie_embeddings=True)
    assert octavo_without_torch("generate", run, *options).stdout
