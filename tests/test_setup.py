"""scripts/setup.sh with a pretended Python: what is installed when, and what a person is told."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Makes "environments" that hold itself, and writes down what it is told to install.
PYTHON = """#!/bin/bash
case "$*" in
*version_info\\ \\<*) exit ${FAKE_TOO_OLD:-0} ;;
*ensurepip*) exit ${FAKE_NO_VENV:-0} ;;
*%d.%d*) echo 3.11 ;;
"-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
*"pip install"*)
    echo "$*" >> installed
    if [[ -n ${FAKE_PIP_STOPPED:-} ]]; then kill -INT $PPID; exit 1; fi
    exit ${FAKE_PIP_FAILS:-0} ;;
*urlopen*) exit 1 ;;
esac
"""
TOOLS = ("bash", "cat", "cksum", "cp", "dirname", "mkdir", "rm", "timeout", "touch", "uname")
UV = """#!/bin/bash
echo "uv $UV_FIND_LINKS $*" >> installed; exit ${FAKE_UV_FAILS:-0}
"""


class Clone:
    """A clone at a path with a space, and a PATH with nothing but the tools that setup.sh needs."""

    def __init__(self, home: Path) -> None:
        self.home, self.bin = home / "a clone", home / "bin"
        (self.home / "scripts").mkdir(parents=True)
        for name in ("scripts/setup.sh", "pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, self.home / name)
        self.bin.mkdir()
        for tool in TOOLS:
            if found := shutil.which(tool):
                (self.bin / tool).symlink_to(found)
        self.program("python3", PYTHON)

    def program(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text, encoding="utf-8")
        (self.bin / name).chmod(0o755)

    def setup(self, extra: str, **env: str) -> tuple[int, str, list[str]]:
        """Exit status, what was said, and what was installed in this call."""
        log = self.home / "installed"
        log.write_text("", encoding="utf-8")
        script, path = str(self.home / "scripts" / "setup.sh"), str(self.bin)
        result = subprocess.run(
            ["bash", script, extra], env={"PATH": path, **env}, capture_output=True, text=True
        )
        return result.returncode, result.stderr, log.read_text(encoding="utf-8").splitlines()


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path)


def test_the_first_call_installs_pinned_and_the_second_does_nothing(clone: Clone):
    status, _, installed = clone.setup("viz")
    assert status == 0
    assert len(installed) == 1
    assert installed[0].endswith("-c constraints.txt -e .[viz]")
    assert clone.setup("viz") == (0, "", [])


def test_what_tests_need_is_more_than_what_running_needs(clone: Clone):
    clone.setup("viz")
    assert clone.setup("dev")[2][0].endswith("-e .[dev]")
    assert clone.setup("dev") == (0, "", [])
    assert clone.setup("viz") == (0, "", [])


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_a_change_of_what_is_asked_for_installs_again(clone: Clone, name: str):
    clone.setup("dev")
    with (clone.home / name).open("a", encoding="utf-8") as file:
        file.write("# changed\n")
    assert clone.setup("dev")[2]


def test_a_moved_clone_installs_again(clone: Clone):
    """The environment names the folder it was made in, and the package is used from there."""
    clone.setup("viz")
    clone.home = clone.home.rename(clone.home.with_name("moved"))
    assert clone.setup("viz")[2]


@pytest.mark.parametrize("before", [False, True], ids=["first", "later"])
def test_an_interrupted_installation_begins_afresh(clone: Clone, before: bool):
    """pip trusts a half-copied package once its metadata is there, and ends Ctrl-C as a failure."""
    if before:
        clone.setup("viz")
    assert clone.setup("dev", FAKE_PIP_STOPPED="1")[0] == 130
    half = clone.home / ".venv" / "half-a-package"
    half.touch()
    status, said, installed = clone.setup("viz")
    assert (status, len(installed)) == (0, 1)
    assert "did not finish" in said
    assert not half.exists()


def test_a_failed_installation_leaves_what_was_there(clone: Clone):
    """`make test` without a network must not cost the environment of `make run`."""
    clone.setup("viz")
    status, said, _ = clone.setup("dev", FAKE_PIP_FAILS="1")
    assert status == 2
    assert "error: not everything could be installed; " in said
    assert clone.setup("viz") == (0, "", [])
    assert clone.setup("dev")[2]


def test_uv_is_used_where_there_is_one_and_pip_where_it_fails(clone: Clone):
    clone.program("uv", UV)
    links = {"PIP_FIND_LINKS": "/wheels /more"}
    (line,) = clone.setup("viz", **links)[2]
    assert line.startswith("uv /wheels,/more pip install")
    shutil.rmtree(clone.home / ".venv")
    first, second = clone.setup("viz", FAKE_UV_FAILS="1", **links)[2]
    assert first.startswith("uv ")
    assert second.startswith("-m pip install")


@pytest.mark.parametrize(
    ("env", "what"),
    [
        ({"FAKE_TOO_OLD": "1"}, "error: no Python 3.11 or newer; "),
        ({"FAKE_NO_VENV": "1"}, "sudo apt install python3.11-venv"),
    ],
)
def test_what_is_missing_is_said_in_one_line(clone: Clone, env: dict[str, str], what: str):
    status, said, installed = clone.setup("viz", **env)
    assert (status, installed) == (2, [])
    assert what in said
    assert said.count("\n") == 1
    assert clone.setup("viz")[0] == 0  # and once it is there, all is well
