"""What every client of a model has in common: an image and options in, detections out; the protocol is the client's."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from dethandlers.detections import Detections

from detserve.errors import ClientError


class DetectingClient(ABC):
    """Calls the models of one server."""

    @abstractmethod
    def predict(
        self,
        model: str,
        image: bytes | Path,
        *,
        version: str | None = None,
        options: Mapping[str, object] | None = None,
    ) -> Any:
        """Send one image, return the JSON answer."""

    def detect(
        self,
        model: str,
        image: bytes | Path,
        *,
        score_threshold: float | None = None,
        max_detections: int | None = None,
        classes: Iterable[str] | None = None,
        masks: bool = False,
        keypoints: bool = False,
        version: str | None = None,
    ) -> Detections:
        """Send one image, return its detections, best first.

        Raises:
            EndpointError: the worker, or TorchServe, answered with an error.
            ClientError: there was no answer, or it is not one of ours.
        """
        options = {
            "score_threshold": score_threshold,
            "max_detections": max_detections,
            "classes": None if classes is None else list(classes),
            "masks": "rle" if masks else None,
            "keypoints": True if keypoints else None,
        }
        found = parse_detections(self.predict(model, image, version=version, options=options))
        return replace(found, masks=[]) if masks and not len(found) else found


def image_bytes(image: bytes | Path) -> bytes:
    """Return an image file's bytes.

    Raises:
        ClientError: the file cannot be read.
    """
    if isinstance(image, bytes):
        return image
    try:
        return image.read_bytes()
    except OSError as error:
        raise ClientError(f"The image {image} cannot be read: {error.strerror}.") from error


def option_texts(options: Mapping[str, object] | None) -> dict[str, str]:
    """Return the options as text, without those that are None: a list comma-separated, a bool true or false."""
    return {name: _text(value) for name, value in (options or {}).items() if value is not None}


def _text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str) or not isinstance(value, Iterable):
        return str(value)
    return ",".join(str(one) for one in value)


def parse_detections(answer: Any) -> Detections:
    """Return the detections of a default answer (the list), or of one with timings around it."""
    found = answer.get("detections") if isinstance(answer, dict) else answer
    if not isinstance(found, list):
        raise ClientError(
            f"Expected a list of detections, got {str(answer)[:100]!r}. Is that a detserve endpoint?", type="bad_answer"
        )
    if not found:
        return Detections.empty()
    try:
        return Detections(
            boxes_xyxy=np.array([one["bbox"] for one in found], np.float32).reshape(-1, 4),
            scores=np.array([one["score"] for one in found], np.float32),
            labels=np.array([one["class_label"] for one in found], np.int64),
            masks=[one["segmentation"] for one in found] if "segmentation" in found[0] else None,
            keypoints=np.array([one["keypoints"] for one in found], np.float32) if "keypoints" in found[0] else None,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ClientError(
            f"The answer is not a list of detections: {type(error).__name__}: {error}.", type="bad_answer"
        ) from error
