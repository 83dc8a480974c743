"""A file from the network, checked by its SHA-256 and kept, so that it is asked for once.

The cache is $OCTAVO_CACHE, else $XDG_CACHE_HOME/octavo, else ~/.cache/octavo. Bytes with another
hash are never used, wherever they came from.
"""

import hashlib
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from octavo.disk import write_atomic
from octavo.errors import OctavoError, ResourceError

TIMEOUT = 10.0  # seconds of silence after which there is no network


def cache_dir() -> Path:
    """Where downloads are kept."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("OCTAVO_CACHE") or base / "octavo")


def fetch(name: str, url: str, sha256: str, otherwise: str, places: Iterable[Path] = ()) -> bytes:
    """The bytes with this SHA-256: from ``places``, the cache (as ``name``), or else from ``url``.

    Raises `ResourceError` when the network is absent or gives other bytes; ``otherwise`` tells
    what to do then.
    """
    kept = cache_dir() / name
    for place in [*places, kept]:
        with suppress(OSError):
            data = place.read_bytes()
            if hashlib.sha256(data).hexdigest() == sha256:
                return data
    data = _download(name, url, otherwise)
    actual = hashlib.sha256(data).hexdigest()
    if actual != sha256:
        raise ResourceError(
            f"the download of {name} is damaged: its SHA-256 is {actual[:12]}…, not {sha256[:12]}…",
            f"from {url}",
            otherwise,
        )
    with suppress(OSError, OctavoError):  # a cache that cannot be written only costs time later
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(kept, data)
    return data


def _download(name: str, url: str, otherwise: str) -> bytes:
    from http.client import HTTPException
    from urllib.request import urlopen

    try:
        with urlopen(url, timeout=TIMEOUT) as response:
            return response.read()
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise ResourceError(
            f"cannot download {name}: {reason or type(error).__name__}", f"from {url}", otherwise
        ) from None
