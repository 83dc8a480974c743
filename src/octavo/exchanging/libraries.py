"""Others' libraries, which may be absent, talk much, and fail in ways of their own."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from octavo.errors import MissingExtraError, OctavoError


def library(name: str, wanted_for: str = "") -> Any:
    """The library ``name``; where it is not installed None, or `MissingExtraError` if wanted."""
    try:
        return importlib.import_module(name)
    except ImportError:
        if wanted_for:
            raise MissingExtraError("hf", wanted_for) from None
        return None


@contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Without its warnings and progress bars meanwhile: what they warn of is what we compare."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def translated(kind: type[OctavoError], what: str, fix: str = "") -> Iterator[None]:
    """Let what their code raises be one line of this ``kind``: ``what``, and its reason."""
    try:
        yield
    except OctavoError:
        raise
    except Exception as error:  # they have a class for each
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise kind(f"{what}: {reason}", fix=fix) from error
