"""Converts a data set in pieces, by several processes, so that its size does not matter to the memory.

    part ─► pieces ─► read: policies ─► spilled ─┐  what only the whole tells: classes, VOC's first pixel, ids
                                                 ├─► write: COCO fragments, VOC or YOLO files ─► joined, renamed
    a piece is some images; a process reads or writes one at a time

Nothing stands under the output's name before all of it is written.
"""

import itertools
import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import yaml

from dettools.datasets.conversion_parts import LoadedReader, Part, Reader
from dettools.datasets.conversion_pieces import (
    Map,
    Numbering,
    Piece,
    Task,
    pool,
    read_by_worker,
    read_piece,
    workspace,
    write_piece,
)
from dettools.datasets.conversion_rules import Rules, Tally
from dettools.datasets.dataset import DatasetFormatError, Progress, is_id
from dettools.datasets.voc import FROM_0, PixelCount
from dettools.datasets.writing import CocoWriter, Files, FolderWriter, Written
from dettools.ground_truth import base_name

# Key of a class in the source to its id and name.
Table = Mapping[Any, tuple[int, str]]
_VOC_FOLDERS = ("JPEGImages", "Annotations", "ImageSets/Main")


@dataclass(frozen=True)
class Output:
    """What was written: ``path`` a COCO file or a folder, with so many images and objects; ``name`` of the split."""

    path: Path
    name: str
    images: int
    annotations: int


@dataclass(frozen=True)
class Conversion:
    """The outcome.

    Attributes:
        outputs: one a part.
        categories: id to name, as written.
        skipped: what was left out.
        lost: what the target has no place for, name to count.
        unread: what the source has besides, and the reader does not take.
        notes: what a person should know, one sentence each.
    """

    outputs: tuple[Output, ...]
    categories: Mapping[int, str]
    skipped: Tally
    lost: Mapping[str, int]
    unread: Mapping[str, int]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return {
            "outputs": [{**vars(one), "path": str(one.path)} for one in self.outputs],
            "categories": [{"id": identifier, "name": name} for identifier, name in self.categories.items()],
            "skipped": self.skipped.to_json(),
            "not_held_by_target": dict(sorted(self.lost.items())),
            "not_read": dict(sorted(self.unread.items())),
            "notes": list(self.notes),
        }


class Converter:
    """Converts parts of one reader's data set.

    Args:
        reader: of the source.
        rules: what is written.
        processes: so many read and write at once.
        first_pixel: VOC: what the first pixel of a row is called, read or written; None decides by the coordinates.
        files: what becomes of the image files where the target is a folder.
        progress: told of the images that are read and written.
    """

    def __init__(
        self,
        reader: Reader,
        rules: Rules,
        *,
        processes: int = 1,
        first_pixel: int | None = None,
        files: Files = "link",
        progress: Progress | None = None,
    ) -> None:
        self._reader, self._rules, self._processes = reader, rules, processes
        self._first_pixel, self._files, self._progress = first_pixel, files, progress
        self._skipped, self._lost, self._unread = Tally(), Counter[str](), Counter[str]()
        self._notes: list[str] = []
        self._done = self._total = 0
        self._counted = PixelCount()

    def to_coco(self, parts: Mapping[Path, Part], extra: Mapping[str, Any], *, keep_empty: bool) -> Conversion:
        """Write one COCO file a part; ``extra`` joins the document. A part without any object may be left out.

        Raises:
            DatasetFormatError: a file cannot be read or written.
        """
        outputs: list[Output] = []
        for path in parts:
            path.parent.mkdir(parents=True, exist_ok=True)
        with (
            workspace(next(iter(parts)).parent) as folder,
            pool(self._processes, self._reader_of_workers()) as mapped,
        ):
            pieces = self._read([*parts.values()], folder, mapped)
            everything = list(itertools.chain(*pieces))
            table = self._table(everything)
            for (path, part), some in zip(parts.items(), pieces, strict=True):
                if not keep_empty and not any(piece.annotations for piece in some):
                    self._skipped.add("no_objects", f"{part.name}: {path.name} is not written")
                    continue
                work = folder / f"output-{len(outputs)}"
                written = self._write_document(path, some, table, work, extra, mapped)
                outputs.append(Output(path, part.name, written.images, written.annotations))
        return self._conversion(outputs, table)

    def to_folder(self, root: Path, parts: Sequence[Part]) -> Conversion:
        """Write a tree of VOC or YOLO files.

        Raises:
            DatasetFormatError: the folder has files already, or one cannot be read or written.
        """
        # What it links to, which need not be there yet.
        place = root.resolve()
        if place.exists() and (not place.is_dir() or any(place.iterdir())):
            got = "a folder with files" if place.is_dir() else "a file"
            raise DatasetFormatError(f"{root}: got {got}, expected a new or empty folder. Name another --out.")
        place.parent.mkdir(parents=True, exist_ok=True)
        with (
            workspace(place.parent) as folder,
            pool(self._processes, self._reader_of_workers()) as mapped,
        ):
            tree = folder / "tree"
            pieces = self._read(parts, folder / "spills", mapped)
            together = list(itertools.chain(*pieces))
            table, first = self._table(together), self._first()
            stems = _stems([name for piece in together for name in piece.names])
            outputs = []
            for part, some in zip(parts, pieces, strict=True):
                split = part.name or ("train" if self._rules.target == "yolo" else "")
                for inner in _VOC_FOLDERS if self._rules.target == "voc" else (f"images/{split}", f"labels/{split}"):
                    (tree / inner).mkdir(parents=True, exist_ok=True)
                writer: CocoWriter | FolderWriter = FolderWriter(self._rules, tree, split, first, self._files)
                mine = stems[: sum(piece.images for piece in some)]
                stems = stems[len(mine) :]
                written = self._write(some, table, mine, [writer] * len(some), mapped)
                if self._rules.target == "voc" and part.name:
                    (tree / "ImageSets/Main" / f"{part.name}.txt").write_text("".join(f"{one}\n" for one in mine))
                outputs.append(Output(root, split, written.images, written.annotations))
            if self._rules.target == "yolo":
                self._describe(tree, [one.name for one in outputs], table)
            tree.replace(place)
        return self._conversion(outputs, table)

    def _write_document(
        self,
        path: Path,
        pieces: Sequence[Piece],
        table: Table,
        work: Path,
        extra: Mapping[str, Any],
        mapped: Map,
    ) -> Written:
        images, annotations = work / "images", work / "annotations"
        images.mkdir(parents=True)
        annotations.mkdir()
        writers: list[CocoWriter | FolderWriter] = [
            CocoWriter(images / f"{at:08}", annotations / f"{at:08}") for at in range(len(pieces))
        ]
        names = [name for piece in pieces for name in piece.names]
        # Sorted: a table of a hundred thousand names would show in the memory.
        twice = {name for name, following in itertools.pairwise(sorted(names)) if name and name == following}
        for name, count in Counter(name for name in names if name in twice).items():
            self._skipped.add("duplicate_file_name", f"{name}: {count} images")
        written = self._write(pieces, table, names, writers, mapped)
        whole = work / path.name
        with whole.open("wb") as stream:
            stream.write(json.dumps(dict(extra))[:-1].encode() + (b", " if extra else b""))
            for key, fragments in (("images", images), ("annotations", annotations)):
                stream.write(f'"{key}": ['.encode())
                _join(sorted(fragments.iterdir()), stream)
                stream.write(b"],\n")
            entries = [
                {**self._entry(key), "id": identifier, "name": name} for key, (identifier, name) in table.items()
            ]
            stream.write(b'"categories": ' + json.dumps(entries, ensure_ascii=False).encode() + b"}\n")
        # Both are on one file system, so that this is one step.
        whole.replace(path)
        return written

    def _entry(self, key: Any) -> Mapping[str, Any]:
        """Return what else a COCO file says of a class."""
        if not isinstance(self._reader, LoadedReader):
            return {}
        return next(one for one in self._reader.dataset.document["categories"] if one.get("id") == key)

    def _read(self, parts: Sequence[Part], folder: Path, mapped: Map) -> list[list[Piece]]:
        """Read all parts before any is written: classes and the first pixel are of the whole data set."""
        for reason, detail in self._reader.left_out(parts):
            self._skipped.add(reason, detail)
        step = self._reader.at_once
        self._total = 2 * sum(len(part.items) for part in parts)
        pieces: list[list[Piece]] = []
        for part in parts:
            spills = folder / f"part-{len(pieces)}"
            spills.mkdir(parents=True)
            starts = range(0, len(part.items), step)
            tasks = [(part.items[start : start + step], spills / f"{start:09}", self._rules) for start in starts]
            own = map(partial(read_piece, self._reader), tasks) if isinstance(self._reader, LoadedReader) else None
            pieces.append([])
            for piece in own or mapped(read_by_worker, tasks):
                self._skipped.merge(piece.skipped)
                self._unread.update(piece.unread)
                self._counted.merge(piece.counted)
                self._tell(piece.images)
                pieces[-1].append(piece)
        return pieces

    def _write(
        self,
        pieces: Sequence[Piece],
        table: Table,
        stems: Sequence[str],
        writers: Sequence[CocoWriter | FolderWriter],
        mapped: Map,
    ) -> Written:
        keep = self._keeps_ids()
        first = self._first() if self._reader.kind == "voc" else 0
        image, annotation, tasks = 1, 1, []
        for piece, writer in zip(pieces, writers, strict=True):
            numbering = Numbering(image, annotation, keep, table, first)
            mine = stems[image - 1 : image - 1 + piece.images]
            tasks.append(Task(piece.spill, mine, numbering, writer))
            image, annotation = image + piece.images, annotation + piece.annotations
        images = annotations = 0
        for written, skipped in mapped(write_piece, tasks):
            self._skipped.merge(skipped)
            self._lost.update(written.lost)
            images, annotations = images + written.images, annotations + written.annotations
            self._tell(written.images)
        return Written(images, annotations, Counter())

    def _reader_of_workers(self) -> Reader | None:
        # A data set that is in memory is read by this process.
        return None if isinstance(self._reader, LoadedReader) else self._reader

    def _tell(self, images: int) -> None:
        self._done += images
        if self._progress:
            self._progress(self._done, self._total)

    def _table(self, pieces: Sequence[Piece]) -> dict[Any, tuple[int, str]]:
        """Return the key of each class to its id and name, in the order of the target's classes."""
        known = self._reader.categories
        used = {key for piece in pieces for key in piece.keys}
        if known is None and self._reader.kind == "yolo":
            self._notes.append("there are no names of classes: they are called by their numbers")
            known = {number: (number, f"class {number - 1}") for number in range(1, max(used, default=0) + 1)}
        elif known is None:
            known = {name: (number, name) for number, name in enumerate(sorted(used), start=1)}
        table = dict(known)
        renumbered = {key: (number, name) for number, (key, (_, name)) in enumerate(table.items(), start=1)}
        if self._rules.target == "yolo" or self._rules.contiguous:
            if self._rules.target == "yolo" and renumbered != table:
                self._note("category ids become class numbers from 0, in their order; the way back counts from 1")
            return renumbered
        if self._rules.target == "voc" and self._reader.kind != "voc":
            self._note("VOC has names of classes only: the way back numbers them by the alphabet")
            if empty := [name for key, (_, name) in table.items() if key not in used]:
                self._lost["classes without any object"] += len(empty)
        return table

    def _first(self) -> int:
        """Return what VOC's first pixel of a row is called, read or written: one rule, so that the way back is sure."""
        if "voc" not in (self._reader.kind, self._rules.target):
            return 0
        if self._first_pixel is not None:
            return self._first_pixel
        if not self._counted.first:
            self._note(FROM_0)
        return self._counted.first

    def _keeps_ids(self) -> bool:
        """Whether the entries of a COCO file keep their ids: predictions name images by them."""
        if not isinstance(self._reader, LoadedReader) or self._rules.target != "coco":
            return False
        dataset = self._reader.dataset
        ids = [[one.get("id") for one in entries] for entries in (dataset.images, dataset.annotations)]
        if all(all(is_id(one) for one in some) and len(set(some)) == len(some) for some in ids) and 0 not in ids[1]:
            return True
        self._note("an id is 0, missing, no whole number or there twice: images and annotations are numbered from 1")
        return False

    def _note(self, note: str) -> None:
        if note not in self._notes:
            self._notes.append(note)

    def _describe(self, tree: Path, splits: Sequence[str], table: Table) -> None:
        names = [name for _, name in table.values()]
        values = {**{split: f"images/{split}" for split in splits}, "names": dict(enumerate(names))}
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        (tree / "data.yaml").write_text(text, encoding="utf-8")
        if "val" not in splits and "valid" not in splits:
            self._note("data.yaml has no val, which training needs: convert it too, or name another folder there")

    def _conversion(self, outputs: Sequence[Output], table: Table) -> Conversion:
        if isinstance(self._reader, LoadedReader) and self._rules.target != "coco":
            self._note("the ids of images and annotations have no place: the way back numbers them from 1")
            document = self._reader.dataset.document
            self._lost.update(
                f"categories: {key}" for one in document["categories"] for key in one if key not in ("id", "name")
            )
            lists = ("images", "annotations", "categories")
            self._lost.update(key for key, value in document.items() if key not in lists and value)
        lost = {key: count for key, count in self._lost.items() if count > 0}
        return Conversion(tuple(outputs), dict(table.values()), self._skipped, lost, self._unread, tuple(self._notes))


def _join(fragments: Sequence[Path], stream: BinaryIO) -> None:
    """Write lists without brackets behind each other."""
    before = False
    for fragment in fragments:
        if fragment.stat().st_size:
            stream.write(b",\n" if before else b"\n")
            before = True
            with fragment.open("rb") as source:
                shutil.copyfileobj(source, stream)


def _stems(names: Sequence[str]) -> list[str]:
    """Return a file name without suffix for each image: its own, with its folders where another has it."""
    used: set[str] = set()
    stems = []
    for name in names:
        path = PurePosixPath(name.replace("\\", "/")).with_suffix("") if base_name(name) else PurePosixPath("image")
        joined = "__".join(part for part in path.parts if part not in ("/", "..", "."))
        numbered = (f"{joined}_{number}" for number in itertools.count(2))
        stem = next(one for one in itertools.chain((path.name, joined), numbered) if one.casefold() not in used)
        used.add(stem.casefold())
        stems.append(stem)
    return stems
