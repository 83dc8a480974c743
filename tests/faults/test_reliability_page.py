"""What the page on reliability says is tested is tested, under that name."""

import re


def test_every_test_that_the_page_names_exists(root):
    page = (root / "docs" / "reliability.md").read_text(encoding="utf-8")
    tests = "".join(p.read_text(encoding="utf-8") for p in (root / "tests").rglob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", page)
    assert len(named) > 50
    assert [name for name in named if f"def {name}(" not in tests] == []
