"""Secrets out of a config before it is shown: passwords, tokens and keys, by the key's words or the value's shape."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from dettools.configs.origins import Key

HIDDEN = "***"
_WORDS = {"password", "passwd", "pwd", "passphrase", "secret", "token", "apikey", "credential", "bearer"}
_WORDS |= {"authorization", "credentials"}
# At the end of a key, several of them; `tokens` alone may be anything's, and `passwords_file` is a path.
_PLURALS = {"passwords", "passphrases", "secrets", "apikeys"}
# Words that are a secret only together: `key` alone is any key.
_PAIRS = {(what, "key") for what in ("api", "access", "secret", "private", "auth", "account", "ssh")}
_PAIRS |= {("auth", "token"), ("access", "token"), ("api", "token")}
_PAIRS |= {(first, f"{second}s") for first, second in _PAIRS}
_SHAPES = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\bgh[pousr]_[A-Za-z0-9]{20,}"
    r"|\bgithub_pat_\w{20,}|\bhf_[A-Za-z0-9]{20,}|\bsk-[A-Za-z0-9_-]{20,}|\bxox[abprs]-[A-Za-z0-9-]{10,}"
    r"|\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]+|(?<=\bBearer )\S{6,}|(?<=hooks\.slack\.com/services/)\S+"
    r"|(?i:(?<=\bpassword=)|(?<=\bpwd=))[^\s;&]+",
    re.DOTALL,
)
_IN_ADDRESS = re.compile(r"(?<=://)[^/\s@:]*:[^/\s@]+(?=@)")
_IN_QUERY = re.compile(r"(?i)([?&](?:[\w-]*(?:token|signature|secret|password|api_?key|credential)|sig)=)[^&\s]+")


@dataclass(frozen=True)
class Redacted:
    """Values without secrets, and the dotted keys of those that were hidden."""

    values: dict[str, Any]
    hidden: tuple[str, ...]


def redacted(values: Mapping[str, Any]) -> Redacted:
    """Replace what looks like a secret by ``***``, also in the passwords and signatures of addresses."""
    hidden: list[str] = []
    shown: dict[str, Any] = _shown(values, (), hidden, secret=False)
    return Redacted(shown, tuple(hidden))


def redacted_at(path: tuple[Key, ...], value: Any) -> Any:
    """Replace what looks like a secret in the value at a path; a word of the path may tell that it is one."""
    secret = any(_names_a_secret(str(key)) for key in path)
    return _shown(value, path, [], secret=secret)


def _shown(value: Any, path: tuple[Key, ...], hidden: list[str], *, secret: bool) -> Any:
    if isinstance(value, Mapping):
        return {
            key: _shown(inner, (*path, key), hidden, secret=secret or _names_a_secret(str(key)))
            for key, inner in value.items()
        }
    if isinstance(value, list | tuple):
        inner = [_shown(one, (*path, number), hidden, secret=secret) for number, one in enumerate(value)]
        return type(value)(inner)
    clean = value
    if isinstance(value, str) and value:
        shaped = _IN_QUERY.sub(rf"\1{HIDDEN}", _IN_ADDRESS.sub(HIDDEN, value))
        clean = HIDDEN if secret else _SHAPES.sub(HIDDEN, shaped)
    elif secret and isinstance(value, int) and not isinstance(value, bool) and _is_a_password(path):
        clean = HIDDEN
    if clean is not value and clean != value:  # NaN differs from itself
        hidden.append(".".join(map(str, path)))
    return clean


def _words(key: str) -> list[str]:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key).lower().replace("-", "_").split("_")


def _names_a_secret(key: str) -> bool:
    words = _words(key)
    return not _WORDS.isdisjoint(words) or words[-1] in _PLURALS or any(pair in _PAIRS for pair in pairwise(words))


def _is_a_password(path: tuple[Key, ...]) -> bool:
    """Whether a number is one: `token=4` is a count, `password=1234` is not."""
    return any(not {"password", "passwd", "pwd", "secret"}.isdisjoint(_words(str(key))) for key in path)
