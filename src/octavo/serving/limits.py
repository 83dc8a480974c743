"""How much one server takes on."""

from dataclasses import dataclass
from typing import Annotated

from octavo.settings import Group


@dataclass(frozen=True, kw_only=True)
class Limits(Group):
    """The bounds of one server. Raises `ConfigError` for a bound that is none."""

    slots: Annotated[int, (1, 1024)] = 32
    """Texts written at once by each model."""
    queue: Annotated[int, (0, 2**20)] = 64
    """Requests that may wait for each model."""
    tokens: Annotated[int, (1, 2**30)] = 4096
    """Tokens that a request may ask for, a text."""
    seconds: Annotated[float, (0.001, 1e6)] = 600
    """From a request's arrival to its last token."""
    grace: Annotated[float, (0, 1e6)] = 30
    """Seconds that what is being written has when the server is told to end."""
    body: Annotated[int, (1, 2**30)] = 2**20
    """Bytes of a request."""
    arrival: Annotated[float, (0.001, 1e6)] = 30
    """Seconds in which a request must come in, and in which a reader must take something."""
