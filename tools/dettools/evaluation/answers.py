"""What came back for each image, and the journal that an interrupted evaluation goes on from.

    answers.jsonl:   {"journal": 1, "identity": {…}}        whose answers these are
                     {"image_id": …, "status": "answered", "boxes_xyxy": [[…]], "scores": […], "labels": […], …}
                     {"image_id": …, "status": "failed", "error": {"type", "status", "message"}, …}

Every line is written when its image is done, so whatever ends the run loses no more than what was in flight. Boxes,
scores and labels are kept as they came; COCO results are derived from them.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TextIO

import numpy as np
from dethandlers.detections import Detections
from detserve.errors import DetserveError

_FORMAT = 1


class JournalError(DetserveError):
    """The journal belongs to another evaluation, or cannot be read."""


@dataclass(frozen=True)
class Failure:
    """Why an image has no answer.

    Attributes:
        type: machine word, such as ``not_an_image``, ``no_worker`` or ``timeout``.
        status: HTTP status; None when there was no answer at all.
    """

    type: str
    message: str
    status: int | None = None


@dataclass(frozen=True)
class Answer:
    """One image of the data set: answered or failed, never an empty list in place of a failure.

    Attributes:
        image_id: of the annotation file.
        file_name: of the annotation file.
        detections: what was found; None when the image failed.
        failure: why it failed; None when it was answered.
        attempts: requests that were sent for it.
        latency_ms: of the last attempt.
    """

    image_id: int
    file_name: str
    detections: Detections | None = field(default=None, repr=False)
    failure: Failure | None = None
    attempts: int = 1
    latency_ms: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the journal's line."""
        line: dict[str, Any] = {
            "image_id": self.image_id,
            "file_name": self.file_name,
            "status": "failed" if self.failure else "answered",
            "attempts": self.attempts,
            "latency_ms": round(self.latency_ms, 3),
        }
        if self.failure is not None:
            failure = {"type": self.failure.type, "status": self.failure.status, "message": self.failure.message}
            return {**line, "error": failure}
        if self.detections is None:
            return line
        line["boxes_xyxy"] = _rounded(self.detections.boxes_xyxy)
        line["scores"] = _rounded(self.detections.scores)
        line["labels"] = self.detections.labels.tolist()
        if self.detections.masks is not None:
            line["masks"] = self.detections.masks
        if self.detections.keypoints is not None:
            line["keypoints"] = _rounded(self.detections.keypoints)
        return line

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> Self:
        """Read the journal's line."""
        common = (line["image_id"], line["file_name"])
        counted = {"attempts": line["attempts"], "latency_ms": line["latency_ms"]}
        if line["status"] == "failed":
            error = line["error"]
            return cls(*common, failure=Failure(error["type"], error["message"], error["status"]), **counted)
        detections = Detections(
            np.asarray(line["boxes_xyxy"], np.float32).reshape(-1, 4),
            np.asarray(line["scores"], np.float32),
            np.asarray(line["labels"], np.int64),
            masks=line.get("masks"),
            keypoints=np.asarray(line["keypoints"], np.float32) if "keypoints" in line else None,
        )
        return cls(*common, detections=detections, **counted)


@dataclass(frozen=True)
class Event:
    """Something that happened on the way and was got over: a request that was sent again.

    Attributes:
        at_s: seconds since the run began.
        image: file name.
        type, status: of the error that the request got.
    """

    at_s: float
    image: str
    type: str
    status: int | None
    message: str

    def to_json(self) -> dict[str, Any]:
        """Return the journal's line."""
        return {
            "event": "sent_again",
            "at_s": round(self.at_s, 3),
            "image": self.image,
            "type": self.type,
            "status": self.status,
            "message": self.message,
        }

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> Self:
        """Read the journal's line."""
        return cls(line["at_s"], line["image"], line["type"], line["status"], line["message"])


class Journal:
    """The answers of one evaluation on disk.

    Attributes:
        answers: image id to its answer, of earlier runs and of this one.
        events: what was got over, in earlier runs and in this one.
        resumed: the images that an earlier, interrupted run had answered.
    """

    def __init__(self, stream: TextIO, answers: dict[int, Answer], events: list[Event]) -> None:
        self.answers = answers
        self.events = events
        self.resumed = frozenset(one.image_id for one in answers.values() if one.failure is None)
        self._stream = stream

    def add(self, answer: Answer) -> None:
        """Keep an answer; it is on disk when this returns."""
        self.answers[answer.image_id] = answer
        self._write(answer.to_json())

    def note(self, event: Event) -> None:
        """Keep an event."""
        self.events.append(event)
        self._write(event.to_json())

    def complete(self) -> None:
        """Say that this evaluation is over: the next one asks anew."""
        self._write({"complete": True})

    def _write(self, line: Mapping[str, Any]) -> None:
        self._stream.write(json.dumps(line) + "\n")
        self._stream.flush()


@contextmanager
def open_journal(path: Path, identity: Mapping[str, Any], *, fresh: bool = False) -> Iterator[Journal]:
    """Open the journal of an evaluation, with the answers that an earlier, interrupted run left.

    Args:
        path: the file.
        identity: what must be equal for answers to belong together: model, weights, data set, threshold.
        fresh: begin anew and drop what is there.

    Raises:
        JournalError: the file belongs to another evaluation, or is none.
    """
    answers: dict[int, Answer] = {}
    events: list[Event] = []
    whole = 0
    if path.is_file() and path.stat().st_size and not fresh:
        whole = _read(path, identity, answers, events)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("r+" if whole else "w", encoding="utf-8") as stream:
        # A line that the end of the last run cut in two goes.
        stream.truncate(whole)
        stream.seek(whole)
        journal = Journal(stream, answers, events)
        if not whole:
            stream.write(json.dumps({"journal": _FORMAT, "identity": identity}) + "\n")
            stream.flush()
        yield journal


def read_answers(path: Path) -> tuple[dict[str, Any], dict[int, Answer], list[Event]]:
    """Read a journal whoever wrote it: whose answers they are, the last one of each image, and what was got over.

    Raises:
        JournalError: it cannot be read, or is none.
    """
    answers: dict[int, Answer] = {}
    events: list[Event] = []
    try:
        header, *lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        identity: dict[str, Any] = header["identity"]
        for line in lines:
            if "event" in line:
                events.append(Event.from_json(line))
            elif not line.get("complete"):
                answer = Answer.from_json(line)
                answers[answer.image_id] = answer
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise JournalError(
            f"{path} is not the journal of an evaluation ({type(error).__name__}: {error}). Evaluate again."
        ) from error
    return identity, answers, events


def _read(path: Path, identity: Mapping[str, Any], answers: dict[int, Answer], events: list[Event]) -> int:
    """Fill in what the file holds; return the length of its whole lines in bytes."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    lines = content[:whole].splitlines()
    try:
        header = json.loads(lines[0]) if lines else {}
        if not lines:
            return 0
        _require_same(path, header["identity"] if header.get("journal") == _FORMAT else None, identity)
        for text in lines[1:]:
            line = json.loads(text)
            if line.get("complete"):
                # What was finished is not gone on with: the endpoint may have changed since.
                answers.clear()
                events.clear()
                return 0
            if "event" in line:
                events.append(Event.from_json(line))
            else:
                answer = Answer.from_json(line)
                answers[answer.image_id] = answer
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise JournalError(
            f"{path} is not the journal of an evaluation ({type(error).__name__}: {error}). "
            "Choose another folder with --out, or drop what is there with --fresh."
        ) from error
    return whole


def _require_same(path: Path, got: Any, expected: Mapping[str, Any]) -> None:
    if not isinstance(got, dict):
        raise JournalError(f"{path} was written by another version. Choose another --out, or --fresh to drop it.")
    plain = json.loads(json.dumps(expected))
    differing = [key for key in sorted(plain.keys() | got.keys()) if plain.get(key) != got.get(key)]
    if differing:
        what = "; ".join(f"{key}: {got.get(key)!r} there, {plain.get(key)!r} now" for key in differing)
        raise JournalError(
            f"{path} holds the answers of another evaluation ({what}). "
            "Choose another folder with --out, or drop what is there with --fresh."
        )


def category_of(label: int, category_ids: Sequence[int | None]) -> int | None:
    """Return the data set's category id of a label; None for one that neither knows."""
    return category_ids[label] if 0 <= label < len(category_ids) else None


def coco_results(answers: Sequence[Answer], category_ids: Sequence[int | None]) -> list[dict[str, Any]]:
    """Return COCO results: one object per detection, ``bbox`` as xywh px.

    Args:
        answers: failed images have none.
        category_ids: the data set's category id of each label; None for a class that the data set does not have.
    """
    results = []
    for answer in answers:
        found = answer.detections
        if found is None:
            continue
        boxes = found.boxes_xyxy.astype(np.float64)
        for place, label in enumerate(found.labels.tolist()):
            category_id = category_of(label, category_ids)
            if category_id is None:
                continue
            x1, y1, x2, y2 = boxes[place].tolist()
            result: dict[str, Any] = {
                "image_id": answer.image_id,
                "category_id": category_id,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "score": float(found.scores[place]),
            }
            if found.masks is not None:
                result["segmentation"] = found.masks[place]
            if found.keypoints is not None:
                result["keypoints"] = found.keypoints[place].astype(float).reshape(-1).tolist()
            results.append(result)
    return results


def _rounded(values: Any) -> Any:
    """Nine significant digits: the fewest that bring every float32 back unchanged."""
    if isinstance(values, np.ndarray):
        return _rounded(values.tolist())
    return [_rounded(value) for value in values] if isinstance(values, list) else float(f"{values:.9g}")
