"""The tokens that the edge lets in: lines of a file that the user edits, files of a folder that nginx looks into.

nginx asks for each request whether a file named like its token is there. So a token is valid, and no longer valid, from
one request to the next, and nothing has to be reloaded, which would close idle connections in the face of a request.
"""

import contextlib
import json
import re
import secrets
import time
from pathlib import Path

from detserve.edge.settings import read_tokens
from detserve.errors import ServerError
from detserve.instance import Instance

_FILE_WAIT_S = 3.0
_SAFE = re.compile(r"[A-Za-z0-9_=-]+")


def write_new_token(path: Path) -> None:
    """Make a token file with one new token, readable by us alone."""
    path.touch(mode=0o600)
    path.write_text(f"{secrets.token_urlsafe(32)}\n", encoding="utf-8")


def publish_tokens(tokens_file: Path, folder: Path) -> bool:
    """Bring the folder that nginx looks into up to the file: first what is new, then without what is gone.

    Returns:
        Whether anything was new or gone.

    Raises:
        ServerError: the file cannot be read, or is being written; the folder stays as it was.
    """
    wanted = set(read_tokens(tokens_file))
    folder.mkdir(mode=0o700, exist_ok=True)
    there = {path.name for path in folder.iterdir()}
    for name in wanted - there:
        (folder / name).touch(mode=0o600)
    for name in there - wanted:
        with contextlib.suppress(FileNotFoundError):
            (folder / name).unlink()
    return wanted != there


def backend_token(instance: Instance) -> str:
    """Return TorchServe's own inference token; its file is empty for a moment while TorchServe writes it."""
    deadline = time.monotonic() + _FILE_WAIT_S
    while True:
        try:
            key = str(json.loads(instance.key_path.read_text(encoding="utf-8"))["inference"]["key"])
            if _SAFE.fullmatch(key):
                return key
            # Anything else could end nginx's string and begin a directive.
            raise ServerError(f"The token in {instance.key_path} is not one of letters, digits, '-', '_' and '='.")
        except (OSError, ValueError, KeyError, TypeError) as error:
            if time.monotonic() > deadline:
                raise ServerError(f"The token file {instance.key_path} cannot be read ({error}).") from error
            time.sleep(0.05)
