"""The guide: quoted code is there, chapters run, the site holds together and needs no network."""

import ast
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GUIDE = runpy.run_path(str(ROOT / "scripts" / "guide.py"))
CHAPTERS: list[Path] = GUIDE["CHAPTERS"]
EXTENDING = ROOT / "docs" / "extending.md"
FENCED = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
each_chapter = pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)


@pytest.fixture(scope="session")
def guide_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the notebooks that one test runs are kept for the next."""
    return tmp_path_factory.mktemp("guide")


def test_the_guide_has_ten_chapters():
    assert [path.stem[:2] for path in CHAPTERS] == [f"{number:02}" for number in range(1, 11)]


@each_chapter
def test_a_chapter_has_what_every_chapter_has(chapter: Path):
    """Short, with code that runs, code that is quoted, a picture, formulas and two questions."""
    text = chapter.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 210
    assert GUIDE["QUOTE"].search(text), "it quotes no code"
    assert "plt.show()" in text
    assert "$$" in text
    assert re.search(r"^## Two questions\n\n1\. .*?^2\. ", text, re.DOTALL | re.MULTILINE)
    for code in GUIDE["CELL"].findall(text):
        ast.parse(code)


@each_chapter
def test_what_a_chapter_quotes_is_the_source_itself(chapter: Path):
    """A definition that was renamed or moved does not leave an empty box behind."""
    text = chapter.read_text(encoding="utf-8")
    for name, file in GUIDE["QUOTE"].findall(text):
        quote = GUIDE["quoted"](name, file)
        kind = "class" if name.rpartition(".")[2].strip("_")[0].isupper() else "def"
        assert f"{kind} {name.rpartition('.')[2]}" in quote
        first = quote.splitlines()[-1].strip()
        assert first in (ROOT / file).read_text(encoding="utf-8")
        ast.parse(quote)
    assert not GUIDE["QUOTE"].search(GUIDE["with_quotes"](text))


def test_a_quoted_name_that_is_gone_is_an_error():
    layers = "src/octavo/model/layers.py"
    assert GUIDE["quoted"]("octavo.model.layers.rotate", layers).startswith("def rotate(")
    for name in ("octavo.model.layers.rotated", "octavo.model.layers.MLP.backward"):
        with pytest.raises(LookupError, match=name.rpartition(".")[2]):
            GUIDE["quoted"](name, layers)
    with pytest.raises(LookupError, match="is not in"):
        GUIDE["quoted"]("octavo.model.gpt.GPT", layers)


def test_a_short_notebook_differs_in_how_long_it_trains_only():
    for chapter in CHAPTERS:
        cells = GUIDE["notebook"](chapter).cells
        short = GUIDE["notebook"](chapter, short=True).cells
        changed = [
            (old, new)
            for a, b in zip(cells, short, strict=True)
            for old, new in zip(a.source.splitlines(), b.source.splitlines(), strict=True)
            if old != new
        ]
        assert all(old.startswith("STEPS = ") for old, _ in changed)
        assert all(new == GUIDE["SHORT"] for _, new in changed)


@pytest.mark.long
@pytest.mark.timeout(600)
@each_chapter
def test_a_chapter_runs(chapter: Path, guide_cache: Path, monkeypatch: pytest.MonkeyPatch):
    """As a notebook, from its first cell to its last, with little training."""
    monkeypatch.setenv("OCTAVO_SHORT_GUIDE", "1")
    monkeypatch.setenv("OCTAVO_GUIDE_CACHE", str(guide_cache))
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import site_hooks

    book = site_hooks.executed(chapter)
    drawn = [out for cell in book.cells for out in cell.get("outputs", []) if "data" in out]
    assert any("image/svg+xml" in out["data"] for out in drawn), "it draws no picture"


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_site_is_built_and_nothing_in_it_is_fetched(guide_cache: Path, tmp_path: Path):
    """Strictly: a link or an anchor that leads nowhere ends the build."""
    site = tmp_path / "site"
    kept = {"OCTAVO_SHORT_GUIDE": "1", "OCTAVO_GUIDE_CACHE": str(guide_cache)}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | kept, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    pages = {path.relative_to(site).as_posix() for path in site.rglob("*.html")}
    for page in (ROOT / "docs").rglob("*.md"):
        assert page.relative_to(ROOT / "docs").with_suffix(".html").as_posix() in pages
    for page in site.rglob("*.html"):
        html = page.read_text(encoding="utf-8")
        fetched = re.findall(
            r"<(?:script|img|iframe|link)\b[^>]*(?:src|href)=\"?(https?:[^\" >]+)", html
        )
        assert not fetched, f"{page.name} fetches {fetched}"
        assert "arithmatex" not in html, f"{page.name} has a formula that nothing draws"
    for chapter in CHAPTERS:
        html = (site / "guide" / f"{chapter.stem}.html").read_text(encoding="utf-8")
        assert "<math" in html
        assert 'class="drawn"' in html
        assert (site / "guide" / f"{chapter.stem}.ipynb").is_file()


def patched(diff: str, source: Path) -> None:
    """Make a diff's changes, each block of lines found by itself, in a copy of the sources."""
    for file, lines in re.findall(r"^--- (\S+)\n(.*?)(?=^--- |\Z)", diff, re.DOTALL | re.MULTILINE):
        path = source / file
        rows = lines.splitlines(keepends=True)
        old = "".join(row[1:] for row in rows if row[0] in " -")
        new = "".join(row[1:] for row in rows if row[0] in " +")
        text = path.read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{file} has changed: the page's diff does not fit it"
        path.write_text(text.replace(old, new), encoding="utf-8")


@pytest.mark.long
@pytest.mark.timeout(300)
def test_every_extension_works_and_is_short(tmp_path: Path):
    """The page's diff on a copy of octavo, then its programs, as they stand."""
    blocks = FENCED.findall(EXTENDING.read_text(encoding="utf-8"))
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    for language, block in blocks:
        assert len(block.splitlines()) < 30
        if language == "diff":
            patched("".join(line + "\n" for line in block.splitlines()), tmp_path)
    program = "".join(block for language, block in blocks if language == "python")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "src")}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "AbsNorm" in done.stdout
    assert "Bilinear" in done.stdout
    assert "Tokenizer(bpe, 1000 tokens)" in done.stdout
