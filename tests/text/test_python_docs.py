import hashlib
import sys

import pytest
from command_kit import python

from octavo.errors import DataError
from octavo.text import python_docs as module
from octavo.text.python_docs import python_docs


@pytest.fixture(scope="module")
def documents():
    return python_docs()


def test_it_is_about_two_megabytes_of_english(documents):
    text = "\n\n".join(documents)
    assert 1.5e6 < len(text.encode()) < 3e6
    assert 60 < len(set(text)) < 256  # a small vocabulary for a character model
    assert text.count(" the ") > 10_000
    text.encode("utf-8")  # no half characters


def test_it_begins_with_the_topics_and_has_docstrings(documents):
    from pydoc_data.topics import topics

    assert documents[0] == topics[min(topics)].strip()
    assert any("JSON (JavaScript Object Notation)" in document for document in documents)


def test_nothing_is_said_twice(tmp_path, monkeypatch):
    (tmp_path / "abc.py").write_text('"""One."""\ndef f():\n    """Two.\n\n    Indented."""\n')
    (tmp_path / "json").mkdir()
    tool = [
        '"""One."""',
        "class C:",
        '    """Three."""',
        "    def f(self):",
        '        """Two.\n\n        Indented."""',
        "    async def g(self):",
        "        '''Four.'''",
    ]
    (tmp_path / "json" / "tool.py").write_text("\n".join(tool))
    (tmp_path / "json" / "test").mkdir()
    (tmp_path / "json" / "test" / "a.py").write_text('"""A test."""')
    (tmp_path / "mine.py").write_text('"""Not of the standard library."""')
    monkeypatch.setattr(module.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert python_docs()[-2:] == ["One.\n\nTwo.\n\nIndented.", "Three.\n\nFour."]


def test_it_is_the_same_text_in_another_process(documents):
    """Whatever the order of the disk and of sets; and no module is imported to be read."""
    code = (
        "import hashlib, sys; from octavo.text.python_docs import python_docs\n"
        "print(hashlib.sha256('|'.join(python_docs()).encode()).hexdigest())\n"
        "assert not {'turtle', 'antigravity', 'this', 'asyncio'} & set(sys.modules)"
    )
    assert python(code).stdout.strip() == hashlib.sha256("|".join(documents).encode()).hexdigest()


def test_a_python_without_documentation_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    monkeypatch.setattr(module.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(DataError, match="without its documentation"):
        python_docs()
