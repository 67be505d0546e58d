"""The golden image of an archive: which one it is, and what eager finds in it."""

import importlib.resources
from pathlib import Path

import numpy as np
from dethandlers.artefact import Golden
from dethandlers.golden import TOLERANCES
from dethandlers.spec import Serving, Spec

from detserve.eager import EagerModel
from detserve.errors import DetserveError, SpecError

_LOWER_THRESHOLDS = (0.02, 0.005, 0.001)


def golden_image_of(spec: Spec, folder: Path, given: Path | None) -> tuple[str, bytes]:
    """Return the golden image's name and bytes: the one given, the spec's, or a generated scene.

    Raises:
        SpecError: it cannot be read.
    """
    path = given or (folder / spec.golden_image if spec.golden_image else None)
    if path is None:
        resource = importlib.resources.files("detserve") / "golden.jpg"
        return "golden.jpg", resource.read_bytes()
    try:
        return f"golden{path.suffix.lower()}", path.read_bytes()
    except OSError as error:
        raise SpecError(f"golden_image: cannot read {path} ({error}). Give an image with --golden-image.") from error


def golden_detections(eager: EagerModel, image: tuple[str, bytes], serving: Serving) -> tuple[str, Golden]:
    """Return the golden image's name, and what eager finds in it at the spec's own threshold.

    Where that is nothing, the threshold of the golden check is lowered until there is something to check: a model that
    sees nothing it knows in the generated scene still has opinions.

    Raises:
        SpecError: it is no image.
    """
    own = max(serving.score_threshold, serving.min_score_threshold)
    for threshold in (own, *(lower for lower in _LOWER_THRESHOLDS if lower < own)):
        try:
            found = eager.detect(image[1], threshold, serving.max_detections)
        except DetserveError as error:
            raise SpecError(f"golden_image: {error} Give another one with --golden-image.") from error
        # What is nearer to the threshold than the check's tolerance may come and go.
        if np.any(found.scores >= threshold + TOLERANCES["fp32"].score):
            return image[0], Golden(image[1], threshold, serving.max_detections, found)
    return image[0], Golden(image[1], own, serving.max_detections, eager.detect(image[1], own, serving.max_detections))
