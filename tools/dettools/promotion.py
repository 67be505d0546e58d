"""A new version of a served model becomes the default when the server itself has shown that it finds what it should.

register ─► every worker READY, its own golden check passed
    ─► golden image over the endpoint, against eager's detections from the build
    ─► images over the endpoint, against eager inference now (what `detserve compare` does)
    ─► default ─► the default answers as the new version ─► the old one stays, or goes when it is quiet
anything fails, or Ctrl-C ─► the new version is unregistered, the default is what it was
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from dethandlers.artefact import Artefact, load_artefact
from dethandlers.errors import DetectorError
from dethandlers.golden import TOLERANCES, describe_drift
from detserve import server
from detserve.client import Client
from detserve.eager import EagerModel, eager_from_archive
from detserve.errors import ArchiveError, ClientError, DetserveError, ServerError
from detserve.instance import Instance
from detserve.mar import unpacked

from dettools.agreement import TierName
from dettools.comparison import Comparison, ImageComparison, compare_image, compare_images, failed_image

_BACK_WITHIN_S = 15.0

Check = Literal["start", "golden", "compare", "default"]


@dataclass(frozen=True)
class Demands:
    """What a new version must show.

    Attributes:
        images: to compare on; empty takes the archive's golden image.
        tier: that every image must reach.
        score_threshold, max_detections: asked of both sides.
        allow_code: a model of MMDetection may import here what its config names.
        device: of eager inference.
    """

    images: Sequence[Path] = ()
    tier: TierName = "numeric"
    score_threshold: float = 0.05
    max_detections: int = 100
    allow_code: bool = False
    device: str = "cpu"


@dataclass(frozen=True)
class Promotion:
    """What came of it.

    Attributes:
        previous: the default version before; None for a model that was not served.
        failed: the check that failed; None when the version was promoted.
        reason: why, as a sentence; empty when it was promoted.
        golden: whether the golden image was reproduced over the endpoint; None when it did not come to that.
        comparison: served against eager; None when it did not come to that.
        default: the default version now; None when the model is not served now.
        previous_served: whether the previous default is served still.
    """

    name: str
    version: str
    previous: str | None
    failed: Check | None = None
    reason: str = ""
    golden: bool | None = None
    comparison: Comparison | None = None
    default: str | None = None
    previous_served: bool = True

    @property
    def promoted(self) -> bool:
        """Whether the new version is the default."""
        return self.failed is None

    def to_json(self) -> dict[str, Any]:
        """Return the outcome as JSON values."""
        plain = asdict(replace(self, comparison=None))
        comparison = None if self.comparison is None else self.comparison.to_json(per_image=False)
        return {**plain, "promoted": self.promoted, "comparison": comparison}


def promote(
    archive: Path,
    demands: Demands | None = None,
    *,
    instance: Instance | None = None,
    wish: server.ServingWish | None = None,
    trusted_keys: Sequence[Path] | None = None,
    unregister_old: bool = False,
    drain_timeout_s: float = 30.0,
    timeout_s: float = 180.0,
    on_progress: Callable[[str], None] = lambda _: None,
) -> Promotion:
    """Bring a new version in, check it, make it the default; or leave all as it was, and say why.

    Args:
        wish, trusted_keys, timeout_s: as for `server.register`.
        unregister_old: take the previous default out when it is quiet. What asks for it by its version fails then, and
            there is no way back by one command, so it stays unless this is asked for.

    Raises:
        ArchiveError: the archive must not be served.
        DetserveError: no server, the version is served already, or eager inference cannot be loaded.
    """
    instance, demands = instance or Instance.named(), demands or Demands()
    previous = _defaults(instance)
    try:
        model = server.register(
            archive,
            instance=instance,
            wish=wish,
            trusted_keys=trusted_keys,
            timeout_s=timeout_s,
            on_progress=on_progress,
        )
    except server.NotStartedError as error:
        was = previous.get(error.name)
        return Promotion(error.name, error.version, was, "start", str(error), default=was)
    outcome = Promotion(model.name, model.version, previous.get(model.name), default=model.version)
    try:
        outcome = _checked(outcome, demands, instance, on_progress)
        if outcome.failed is None:
            outcome = _made_default(outcome, instance, on_progress)
    except BaseException:
        _roll_back(outcome, instance)
        raise
    if outcome.failed is not None:
        on_progress(f"taking {model.name} {model.version} out again")
        _roll_back(outcome, instance)
        return replace(outcome, default=_defaults(instance).get(outcome.name))
    if unregister_old and outcome.previous is not None:
        return _without_previous(outcome, instance, drain_timeout_s, on_progress)
    return outcome


def _defaults(instance: Instance) -> dict[str, str]:
    """Return the default version of each model."""
    return {model.name: model.version for model in instance.require_running().models if model.default}


def _checked(outcome: Promotion, demands: Demands, instance: Instance, on_progress: Callable[[str], None]) -> Promotion:
    archive = server.stored_archive(instance, outcome.name, outcome.version)
    with unpacked(archive) as folder, Client.for_instance(instance.name, retries=5) as client:
        try:
            artefact = load_artefact(folder)
        except DetectorError as error:
            raise ArchiveError(f"archive {archive.name}: {error}") from error
        if artefact.golden is not None:
            on_progress("the golden image over the endpoint")
            drift = _golden_drift(artefact, client)
            outcome = replace(outcome, golden=not drift)
            if drift:
                return replace(outcome, failed="golden", reason=drift)
        on_progress("eager inference")
        eager = eager_from_archive(archive, device=demands.device, allow_code=demands.allow_code)
        comparison = _compare(artefact, eager, client, demands, on_progress)
    outcome = replace(outcome, comparison=comparison)
    if comparison.passed:
        return outcome
    failing = [image for image in comparison.images if not image.passed]
    why = next((finding.detail for image in failing for finding in image.findings if finding.fails), "no image")
    return replace(
        outcome,
        failed="compare",
        reason=f"served differs from eager on {len(failing)} of {len(comparison.images)} image(s), below the tier "
        f"{demands.tier}: {why}",
    )


def _golden_drift(artefact: Artefact, client: Client) -> str:
    """Return how the served golden detections differ from eager's of the build; empty when they do not."""
    golden, spec = artefact.golden, artefact.spec
    assert golden is not None  # noqa: S101 - the caller has looked
    try:
        found = client.detect(
            spec.name,
            golden.image,
            score_threshold=golden.score_threshold,
            max_detections=golden.max_detections,
            version=spec.version,
        )
    except ClientError as error:
        return f"the golden image got no answer: {error}"
    tolerance = TOLERANCES[spec.serving.precision]
    return describe_drift(golden.detections, found, golden.score_threshold, tolerance, spec.categories)


def _compare(
    artefact: Artefact, eager: EagerModel, client: Client, demands: Demands, on_progress: Callable[[str], None]
) -> Comparison:
    paths = {str(path): path for path in demands.images}
    if not paths and artefact.golden is None:
        raise ArchiveError(
            f"{artefact.spec.name} {artefact.spec.version}: the archive has no golden image to compare on. Give images "
            "with --images."
        )
    images: list[ImageComparison] = []
    for name in paths or ["the golden image"]:
        content = paths[name].read_bytes() if name in paths else artefact.golden.image if artefact.golden else b""
        images.append(_compare_one(name, content, artefact, eager, client, demands))
        if len(images) % 10 == 0 or len(images) == len(paths):
            on_progress(f"compared {len(images)} of {len(paths)} images")
    return compare_images(
        images,
        score_threshold=demands.score_threshold,
        max_detections=demands.max_detections,
        required=demands.tier,
    )


def _compare_one(
    name: str, content: bytes, artefact: Artefact, eager: EagerModel, client: Client, demands: Demands
) -> ImageComparison:
    spec = artefact.spec
    try:
        reference = eager.detect(content, demands.score_threshold, demands.max_detections)
    except DetserveError as error:
        return failed_image(name, "eager_failed", str(error))
    try:
        served = client.detect(
            spec.name,
            content,
            score_threshold=demands.score_threshold,
            max_detections=demands.max_detections,
            version=spec.version,
        )
    except ClientError as error:
        return failed_image(name, "request_failed", str(error), eager=reference)
    return compare_image(
        name,
        reference,
        served,
        score_threshold=demands.score_threshold,
        max_detections=demands.max_detections,
        required=demands.tier,
        names=[category.name for category in spec.categories],
    )


def _made_default(outcome: Promotion, instance: Instance, on_progress: Callable[[str], None]) -> Promotion:
    on_progress(f"{outcome.name} {outcome.version} becomes the default")
    server.set_default(outcome.name, outcome.version, instance=instance)
    try:
        with Client.for_instance(instance.name, retries=5) as client:
            answering = str(client.describe(outcome.name).get("version"))
    except ClientError as error:
        return replace(outcome, failed="default", reason=f"the new default does not answer: {error}")
    if answering != outcome.version:
        return replace(outcome, failed="default", reason=f"the default still answers as version {answering}")
    return outcome


def _roll_back(outcome: Promotion, instance: Instance) -> None:
    """Leave the server as it was; nobody asks for a version that never was the default but by its name."""
    try:
        # Somebody else may have chosen another default meanwhile: that one is theirs.
        if outcome.previous is not None and _is_default(outcome, instance):
            _make_default_again(outcome.name, outcome.previous, instance)
    finally:
        server.unregister(outcome.name, outcome.version, instance=instance, drain_timeout_s=5.0, force=True)


def _is_default(outcome: Promotion, instance: Instance) -> bool:
    """Ask the server itself: who was interrupted may not have written it down."""
    models = server.status(instance, ask_workers=False).models
    return any(one.default for one in models if (one.name, one.version) == (outcome.name, outcome.version))


def _make_default_again(name: str, version: str, instance: Instance) -> None:
    """Its worker may have died just now: it is back within seconds, and is waited for."""
    deadline = time.monotonic() + _BACK_WITHIN_S
    while True:
        try:
            server.set_default(name, version, instance=instance)
        except ServerError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
        else:
            return


def _without_previous(
    outcome: Promotion, instance: Instance, drain_timeout_s: float, on_progress: Callable[[str], None]
) -> Promotion:
    try:
        server.unregister(
            outcome.name,
            outcome.previous,
            instance=instance,
            drain_timeout_s=drain_timeout_s,
            on_progress=on_progress,
        )
    except ServerError as error:
        # The new version is the default all the same.
        on_progress(f"{outcome.name} {outcome.previous} stays: {error}")
        return outcome
    return replace(outcome, previous_served=False)
