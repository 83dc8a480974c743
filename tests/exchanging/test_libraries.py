"""Libraries that are not there, that talk, and that fail: one line in each case, or none."""

import sys

import pytest

from octavo.errors import CheckpointError, ConfigError, MissingExtraError
from octavo.exchanging.libraries import library, quiet, translated


def test_what_is_not_installed_is_none_or_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert library("peft") is None
    with pytest.raises(MissingExtraError, match=r"an adapter needs .*octavo\[hf\]"):
        library("peft", "an adapter")
    assert library("json", "JSON") is sys.modules["json"]


def test_quiet_puts_everything_back():
    transformers = pytest.importorskip("transformers")
    logging = transformers.utils.logging
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with quiet(transformers):
        assert not logging.is_progress_bar_enabled()
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


@pytest.mark.parametrize(
    ("error", "reason"),
    [(RuntimeError("one\ntwo"), "one"), (OSError(), r"OSError\(\)"), (ValueError(" "), "ValueErr")],
)
def test_errors_of_every_kind_become_one_line(error, reason):
    with (
        pytest.raises(CheckpointError, match=rf"^it cannot: {reason}[^\n]*; try again$"),
        translated(CheckpointError, "it cannot", "try again"),
    ):
        raise error


def test_errors_of_ours_say_enough_already():
    with pytest.raises(ConfigError, match=r"^ours$"), translated(CheckpointError, "it cannot"):
        raise ConfigError("ours")
