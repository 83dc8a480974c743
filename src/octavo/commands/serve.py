"""`octavo serve`: models behind OpenAI's API."""

import os
from argparse import Namespace
from pathlib import Path

from octavo.commands.shared import Option, add_common, one_run
from octavo.errors import ConfigError, MissingExtraError

WORDS = "RUN..."
PAGE = """\
Serve models to whatever speaks OpenAI's API, each by its directory's name.

  octavo serve runs/my
  octavo serve runs/my runs/voice --port 8080
  octavo serve runs/my --host 0.0.0.0 --api-key-file key.txt
  curl localhost:8000/v1/completions -H "Content-Type: application/json" -d '{"prompt": "The "}'

In a program: OpenAI(base_url="http://localhost:8000/v1", api_key="none"). The same prompt, settings
and seed write what octavo generate writes, whoever else is served. Beyond this machine it listens
only with a key, from a file or OCTAVO_API_KEY. Ctrl-C or SIGTERM: no more requests are taken, what
is being written is finished; a second one ends at once. Without RUN the newest one under runs/ is
served. docs/serve.md has every field, limit and error."""


def add_options(option: Option) -> None:
    option("--port", type=int, default=8000, metavar="N", help="0: any free one; default: 8000")
    option("--host", default="127.0.0.1", metavar="A", help="address to listen on")
    option(
        "--api-key-file", metavar="FILE", help="its one line is the key that requests must carry"
    )
    option("--slots", type=int, default=32, metavar="N", help="texts at once, a model; default: 32")
    option("--queue", type=int, default=64, metavar="N", help="requests that may wait; default: 64")
    option("--max-tokens", type=int, default=4096, metavar="N", help="longest text; default: 4096")
    option("--seconds", type=float, default=600, metavar="S", help="longest request; default: 600")
    option("--grace", type=float, default=30, metavar="S", help="to finish in; default: 30")
    add_common(option, "weights", "base", "device")


def run(args: Namespace, settings: list[str]) -> None:
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        raise MissingExtraError("serve", "octavo serve") from None
    from octavo.serving.limits import Limits
    from octavo.serving.serve import serve

    limits = Limits(
        slots=args.slots,
        queue=args.queue,
        tokens=args.max_tokens,
        seconds=args.seconds,
        grace=args.grace,
    )
    serve(
        args.words or [one_run([])],
        args.host,
        args.port,
        read_key(args.api_key_file),
        limits,
        device=args.device,
        base=args.base,
        weights=args.weights,
    )


def read_key(file: str | None) -> str | None:
    """The key in a file, else in OCTAVO_API_KEY; None without either."""
    if file is None:
        return os.environ.get("OCTAVO_API_KEY") or None
    try:
        key = Path(file).read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(f"cannot read the key {file}: {reason}") from None
    if not key or len(key.splitlines()) > 1:
        raise ConfigError(
            f"the key file {file} does not hold one line", fix="write one key into it"
        )
    return key
