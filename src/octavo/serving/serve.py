"""A server from its settings to its end."""

import asyncio
import ipaddress
import sys
from collections.abc import Sequence
from typing import Any

from octavo.errors import ConfigError
from octavo.serving.app import create_app
from octavo.serving.limits import Limits
from octavo.serving.listening import Server, listen
from octavo.serving.metrics import Metrics
from octavo.serving.models import load_models


def serve(
    paths: Sequence[str], host: str, port: int, key: str | None, limits: Limits, **options: Any
) -> None:
    """Serve runs until Ctrl-C or SIGTERM; ``options`` are those of `octavo.load`.

    Raises `ConfigError` for an address beyond this machine without a ``key``, `ResourceError` where
    it cannot listen, and what loading raises.
    """
    if key is None and not is_loopback(host):
        raise ConfigError(
            f"{host} can be reached from other machines, and there is no key",
            fix="give one with --api-key-file FILE or OCTAVO_API_KEY, or leave --host out",
        )
    if key is not None and not (key.isascii() and key.isprintable()):
        raise ConfigError("the key has characters that no request can carry", fix="use ASCII")
    with listen(host, port) as listening:
        metrics = Metrics()
        models = load_models(paths, limits, metrics, **options)
        app = create_app(models, limits, metrics, key, host)
        server = Server(app, models, limits)
        address = f"[{host}]" if ":" in host else host
        where = f"http://{address}:{listening.getsockname()[1]}"
        print(f"serving {', '.join(models.by_name)} at {where}/v1; Ctrl-C ends", flush=True)
        asyncio.run(server.serve(sockets=[listening]))
    print("the server has ended", file=sys.stderr)


def is_loopback(host: str) -> bool:
    """Whether an address, or the name localhost, is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"
