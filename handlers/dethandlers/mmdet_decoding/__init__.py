"""What MMDetection's heads do after their last convolution: from raw maps to detections, without MMDetection.

    maps of one image ─► the kind's function below ─► candidates ─► `selection` ─► boxes of the original image

A head's settings are data (``decoding.head`` in the spec), written when the model was exported: which priors, which
coding of boxes, which scores, where candidates are cut. A new kind is a file here and a line in KINDS.

Source of the decoding: MMDetection 3.3.0, mmdet/models/dense_heads; each file names its class.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch

from dethandlers.errors import ArtefactError
from dethandlers.mmdet_decoding.selection import Suppression

KINDS: dict[str, str] = {
    "dense": "dethandlers.mmdet_decoding.dense:decode_dense",
    "queries": "dethandlers.mmdet_decoding.queries:decode_queries",
    "yolov3": "dethandlers.mmdet_decoding.yolov3:decode_yolov3",
    "yolox": "dethandlers.mmdet_decoding.yolox:decode_yolox",
}


@dataclass(frozen=True)
class Head:
    """A head's settings.

    Attributes:
        kind: a key of ``KINDS``.
        strides: ``(x, y)`` px between the cells of each level.
        priors: per level, what stands at the first cell, px of the input: points ``(A, 2)`` or anchors xyxy ``(A, 4)``.
        scores: what makes the class maps scores: ``sigmoid``, ``softmax`` with the background last, or ``none``.
        boxes: coding of the boxes, and its settings.
        factors: whether each candidate's score has a factor of its own (centerness).
        nms_pre: most candidates that enter NMS, of each level (YOLOv3: of all); -1, MMDetection's default, leaves out
            the worst alone.
        least_objectness: YOLOv3's ``conf_thr``.
        least_side: boxes of the original image whose sides are not above this are dropped, px; below 0 none is.
        nms: its settings; None without.
    """

    kind: str
    strides: tuple[tuple[float, float], ...] = ()
    priors: tuple[tuple[tuple[float, ...], ...], ...] = ()
    scores: str = "sigmoid"
    boxes: Mapping[str, Any] = field(default_factory=dict)
    factors: bool = False
    nms_pre: int = -1
    least_objectness: float = -1.0
    least_side: float = -1.0
    nms: Suppression | None = None


@dataclass(frozen=True)
class Frame:
    """Where an image lies in the network's input.

    Attributes:
        size: ``(h, w)`` px to which boxes are clipped.
        scale_xy: factors from the input's pixels to those of the original.
    """

    size: tuple[int, int]
    scale_xy: tuple[float, float]


@dataclass(frozen=True)
class Wanted:
    """What is asked for.

    Attributes:
        score_threshold: least score, before factors.
        max_detections: most detections.
        known: ``(C,)`` bool, of the network's classes those that the category map has.
    """

    score_threshold: float
    max_detections: int
    known: torch.Tensor


@dataclass(frozen=True)
class Found:
    """An image's detections, best first: ``boxes`` ``(N, 4)`` xyxy px of the original, ``scores``, ``labels``."""

    boxes: torch.Tensor
    scores: torch.Tensor
    labels: torch.Tensor


def read_head(value: Mapping[str, Any]) -> Head:
    """Read ``decoding.head`` of a spec.

    Raises:
        ArtefactError: it is not what ``export`` writes.
    """
    try:
        given = dict(value)
        nms = given.pop("nms", None)
        head = Head(**given, nms=Suppression(**nms) if nms else None)
        head = replace(
            head,
            strides=tuple((float(x), float(y)) for x, y in head.strides),
            priors=tuple(tuple(tuple(map(float, row)) for row in level) for level in head.priors),
            boxes=dict(head.boxes),
        )
    except (TypeError, ValueError) as error:
        raise ArtefactError(f"decoding.head: not the settings of a head ({error}). Export the model again.") from error
    if head.kind not in KINDS:
        raise ArtefactError(
            f"decoding.head: got kind {head.kind!r}, expected {', '.join(KINDS)}. Export the model again."
        )
    return head


def decode_head(outputs: Mapping[str, torch.Tensor], head: Head, frame: Frame, wanted: Wanted) -> Found:
    """Decode one image's maps.

    Args:
        outputs: by name, without their batch dimension.
        head: settings.
        frame: of the image.
        wanted: limits.

    Raises:
        ArtefactError: the outputs are not the head's.
    """
    module, _, name = KINDS[head.kind].partition(":")
    decode = cast("Callable[..., Found]", getattr(importlib.import_module(module), name))
    try:
        return decode({name: output.float() for name, output in outputs.items()}, head, frame, wanted)
    except (KeyError, IndexError, RuntimeError) as error:
        shapes = ", ".join(f"{name} {tuple(output.shape)}" for name, output in outputs.items())
        raise ArtefactError(
            f"network outputs: got {shapes}, which are no maps of a {head.kind} head as the spec describes it "
            f"({error}). Export the model again."
        ) from error
