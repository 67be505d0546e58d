"""Who is asked under corruption: a served endpoint, the worker's detector in this process, or the framework itself.

All three get encoded images and answer through the interface of `detserve evaluate`, which sends again what may be sent
again and counts every image as answered or failed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from dethandlers.options import Options
from detserve.errors import DetserveError

from dettools.evaluation.category_mapping import CategoryMapping, map_categories
from dettools.evaluation.gate import limits_of, objections
from dettools.evaluation.request import RefusedError, Request
from dettools.evaluation.run import served_answerer
from dettools.evaluation.stream import Answerer
from dettools.ground_truth import GroundTruth

Backend = Literal["endpoint", "runtime", "eager"]


@dataclass(frozen=True)
class Subject:
    """Who is asked.

    Attributes:
        asked: with what options, as they take effect.
        mapping: which category of the data set each of its classes is.
        names: of its classes, by label.
    """

    answerer: Answerer
    backend: Backend
    asked: Options
    mapping: CategoryMapping
    names: tuple[str, ...]


@contextmanager
def open_subject(request: Request, backend: Backend, truth: GroundTruth) -> Iterator[Subject]:
    """Load or reach who is asked.

    Args:
        request: names it; an endpoint where ``backend`` says so; ``weights`` with MMDetection's config as ``model``.
        backend: what kind it is.
        truth: the data set.

    Raises:
        RefusedError: the figures would not be its AP, and nobody said that they are wanted all the same.
        DetserveError: it cannot be loaded or reached.
    """
    with _answerer(request, backend) as answerer:
        limits = limits_of(answerer.facts, request.score_threshold, request.max_detections)
        categories = answerer.categories
        if categories is None and not request.accept_objections:
            raise DetserveError(
                f"{answerer.name} does not tell which class each label is; expected a detserve endpoint. If label i is "
                "the data set's i-th category, use --accept-objections."
            )
        if categories is None:
            mapping = CategoryMapping(tuple(one.id for one in truth.categories), "id")
            names = tuple(one.name for one in truth.categories)
        else:
            mapping = map_categories(categories, truth.categories, request.categories_by)
            names = tuple(one.name for one in categories)
        found = objections(limits, mapping)
        if found and not request.accept_objections:
            raise RefusedError(found)
        yield Subject(
            answerer, backend, replace(request.asked, score_threshold=limits.effective_threshold), mapping, names
        )


@contextmanager
def _answerer(request: Request, backend: Backend) -> Iterator[Answerer]:
    if backend == "endpoint":
        if request.endpoint is None:
            raise DetserveError(
                f"--backend endpoint: got {request.model}, expected the name of a served model. Name it, or leave "
                "--backend out."
            )
        with served_answerer(request, request.endpoint) as served:
            yield served
        return
    # torch is imported where something runs in this process, and not for an endpoint.
    from dettools.evaluation.local_answerers import EagerAnswerer, RuntimeAnswerer

    if backend == "eager":
        from detserve.eager import EagerModel, load_eager

        model: EagerModel
        if request.model.endswith(".py") and request.weights is not None:
            from detserve.eager_mmdet import load_mmdet

            config = Path(request.model)
            model = load_mmdet(config, request.weights, device=request.device, allow_code=request.allow_code)
        else:
            model = load_eager(
                request.model,
                model_store=request.model_store,
                spec=request.spec,
                weights=request.weights,
                device=request.device,
                allow_code=request.allow_code,
            )
        yield EagerAnswerer(model, asked=request.asked)
        return
    from dettools.local_detector import open_detector

    with open_detector(
        request.model,
        model_store=request.model_store,
        weights=request.weights,
        device=request.device,
        allow_code=request.allow_code,
    ) as detector:
        asked = replace(
            request.asked, score_threshold=max(request.score_threshold, detector.spec.serving.min_score_threshold)
        )
        # One image at a time: the latency of a batch is not that of its images.
        yield RuntimeAnswerer(detector, asked=asked, batch_size=1)
