"""The native library: built once, whole or not at all, and never a reason not to write."""

import ctypes
import os
import subprocess
import sys
import textwrap

import pytest

from octavo.config import Config
from octavo.errors import ConfigError
from octavo.generating import choosing, native_build, native_structures
from octavo.generating.engine import TorchEngine
from octavo.generating.native import NativeEngine
from octavo.generating.native_build import NoLibraryError, built, find_compiler, load_library
from octavo.language_model import load
from octavo.model_config import ModelConfig
from octavo.training.packing import pack_run, weights_of

ANSWER = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """Sources that compile in no time in place of the engine's own."""
    folder = tmp_path / "sources"
    folder.mkdir()
    for name in native_build.SOURCES:
        (folder / name).write_text(ANSWER if name == "native.cpp" else "", encoding="utf-8")
    monkeypatch.setattr(native_build, "HERE", folder)
    load_library.cache_clear()
    yield folder
    load_library.cache_clear()


def answer(library):
    return ctypes.CDLL(str(library)).answer()


def libraries(folder):
    return sorted(path for path in folder.iterdir() if not path.is_symlink())


def test_it_is_compiled_once_and_again_when_a_source_changes(sources, cache_dir, monkeypatch):
    first = built()
    assert answer(first) == 42
    monkeypatch.setattr(native_build, "compile_library", None)  # would fail if it were called
    assert built() == first
    monkeypatch.undo()
    monkeypatch.setenv("OCTAVO_CACHE", str(cache_dir))
    monkeypatch.setattr(native_build, "HERE", sources)
    (sources / "kernels.h").write_text("// another\n", encoding="utf-8")
    assert built() != first
    assert libraries(cache_dir) == sorted([first, built()])  # nothing temporary is left


def test_another_compiler_or_other_flags_make_another_library(sources, monkeypatch):
    first = built()
    monkeypatch.setenv("CXX", "g++ -DOTHER")
    other = built()
    monkeypatch.setattr(native_build, "FLAGS", (*native_build.FLAGS, "-DMORE"))
    assert len({first, other, built()}) == 3


def test_processes_that_build_at_once_do_not_disturb_each_other(sources, cache_dir):
    program = textwrap.dedent(f"""
        from pathlib import Path
        from octavo.generating import native_build
        native_build.HERE = Path({str(sources)!r})
        print(native_build.load_library().answer())
    """)
    start = [sys.executable, "-c", program]
    running = [subprocess.Popen(start, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert [process.communicate()[0] for process in running] == ["42\n"] * 4
    assert len(libraries(cache_dir)) == 1


def test_the_library_a_wheel_carries_is_taken_if_it_is_of_these_sources(sources, monkeypatch):
    carried = sources / f"_native-{native_build.source_key()}.so"
    native_build.compile_library(find_compiler(), carried)
    monkeypatch.setenv("PATH", "")  # no compiler, and none is needed
    monkeypatch.delenv("CXX", raising=False)
    assert load_library().answer() == 42
    load_library.cache_clear()
    (sources / "native.cpp").write_text(ANSWER.replace("42", "43"), encoding="utf-8")
    with pytest.raises(NoLibraryError, match="no C"):
        load_library()


def test_a_carried_library_for_another_system_is_passed_over(sources):
    carried = sources / f"_native-{native_build.source_key()}.so"
    carried.write_bytes(b"\x7fELF of some other machine")
    assert load_library().answer() == 42


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("", "there is no C"),
        ("/nowhere/g++", "compiler /nowhere/g\\+\\+ does not run"),
        ("false", "false failed: exit code 1"),
    ],
)
def test_the_reason_why_there_is_none(sources, monkeypatch, cache_dir, compiler, reason):
    monkeypatch.setenv("CXX", compiler)
    if not compiler:
        monkeypatch.setenv("PATH", "")
    with pytest.raises(NoLibraryError, match=reason):
        load_library()
    assert libraries(cache_dir) == []


def test_the_compilers_first_error_is_the_reason(sources, cache_dir):
    (sources / "native.cpp").write_text("int f() { return wrong; }\n", encoding="utf-8")
    with pytest.raises(NoLibraryError, match=r"native\.cpp:1:.* error: .*wrong"):
        load_library()
    assert libraries(cache_dir) == []


def test_a_cache_that_cannot_be_written_is_the_reason(sources, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(NoLibraryError, match="cannot be written: Not a directory"):
        load_library()


def test_a_build_that_takes_long_says_so(sources, monkeypatch, capsys, tmp_path):
    slow = tmp_path / "slow"
    slow.write_text('#!/bin/sh\n[ "$1" = --version ] || sleep 0.3\nexec g++ "$@"\n')
    slow.chmod(0o755)
    monkeypatch.setenv("CXX", str(slow))
    monkeypatch.setattr(native_build, "QUIET_SECONDS", 0.1)
    assert load_library().answer() == 42
    assert capsys.readouterr().err == "compiling the native engine, once ...\n"
    load_library.cache_clear()
    assert load_library().answer() == 42
    assert capsys.readouterr().err == ""


@pytest.fixture
def run(tmp_path):
    """A run with random weights."""
    import torch

    from octavo.checkpoint import Run
    from octavo.model.gpt import GPT

    torch.manual_seed(0)
    model = ModelConfig(vocab_size=32, block_size=16, n_layer=1, n_head=2, d_model=16)
    weights = GPT(model).state_dict()
    return Run.create(tmp_path / "run", Config(model=model), None, {}, weights).path


def ids(run, **how):
    return load(run, **how).generate_ids([[1, 2]], max_new_tokens=20)


def test_without_a_compiler_pytorch_writes_the_same_and_says_so_once(run, monkeypatch, capsys):
    expected = ids(run)
    assert capsys.readouterr().err == ""
    load_library.cache_clear()
    choosing.tell_once.cache_clear()
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("OCTAVO_CACHE", os.devnull)
    assert ids(run) == expected
    assert ids(run) == expected
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "there is no C++ compiler" in said[0]
    with pytest.raises(ValueError, match="the native engine is not here: there is no C"):
        ids(run, engine="native")


def test_a_part_that_the_engine_has_not_is_written_by_pytorch(run, monkeypatch, capsys):
    """A norm or an MLP added to the configuration was a ValueError out of a tuple's index."""
    expected = ids(run)
    choosing.tell_once.cache_clear()
    monkeypatch.setattr(native_structures, "NORM_KINDS", ("layernorm",))
    assert ids(run) == expected
    said = "the native engine is not here: it has no rmsnorm, only layernorm"
    assert capsys.readouterr().err == f"{said}; PyTorch writes, more slowly\n"
    with pytest.raises(ConfigError, match=said):
        ids(run, engine="native")


def test_the_engine_can_be_chosen(run, monkeypatch):
    expected = ids(run)
    for choice, engine in (
        ("native", NativeEngine),
        ("torch", TorchEngine),
        ("auto", NativeEngine),
    ):
        assert ids(run, engine=choice) == expected
        monkeypatch.setenv("OCTAVO_ENGINE", choice)
        lm = load(run)
        assert lm.generate_ids([[1, 2]], max_new_tokens=20) == expected
        assert type(lm._engine(1)) is engine
    assert lm.model  # may be changed from now on: then it is what writes
    assert type(lm._engine(1)) is TorchEngine
    with pytest.raises(ValueError, match="unknown engine 'fast'; known: auto, native, torch"):
        load(run, engine="fast")


def test_packed_weights_write_what_pytorch_writes_with_them(run):
    with pytest.raises(ValueError, match=r"pack them: octavo quantize .* --to int8"):
        ids(run, weights="int8")
    lm = load(run)
    pack_run(lm, weights_of(lm), "int8")
    plain, packed = ids(run, weights="int8", engine="torch"), ids(run, weights="int8")
    assert packed == plain
    packed_lm = load(run, weights="int8")
    assert packed_lm.model  # what judges: the same weights, dequantized
    assert type(packed_lm._engine(1)) is NativeEngine  # what writes: as chosen
