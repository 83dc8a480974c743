"""A directory for others appears whole or not at all, and never in the place of something else."""

import pytest

from octavo.errors import ConfigError
from octavo.exchanging.staging import refuse_occupied, staged


def names(folder):
    return sorted(path.name for path in folder.rglob("*"))


def test_it_appears_when_it_is_whole(tmp_path):
    target = tmp_path / "new" / "out"
    with staged(target) as temp:
        (temp / "config.json").write_text("{}", encoding="utf-8")
        assert not target.exists()
    assert names(tmp_path) == ["config.json", "new", "out"]


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), staged(tmp_path / "out") as temp:  # noqa: PT012
        (temp / "config.json").write_text("{}", encoding="utf-8")
        raise ZeroDivisionError
    assert names(tmp_path) == []


def test_an_empty_directory_may_be_filled(tmp_path):
    (tmp_path / "out").mkdir()
    with staged(tmp_path / "out") as temp:
        (temp / "config.json").write_text("{}", encoding="utf-8")
    assert names(tmp_path / "out") == ["config.json"]


@pytest.mark.parametrize(
    ("there", "force", "words"),
    [
        ("out/notes.txt", False, "is not empty.*--force"),
        ("out/config.yaml", False, "is a run"),
        ("out/config.yaml", True, "is a run"),  # force is for exports, not for years of training
        ("out", True, "is a file"),
    ],
)
def test_what_is_there_is_not_written_over(there, force, words, tmp_path):
    (tmp_path / there).parent.mkdir(exist_ok=True)
    (tmp_path / there).write_text("precious", encoding="utf-8")
    with pytest.raises(ConfigError, match=words):
        refuse_occupied(tmp_path / "out", force)
    with pytest.raises(ConfigError, match=words), staged(tmp_path / "out", force):
        pass
    assert (tmp_path / there).read_text(encoding="utf-8") == "precious"


def test_force_replaces_an_export_and_leaves_the_rest(tmp_path):
    """Shards of an earlier export beside a new single file would be read with it."""
    out = tmp_path / "out"
    out.mkdir()
    for name in ("notes.txt", "config.json", "model-00001-of-00002.safetensors", "tokenizer.json"):
        (out / name).write_text("old", encoding="utf-8")
    with staged(out, force=True) as temp:
        for name in ("config.json", "model.safetensors"):
            (temp / name).write_text("new", encoding="utf-8")
    found = {path.name: path.read_text(encoding="utf-8") for path in out.iterdir()}
    assert found == {"notes.txt": "old", "config.json": "new", "model.safetensors": "new"}
    assert names(tmp_path) == sorted([*found, "out"])


def test_with_force_an_error_leaves_the_earlier_export(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old", encoding="utf-8")
    with pytest.raises(ZeroDivisionError), staged(out, force=True) as temp:  # noqa: PT012
        (temp / "config.json").write_text("new", encoding="utf-8")
        raise ZeroDivisionError
    assert (out / "config.json").read_text(encoding="utf-8") == "old"
    assert names(tmp_path) == ["config.json", "out"]


def test_a_path_that_cannot_be_is_one_line(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match="Not a directory"), staged(tmp_path / "file" / "out"):
        pass
