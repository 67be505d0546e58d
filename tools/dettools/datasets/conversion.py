"""Converts a data set in pieces, by several processes, so that its size does not matter to the memory.

    part ─► pieces ─► read: policies ─► spilled ─┐  what only the whole tells: classes, VOC's first pixel, ids
                                                 ├─► write: COCO fragments, VOC or YOLO files ─► joined, renamed
    a piece is some images; a process reads or writes one at a time

Nothing stands under the output's name before all of it is written.
"""

import itertools
import json
import shutil
import tempfile
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
    write_piece,
)
from dettools.datasets.conversion_rules import Rules, Tally
from dettools.datasets.dataset import DatasetFormatError, Progress, is_id
from dettools.datasets.writing import CocoWriter, Files, FolderWriter, Written
from dettools.ground_truth import base_name

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

    def to_coco(self, parts: Mapping[Path, Part], extra: Mapping[str, Any], *, keep_empty: bool) -> Conversion:
        """Write one COCO file a part; ``extra`` joins the document. A part without any object may be left out.

        Raises:
            DatasetFormatError: a file cannot be read or written.
        """
        outputs = []
        categories: dict[int, str] = {}
        with pool(self._processes, self._reader_of_workers()) as mapped:
            for path, part in parts.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
                    output, table = self._to_coco(path, part, Path(folder), mapped, extra, keep_empty)
                categories |= dict(table.values())
                outputs += [output] if output else []
        return self._conversion(outputs, categories)

    def to_folder(self, root: Path, parts: Sequence[Part]) -> Conversion:
        """Write a tree of VOC or YOLO files.

        Raises:
            DatasetFormatError: the folder has files already, or one cannot be read or written.
        """
        if root.exists() and (not root.is_dir() or any(root.iterdir())):
            raise DatasetFormatError(
                f"{root}: got a folder with files, expected a new or empty one. Name another --out."
            )
        root.parent.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{root.name}.") as folder,
            pool(self._processes, self._reader_of_workers()) as mapped,
        ):
            spills, tree = Path(folder, "spills"), Path(folder, "tree")
            pieces = {part.name: self._read(part, spills / str(at), mapped) for at, part in enumerate(parts)}
            together = [piece for some in pieces.values() for piece in some]
            table, first = self._table(together), self._written_first(together)
            stems = _stems([name for piece in together for name in piece.names])
            outputs = []
            for part in parts:
                split = part.name or ("train" if self._rules.target == "yolo" else "")
                for inner in _VOC_FOLDERS if self._rules.target == "voc" else (f"images/{split}", f"labels/{split}"):
                    (tree / inner).mkdir(parents=True, exist_ok=True)
                writer: CocoWriter | FolderWriter = FolderWriter(self._rules, tree, split, first, self._files)
                some = pieces[part.name]
                mine = stems[: sum(piece.images for piece in some)]
                stems = stems[len(mine) :]
                written = self._write(some, table, mine, [writer] * len(some), mapped)
                if self._rules.target == "voc" and part.name:
                    (tree / "ImageSets/Main" / f"{part.name}.txt").write_text("".join(f"{one}\n" for one in mine))
                outputs.append(Output(root, split, written.images, written.annotations))
            if self._rules.target == "yolo":
                self._describe(tree, [one.name for one in outputs], table)
            tree.replace(root)
        return self._conversion(outputs, dict(table.values()))

    def _to_coco(
        self, path: Path, part: Part, folder: Path, mapped: Map, extra: Mapping[str, Any], keep_empty: bool
    ) -> tuple[Output | None, Mapping[Any, tuple[int, str]]]:
        pieces = self._read(part, folder / "spills", mapped)
        table = self._table(pieces)
        if not keep_empty and not any(piece.annotations for piece in pieces):
            self._skipped.add("no_objects", f"{part.name}: {path.name} is not written")
            return None, {}
        images, annotations = folder / "images", folder / "annotations"
        images.mkdir()
        annotations.mkdir()
        writers: list[CocoWriter | FolderWriter] = [
            CocoWriter(images / f"{at:08}", annotations / f"{at:08}") for at in range(len(pieces))
        ]
        names = [name for piece in pieces for name in piece.names]
        written = self._write(pieces, table, names, writers, mapped)
        whole = folder / path.name
        with whole.open("wb") as stream:
            stream.write(json.dumps(dict(extra))[:-1].encode() + (b", " if extra else b""))
            for key, fragments in (("images", images), ("annotations", annotations)):
                stream.write(f'"{key}": ['.encode())
                _join(sorted(fragments.iterdir()), stream)
                stream.write(b"],\n")
            entries = [{"id": identifier, "name": name} for identifier, name in table.values()]
            stream.write(b'"categories": ' + json.dumps(entries, ensure_ascii=False).encode() + b"}\n")
        whole.replace(path)
        return Output(path, part.name, written.images, written.annotations), table

    def _read(self, part: Part, folder: Path, mapped: Map) -> list[Piece]:
        folder.mkdir(parents=True)
        step = self._reader.at_once
        starts = range(0, len(part.items), step)
        self._total += 2 * len(part.items)
        tasks = [(part.items[start : start + step], folder / f"{start:09}", self._rules) for start in starts]
        reading = map(partial(read_piece, self._reader), tasks) if isinstance(self._reader, LoadedReader) else None
        pieces = []
        for piece in reading or mapped(read_by_worker, tasks):
            self._skipped.merge(piece.skipped)
            self._unread.update(piece.unread)
            self._tell(piece.images)
            pieces.append(piece)
        return pieces

    def _write(
        self,
        pieces: Sequence[Piece],
        table: Mapping[Any, tuple[int, str]],
        stems: Sequence[str],
        writers: Sequence[CocoWriter | FolderWriter],
        mapped: Map,
    ) -> Written:
        keep = self._keeps_ids()
        first = self._read_first(pieces)
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

    def _read_first(self, pieces: Sequence[Piece]) -> int:
        if self._reader.kind != "voc":
            return 0
        if self._first_pixel is not None:
            return self._first_pixel
        first = int(all(piece.from_one for piece in pieces))
        if not first:
            self._note("coordinates count from 0 (one is below 1, or is no whole number); VOC's own count from 1")
        return first

    def _written_first(self, pieces: Sequence[Piece]) -> int:
        """Return what a written VOC box counts from: a reader takes fractions for boxes that count from 0."""
        if self._rules.target != "voc" or self._reader.kind == "voc":
            return self._read_first(pieces)
        if self._first_pixel is not None:
            return self._first_pixel
        whole = all(piece.whole for piece in pieces)
        if not whole:
            self._note("boxes have fractions of a pixel and are written counting from 0; VOC's own count from 1")
        return int(whole)

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

    def _describe(self, tree: Path, splits: Sequence[str], table: Mapping[Any, tuple[int, str]]) -> None:
        names = [name for _, name in table.values()]
        values = {**{split: f"images/{split}" for split in splits}, "names": dict(enumerate(names))}
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        (tree / "data.yaml").write_text(text, encoding="utf-8")
        if "val" not in splits and "valid" not in splits:
            self._note("data.yaml has no val, which training needs: convert it too, or name another folder there")

    def _conversion(self, outputs: Sequence[Output], categories: Mapping[int, str]) -> Conversion:
        if self._rules.target != "coco" and self._reader.kind == "coco":
            self._note("the ids of images and annotations have no place: the way back numbers them from 1")
        if isinstance(self._reader, LoadedReader):
            for detail in self._reader.objects_of_no_image():
                self._skipped.add("unknown_image", detail)
        lost = {key: count for key, count in self._lost.items() if count > 0}
        return Conversion(tuple(outputs), categories, self._skipped, lost, self._unread, tuple(self._notes))


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
