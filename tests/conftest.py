"""What every test stands on: one thread, the same seeds every time, and a cache of its own."""

import os
import random
import signal
import sys
from pathlib import Path

# Before anything imports torch: each of several pytest workers would otherwise take all cores.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MPLBACKEND"] = "Agg"

import hypothesis
import numpy as np
import pytest

# A shell that runs the tests in its background makes them ignore Ctrl-C, and all they start with
# them; a handler of one's own, unlike ignoring, is not inherited.
signal.signal(signal.SIGINT, signal.default_int_handler)

hypothesis.settings.register_profile("octavo", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("octavo")


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def cache_dir(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where downloads are kept: empty, and this test's alone."""
    directory = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("OCTAVO_CACHE", str(directory))
    return directory


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """A test that forgets to seed is still the same test tomorrow, and the same alone."""
    random.seed(1337)
    np.random.seed(1337)
    if torch := sys.modules.get("torch"):  # not imported for the tests that do without
        torch.manual_seed(1337)
