"""What MkDocs does besides for octavo's pages: runs the guide, draws its mathematics, lists pages.

Everything a page needs lies beside it: nothing is fetched when it is read. Mathematics becomes
MathML, pictures are SVG within the page, so that they take its colours, light or dark.
"""

import functools
import html
import logging
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import guide
import nbformat
from latex2mathml.converter import convert
from nbformat import NotebookNode

from octavo.reporting.curves import BLUE, GRID, INK, SKY, VERMILION

log = logging.getLogger("mkdocs.hooks.guide")
SHORT = bool(os.environ.get("OCTAVO_SHORT_GUIDE"))
KEPT = Path(os.environ.get("OCTAVO_GUIDE_CACHE") or guide.ROOT / ".cache" / "guide")
OUTWARD = re.compile(
    r"\[([^\]\n]+)\]\((?:\.\./)+((?:src|benchmarks|configs|scripts|tests)/[^)\s]+)\)"
)
MATH = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
COLOURS = {
    BLUE: "var(--blue)",
    SKY: "var(--sky)",
    VERMILION: "var(--vermilion)",
    GRID: "var(--rule)",
    INK: "currentColor",
    "#ffffff": "none",
}  # the page's name for each: site.css chooses lighter ones on a dark ground
PLACE = tempfile.TemporaryDirectory(prefix="octavo-guide-")  # where the chapters' runs are made


def on_config(config: Any) -> Any:
    """List the pages: the guide in its order, then whatever else lies in docs/."""
    docs = Path(config.docs_dir)

    def pages(pattern: str) -> list[str]:
        return [path.relative_to(docs).as_posix() for path in sorted(docs.glob(pattern))]

    last = ["LOG.md"]
    how_to = [page for page in pages("*.md") if page not in ("index.md", *last)]
    config.nav = [
        "index.md",
        {"The guide": ["guide/index.md", *pages("guide/[0-9]*.md")]},
        {"How to": how_to},
        {"Why it is so": pages("adr/*.md") + last},
    ]
    return config


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """A chapter with what its cells printed and drew; on all pages, sources named, not linked."""
    source = Path(page.file.abs_src_path)
    if source in guide.CHAPTERS:
        markdown = "\n\n".join(map(_cell, executed(source).cells))
    return OUTWARD.sub(r"\1 (`\2`)", markdown)


def on_page_content(html_text: str, page: Any, **_: Any) -> str:
    """Mathematics as MathML, and a chapter's notebook to take home."""
    body = MATH.sub(_mathml, html_text)
    source = Path(page.file.abs_src_path)
    if source in guide.CHAPTERS:
        link = f'<a href="{source.stem}.ipynb" download>this page as a notebook</a>'
        body = body.replace("</h1>", f'</h1><p class="take">{link}</p>', 1)
    return body


def on_post_build(config: Any) -> None:
    """Put the notebooks beside the pages."""
    for chapter in guide.CHAPTERS:
        nbformat.write(executed(chapter), Path(config.site_dir) / "guide" / f"{chapter.stem}.ipynb")


@functools.cache
def executed(chapter: Path) -> NotebookNode:
    """The chapter's notebook, run; kept until its text or, but for a short one, octavo changes."""
    book = guide.notebook(chapter, SHORT)
    file = KEPT / f"{chapter.stem}.ipynb"
    newest = max(path.stat().st_mtime for path in (guide.ROOT / "src").rglob("*.py"))
    if file.is_file() and (SHORT or file.stat().st_mtime > newest):
        kept = nbformat.read(file, as_version=4)
        if [cell.source for cell in kept.cells] == [cell.source for cell in book.cells]:
            return kept
    log.info(f"running {chapter.name}")
    guide.run(book, Path(PLACE.name))
    file.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(book, file)
    return book


def _cell(cell: NotebookNode) -> str:
    """A cell as Markdown, with its output."""
    if cell.cell_type == "markdown":
        return cell.source
    shown = [f"```python\n{cell.source}\n```"]
    said = "".join(output.text for output in cell.outputs if output.get("name") == "stdout")
    if said:
        shown.append(f"~~~~~~ {{.text .printed}}\n{said.rstrip()}\n~~~~~~")
    for output in cell.outputs:
        if svg := output.get("data", {}).get("image/svg+xml"):
            shown.append(f'<figure class="drawn">{_themed(svg)}</figure>')
    return "\n\n".join(shown)


def _themed(svg: str) -> str:
    """A drawing that takes its colours and its font from the page."""
    body = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    body = re.sub(r"font-family: [^;\"]*", "font-family: inherit", body)
    body = re.sub(r"(font: [\d.]+px) [^;\"]*", r"\1 sans-serif", body)
    for colour, name in COLOURS.items():
        body = body.replace(colour, name)
    return re.sub(r"\n\s*", "\n", body).strip()


def _mathml(found: re.Match[str]) -> str:
    tag, latex = found.groups()
    block = "block" if tag == "div" else "inline"
    parts = html.unescape(latex).split(r"\qquad")  # which a narrow page puts below each other
    drawn = "".join(convert(part, display=block) for part in parts)
    return f'<{tag} class="math">{drawn}</{tag}>'
