"""A data set evaluated in parts by several processes, and the parts put together as if one had done it.

    shard 0/3 ─► shard-0-of-3/  answers.jsonl  part.json ─┐
    shard 1/3 ─► shard-1-of-3/  …                         ├─► every image's answer once ─► metrics, certificate
    shard 2/3 ─► shard-2-of-3/  …                         ┘

AP is no mean of the parts' APs: its precision-recall curve ranks the detections of all images. So a part keeps the
answers and no figure. Shards are counted from 0, as Kubernetes counts an Indexed Job's JOB_COMPLETION_INDEX.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from detserve.errors import DetserveError

from dettools.evaluation.answers import Answer, Event, read_answers
from dettools.evaluation.category_mapping import CategoryMapping
from dettools.evaluation.certificate import Side
from dettools.evaluation.collected import Collected
from dettools.evaluation.gate import Cost, Limits, Objection
from dettools.ground_truth import ImageEntry

PART_FILE = "part.json"
_FORMAT = 1
_FOLDER = re.compile(r"shard-(\d+)-of-(\d+)")
_MUST_AGREE = (
    "of",
    "annotations_sha256",
    "name",
    "limits",
    "mapping",
    "accepted",
    "iou_types",
    "limit",
    "classes",
    "against",
)


class ShardError(DetserveError):
    """A shard that cannot be, or parts that do not belong together."""


class UnfinishedError(ShardError):
    """Some of the shards are not done yet."""


@dataclass(frozen=True)
class Shard:
    """Every ``count``-th image from the ``index``-th on: neighbours in a data set are alike, so they are dealt out.

    Attributes:
        index: 0 to count − 1.
    """

    index: int
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ShardError(
                f"--shard: got {self}, expected I/N with I from 0 to N-1 (as Kubernetes' JOB_COMPLETION_INDEX): the "
                "first of 8 is 0/8, the last 7/8."
            )

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``I/N``.

        Raises:
            ShardError: it is not that.
        """
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text, re.ASCII)
        if found is None:
            raise ShardError(f"--shard: got {text!r}, expected I/N, such as 0/8 for the first of eight.")
        return cls(int(found[1]), int(found[2]))

    def folder(self, out: Path) -> Path:
        """Return the part's own folder in that of the evaluation."""
        return out / f"shard-{self.index}-of-{self.count}"

    def of(self, entries: Sequence[ImageEntry]) -> tuple[ImageEntry, ...]:
        """Return its images.

        Raises:
            ShardError: there are fewer images than shards; told by every shard alike.
        """
        if len(entries) < self.count:
            raise ShardError(f"--shard: got {self.count} shards of {len(entries)} images; expected an image in each.")
        return tuple(entries[self.index :: self.count])


@dataclass(frozen=True)
class Part:
    """What one shard left.

    Attributes:
        path: its ``part.json``.
        images: how many it had to ask for.
    """

    shard: Shard
    path: Path
    images: int
    failed: tuple[Answer, ...]
    events: tuple[Event, ...]
    resumed: int
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether every image was answered."""
        return not self.failed

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {
            "shard": str(self.shard),
            "part": str(self.path),
            "images": self.images,
            "answered": self.images - len(self.failed),
            "failed": len(self.failed),
            "failed_images": [
                {"image": answer.file_name, "type": answer.failure.type, "message": answer.failure.message}
                for answer in self.failed
                if answer.failure is not None
            ],
            "sent_again": len(self.events),
            "from_an_earlier_run": self.resumed,
            "seconds": round(self.seconds, 3),
        }


def write_part(
    shard: Shard,
    collected: Collected,
    folder: Path,
    *,
    annotations_sha256: str,
    iou_types: Sequence[str],
    limit: int | None,
    classes: Sequence[str],
) -> Part:
    """Write ``part.json`` beside the answers: what `read_parts` needs to put them together."""
    reference = collected.reference
    document = {
        "part": _FORMAT,
        "shard": shard.index,
        "of": shard.count,
        "images": len(collected.answers),
        "annotations_sha256": annotations_sha256,
        "name": collected.name,
        "facts": dict(collected.facts),
        "limits": asdict(collected.limits),
        "mapping": asdict(collected.mapping),
        "accepted": [asdict(one) for one in collected.accepted],
        "iou_types": list(iou_types),
        "limit": limit,
        "classes": list(classes),
        "against": None if reference is None else {"name": reference.name, "mapping": asdict(reference.mapping)},
        "reference_answers": collected.reference_file,
        "seconds": round(collected.seconds, 3),
    }
    path = folder / PART_FILE
    # Whole or not at all: a merge may be looking.
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
    failed = tuple(answer for answer in collected.answers if answer.failure is not None)
    return Part(shard, path, len(collected.answers), failed, collected.events, collected.resumed, collected.seconds)


@dataclass(frozen=True)
class Parts:
    """The parts of one evaluation.

    Attributes:
        answers, reference: of all shards together, by image id.
        iou_types, limit, classes: as the shards were told.
    """

    document: Mapping[str, Any]
    answers: Mapping[int, Answer]
    reference: Mapping[int, Answer] | None
    events: tuple[Event, ...]
    seconds: float

    @property
    def iou_types(self) -> tuple[Any, ...]:
        """What was measured."""
        return tuple(self.document["iou_types"])

    @property
    def limit(self) -> int | None:
        """Only the first so many images of the data set."""
        limit: int | None = self.document["limit"]
        return limit

    @property
    def classes(self) -> tuple[str, ...]:
        """The categories that the data set was restricted to; empty for all."""
        return tuple(self.document["classes"])

    @property
    def annotations_sha256(self) -> str:
        """Of the annotation file that the shards read."""
        return str(self.document["annotations_sha256"])

    def collected(self, entries: Sequence[ImageEntry]) -> Collected:
        """Return what one process would have collected.

        Raises:
            ShardError: an image has no answer in any shard.
        """
        missing = [entry.file_name for entry in entries if entry.id not in self.answers]
        if missing:
            raise ShardError(
                f"--merge: {len(missing)} of {len(entries)} images are in no shard's answers (the first is "
                f"{missing[0]}). Run the shards again."
            )
        against = self.document["against"]
        reference = None
        if against is not None and self.reference is not None:
            reference = Side(against["name"], self.reference, _mapping(against["mapping"]))
        return Collected(
            name=self.document["name"],
            facts=self.document["facts"],
            limits=Limits(**self.document["limits"]),
            mapping=_mapping(self.document["mapping"]),
            accepted=tuple(_objection(one) for one in self.document["accepted"]),
            answers=tuple(self.answers[entry.id] for entry in entries),
            reference=reference,
            events=self.events,
            seconds=self.seconds,
        )


def read_parts(folder: Path) -> Parts:
    """Read the shards of an evaluation.

    Raises:
        UnfinishedError: none is there, or one is missing or unfinished.
        ShardError: they are not of one evaluation.
    """
    found = sorted(
        (int(match[2]), int(match[1]), path)
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := _FOLDER.fullmatch(path.name)) and path.is_dir()
    )
    if not found:  # also when no shard has begun: Kubernetes starts the merge beside them
        raise UnfinishedError(
            f"--merge: got {folder}, expected a folder with shard-I-of-N/, as `evaluate --shard` leaves it."
        )
    counts = sorted({count for count, _, _ in found})
    if len(counts) > 1:
        raise ShardError(
            f"--merge: {folder} holds shards of different runs (of {' and of '.join(map(str, counts))}); "
            "remove those that are not meant."
        )
    done = {index: path for _, index, path in found if (path / PART_FILE).is_file()}
    missing = [f"{index}/{counts[0]}" for index in range(counts[0]) if index not in done]
    if missing:
        raise UnfinishedError(
            f"--merge: of {counts[0]} shards {len(done)} are done; run --shard {', --shard '.join(missing[:8])}"
            f"{' …' if len(missing) > 8 else ''} to the end first."
        )
    documents = {index: _read(done[index]) for index in sorted(done)}
    first = documents[0]
    answers: dict[int, Answer] = {}
    reference: dict[int, Answer] = {}
    events: list[Event] = []
    identities: dict[str, Any] = {}
    for index, document in documents.items():
        for key in _MUST_AGREE:
            _require_equal(f"part.json's {key}", index, document[key], first[key])
        for name, into in (("answers.jsonl", answers), (document["reference_answers"], reference)):
            if name is None:
                continue
            identity, its, sent_again = read_answers(done[index] / name)
            _require_equal(f"{name}'s identity", index, identity, identities.setdefault(name, identity))
            doubled = into.keys() & its.keys()
            if doubled:
                raise ShardError(f"--merge: image {min(doubled)} was answered in two shards; run them again.")
            into.update(its)
            if into is answers:
                events += sent_again
    seconds = sum(float(document["seconds"]) for document in documents.values())
    return Parts(first, answers, reference or None, tuple(events), seconds)


def _read(folder: Path) -> dict[str, Any]:
    try:
        document = json.loads((folder / PART_FILE).read_text(encoding="utf-8"))
        if document["part"] != _FORMAT:
            raise ShardError(f"--merge: {folder / PART_FILE} was written by another version; run the shard again.")
        absent = {*_MUST_AGREE, "facts", "seconds", "reference_answers"} - document.keys()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ShardError(f"--merge: {folder / PART_FILE} is no part of an evaluation ({error!r}).") from error
    if absent:
        raise ShardError(f"--merge: {folder / PART_FILE} lacks {', '.join(sorted(absent))}; run the shard again.")
    return dict(document)


def _require_equal(what: str, index: int, got: Any, expected: Any) -> None:
    if got != expected:
        raise ShardError(
            f"--merge: the shards are not of one evaluation: {what} is {got!r} in shard {index}, {expected!r} in "
            "shard 0. Run them with the same model, data set and options."
        )


def _mapping(fields: Mapping[str, Any]) -> CategoryMapping:
    lists: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    return CategoryMapping(**lists)


def _objection(fields: Mapping[str, Any]) -> Objection:
    cost = fields["cost"]
    return Objection(fields["code"], fields["message"], None if cost is None else Cost(**cost))
