"""`octavo compress` and `decompress`: files, figures, and nothing half done."""

import os

import pytest
from command_kit import figures, octavo, printed, without_torch
from run_kit import make_run

from octavo.commands import compress
from octavo.text.tokenizer import Tokenizer

TEXT = b"She sells sea shells by the sea shore.\r\n\xff\x00" * 40


@pytest.fixture
def run(tmp_path):
    (tmp_path / "sea.txt").write_bytes(TEXT)
    tokenizer = Tokenizer.char(TEXT.decode("latin-1")[:38])
    return make_run(tmp_path / "run", tokenizer, block_size=16, n_layer=1, tie_embeddings=True)


def test_a_file_goes_and_comes_back_and_the_figures_are_said(run, tmp_path, capsys):
    packed, back = tmp_path / "sea.octz", tmp_path / "back.txt"
    said = printed(capsys, "compress", run, tmp_path / "sea.txt", packed)
    for part in ("sea.txt: 1,680 bytes", "octavo", "gzip", "xz", "zstd", "bits a byte", " : 1"):
        assert part in said
    assert octavo("decompress", run, packed, back) == 0
    assert back.read_bytes() == TEXT
    assert "1,680 bytes, as they were" in capsys.readouterr().out


def test_figures_are_one_json_object(run, tmp_path, capsys):
    packed = tmp_path / "sea.octz"
    facts = figures(capsys, "compress", run, tmp_path / "sea.txt", packed)
    assert facts["bytes"] == len(TEXT)
    assert facts["compressed_bytes"] == facts["sizes"]["octavo"] == packed.stat().st_size
    assert facts["bits_per_byte"]["octavo"] == pytest.approx(8 * packed.stat().st_size / len(TEXT))
    assert figures(capsys, "decompress", run, packed, tmp_path / "back")["bytes"] == len(TEXT)


def test_an_empty_file_has_no_bits_a_byte(run, tmp_path, capsys):
    (tmp_path / "empty").write_bytes(b"")
    words = ["compress", run, tmp_path / "empty"]
    assert "empty: 0 bytes" in printed(capsys, *words, tmp_path / "out")
    assert figures(capsys, *words, tmp_path / "out2")["bits_per_byte"] == {}
    assert octavo("decompress", run, tmp_path / "out", tmp_path / "back") == 0
    assert (tmp_path / "back").read_bytes() == b""


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["sea.txt"], 2, "2 words were given"),
        (["sea.txt", "sea.txt"], 2, "sea.txt is there already"),
        (["sea.txt", "nowhere/out"], 2, "nowhere is no directory"),
        (["absent.txt", "out"], 3, "cannot read"),
    ],
)
def test_what_cannot_be_is_said_before_the_work(run, tmp_path, capsys, words, code, said):
    assert octavo("compress", run, *[tmp_path / word for word in words]) == code
    assert said in capsys.readouterr().err
    assert (tmp_path / "sea.txt").read_bytes() == TEXT


def test_a_directory_that_cannot_be_written_is_said_before_the_work(
    run, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert octavo("compress", run, tmp_path / "sea.txt", tmp_path / "out") == 6
    assert "cannot be written" in capsys.readouterr().err


def test_no_file_of_ours_is_said_before_the_model_is_loaded(run, tmp_path, capsys):
    assert octavo("decompress", tmp_path / "no run", tmp_path / "sea.txt", tmp_path / "out") == 3
    assert "no file of octavo compress; in" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_ctrl_c_leaves_no_half_file(run, tmp_path, monkeypatch):
    def interrupt(lm, data, watch):
        raise KeyboardInterrupt

    monkeypatch.setattr("octavo.explaining.compression.compress", interrupt)
    before = set(tmp_path.iterdir())
    assert octavo("compress", run, tmp_path / "sea.txt", tmp_path / "out") == 130
    assert set(tmp_path.iterdir()) == before


def test_it_needs_no_torch(run, tmp_path):
    """Importing it costs more than compressing a short file."""
    program = f"""
from argparse import Namespace
from octavo.commands import compress, decompress
words = [{str(run)!r}, {str(tmp_path / "sea.txt")!r}, {str(tmp_path / "out")!r}]
compress.run(Namespace(words=words, device="auto", base=None, weights=None, json=False), [])
words = [{str(run)!r}, {str(tmp_path / "out")!r}, {str(tmp_path / "back")!r}]
decompress.run(Namespace(words=words, base=None, json=False), [])
"""
    without_torch(program)
    assert (tmp_path / "back").read_bytes() == TEXT


def test_the_bar_is_told_how_far_it_is(run, tmp_path):
    with compress.progress("compressing") as watch:
        watch(1, 2)
        watch(2, 2)
