"""A client's tokens: read again when the server has refused one, and renewed when what is read is the refused one."""

import threading
from collections.abc import Callable

from detserve.instance import Instance
from detserve.server.tokens import TokenKind, renewed, token


def token_source(instance: Instance, kind: TokenKind) -> Callable[[], str]:
    """Return the function that a client asks for a token: first, and again when the server refuses what it gave.

    Whether a token's time is over is for the server to say: after a jump of the clock, or with a key file that says
    otherwise, the token that it refuses may seem valid for hours.
    """
    given: str | None = None
    lock = threading.Lock()

    def ask() -> str:
        nonlocal given
        with lock:
            found = token(instance, kind)
            if found.value == given:
                found = renewed(instance, instance.require_running(), kind, found.value)
            given = found.value
            return given

    return ask
