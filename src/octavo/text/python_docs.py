"""The English that any Python has on disk: a text of about 2 MB to learn from, without a download.

First the topics of Python's documentation, then each standard module's docstrings. Modules are
parsed, never imported. The text is the same wherever the Python version is: what some systems
package apart from the rest is left out.
"""

import ast
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from octavo.errors import DataError

LEFT_OUT = {
    "distutils", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "test", "tests", "tkinter",
    "turtledemo",
}  # fmt: skip


def python_docs() -> list[str]:
    """One document a topic, one a module, in sorted order; a docstring seen before is left out.

    Raises `DataError` for a Python that was installed without topics and sources.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        topics = {}
    documents = [topics[name].strip() for name in sorted(topics)]
    seen: set[str] = set()
    for path in _modules():
        found = dict.fromkeys(_docstrings(ast.parse(path.read_bytes())))
        documents.append("\n\n".join(docstring for docstring in found if docstring not in seen))
        seen.update(found)
    if not any(documents):
        raise DataError("this Python came without its documentation", fix="name a text of your own")
    return [document for document in documents if document]


def _modules() -> Iterator[Path]:
    """The standard library's files in sorted order, without its tests."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py"), key=Path.as_posix):
        parts = path.relative_to(library).with_suffix("").parts
        if parts[0] in sys.stdlib_module_names and not LEFT_OUT.intersection(parts):
            yield path


def _docstrings(node: ast.AST) -> Iterator[str]:
    """The docstrings of a module, class or function and of what is defined in it, in order."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        if docstring := ast.get_docstring(node):
            yield docstring
        for child in node.body:
            yield from _docstrings(child)
