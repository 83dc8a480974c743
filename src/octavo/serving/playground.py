"""The page at `/`: one file, which speaks to the server that sent it and to nothing else."""

import base64
import hashlib
import re
from importlib.resources import files

from fastapi.responses import HTMLResponse


def playground() -> HTMLResponse:
    """The page. Its policy lets run only the script and the style that are in the file, by their
    hashes: whatever a model writes, it cannot become either.
    """
    html = files("octavo.serving").joinpath("playground.html").read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; script-src '{_hash(html, 'script')}'; "
        f"style-src '{_hash(html, 'style')}'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {
        "Content-Security-Policy": policy,
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-cache",
    }
    return HTMLResponse(html, headers=headers)


def _hash(html: str, tag: str) -> str:
    """The hash of the one element, as a policy names it."""
    (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
