"""The wheel and the source archive hold what they should, and what is installed from them works."""

import os
import site
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source archive and the wheel built from it, as an index would get them."""
    out = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    result = subprocess.run(build, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return out


@pytest.fixture(scope="module")
def installed(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``bin`` of a fresh environment: the wheel, and the libraries of this one.

    Its path has a space in it. The libraries are seen through a .pth file, which puts them behind
    the wheel; .pth files among them, the one of the octavo under development too, are not read.
    """
    home = tmp_path_factory.mktemp("a place") / "with spaces"
    venv.create(home)
    (wheel,) = dist.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--python", str(home / "bin" / "python"), "install"]
    subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], check=True, capture_output=True)
    (packages,) = home.glob("lib/python*/site-packages")
    (packages / "libraries.pth").write_text("\n".join(site.getsitepackages()), encoding="utf-8")
    return home / "bin"


def run(directory: Path, *command: str | Path) -> str:
    """Standard output of a command in ``directory``, where the repository is not to be seen."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    result = subprocess.run(command, cwd=directory, env=clean, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_wheel_brings_types_recipes_and_every_file(dist: Path):
    (wheel,) = dist.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "octavo/py.typed" in names
    source = ROOT / "src"
    files = {p.relative_to(source).as_posix() for p in source.rglob("*.*") if p.suffix != ".pyc"}
    recipes = {f"octavo/configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")}
    assert recipes
    assert files | recipes <= names
    assert not [name for name in names if not name.startswith(("octavo/", "octavo-"))]


def test_the_source_archive_can_be_tested_from(dist: Path):
    (archive,) = dist.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    wanted = {"Makefile", "constraints.txt", "scripts/setup.sh", "README.md", "LICENSE"}
    assert wanted <= names
    for folder in ("src/octavo", "tests", "configs", "docs", "benchmarks"):
        assert [name for name in names if name.startswith(f"{folder}/")], f"no {folder}"
    assert not [name for name in names if "__pycache__" in name or name.startswith("runs/")]


def test_the_installed_command_answers_anywhere(installed: Path, tmp_path: Path):
    assert "train" in run(tmp_path, installed / "octavo", "--help")
    assert run(tmp_path, installed / "octavo", "--version").startswith("octavo ")
    where = run(tmp_path, installed / "python", "-c", "import octavo; print(octavo.__file__)")
    assert Path(where.strip()).is_relative_to(installed.parent)


def test_a_recipe_is_found_by_its_name_from_the_wheel(installed: Path, tmp_path: Path):
    """In the repository the recipes lie in configs/; installed, they must come with the package."""
    assert "parameters" in run(
        tmp_path, installed / "octavo", "plan", "quickstart.yaml", "--no-probe"
    )


def test_the_wheel_carries_the_native_engine(dist: Path, installed: Path, tmp_path: Path):
    """Where it is installed no compiler is needed."""
    (wheel,) = dist.glob("*.whl")
    assert not wheel.name.endswith("-any.whl")
    program = "from octavo.generating.native_build import load_library; print(load_library()._name)"
    clean = {"PATH": "", "HOME": str(tmp_path)}
    python = [installed / "python", "-c", program]
    result = subprocess.run(python, cwd=tmp_path, env=clean, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).is_relative_to(installed.parent)


def test_without_a_compiler_the_wheel_is_pure(tmp_path: Path):
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path)]
    result = subprocess.run(
        [*build, str(ROOT)], capture_output=True, text=True, env={**os.environ, "CXX": "false"}
    )
    assert result.returncode == 0, result.stderr
    assert "a wheel without the native engine: false failed" in result.stdout + result.stderr
    (wheel,) = tmp_path.glob("*-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
