"""What shows that a file is whole: its digest, its archive's own checks, or its length alone; else it is not taken."""

import hashlib
from pathlib import Path

from dettools.datasets.download_archive import check_whole
from dettools.datasets.download_table import DownloadError


def proof_of(path: Path, size: int | None, digest: str) -> str:
    """Return what shows that a file is whole: its digest, its archive's own checks, or its length alone.

    Raises:
        DownloadError: it is not whole, or not the file that it should be; or nothing can show it.
    """
    got = path.stat().st_size
    if not got:
        raise DownloadError("it is empty.")
    if size is not None and got != size:
        raise DownloadError(f"got {got} bytes, expected {size}.")
    if digest:
        kind, _, expected = digest.partition(":")
        if (found := _digest(path, kind)) != expected:
            raise DownloadError(f"got {kind} {found}, expected {expected}: damaged on the way, or another file.")
        return kind
    if check_whole(path):
        return "archive"
    if size is None:
        raise DownloadError("neither its size nor its digest is known, so that half of it would look like all.")
    return "length"


def sha256_of(path: Path, proven: str = "") -> str:
    """Return a file's SHA-256; it is not read again where `proof_of` has proven that digest."""
    kind, _, digits = proven.partition(":")
    return digits if kind == "sha256" else _digest(path, "sha256")


def _digest(path: Path, kind: str) -> str:
    with path.open("rb") as file:
        # MD5 is what is published for some files; it shows damage, not malice.
        return hashlib.file_digest(file, lambda: hashlib.new(kind, usedforsecurity=False)).hexdigest()
