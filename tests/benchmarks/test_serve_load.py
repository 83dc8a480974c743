"""The server's benchmarks in short: no error under load, nothing lost when clients leave."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from run_kit import make_run

from octavo.text.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]


@pytest.mark.long
@pytest.mark.parametrize(
    ("words", "counted", "zero"),
    [
        (["load", "--minutes", "0.05", "--streams", "8"], "requests", ["errors"]),
        (["leave", "--clients", "80"], "clients that left", ["slots lost", "errors afterwards"]),
    ],
)
def test_a_minute_of_it(tmp_path, words, counted, zero):
    run = make_run(tmp_path / "run", Tokenizer.byte(), block_size=128)
    command = [sys.executable, str(ROOT / "benchmarks" / "serve.py"), *words, str(run)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    found = dict(re.findall(r"^(.*?) {2,}([\d,.]+) ", done.stdout, re.MULTILINE))
    assert float(found[counted].replace(",", "")) >= 8
    assert [found[name] for name in zero] == ["0.00"] * len(zero)
