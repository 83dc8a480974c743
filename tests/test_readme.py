"""What README says is so: commands parse, links lead somewhere, figures come from records."""

import ast
import json
import re
import runpy
import shlex
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from command_kit import printed

import octavo
from octavo import cli
from octavo.config import SECTIONS

ROOT = Path(__file__).parents[1]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
MARKDOWN = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def code(readme: str) -> list[str]:
    """What README types: each line of its fenced blocks, and each `piece of code` in its prose."""
    lines = [line for _, block in FENCED.findall(readme) for line in block.splitlines()]
    return lines + re.findall(r"`([^`\n]+)`", FENCED.sub("", readme))


def commands(readme: str, program: str) -> list[list[str]]:
    """The words after ``program`` wherever README types it, with or without a $ before it."""
    typed = [re.sub(r"^\$ ", "", line) for line in code(readme)]
    return [
        shlex.split(line, comments=True)[1:] for line in typed if line.startswith(program + " ")
    ]


@pytest.fixture(scope="module")
def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def help_page(capsys: pytest.CaptureFixture[str]) -> Callable[[str], str]:
    @cache
    def read(command: str) -> str:
        return printed(capsys, command, "--help")

    return read


def test_every_option_of_every_command_exists(readme: str, help_page: Callable[[str], str]):
    shown = commands(readme, "octavo")
    assert shown, "README shows no command"
    for command, *words in shown:
        assert command in cli.COMMANDS, f"octavo has no command {command}"
        for word in words:
            if option := re.fullmatch(r"(--[\w-]+)(=.*)?", word):
                known = re.findall(r"--[\w-]+", help_page(command))
                assert option[1].replace("_", "-") in known, f"octavo {command} has no {option[1]}"


def test_every_setting_exists(readme: str):
    words = [word for line in code(readme) for word in line.split()]
    named = [found.groups() for w in words if (found := re.match(r"(?:--)?(\w+)\.(\w+)=", w))]
    assert named, "README shows no setting"
    for section, name in named:
        assert section in SECTIONS, f"no section {section}"
        assert name in SECTIONS[section].__dataclass_fields__, f"no setting {section}.{name}"


def test_every_target_of_make_exists(readme: str):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    shown = commands(readme, "make")
    assert ["run"] in shown
    assert ["test"] in shown
    for target, *_ in shown:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target} does not exist"


def test_every_python_example_compiles_and_names_what_octavo_has(readme: str):
    for language, block in FENCED.findall(readme):
        if language == "python":
            ast.parse(block)
            for name in re.findall(r"\boctavo\.(\w+)", block):
                assert name in dir(octavo), f"octavo has no {name}"


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)\s#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not re.match(r"\w+:", target):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_table_is_the_newest_record_of_its_name(page: Path):
    fill = runpy.run_path(str(ROOT / "benchmarks" / "tables.py"))["fill"]
    text = page.read_text(encoding="utf-8")
    assert fill(text) == text, "run: python benchmarks/tables.py"


def test_a_table_is_drawn_from_the_newest_record(tmp_path: Path):
    """A figure that was measured again, or typed over by hand, does not stay in README."""
    fill = runpy.run_path(str(ROOT / "benchmarks" / "tables.py"))["fill"]
    for date, value in (("2026-11-03", 1200), ("2026-10-29", 900)):
        result = {"what": "cached", "value": value, "unit": "tokens/s", "low": 850, "high": 1250.4}
        record = {"name": "writing", "machine": "a laptop", "versions": {"torch": "2.13.0"}}
        record |= {"command": "bench", "rounds": 3, "results": [result]}
        (tmp_path / f"writing-cpu-{date}.json").write_text(json.dumps(record), encoding="utf-8")
    drawn = fill("a\n<!-- record: writing -->\n| cached | 9,999 |\n<!-- end -->\nb\n", tmp_path)
    assert "| cached | 1,200 tokens/s | 850 to 1,250 |" in drawn
    assert "9,999" not in drawn
    assert drawn.startswith("a\n")
    assert drawn.endswith("<!-- end -->\nb\n")
    assert fill(drawn, tmp_path) == drawn
    with pytest.raises(FileNotFoundError, match="speed"):
        fill("<!-- record: speed -->\n<!-- end -->", tmp_path)
    record["machine"] = "a rack"
    (tmp_path / "writing-other-cpu-2026-11-04.json").write_text(json.dumps(record), "utf-8")
    assert "on a rack" in fill(drawn, tmp_path)
    assert "on a laptop" in fill(drawn.replace("writing", "writing on cpu", 1), tmp_path)


def test_every_picture_is_drawn_from_the_newest_record(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for path, text in runpy.run_path(str(ROOT / "benchmarks" / "pictures.py"))["drawn"]().items():
        assert path.read_text(encoding="utf-8") == text, "run: python benchmarks/tables.py"
