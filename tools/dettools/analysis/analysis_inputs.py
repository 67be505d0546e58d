"""What an analysis is given: predictions, their annotations, photographs, named one by one or by MMDetection's config.

    CONFIG.py (read, not run) ─► annotations, images, classes ─┐
    --annotations, --images ───────────────────────────────────┼─► Inputs ─► find_overlaps ─► confusions, image results
    RESULTS ───────────────────────────────────────────────────┘

MMDetection's own tools take CONFIG RESULTS FOLDER; ours need no config.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from detserve.errors import DetserveError
from detserve.mmdet_dataset import DatasetError, read_dataset

from dettools.coco_metrics import IouType
from dettools.ground_truth import GroundTruth, load_ground_truth
from dettools.predictions import Predictions, load_predictions

_CONFIGS = (".py", ".yaml", ".yml")


class AnalysisInputError(DetserveError):
    """The command line does not name what an analysis needs."""


@dataclass(frozen=True)
class Places:
    """The positionals of a command line, told apart: ``[CONFIG] RESULTS [FOLDER]``."""

    config: Path | None
    results: Path
    folder: Path | None


@dataclass(frozen=True)
class Inputs:
    """What was read.

    Attributes:
        ground_truth: the annotations, restricted to the config's classes.
        predictions: checked against them.
        photographs: image id to file, of those that are there; empty where no folder was named.
        notes: what a reader of the figures has to know, one sentence each.
    """

    ground_truth: GroundTruth
    predictions: Predictions
    photographs: dict[int, Path] = field(repr=False)
    notes: tuple[str, ...]

    @property
    def iou_type(self) -> IouType:
        """What can be compared: boxes where all have one, else masks."""
        boxes = all(one.get("bbox") is not None for one in self.predictions.results)
        return "bbox" if boxes else "segm"

    def with_results(self, results: Sequence[dict[str, Any]]) -> "Inputs":
        """Return the same with other results."""
        return replace(self, predictions=replace(self.predictions, results=tuple(results)))


def split_positionals(given: Sequence[str], folder: Path | None) -> Places:
    """Tell ``[CONFIG] RESULTS [FOLDER]`` apart; ``folder`` is the one that an option named.

    Raises:
        AnalysisInputError: too many or too few, or the folder comes twice.
    """
    words = list(given)
    config = Path(words.pop(0)) if words and words[0].endswith(_CONFIGS) else None
    if not 1 <= len(words) <= 2:
        raise AnalysisInputError(
            f"got {' '.join(given)}, expected [CONFIG.py] RESULTS [FOLDER]: one results file, before it at most one "
            "config, after it at most one folder to write to."
        )
    if len(words) == 2:
        if folder is not None:
            raise AnalysisInputError(f"got two folders to write to, {words[1]} and --out {folder}. Give one of them.")
        folder = Path(words[1])
    if folder is not None and folder.exists() and not folder.is_dir():
        raise AnalysisInputError(f"got {folder}, expected a folder to write to; that is a file.")
    return Places(config, Path(words[0]), folder)


def read_inputs(
    places: Places,
    *,
    annotations: Path | None,
    images: Path | None,
    categories: Sequence[str] | None = None,
    allow_code: bool = False,
) -> Inputs:
    """Read annotations and predictions, and find the photographs.

    Args:
        places: the config, if any, and the results.
        annotations: instead of the config's.
        images: folder of the photographs, instead of the config's.
        categories: what the labels of a pickle stand for, as `load_predictions` takes it.
        allow_code: a config that is not literal is run.

    Raises:
        AnalysisInputError: neither a config nor annotations.
        DetserveError: a file cannot be read, or they do not belong together.
    """
    notes: list[str] = []
    names: tuple[str, ...] = ()
    if annotations is None:
        if places.config is None:
            raise AnalysisInputError(
                "no annotations: give --annotations val.json, the COCO file that the predictions were made with, or "
                "MMDetection's CONFIG.py before the results."
            )
        # Without its photographs a set can still be counted: a missing folder is told, not refused.
        dataset = read_dataset(places.config, images=images or Path(), allow_code=allow_code)
        annotations, names = dataset.annotations, dataset.class_names
        notes += dataset.notes
        if images is None:
            images = _images_of(places.config, allow_code=allow_code)
            if images is None:
                notes.append(f"the photographs that {places.config} names are not here: give --images DIR to see them")
    ground_truth = load_ground_truth(annotations)
    if names:
        ground_truth = ground_truth.with_categories(names)
    predictions = load_predictions(places.results, ground_truth, categories=categories)
    photographs, missing = ground_truth.image_files(images) if images else ({}, ())
    if missing:
        notes.append(f"{len(missing)} of {len(ground_truth.images)} photographs are not in {images}")
    return Inputs(ground_truth, predictions, photographs, (*notes, *ground_truth.notes, *predictions.notes))


def _images_of(config: Path, *, allow_code: bool) -> Path | None:
    try:
        return read_dataset(config, allow_code=allow_code).images
    except DatasetError:
        return None
