"""The tokens of a running server: read from TorchServe's key file, renewed when they have run out.

A renewed token replaces the old one for everybody, so a token is renewed only when its time is over or nearly so.
"""

import fcntl
import json
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import requests

from detserve.edge.settings import read_tokens
from detserve.errors import ServerError
from detserve.instance import Instance, InstanceState

TokenKind = Literal["inference", "management", "key"]

_RENEW_WITHIN_S = 10.0
_FILE_WAIT_S = 3.0


class NotAnsweringError(ServerError):
    """The management API cannot be reached, or not in time."""


@dataclass(frozen=True)
class Token:
    """A token, or the API key that renews tokens (``kind`` is "key"; it does not expire)."""

    value: str
    kind: TokenKind
    expires_at: datetime | None

    def expires_in_s(self) -> float | None:
        """Return the seconds that it is still valid, negative when it is over; None when it never expires."""
        return None if self.expires_at is None else (self.expires_at - datetime.now(UTC)).total_seconds()


def token(instance: Instance | None = None, kind: TokenKind = "inference", *, renew: bool = True) -> Token:
    """Return a valid token of a running server, a new one when the old one's time is over.

    Behind an edge the inference token is the edge's: the first of its file, valid for as long as it stands there.
    """
    instance = instance or Instance.named()
    state = instance.require_running()
    if not state.token_auth:
        raise ServerError(
            f"The server of instance {instance.name!r} was started without token authorisation: "
            "send requests without an Authorization header."
        )
    if (own := _edge_token(state, kind)) is not None:
        return own
    found = _read(instance, kind)
    left = found.expires_in_s()
    if not renew or left is None or left > _renew_within_s(instance, found):
        return found
    return renewed(instance, state, kind, found.value)


def _renew_within_s(instance: Instance, found: Token) -> float:
    """Return how near its end a token is renewed; one that lives for seconds not at once, or it never came to use."""
    if found.expires_at is None:
        return 0.0
    try:
        lifetime_s = found.expires_at.timestamp() - instance.key_path.stat().st_mtime
    except OSError:  # the server is ending
        return _RENEW_WITHIN_S
    return max(0.0, min(_RENEW_WITHIN_S, lifetime_s / 4))


def renewed(instance: Instance, state: InstanceState, kind: TokenKind, old: str) -> Token:
    """Ask the server for a new token, unless somebody else has done so since ``old`` was read.

    An edge's token is the user's to renew: the one that its file begins with is returned, be it the old one.
    """
    if (own := _edge_token(state, kind)) is not None:
        return own
    with instance.key_path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        current = _read(instance, kind)
        left = current.expires_in_s()
        if current.value != old and (left is None or left > 0):
            return current
        key = _read(instance, "key").value
        with requests.Session() as session:
            session.trust_env = False  # a proxy or a ~/.netrc has no business on the loopback
            try:
                answer = session.get(
                    f"{state.management_url}/token",
                    params={"type": kind},
                    headers={"Authorization": f"Bearer {key}"},
                    timeout=10,
                )
            except requests.RequestException as error:
                raise NotAnsweringError(
                    f"The server did not renew its {kind} token: {state.management_url} does not answer "
                    f"({type(error).__name__}). Restart the server."
                ) from error
        if answer.status_code != 200:
            raise ServerError(
                f"The server did not renew its {kind} token: HTTP {answer.status_code} {answer.text.strip()[:200]}. "
                "Restart the server."
            )
        return _read(instance, kind)


def _edge_token(state: InstanceState, kind: TokenKind) -> Token | None:
    if kind != "inference" or state.edge is None or state.edge.tokens_file is None:
        return None
    return Token(read_tokens(Path(state.edge.tokens_file))[0], kind, None)


def _read(instance: Instance, kind: TokenKind) -> Token:
    """Read the key file, which is empty for a moment while TorchServe writes it."""
    deadline = time.monotonic() + _FILE_WAIT_S
    while True:
        try:
            return _parsed(json.loads(instance.key_path.read_text(encoding="utf-8")), kind)
        except (OSError, ValueError, KeyError, TypeError) as error:
            if time.monotonic() > deadline:
                raise ServerError(
                    f"The token file {instance.key_path} cannot be read ({type(error).__name__}: {error}). "
                    "Restart the server: `detserve serve stop`, then `start`."
                ) from error
            time.sleep(0.05)


def _parsed(data: dict[str, Any], kind: TokenKind) -> Token:
    if kind == "key":
        return Token(data["API"]["key"], kind, None)
    entry = data[kind]
    # Java writes nanoseconds, fromisoformat reads microseconds.
    head, dot, fraction = entry["expiration time"].removesuffix("Z").partition(".")
    expires = datetime.fromisoformat(head + (dot + fraction[:6] if dot else "")).replace(tzinfo=UTC)
    return Token(entry["key"], kind, expires)
