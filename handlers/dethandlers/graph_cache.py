"""Optimised graphs kept from one start of a worker to the next, so that a network is optimised once on a machine.

    key ─► KEY-SHA256.ort there, and its digest right? ─► load it ("cached")
                └─ no ─► optimise, save into a folder of its own, renamed ("fresh")
                             └─ nothing can be saved ─► go on without ("not cached")

A cache never keeps a worker from starting. Its folder belongs to the worker's user (or root) and nobody else may write
there, else it is not used: who can put a graph there could put any into the worker. Workers that start at once each
build their own file; the first one stays.

What it gains is the time of the optimiser, which depends on the nodes of a graph; what it costs depends on its bytes,
which are hashed and, at the first start, written. Opening a session, medians on two cores that others kept busy:

    YOLOX-nano 3.7 MB: 176 ms, cached 61 ms      an exported SSDlite 9 MB: 411 ms, cached 152 ms
    Faster R-CNN 167 MB, on idler cores: 510 ms, cached 545 ms, and 1.1 s more at the first start: not cached

onnxruntime's own format is kept, not ONNX: it loads faster, and some loops' bodies, once optimised and written as ONNX,
do not load again.
"""

import contextlib
import hashlib
import json
import mmap
import os
import platform
import re
import stat
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from dethandlers.artefact import digest_file

FOLDER_VARIABLE = "DETSERVE_CACHE_DIR"
MOST_FILES = 20
MOST_BYTES = 2_000_000_000
LARGEST_FILE = 64_000_000
"""Bytes of an ONNX file; the graph of a larger one loads no faster than it is optimised."""
_SUFFIX = ".ort"
_ABANDONED_S = 3600.0
_REFUSED_S = 86400.0
"""How long a graph that did not load is not tried again: what kept it from loading may have been the machine."""

Optimisation = Literal["cached", "fresh", "not cached"]
SessionT = TypeVar("SessionT")


def cache_folder() -> Path | None:
    """Return the folder of the graphs, made when it is missing; None where none may be used.

    It lies in ``$DETSERVE_CACHE_DIR``, else in ``$XDG_CACHE_HOME/detserve``, else in ``~/.cache/detserve``.
    """
    named, shared = os.environ.get(FOLDER_VARIABLE), os.environ.get("XDG_CACHE_HOME", "")
    try:
        # The XDG base directory specification: a relative path there is to be ignored.
        base = Path(shared) if Path(shared).is_absolute() else Path.home() / ".cache"
        folder = (Path(named) if named else base / "detserve") / "graphs"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder if _ours_alone(folder.lstat()) else None
    except (OSError, RuntimeError):  # RuntimeError: a user without a home
        return None


def graph_key(weights: Path, made_by: Mapping[str, Any]) -> str | None:
    """Return what an optimised graph is kept under; None for a file whose graph is not kept.

    That is one too large to gain by it, and one that does not hold its weights itself.

    Args:
        weights: the file, of which the content counts.
        made_by: what else the graph depends on: the runtime's version, the provider and its options.
    """
    if not 0 < weights.stat().st_size <= LARGEST_FILE or (digest := _digest(weights)) is None:
        return None
    known = {"file": digest, "cpu": [platform.machine(), _cpu_flags()], **made_by}
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:32]


def _digest(weights: Path) -> str | None:
    """Return the SHA-256 of a file, or None when tensors lie in other files, which it would not tell.

    The file itself is read, whatever a list beside it says: an unpacked archive's network may have been replaced since,
    and the old one would answer. Of 64 MB that takes 0.1 s.
    """
    with weights.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        # The key of an entry of TensorProto.external_data (onnx.proto).
        return None if content.find(b"\x0a\x08location") >= 0 else hashlib.sha256(content).hexdigest()


def open_with_cache(
    key: str | None, optimise: Callable[[Path | None], SessionT], load: Callable[[Path], SessionT]
) -> tuple[SessionT, Optimisation]:
    """Open a session by its cached graph, or optimise the graph and keep it.

    Args:
        key: of the graph; None: it cannot be kept.
        optimise: opens a session from the original file, and saves the optimised graph where the path says.
        load: opens a session from a saved graph.

    Returns:
        The session, and where its graph came from. What ``optimise(None)`` raises is passed on, and nothing else.
    """
    folder = cache_folder() if key else None
    if key is None or folder is None or _is_refused(folder, key):
        return optimise(None), "not cached"
    found = _find(folder, key)
    if found is not None:
        try:
            return load(found), "cached"
        except Exception:  # noqa: BLE001 - whatever it is, the original file decides
            session = optimise(None)
            _refuse(folder, key, found)
            return session, "not cached"
    try:
        with tempfile.TemporaryDirectory(prefix=".building-", dir=folder) as building:
            path = Path(building) / f"graph{_SUFFIX}"
            session = optimise(path)
            try:
                _keep(folder, key, path)
            except OSError:
                return session, "not cached"
            return session, "fresh"
    except Exception:  # noqa: BLE001 - read-only, full, or a graph that cannot be saved; else it fails again below
        return optimise(None), "not cached"


def _find(folder: Path, key: str) -> Path | None:
    """Return the graph of a key; one that is damaged is removed."""
    for path in sorted(folder.glob(f"{key}-*{_SUFFIX}")):
        with contextlib.suppress(OSError):
            if _ours_alone(path.lstat()) and digest_file(path) == path.stem.partition("-")[2]:
                with contextlib.suppress(OSError):
                    os.utime(path)  # the oldest are removed first
                return path
            path.unlink()
    return None


def _keep(folder: Path, key: str, built: Path) -> None:
    digest = digest_file(built)
    if next(folder.glob(f"{key}-*{_SUFFIX}"), None):
        return  # of workers that start at once, the first
    built.chmod(0o600)
    kept = folder / f"{key}-{digest}{_SUFFIX}"
    built.replace(kept)
    _tidy(folder, kept)


def _tidy(folder: Path, kept: Path) -> None:
    """Remove what passes the bounds, oldest first, and what workers left that were killed while they built."""
    seen = {}
    for path in [*folder.glob(f"*{_SUFFIX}"), *folder.glob("*.refused")]:
        with contextlib.suppress(OSError):
            seen[path] = path.stat()
    newest_first = sorted(seen, key=lambda path: (path == kept, seen[path].st_mtime), reverse=True)
    total = 0
    for place, path in enumerate(newest_first):
        total += seen[path].st_size
        if path != kept and (place >= MOST_FILES or total > MOST_BYTES):
            path.unlink(missing_ok=True)
    for left in folder.glob(".building-*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _ABANDONED_S:
                for file in left.iterdir():
                    file.unlink()
                left.rmdir()


def _refused(folder: Path, key: str) -> Path:
    """The mark that onnxruntime saved a graph which it does not load, so that not every start tries it again."""
    return folder / f"{key}.refused"


def _is_refused(folder: Path, key: str) -> bool:
    with contextlib.suppress(OSError):
        return abs(time.time() - _refused(folder, key).stat().st_mtime) < _REFUSED_S
    return False


def _refuse(folder: Path, key: str, found: Path) -> None:
    with contextlib.suppress(OSError):
        found.unlink()  # when another worker has removed it meanwhile, the graph is not to blame
        _refused(folder, key).touch(mode=0o600)


def _ours_alone(seen: os.stat_result) -> bool:
    kind = stat.S_ISDIR(seen.st_mode) or stat.S_ISREG(seen.st_mode)
    return kind and seen.st_uid in (os.geteuid(), 0) and not seen.st_mode & 0o022


def _cpu_flags() -> str:
    """Return the processor's features; onnxruntime lays weights out for them."""
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text("utf-8", "replace")
        if match := re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE):
            return " ".join(sorted(match.group(1).split()))
    return platform.processor()
