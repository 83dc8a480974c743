"""The pages that show commands, typed as they stand; only the training is shortened."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
SHORT = {
    "train": ["train.max_steps=12", "eval.windows=8", "log.sample_tokens=5"],
    "finetune": ["train.max_steps=6", "eval.windows=8", "log.sample_tokens=5"],
}


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", ["finetune.md", "data.md", "reliability.md"])
def test_every_command_of_a_page_works(page, tmp_path):
    text = (DOCS / page).read_text(encoding="utf-8")
    (tmp_path / "voice.txt").write_text(text.encode("ascii", "ignore").decode() * 3)
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        for line in block.splitlines():
            program, command, *words = shlex.split(line, comments=True)
            assert program == "octavo"
            settings = [s for s in SHORT.get(command, []) if s.split("=")[0] not in line]
            typed = [sys.executable, "-m", "octavo", command, *words, *settings]
            done = subprocess.run(typed, cwd=tmp_path, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{line}\n{done.stderr}"
