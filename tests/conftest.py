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

hypothesis.settings.register_profile(
    "octavo",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=100 * int(os.environ.get("OCTAVO_FAULTS", "1")),  # more of them by `make faults`
)
hypothesis.settings.load_profile("octavo")


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return Path(__file__).parents[1]


@pytest.fixture(scope="session")
def native_library(root: Path) -> Path | None:
    """The native engine's library, compiled once and not once a test; None without a compiler."""
    from octavo.generating import native_build

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OCTAVO_CACHE", str(root / ".cache"))
        try:
            return native_build.built()
        except native_build.NoLibraryError:
            return None


@pytest.fixture(autouse=True)
def cache_dir(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    native_library: Path | None,
) -> Path:
    """Where downloads are kept: empty but for the native library, and this test's alone."""
    directory = tmp_path_factory.mktemp("cache")
    if native_library is not None:
        (directory / native_library.name).symlink_to(native_library)
    monkeypatch.setenv("OCTAVO_CACHE", str(directory))
    return directory


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a module's tests, gone to."""
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """A test that forgets to seed is still the same test tomorrow, and the same alone."""
    random.seed(1337)
    np.random.seed(1337)
    if torch := sys.modules.get("torch"):  # not imported for the tests that do without
        torch.manual_seed(1337)
