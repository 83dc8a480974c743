"""The guide's chapters as notebooks: one Markdown file is the page, the notebook and a test.

A ``python`` block is a cell. A line that is nothing but a link to a definition in the sources, as
``[`octavo.model.layers.rotate`](../../src/octavo/model/layers.py)``, gives way to that definition
as it stands. A line ``STEPS = 400`` says how long an experiment takes; shortened, it says 8.

    python scripts/guide.py [FOLDER]        every chapter as a notebook, not run, into notebooks/
"""

import ast
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = sorted(ROOT.glob("docs/guide/[0-9]*.md"))
CELL = re.compile(r"^```python\n(.*?)^```\n", re.DOTALL | re.MULTILINE)
QUOTE = re.compile(r"^\[`(octavo\.[\w.]+)`\]\((?:\.\./)+(src/octavo/[\w/]+\.py)\)$", re.MULTILINE)
STEPS = re.compile(r"^STEPS = \d+", re.MULTILINE)
SHORT = "STEPS = 8"
SVG = new_code_cell("%matplotlib inline\n%config InlineBackend.figure_formats = ['svg']")


def quoted(name: str, file: str) -> str:
    """The source of ``octavo.module.Class.method`` or a function or class, which is in ``file``.

    Raises `LookupError` where there is no such definition.
    """
    module = _module(file)
    if not name.startswith(module + ".") or not (ROOT / file).is_file():
        raise LookupError(f"{name} is not in {file}")
    source = (ROOT / file).read_text(encoding="utf-8")
    node: ast.AST = ast.parse(source)
    for part in name.removeprefix(module + ".").split("."):
        kinds = (ast.FunctionDef, ast.ClassDef)
        named = [n for n in getattr(node, "body", []) if isinstance(n, kinds) and n.name == part]
        if not named:
            raise LookupError(f"{file} has no {part}; the guide quotes {name}")
        node = named[0]
    assert isinstance(node, ast.FunctionDef | ast.ClassDef)
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return textwrap.dedent("\n".join(source.splitlines()[first - 1 : node.end_lineno]))


def _module(file: str) -> str:
    return file.removeprefix("src/").removesuffix(".py").replace("/", ".")


def with_quotes(text: str) -> str:
    """Markdown with every quoted definition in the place of its link."""

    def block(found: re.Match[str]) -> str:
        name, file = found.groups()
        what = name.removeprefix(_module(file) + ".")
        return f"`{what}` in *{file}*\n\n```py\n{quoted(name, file)}\n```"

    return QUOTE.sub(block, text)


def notebook(chapter: Path, short: bool = False) -> NotebookNode:
    """A chapter as a notebook that was not run yet."""
    cells = []
    for number, part in enumerate(CELL.split(chapter.read_text(encoding="utf-8"))):
        if number % 2:
            code = STEPS.sub(SHORT, part) if short else part
            cells.append(new_code_cell(code.rstrip(), id=f"cell-{number}"))
        elif part.strip():
            cells.append(new_markdown_cell(with_quotes(part).strip(), id=f"cell-{number}"))
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return new_notebook(cells=cells, metadata={"kernelspec": kernel})


def run(book: NotebookNode, place: Path) -> NotebookNode:
    """Execute a notebook in the directory ``place``, pictures as SVG.

    Raises nbclient's `CellExecutionError` for the first cell that fails.
    """
    from nbclient import NotebookClient

    book.cells.insert(0, SVG.copy())
    resources = {"metadata": {"path": str(place)}}
    client = NotebookClient(book, timeout=600, resources=resources)
    client.execute(stderr=subprocess.DEVNULL)  # where the kernel warns of its own ways
    del book.cells[0]
    return book


def main(folder: str = "notebooks") -> None:
    """Write every chapter's notebook into ``folder``."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for chapter in CHAPTERS:
        file = Path(folder) / f"{chapter.stem}.ipynb"
        nbformat.write(notebook(chapter), file)
        print(file)


if __name__ == "__main__":
    main(*sys.argv[1:])
