"""One evaluation from beginning to end.

who answers? ─► gate (refuse, with the cost) ─► stream ─► metrics ─► certificate against eager or runtime
"""

import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from dethandlers.options import Options
from detserve.errors import DetserveError
from detserve.instance import Instance
from detserve.model_store import archive_path, spec_path

from dettools.agreement import TierName
from dettools.coco_metrics import IouType, evaluate_coco
from dettools.endpoint import Clients, Endpoint
from dettools.evaluation.answerers import EndpointAnswerer
from dettools.evaluation.answers import Answer, Journal, open_journal
from dettools.evaluation.category_mapping import By, CategoryMapping, map_categories
from dettools.evaluation.certificate import MARGIN, Certificate, Side, certify
from dettools.evaluation.evaluation import Evaluation, summarise
from dettools.evaluation.gate import Limits, Objection, limits_of, objections, seen_objections, with_cost
from dettools.evaluation.stream import Answerer, RetryPolicy, stream
from dettools.ground_truth import GroundTruth, ImageEntry, load_ground_truth

if TYPE_CHECKING:
    from dettools.evaluation.local_answerers import RuntimeAnswerer

Progress = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, and how much there is."""

_SAMPLE = 100
"""Images that a refusal's cost is measured on at most."""
_LOWEST_THRESHOLD = 0.001
_MAY_DIFFER = frozenset({"categories", "device", "device_name", "threads"})
"""What a worker says of itself that may change while a run is interrupted, and changes no answer."""


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
    score_threshold: float = _LOWEST_THRESHOLD
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
class _DataSet:
    truth: GroundTruth
    entries: tuple[ImageEntry, ...]
    files: Mapping[int, Path]


def evaluate(request: Request, *, on_progress: Progress = lambda *_: None) -> Evaluation:
    """Evaluate.

    Raises:
        RefusedError: the figures would not be the model's AP.
        DetserveError: bad input, or an endpoint that does not answer; what was answered is kept.
    """
    data = _data_set(request)
    begun = time.monotonic()
    with ExitStack() as stack:
        answerer = stack.enter_context(_answerer(request))
        _require_capabilities(request, answerer)
        limits = limits_of(answerer.facts, request.score_threshold, request.max_detections)
        mapping = _mapping(answerer, data.truth, request.categories_by)
        found = objections(limits, mapping)
        if answerer.categories is None:
            found += _unknown(request, answerer, data, limits)
        if found and not request.accept_objections:
            sample = _sampler(request, answerer, data, limits, on_progress)
            raise RefusedError([with_cost(one, limits, data.truth, mapping, sample) for one in found])
        asked = replace(request.asked, score_threshold=limits.effective_threshold)
        # What cannot be loaded is told before the first image is sent.
        reference = stack.enter_context(_reference(request, asked)) if request.against else None
        journal = stack.enter_context(_answers(request, answerer, data, "answers.jsonl", asked))
        _stream(request, answerer, data, journal, "served", on_progress)
        seconds = time.monotonic() - begun
        answers = [journal.answers[entry.id] for entry in data.entries]
        certificate = None
        if reference is not None:
            name = f"reference-{request.against}.jsonl"
            theirs = stack.enter_context(_answers(request, reference, data, name, asked))
            _stream(request, reference, data, theirs, str(request.against), on_progress)
            on_progress("certificate", 0, 0)
            sides = (
                Side(reference.name, theirs.answers, _mapping(reference, data.truth, request.categories_by)),
                Side(answerer.name, journal.answers, mapping),
            )
            certificate = _certificate(request, data, *sides, limits)
            theirs.complete()
        if all(answer.failure is None for answer in answers):
            journal.complete()
    return summarise(
        answerer.name,
        answerer.facts,
        data.truth,
        answers,
        limits=limits,
        mapping=mapping,
        iou_types=request.iou_types,
        accepted=found,
        resumed=len(journal.resumed & {entry.id for entry in data.entries}),
        events=journal.events,
        seconds=seconds,
        certificate=certificate,
    )


def _require_capabilities(request: Request, answerer: Answerer) -> None:
    for iou_type, needed in (("segm", "masks"), ("keypoints", "keypoints")):
        if iou_type in request.iou_types and needed not in answerer.facts.get("capabilities", [needed]):
            raise DetserveError(
                f"--iou-type {iou_type}: {answerer.name} has no {needed}. Leave it out, or name a model with them."
            )


def _data_set(request: Request) -> _DataSet:
    truth = load_ground_truth(request.annotations)
    truth = truth.with_categories(request.classes) if request.classes else truth
    files, missing = truth.image_files(request.images)
    entries = truth.images[: request.limit]
    if not any(entry.id in files for entry in entries):
        raise DetserveError(
            f"images: none of the {len(entries)} images of {request.annotations} is in {request.images} (the first is "
            f"{missing[0].file_name}). Give the folder with --images."
        )
    for kind in request.iou_types:
        # Annotations without what is to be measured are told before the first image is sent.
        evaluate_coco(truth, [], iou_type=kind, image_ids=[entry.id for entry in entries])
    return _DataSet(truth, entries, files)


@contextmanager
def _answerer(request: Request) -> Iterator[Answerer]:
    if request.endpoint is None:
        with _runtime(request, request.model, _own_weights(request)) as runtime:
            yield runtime
        return
    with Clients(request.endpoint) as clients:
        yield EndpointAnswerer(
            clients.detecting,
            clients.mine(),
            request.model,
            version=request.version,
            asked=request.asked,
            concurrency=request.concurrency,
            patience_s=request.retry.patience_s,
        )


@contextmanager
def _runtime(
    request: Request, model: str, weights: Path | None = None, asked: Options | None = None
) -> Iterator["RuntimeAnswerer"]:
    # torch is imported where something runs in this process, and not for an endpoint.
    from dettools.evaluation.local_answerers import RuntimeAnswerer
    from dettools.local_detector import open_detector

    with open_detector(
        model, model_store=request.model_store, weights=weights, device=request.device, allow_code=request.allow_code
    ) as detector:
        floor = detector.spec.serving.min_score_threshold
        asked = asked or replace(request.asked, score_threshold=max(request.score_threshold, floor))
        yield RuntimeAnswerer(detector, asked=asked, batch_size=request.batch_size)


def _own_weights(request: Request) -> Path | None:
    """Return the checkpoint instead of the model's own; with a spec beside an archive it is the reference's alone."""
    inside = request.model.endswith((".mar", ".onnx"))
    return None if inside and request.against == "eager" and request.spec is not None else request.weights


def _mapping(answerer: Answerer, truth: GroundTruth, by: By) -> CategoryMapping:
    if answerer.categories is not None:
        return map_categories(answerer.categories, truth.categories, by)
    ids = tuple(entry.id for entry in truth.categories)
    return CategoryMapping(
        ids, "id", note="the endpoint does not tell its categories; label i is taken as the data set's i-th category"
    )


def _unknown(request: Request, answerer: Answerer, data: _DataSet, limits: Limits) -> list[Objection]:
    """Look at some answers of an endpoint that does not describe itself."""
    message = (
        "categories: the endpoint does not tell which class each label is; expected a detserve endpoint. "
        "If label i is the data set's i-th category, evaluate with --accept-objections."
    )
    with open_journal(request.out / "probe.jsonl", {}, fresh=True) as journal:
        entries = [entry for entry in data.entries if entry.id in data.files][:8]
        stream(answerer, entries, data.files, journal, retry=request.retry)
    (request.out / "probe.jsonl").unlink()
    seen = seen_objections(list(journal.answers.values()), limits)
    return [Objection("categories", message), *seen]


@contextmanager
def _answers(request: Request, answerer: Answerer, data: _DataSet, name: str, asked: Options) -> Iterator[Journal]:
    """Open the journal of one side: what must be equal for its answers to belong together."""
    categories = [category.name for category in answerer.categories or ()]
    identity = {
        "answerer": answerer.name,
        "protocol": request.endpoint.protocol if request.endpoint else "in process",
        "images": str(request.images.resolve()),
        "annotations": data.truth.sha256,
        "score_threshold": asked.score_threshold,
        "max_detections": asked.max_detections,
        "iou_types": sorted(request.iou_types),
        "categories": hashlib.sha256(json.dumps(categories).encode()).hexdigest()[:16],
        **{key: value for key, value in answerer.facts.items() if key not in _MAY_DIFFER},
    }
    with open_journal(request.out / name, identity, fresh=request.fresh) as journal:
        yield journal


def _stream(
    request: Request, answerer: Answerer, data: _DataSet, journal: Journal, what: str, on_progress: Progress
) -> None:
    total = len(data.entries)
    done = len(journal.resumed & {entry.id for entry in data.entries})
    on_progress(what, done, total)

    def count(_: Answer) -> None:
        nonlocal done
        done += 1
        on_progress(what, done, total)

    stream(answerer, data.entries, data.files, journal, retry=request.retry, on_answer=count)


@contextmanager
def _reference(request: Request, asked: Options) -> Iterator[Answerer]:
    if request.against == "runtime":
        with _runtime(request, _source(request), request.weights, asked) as runtime:
            yield runtime
        return
    from detserve.eager import load_eager

    from dettools.evaluation.local_answerers import EagerAnswerer

    model = load_eager(
        request.model,
        model_store=request.model_store,
        spec=request.spec,
        weights=request.weights,
        device=request.device,
        allow_code=request.allow_code,
    )
    yield EagerAnswerer(model, asked=asked)


def _certificate(request: Request, data: _DataSet, reference: Side, served: Side, limits: Limits) -> Certificate:
    return certify(
        data.truth,
        reference,
        served,
        [entry.id for entry in data.entries],
        score_threshold=limits.effective_threshold,
        max_detections=limits.max_detections,
        tier=request.tier,
        iou_type=request.iou_types[0],
        margin=request.margin,
        confidence=request.confidence,
    )


def _source(request: Request) -> str:
    """The archive that the server was started with, else the model store's, else its spec."""
    if request.endpoint is None:
        return request.model
    if request.endpoint.url is None:
        state = Instance.named(request.endpoint.instance).require_running()
        for model in state.models:
            wanted = model.default if request.version is None else model.version == request.version
            if model.name == request.model and wanted:
                return model.archive
    archive, spec = archive_path(request.model_store, request.model), spec_path(request.model_store, request.model)
    return str(spec if request.weights is not None or not archive.is_file() else archive)


def _sampler(
    request: Request,
    answerer: Answerer,
    data: _DataSet,
    limits: Limits,
    on_progress: Progress,
) -> Callable[[], tuple[Sequence[Answer], CategoryMapping, str] | None]:
    """Return what draws detections under the best settings: from the endpoint if its floor allows, else in process."""
    entries = [entry for entry in data.entries if entry.id in data.files][:_SAMPLE]
    best = replace(request.asked, score_threshold=_LOWEST_THRESHOLD, max_detections=max(100, request.max_detections))

    def draw() -> tuple[Sequence[Answer], CategoryMapping, str] | None:
        with ExitStack() as stack:
            better: Answerer = answerer
            if (limits.floor or 0.0) > _LOWEST_THRESHOLD and request.endpoint is not None:
                try:
                    better = stack.enter_context(_runtime(request, _source(request), request.weights, best))
                except DetserveError:
                    return None
            elif isinstance(answerer, EndpointAnswerer):
                better = answerer.asking(best)
            else:
                better = cast("RuntimeAnswerer", answerer).asking(best)
            path = request.out / "cost.jsonl"
            with open_journal(path, {}, fresh=True) as journal:
                done = 0

                def count(_: Answer) -> None:
                    nonlocal done
                    done += 1
                    on_progress("what it would cost", done, len(entries))

                stream(better, entries, data.files, journal, retry=request.retry, on_answer=count)
            path.unlink()
            its = _mapping(better, data.truth, request.categories_by)
            return list(journal.answers.values()), its, better.name

    return functools.cache(draw)
