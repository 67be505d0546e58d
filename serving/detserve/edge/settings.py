"""What a user chooses of the edge: TLS, tokens, limits. Checked before anything is started."""

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from detserve.errors import ServerError

TOKEN_PATTERN = re.compile(r"[A-Za-z0-9_-]{16,200}")
_UNQUOTABLE = re.compile(r'["$;{}\\\x00-\x1f]')


@dataclass(frozen=True)
class EdgeSettings:
    """How the edge is set up.

    Attributes:
        tls_certificate, tls_key: PEM files; without them it speaks plain HTTP.
        tokens: file with one valid token a line; None makes a token for this run.
        rate: requests a second that one client may send; 0 is without a limit.
        burst: requests that it may send at once beyond that.
        connections: requests of one client at the same time; 0 is without a limit.
        client_timeout_s: how long a client may pause while it sends or reads.
        upstream_timeout_s: how long TorchServe may take, with the time in its queue.
        trusted_proxies: addresses or networks whose X-Forwarded-For names the client.
    """

    tls_certificate: Path | None = None
    tls_key: Path | None = None
    tokens: Path | None = None
    rate: int = 200
    burst: int = 400
    connections: int = 128
    client_timeout_s: int = 15
    upstream_timeout_s: int = 300
    trusted_proxies: Sequence[str] = ()

    def __post_init__(self) -> None:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ServerError("Got one of --tls-cert and --tls-key; expected both, or none for plain HTTP.")
        for path in (self.tls_certificate, self.tls_key, self.tokens):
            if path is not None:
                require_quotable(path)
                _require_readable(path)
        if self.tokens is not None:
            read_tokens(self.tokens)
        for name, least in (("rate", 0), ("burst", 0), ("connections", 0)):
            _at_least(name, getattr(self, name), least)
        for name in ("client_timeout_s", "upstream_timeout_s"):
            _at_least(name, getattr(self, name), 1)
        for address in self.trusted_proxies:
            try:
                ipaddress.ip_network(address)
            except ValueError as error:
                raise ServerError(
                    f"Got the trusted proxy {address!r}; expected an address or a network such as 10.0.0.0/8."
                ) from error


def read_tokens(path: Path) -> list[str]:
    """Return the tokens of a file, one a line; empty lines and lines that begin with # do not count.

    Raises:
        ServerError: it cannot be read, holds none, or a line is no token.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ServerError(f"The token file {path} cannot be read ({error}).") from error
    tokens = [line for line in lines if line and not line.startswith("#")]
    bad = [number for number, token in enumerate(tokens, start=1) if not TOKEN_PATTERN.fullmatch(token)]
    if bad or not tokens:
        got = f"token {bad[0]} of {path} is none" if bad else f"{path} holds no token"
        raise ServerError(
            f"{got[0].upper()}{got[1:]}; expected one a line, each of 16 to 200 letters, digits, '-' and '_'. "
            "Make one with `openssl rand -hex 32`."
        )
    return tokens


def require_quotable(path: Path) -> None:
    """Refuse a path that cannot stand in nginx's configuration."""
    if found := _UNQUOTABLE.search(str(path)):
        raise ServerError(
            f"Got the path {str(path)!r} with the character {found[0]!r}, which nginx's configuration cannot hold. "
            "Choose another place."
        )


def _require_readable(path: Path) -> None:
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise ServerError(f"The file {path} cannot be read ({error.strerror}).") from error


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ServerError(f"Got {name}={value}; expected {least} or more.")
