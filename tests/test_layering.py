"""The house of DESIGN: a room imports only from floors below it, and no room is too big to read."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_kit import python

SOURCE = Path(__file__).parents[1] / "src" / "octavo"
FLOORS = {
    "errors": 0,
    "settings": 1, "disk": 1, "tensors": 1, "linear": 1, "manifest": 1,
    "model_config": 2,
    "config": 3,
    "model": 4, "text": 4,
    "checkpoint": 5, "packed": 5,
    "adapting": 6,
    "generating": 7,
    "evaluating": 8,
    "exchanging": 9,
    "language_model": 10,
    "reporting": 11,
    "training": 12,
    "studies": 13, "explaining": 13, "serving": 13,
    "commands": 14,
    "cli": 15,
    "__init__": 16, "__main__": 16,
}  # fmt: skip
# The way from `octavo generate` to a written token: torch is imported in functions or not at all.
TORCH_FREE = (
    "__init__", "errors", "settings", "disk", "tensors", "manifest", "model_config", "config",
    "text", "checkpoint", "packed", "generating/sampling", "generating/writing",
    "generating/choosing", "generating/native", "generating/speculative", "generating/terminal",
    "generating/conversation", "language_model", "cli",
)  # fmt: skip
FILES = sorted(SOURCE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_rooms(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Each room that a file imports, in functions too, and the line; `import octavo` is none."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports name the whole path"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            top, *rest = name.split(".")
            if top == "octavo" and rest:
                yield rest[0], node.lineno


def violations(name: str, tree: ast.AST) -> list[str]:
    """Imports of the room ``name`` that do not go down."""
    return [
        f"line {line}: {name} (floor {FLOORS[name]}) imports {other} (floor {FLOORS[other]})"
        for other, line in imported_rooms(tree)
        if other != name and FLOORS[other] >= FLOORS[name]
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_room_imports_only_from_floors_below(path: Path):
    assert violations(room(path), ast.parse(path.read_text(encoding="utf-8"))) == []


def test_an_import_that_climbs_is_seen_wherever_it_hides():
    hidden = "def f():\n    if True:\n        from octavo.training.loop import train\n"
    assert violations("model", ast.parse(hidden))
    assert violations("text", ast.parse("import octavo.model.gpt"))  # sideways is not down
    assert not violations("training", ast.parse("from octavo.model.gpt import GPT\nimport octavo"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_files_and_functions_can_be_read_in_one_go(path: Path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    functions = (
        n
        for n in ast.walk(ast.parse(text))
        if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    long = [f.name for f in functions if (f.end_lineno or 0) - f.lineno >= 60]
    assert long == []


def test_the_model_is_a_textbook_not_a_library():
    lines = sum(len(p.read_text(encoding="utf-8").splitlines()) for p in SOURCE.glob("model/*.py"))
    assert lines < 700


def test_writing_needs_no_torch():
    """Importing torch costs seconds and 220 MB; the native engine writes without it."""
    places = [path.relative_to(SOURCE).with_suffix("").as_posix() for path in FILES]
    free = [place for place in places if place.startswith(TORCH_FREE)]
    names = [f"octavo.{place.replace('/', '.')}" for place in free]
    program = (
        "import importlib, sys\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module(name)\n"
        "    assert 'torch' not in sys.modules, f'{name} imports torch'\n"
    )
    python(program)
