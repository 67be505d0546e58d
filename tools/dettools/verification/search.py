"""Which other description brings the AP back? Measured on a sample: a few images for all of them, more for the best.

other inputs ─► 4 images each ─► the best 4 ─► 16 images ─┐
the input as described ─────────► its own detections ─────┴─► × readings of the labels ─► AP ─► better beyond chance?
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from dethandlers.detector import Detector
from dethandlers.errors import DetectorError
from dethandlers.onnx_family import OnnxFamily
from dethandlers.options import Options
from dethandlers.spec import Spec

from dettools.coco_metrics import compare_coco, evaluate_coco
from dettools.evaluation.answers import Answer, Failure, coco_results
from dettools.evaluation.local_answerers import RuntimeAnswerer
from dettools.ground_truth import GroundTruth, ImageEntry
from dettools.verification.alternatives import (
    Reading,
    changed_keys,
    changed_labels,
    describe_changes,
    other_descriptions,
    other_readings,
)

_FIRST, _SAMPLE, _FINALISTS = 4, 16, 4
# AP that a description with fewer changes may be behind and is still preferred: no more than chance on few images.
_NEAR = 0.01

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Better:
    """A description that fits the model better.

    Attributes:
        changes: keys of ``preprocessing`` and ``decoding`` with their other values.
        categories: what is to change in the category map, for people; or empty.
        ap: AP under it, on the sample.
        ap_described: AP under the description that the model has, on the same images.
    """

    changes: Mapping[str, Any]
    categories: str
    ap: float
    ap_described: float

    def words(self) -> str:
        """Say what to change."""
        return describe_changes(self.changes, self.categories)


@dataclass(frozen=True)
class Search:
    """What was tried.

    Attributes:
        better: what brings the AP back beyond chance; None when nothing does.
        tried: number of descriptions.
        images: size of the sample.
    """

    better: Better | None
    tried: int
    images: int


@dataclass(frozen=True)
class _Trial:
    changes: Mapping[str, Any]
    categories: str
    results: Sequence[Mapping[str, Any]]
    ap: float

    @property
    def count(self) -> int:
        return len(self.changes) + bool(self.categories)


def detect_all(
    detector: Detector,
    entries: Sequence[ImageEntry],
    files: Mapping[int, Path],
    asked: Options,
    on_answer: Callable[[int], None] = lambda _: None,
) -> list[Answer]:
    """Run a detector over images that have a file, in their order.

    Args:
        detector: the worker's.
        entries: of the annotation file.
        files: image id to file.
        asked: of every image.
        on_answer: told how many are done.
    """
    answerer = RuntimeAnswerer(detector, asked=asked)
    answers: list[Answer] = []
    for start in range(0, len(entries), answerer.batch_size):
        part = entries[start : start + answerer.batch_size]
        for entry, reply in zip(part, answerer.ask([files[entry.id].read_bytes() for entry in part]), strict=True):
            answers.append(
                Answer(entry.id, entry.file_name, failure=reply)
                if isinstance(reply, Failure)
                else Answer(entry.id, entry.file_name, detections=reply)
            )
        on_answer(len(answers))
    return answers


def search_description(
    detector: Detector,
    device: torch.device,
    truth: GroundTruth,
    answers: Sequence[Answer],
    files: Mapping[int, Path],
    category_ids: Sequence[int | None],
    *,
    asked: Options,
    wanted_gain: float,
    on_progress: Progress = lambda *_: None,
) -> Search:
    """Look for the description under which the AP comes back.

    Args:
        detector: as described.
        device: where other descriptions run.
        truth: the annotations.
        answers: under the description as it is, in the order of the annotations.
        files: image id to file.
        category_ids: what each label means as described.
        asked: of every image.
        wanted_gain: AP that another description must bring on the sample, as a fraction.
        on_progress: told what is done.
    """
    objects = {one["image_id"] for one in truth.annotations if not one["iscrowd"]}
    sample = [answer for answer in answers if answer.image_id in objects][:_SAMPLE]
    of_id = {entry.id: entry for entry in truth.images}
    entries = [of_id[answer.image_id] for answer in sample]
    spec = detector.spec
    described = Reading("", tuple(category_ids))
    readings = [described, *other_readings(spec.categories, truth.categories, category_ids)]
    # Other families know their input themselves: from the model's own transform.
    others = other_descriptions(spec) if isinstance(detector.family, OnnxFamily) else []
    if not entries:
        return Search(None, 0, 0)
    # Every evaluation reads all annotations that it is given.
    truth = truth.restricted_to([entry.id for entry in entries])

    def trials(other: Spec, found: Sequence[Answer]) -> Iterator[_Trial]:
        ids = [answer.image_id for answer in found]
        changes, moved = changed_keys(spec, other), changed_labels(spec, other)
        for reading in readings[:1] if moved else readings:
            results = coco_results(found, reading.category_ids)
            ap = evaluate_coco(truth, results, image_ids=ids).ap
            yield _Trial(changes, moved or reading.change, results, ap)

    done, total = 0, len(others) + min(_FINALISTS, len(others))
    first: list[tuple[tuple[float, int], Spec]] = []
    count = -1 + len(readings)
    for other in others:
        with _described_as(detector, other, device) as loaded:
            if loaded is not None:
                found = list(trials(other, detect_all(loaded, entries[:_FIRST], files, asked)))
                count += len(found)
                first.append((min(_rank(one) for one in found), other))
        done += 1
        on_progress("other descriptions", done, total)
    tried = list(trials(spec, sample))
    as_described = tried[0]
    for _, other in sorted(first, key=lambda one: one[0])[:_FINALISTS]:
        with _described_as(detector, other, device) as loaded:
            if loaded is not None:
                tried += trials(other, detect_all(loaded, entries, files, asked))
        done += 1
        on_progress("other descriptions", done, total)
    highest = max(one.ap for one in tried)
    best = min((one for one in tried if one.ap >= highest - _NEAR), key=lambda one: (one.count, -one.ap))
    if best.ap - as_described.ap < wanted_gain or not _beyond_chance(truth, as_described, best):
        return Search(None, count, len(entries))
    return Search(Better(best.changes, best.categories, best.ap, as_described.ap), count, len(entries))


def _rank(one: _Trial) -> tuple[float, int]:
    """Higher AP before lower; of those that few images cannot tell apart, fewer changes before more."""
    return -round(one.ap / _NEAR) * _NEAR, one.count


def _beyond_chance(truth: GroundTruth, described: _Trial, best: _Trial) -> bool:
    return compare_coco(truth, described.results, best.results).low > 0


@contextmanager
def _described_as(detector: Detector, spec: Spec, device: torch.device) -> Iterator[Detector | None]:
    """Load the same weights under another description; None when they cannot be loaded so."""
    try:
        other = Detector(replace(detector.artefact, spec=spec), device)
    except DetectorError:
        yield None
        return
    try:
        yield other
    finally:
        other.close()
