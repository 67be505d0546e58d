"""One evaluation from beginning to end.

who answers? ─► gate (refuse, with the cost) ─► stream ─► certificate against eager or runtime ─► metrics
                                                  └─► a shard's part ─► … ─► merge ─┘
"""

import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import tenacity
from dethandlers.options import Options
from detserve.errors import DetserveError
from detserve.instance import Instance
from detserve.model_store import archive_path, spec_path

from dettools.agreement import TierName
from dettools.endpoint import Clients, Endpoint
from dettools.evaluation.answerers import EndpointAnswerer
from dettools.evaluation.answers import Answer, Journal, open_journal
from dettools.evaluation.category_mapping import By, CategoryMapping, map_categories
from dettools.evaluation.certificate import MARGIN, Side
from dettools.evaluation.collected import Collected, conclude
from dettools.evaluation.evaluation import Evaluation
from dettools.evaluation.gate import Limits, Objection, limits_of, objections, seen_objections, with_cost
from dettools.evaluation.request import LOWEST_THRESHOLD, DataSet, RefusedError, Request, load_data_set, selected
from dettools.evaluation.shards import (
    PART_FILE,
    Part,
    Parts,
    Shard,
    ShardError,
    UnfinishedError,
    read_parts,
    write_part,
)
from dettools.evaluation.stream import Answerer, stream
from dettools.ground_truth import GroundTruth, load_ground_truth

if TYPE_CHECKING:
    from dettools.evaluation.local_answerers import RuntimeAnswerer

Progress = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, and how much there is."""

_LOOK_S = 2.0
_SAMPLE = 100
"""Images that a refusal's cost is measured on at most."""
_MAY_DIFFER = frozenset({"categories", "device", "device_name", "threads"})
"""What a worker says of itself that may change while a run is interrupted, and changes no answer."""


def evaluate(request: Request, *, on_progress: Progress = lambda *_: None) -> Evaluation:
    """Evaluate.

    Raises:
        RefusedError: the figures would not be the model's AP.
        DetserveError: bad input, or an endpoint that does not answer; what was answered is kept.
    """
    data = load_data_set(request)
    with _collected(request, data, request.out, on_progress) as collected:
        on_progress("figures", 0, 0)
        return conclude(
            collected,
            data.truth,
            iou_types=request.iou_types,
            tier=request.tier,
            margin=request.margin,
            confidence=request.confidence,
        )


def evaluate_shard(request: Request, shard: Shard, *, on_progress: Progress = lambda *_: None) -> Part:
    """Collect one shard's answers in a folder of its own under ``request.out``; `merge` makes figures of them.

    Raises:
        RefusedError, DetserveError: as `evaluate`.
    """
    data = load_data_set(request, shard)
    folder = shard.folder(request.out)
    (folder / PART_FILE).unlink(missing_ok=True)
    with _collected(request, data, folder, on_progress) as collected:
        return write_part(
            shard,
            collected,
            folder,
            annotations_sha256=data.truth.sha256,
            iou_types=request.iou_types,
            limit=request.limit,
            classes=request.classes,
        )


def merge(
    folder: Path,
    annotations: Path,
    *,
    wait_s: float = 0.0,
    tier: TierName = "numeric",
    margin: float = MARGIN,
    confidence: float = 0.95,
) -> Evaluation:
    """Compute the figures of a whole data set from its shards' answers: those of an evaluation in one piece.

    Args:
        folder: where `evaluate_shard` left the shards.
        annotations: the file that they read.
        wait_s: how long to wait for shards that are not done.

    Raises:
        ShardError: a shard is missing, or they do not belong together or to the annotations.
    """
    waiting = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(UnfinishedError),
        wait=tenacity.wait_fixed(_LOOK_S),
        stop=tenacity.stop_after_delay(wait_s),
        reraise=True,
    )
    parts: Parts = waiting(read_parts, folder)
    truth = load_ground_truth(annotations)
    truth = truth.with_categories(parts.classes) if parts.classes else truth
    if truth.sha256 != parts.annotations_sha256:
        raise ShardError(
            f"--merge: got {annotations} (SHA-256 {truth.sha256[:12]}…), but the shards were evaluated on another "
            f"file ({parts.annotations_sha256[:12]}…). Give the one that they read."
        )
    collected = parts.collected(selected(truth, parts.limit, None))
    return conclude(collected, truth, iou_types=parts.iou_types, tier=tier, margin=margin, confidence=confidence)


@contextmanager
def _collected(request: Request, data: DataSet, out: Path, on_progress: Progress) -> Iterator[Collected]:
    """Ask for every image; the journals say that they are complete when the caller is done with the answers."""
    begun = time.monotonic()
    with ExitStack() as stack:
        answerer = stack.enter_context(_answerer(request))
        _require_capabilities(request, answerer)
        limits = limits_of(answerer.facts, request.score_threshold, request.max_detections)
        mapping = _mapping(answerer, data.truth, request.categories_by)
        found = objections(limits, mapping)
        if answerer.categories is None:
            found += _unknown(request, answerer, data, out, limits)
        if found and not request.accept_objections:
            sample = _sampler(request, answerer, data, out, limits, on_progress)
            raise RefusedError([with_cost(one, limits, data.truth, mapping, sample) for one in found])
        asked = replace(request.asked, score_threshold=limits.effective_threshold)
        # What cannot be loaded is told before the first image is sent.
        reference = stack.enter_context(_reference(request, asked)) if request.against else None
        journal = stack.enter_context(_answers(request, answerer, data, out / "answers.jsonl", asked))
        _stream(request, answerer, data, journal, "served", on_progress)
        seconds = time.monotonic() - begun
        side, reference_file, theirs = None, None, None
        if reference is not None:
            reference_file = f"reference-{request.against}.jsonl"
            theirs = stack.enter_context(_answers(request, reference, data, out / reference_file, asked))
            _stream(request, reference, data, theirs, str(request.against), on_progress)
            side = Side(reference.name, theirs.answers, _mapping(reference, data.truth, request.categories_by))
        answers = tuple(journal.answers[entry.id] for entry in data.entries)
        yield Collected(
            answerer.name,
            answerer.facts,
            limits,
            mapping,
            tuple(found),
            answers,
            side,
            reference_file,
            tuple(journal.events),
            len(journal.resumed & {entry.id for entry in data.entries}),
            seconds,
        )
        if theirs is not None:
            theirs.complete()
        if all(answer.failure is None for answer in answers):
            journal.complete()


def _require_capabilities(request: Request, answerer: Answerer) -> None:
    for iou_type, needed in (("segm", "masks"), ("keypoints", "keypoints")):
        if iou_type in request.iou_types and needed not in answerer.facts.get("capabilities", [needed]):
            raise DetserveError(
                f"--iou-type {iou_type}: {answerer.name} has no {needed}. Leave it out, or name a model with them."
            )


@contextmanager
def _answerer(request: Request) -> Iterator[Answerer]:
    if request.endpoint is None:
        with _runtime(request, request.model, _own_weights(request)) as runtime:
            yield runtime
        return
    with served_answerer(request, request.endpoint) as served:
        yield served


@contextmanager
def served_answerer(request: Request, endpoint: Endpoint) -> Iterator[EndpointAnswerer]:
    """Open clients of an endpoint; they are closed at the end."""
    with Clients(endpoint) as clients:
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


def _unknown(request: Request, answerer: Answerer, data: DataSet, out: Path, limits: Limits) -> list[Objection]:
    """Look at some answers of an endpoint that does not describe itself."""
    message = (
        "categories: the endpoint does not tell which class each label is; expected a detserve endpoint. "
        "If label i is the data set's i-th category, evaluate with --accept-objections."
    )
    with open_journal(out / "probe.jsonl", {}, fresh=True) as journal:
        entries = [entry for entry in data.entries if entry.id in data.files][:8]
        stream(answerer, entries, data.files, journal, retry=request.retry)
    (out / "probe.jsonl").unlink()
    seen = seen_objections(list(journal.answers.values()), limits)
    return [Objection("categories", message), *seen]


@contextmanager
def _answers(request: Request, answerer: Answerer, data: DataSet, path: Path, asked: Options) -> Iterator[Journal]:
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
    with open_journal(path, identity, fresh=request.fresh) as journal:
        yield journal


def _stream(
    request: Request, answerer: Answerer, data: DataSet, journal: Journal, what: str, on_progress: Progress
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
    data: DataSet,
    out: Path,
    limits: Limits,
    on_progress: Progress,
) -> Callable[[], tuple[Sequence[Answer], CategoryMapping, str] | None]:
    """Return what draws detections under the best settings: from the endpoint if its floor allows, else in process."""
    entries = [entry for entry in data.entries if entry.id in data.files][:_SAMPLE]
    best = replace(request.asked, score_threshold=LOWEST_THRESHOLD, max_detections=max(100, request.max_detections))

    def draw() -> tuple[Sequence[Answer], CategoryMapping, str] | None:
        with ExitStack() as stack:
            better: Answerer = answerer
            if (limits.floor or 0.0) > LOWEST_THRESHOLD and request.endpoint is not None:
                try:
                    better = stack.enter_context(_runtime(request, _source(request), request.weights, best))
                except DetserveError:
                    return None
            elif isinstance(answerer, EndpointAnswerer):
                better = answerer.asking(best)
            else:
                better = cast("RuntimeAnswerer", answerer).asking(best)
            path = out / "cost.jsonl"
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
