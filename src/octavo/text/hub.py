"""Rows of a Hugging Face dataset, as they come over the network; nothing else is downloaded."""

import os
from collections.abc import Iterator
from typing import Any

from octavo.errors import ConfigError, MissingExtraError, ResourceError
from octavo.text.download import TIMEOUT

PREFIX = "hf:"
SHORT_NAMES = {"fineweb-edu": "hf:HuggingFaceFW/fineweb-edu:sample-10BT"}
LOCALLY = "without a network name local files: .parquet, .jsonl, .csv or plain text"


def rows(source: str, position: Any = None) -> Iterator[tuple[dict[str, Any], Any]]:
    """The rows of ``hf:NAME:CONFIG:SPLIT``, each with the position (JSON) to go on behind it.

    CONFIG may be left out, SPLIT is train unless named. Raises `MissingExtraError` without the
    library, `ConfigError` for a configuration or split that is none, and `ResourceError` where the
    network fails or there is no such dataset.
    """
    stream = _open(source)
    if position:
        stream.load_state_dict(position)
    rest = iter(stream)
    while True:
        try:
            row = next(rest, None)
        except Exception as error:  # whatever the network and that library's depths throw
            raise _failed("reading", source, error) from error
        if row is None:
            return
        yield row, stream.state_dict()


def _open(source: str) -> Any:
    try:
        from datasets import load_dataset
    except ImportError:
        raise MissingExtraError("data", "a Hugging Face dataset") from None
    name, config, split = [*source.removeprefix(PREFIX).split(":"), "", ""][:3]
    _refuse_offline(source, name)
    try:
        return load_dataset(name, config or None, split=split or "train", streaming=True)
    except ValueError as error:  # no such configuration or split
        what = " ".join(str(error).split())
        raise ConfigError(f"{source}: {what}", fix="name it hf:NAME:CONFIG:SPLIT") from None
    except Exception as error:
        raise _failed("opening", source, error) from error


def _refuse_offline(source: str, name: str) -> None:
    """Without a network say so at once: the library would try for half a minute."""
    from http.client import HTTPException
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    if os.path.exists(name) or {"HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"} & os.environ.keys():
        return
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urlopen(Request(hub, method="HEAD"), timeout=TIMEOUT).close()
    except HTTPError:
        return  # it answers
    except (OSError, HTTPException) as error:
        raise _failed("opening", source, getattr(error, "reason", None) or error) from None


def _failed(doing: str, source: str, error: Any) -> ResourceError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return ResourceError(f"{doing} {source} failed: {reason:.200}", fix=LOCALLY)
