"""The pieces of a conversion: read one, write one, and the processes that do it."""

import fcntl
import multiprocessing
import os
import pickle
import shutil
import signal
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from dettools.datasets.conversion_parts import Reader
from dettools.datasets.conversion_rules import Rules, Tally, degenerate
from dettools.datasets.dataset import DatasetFormatError, DocumentBuilder, is_key, size_of
from dettools.datasets.voc import PixelCount, count_from
from dettools.datasets.writing import Batch, CocoWriter, FolderWriter, Written

Map = Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]
ReadTask = tuple[Sequence[Any], Path, Rules]
_WORKSPACE = ".convert-dataset."
# Where a worker process has its reader, which it gets once.
_reader: list[Reader] = []


@dataclass
class Piece:
    """What reading a piece told, and where it is spilled."""

    spill: Path
    images: int = 0
    annotations: int = 0
    keys: set[Any] = field(default_factory=set)
    counted: PixelCount = field(default_factory=PixelCount)
    names: list[str] = field(default_factory=list)
    skipped: Tally = field(default_factory=Tally)
    unread: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Numbering:
    """How the entries of a spilled piece are numbered; ``keep`` leaves their ids."""

    image: int
    annotation: int
    keep: bool
    categories: Mapping[Any, tuple[int, str]]
    first_pixel: int


@dataclass(frozen=True)
class Task:
    """A spilled piece and how it is written; ``stems`` are of the files of its images."""

    piece: Path
    stems: Sequence[str]
    numbering: Numbering
    writer: CocoWriter | FolderWriter


@contextmanager
def workspace(parent: Path) -> Iterator[Path]:
    """Yield a new folder in another, for what is not finished; remove it, and those of conversions that were killed."""
    for lock in parent.glob(f"{_WORKSPACE}*/lock"):
        with suppress(OSError), lock.open("r+b") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent)
    with tempfile.TemporaryDirectory(dir=parent, prefix=_WORKSPACE) as name:
        folder = Path(name)
        with (folder / "unlocked").open("wb") as stream:
            # A file system may have no locks. Renamed when it is locked: others must not find it before.
            with suppress(OSError):
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                (folder / "unlocked").rename(folder / "lock")
            yield folder


@contextmanager
def pool(processes: int, reader: Reader | None) -> Iterator[Map]:
    """Yield a function that maps tasks in order, by processes if there are more than one.

    Raises:
        DatasetFormatError: a process was ended from outside.
    """
    if processes <= 1:
        _take_reader(reader)
        yield map
        return
    # A forked process would inherit threads that are not there.
    context = multiprocessing.get_context("spawn")
    theirs, ours = context.Pipe(duplex=False)
    with theirs, ours, ProcessPoolExecutor(processes, context, _start_worker, (reader, theirs)) as executor:

        def mapped(function: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[Any]:
            # Starts the processes, which keep the mask: Ctrl-C is the parent's, which ends them.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
            try:
                futures = [executor.submit(function, task) for task in tasks]
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            # Results are let go of. Not executor.map: it cancels, which an executor whose processes end cannot take.
            futures.reverse()
            while futures:
                yield futures.pop().result()

        try:
            yield mapped
        except BrokenProcessPool:
            raise DatasetFormatError(
                "a process that converts was ended from outside. Is there memory enough?"
            ) from None
        except BaseException:
            ours.close()
            raise


def _start_worker(reader: Reader | None, parent: Connection) -> None:
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    _take_reader(reader)


def _end_with(parent: Connection) -> None:
    # Nothing is ever sent: its end is closed, by itself or because it was killed.
    parent.poll(None)
    os._exit(1)


def _take_reader(reader: Reader | None) -> None:
    _reader[:] = [reader] if reader else []


def read_by_worker(task: ReadTask) -> Piece:
    """Read a piece with the reader that this process has."""
    return read_piece(_reader[0], task)


def read_piece(reader: Reader, task: ReadTask) -> Piece:
    """Read some images, apply the rules and spill them."""
    items, spill, rules = task
    builder = DocumentBuilder()
    reader.read(items, builder)
    piece = Piece(spill, images=len(builder.images), unread=builder.unread)
    for problem in builder.problems:
        piece.skipped.add(problem.kind, problem.detail)
    categories = reader.categories
    names = [str(image.get("file_name") or "") for image in builder.images]
    if rules.target == "coco" and reader.kind != "coco":
        # Other targets tell when they are written.
        for image, file, name in zip(builder.images, builder.files, names, strict=True):
            if file is None:
                piece.skipped.add("missing_file", f"{name}: is written all the same")
            if size_of(image) is None:
                piece.skipped.add("no_image_size", f"{name}: is written with {image['width']} x {image['height']}")
    objects: list[list[dict[str, Any]]] = [[] for _ in builder.images]
    for one in builder.annotations:
        place = one["image_id"] - 1
        key = one.get("category_id")
        if categories is not None and (not is_key(key) or key not in categories):
            piece.skipped.add("unknown_category", f"{names[place]}: category_id {key!r}")
            continue
        if not rules.takes(one, reader.kind == "voc", piece.skipped, names[place]):
            continue
        if "voc" in (reader.kind, rules.target):
            left, top, width, height = one["bbox"]
            shift = int(reader.kind != "voc")
            piece.counted.add(left + shift, top + shift, left + width, top + height)
        piece.keys.add(one["category_id"])
        objects[place].append(one)
    piece.annotations = sum(map(len, objects))
    piece.names = names
    with spill.open("wb") as stream:
        pickle.dump((builder.images, builder.files, objects), stream, pickle.HIGHEST_PROTOCOL)
    return piece


def write_piece(task: Task) -> tuple[Written, Tally]:
    """Write a spilled piece, numbered; remove the spill."""
    with task.piece.open("rb") as stream:
        images, files, objects = pickle.load(stream)  # noqa: S301 - written a moment ago by `read_piece`
    task.piece.unlink()
    numbering = task.numbering
    skipped = Tally()
    annotation = numbering.annotation
    kept: list[list[dict[str, Any]]] = []
    for place, (image, found) in enumerate(zip(images, objects, strict=True)):
        if not numbering.keep:
            image["id"] = numbering.image + place
        kept.append([])
        for one in found:
            if numbering.first_pixel:
                count_from(numbering.first_pixel, one)
            if kind := degenerate(one):
                skipped.add(kind, f"{image.get('file_name')}: bbox {one['bbox']}")
                continue
            one["image_id"] = image["id"]
            one["category_id"] = numbering.categories[one["category_id"]][0]
            if not numbering.keep:
                one["id"] = annotation
            annotation += 1
            kept[-1].append(one)
    batch = Batch(images, files, kept, task.stems, dict(numbering.categories.values()))
    written = task.writer.write(batch) if isinstance(task.writer, CocoWriter) else task.writer.write(batch, skipped)
    return written, skipped
