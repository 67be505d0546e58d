"""Corrupted files of some images in a folder, written by several processes: corrupting costs more than detecting."""

import multiprocessing
import signal
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

from dettools.analysis.corruptions import PICTORIAL, CorruptionError, corrupted, require_library
from dettools.ground_truth import ImageEntry


@dataclass(frozen=True)
class CorruptedFiles:
    """Image id to its file, and the images that could not be corrupted, with the reason."""

    files: Mapping[int, Path]
    failures: Mapping[int, str]


class Corruptor(AbstractContextManager["Corruptor"]):
    """Writes corrupted files; ``processes`` of them at once. What is written does not depend on their number."""

    def __init__(self, seed: int, processes: int = 1) -> None:
        self._seed = seed
        # A forked process would inherit threads of torch and of gRPC that are not there.
        context = multiprocessing.get_context("spawn")
        self._pool = (
            ProcessPoolExecutor(processes, mp_context=context, initializer=_leave_ctrl_c_to_the_parent)
            if processes > 1
            else None
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def write(
        self, entries: Sequence[ImageEntry], files: Mapping[int, Path], folder: Path, corruption: str, severity: int
    ) -> CorruptedFiles:
        """Corrupt the images that have a file.

        Raises:
            CorruptionError: the corruption needs a package that is not installed.
        """
        if corruption in PICTORIAL:
            # Once for all images, not as each one's own failure.
            require_library()
        known = [entry.id for entry in entries if entry.id in files]
        write = partial(_write, folder=folder, corruption=corruption, severity=severity, seed=self._seed)
        sources = [files[one] for one in known]
        outcomes = list(self._pool.map(write, known, sources) if self._pool else map(write, known, sources))
        pairs = list(zip(known, outcomes, strict=True))
        return CorruptedFiles(
            {one: path for one, path in pairs if isinstance(path, Path)},
            {one: reason for one, reason in pairs if isinstance(reason, str)},
        )


def _write(image_id: int, source: Path, *, folder: Path, corruption: str, severity: int, seed: int) -> Path | str:
    try:
        body = corrupted(source.read_bytes(), corruption, severity, image_id=image_id, seed=seed)
    except CorruptionError as error:
        return str(error)
    except OSError as error:
        return f"{source}: {error.strerror or error}"
    path = folder / f"{image_id}{_suffix(body, source.suffix)}"
    path.write_bytes(body)
    return path


def _suffix(body: bytes, otherwise: str) -> str:
    return ".png" if body.startswith(b"\x89PNG") else ".jpg" if body.startswith(b"\xff\xd8") else otherwise


def _leave_ctrl_c_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
