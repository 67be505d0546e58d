"""How long a client waits before it sends the same request again.

Asking for detections changes nothing, so a request may always be sent again; what must not happen is that all clients
that were refused together come back together, and earlier than the server asked for.
"""

import random
import time
from email.utils import parsedate_to_datetime

LONGEST_WAIT_S = 2.0
_LONGEST_ASKED_S = 30.0
"""A server may ask for patience; one that asks for hours is not obeyed."""


def wait_s(attempt: int, retry_after: str | None = None) -> float:
    """Return the seconds to wait before the ``attempt``-th repetition (1, 2, …).

    Twice as long each time from 0.2 s up to `LONGEST_WAIT_S`, less a random part of up to a half ("equal jitter"); not
    less than the answer's Retry-After header asks for, and then up to a quarter more.
    """
    spread = random.random()  # noqa: S311 - spreads clients, keeps no secret
    own = min(0.1 * 2.0**attempt, LONGEST_WAIT_S) * (1 - spread / 2)
    return max(own, asked_s(retry_after) * (1 + spread / 4))


def asked_s(retry_after: str | None) -> float:
    """Return what a Retry-After header asks for, in seconds: a number, or a date; 0 without one or when it is neither.

    At most 30 s are granted.
    """
    if not retry_after:
        return 0.0
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(retry_after).timestamp() - time.time()
        except ValueError:
            return 0.0
    return min(seconds, _LONGEST_ASKED_S) if seconds > 0 else 0.0
