"""What is to be evaluated: the question, its data set, and the answer that it will not be evaluated."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dethandlers.options import Options
from detserve.errors import DetserveError

from dettools.agreement import TierName
from dettools.coco_metrics import IouType, evaluate_coco
from dettools.endpoint import Endpoint
from dettools.evaluation.category_mapping import By
from dettools.evaluation.certificate import MARGIN
from dettools.evaluation.gate import Objection
from dettools.evaluation.shards import Shard
from dettools.evaluation.stream import RetryPolicy
from dettools.ground_truth import GroundTruth, ImageEntry, load_ground_truth

LOWEST_THRESHOLD = 0.001
"""What an evaluation asks for unless it is told otherwise: AP needs the low scores too."""


class RefusedError(DetserveError):
    """The evaluation is refused: its AP would be a lie.

    Attributes:
        objections: why, with what each costs.
    """

    exit_code = 1

    def __init__(self, found: Sequence[Objection]) -> None:
        super().__init__(" ".join(objection.sentence() for objection in found))
        self.objections = tuple(found)


@dataclass(frozen=True)
class Request:
    """What is to be evaluated, and how.

    Attributes:
        model: name of the served model; or a spec, an archive or an exported file, run in this process.
        endpoint: where the server is; None to run in this process.
        out: folder of the journal and the results.
        limit, classes: only the first N images, only these categories of the data set; without them all.
        spec, weights: of the eager reference, where they are not those of ``model``.
        allow_code: of MMDetection's configs.
        margin: of the certificate, as a fraction of AP.
    """

    model: str
    images: Path
    annotations: Path
    out: Path
    endpoint: Endpoint | None
    model_store: Path
    against: Literal["eager", "runtime"] | None = None
    iou_types: tuple[IouType, ...] = ("bbox",)
    score_threshold: float = LOWEST_THRESHOLD
    max_detections: int = 100
    categories_by: By = "auto"
    accept_objections: bool = False
    limit: int | None = None
    concurrency: int = 8
    batch_size: int | None = None
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    fresh: bool = False
    margin: float = MARGIN
    confidence: float = 0.95
    tier: TierName = "numeric"
    version: str | None = None
    spec: Path | None = None
    weights: Path | None = None
    device: str = "cpu"
    classes: tuple[str, ...] = ()
    allow_code: bool = False

    def __post_init__(self) -> None:
        checks = {
            "--score-threshold": (0 <= self.score_threshold <= 1, self.score_threshold, "0 to 1"),
            "--max-detections": (1 <= self.max_detections <= 1000, self.max_detections, "1 to 1000"),
            "--concurrency": (self.concurrency >= 1, self.concurrency, "1 or more"),
            "--limit": (self.limit is None or self.limit >= 1, self.limit, "1 or more"),
            "--patience": (self.retry.patience_s > 0, self.retry.patience_s, "more than 0 s"),
            "--timeout": (self.endpoint is None or self.endpoint.timeout_s > 0, "0 or less", "more than 0 s"),
            "--batch-size": (self.batch_size is None or self.batch_size >= 1, self.batch_size, "1 or more"),
            "--margin": (0 < self.margin < 1, 100 * self.margin, "more than 0 and less than 100 AP"),
            "--confidence": (0.5 < self.confidence < 1, self.confidence, "more than 0.5 and less than 1"),
        }
        for name, (good, got, expected) in checks.items():
            if not good:
                raise DetserveError(f"{name}: got {got}, expected {expected}.")

    @property
    def asked(self) -> Options:
        """What each image is asked with."""
        return Options(
            score_threshold=self.score_threshold,
            max_detections=self.max_detections,
            masks="segm" in self.iou_types,
            keypoints="keypoints" in self.iou_types,
        )


@dataclass(frozen=True)
class DataSet:
    """The images to ask for.

    Attributes:
        entries: those of the request's limit and of the shard, in the annotation file's order.
        files: image id to its file; a missing one has none.
    """

    truth: GroundTruth
    entries: tuple[ImageEntry, ...]
    files: Mapping[int, Path]


def selected(truth: GroundTruth, limit: int | None, shard: Shard | None) -> tuple[ImageEntry, ...]:
    """Return the images that are evaluated, in the annotation file's order."""
    entries = truth.images[:limit]
    return entries if shard is None else shard.of(entries)


def load_data_set(request: Request, shard: Shard | None = None) -> DataSet:
    """Read the annotations, and find the images.

    Raises:
        DetserveError: none is there, the annotations lack what is to be measured, or a shard would be empty.
    """
    truth = load_ground_truth(request.annotations)
    truth = truth.with_categories(request.classes) if request.classes else truth
    files, missing = truth.image_files(request.images)
    every = selected(truth, request.limit, None)
    if not any(entry.id in files for entry in every):
        raise DetserveError(
            f"images: none of the {len(every)} images of {request.annotations} is in {request.images} (the first is "
            f"{missing[0].file_name}). Give the folder with --images."
        )
    for kind in request.iou_types:
        # Annotations without what is to be measured are told before the first image is sent.
        evaluate_coco(truth, [], iou_type=kind, image_ids=[entry.id for entry in every])
    return DataSet(truth, selected(truth, request.limit, shard), files)
