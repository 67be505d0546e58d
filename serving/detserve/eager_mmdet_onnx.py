"""The reference for an exported MMDetection model whose checkpoint is not there: the file itself, read plainly.

onnxruntime runs the file on the CPU, one image at a time; NumPy does the rest in double precision, written apart from
the worker's code. Whether the file equals the checkpoint was settled when it was exported; with this reference,
`compare` still proves the serving.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from dethandlers.detections import Detections
from dethandlers.spec import Spec

from detserve.eager_image import bilinear, bilinear_eight_bit, decode_rgb
from detserve.eager_onnx import open_on_cpu
from detserve.errors import SpecError

Array = npt.NDArray[np.float64]


_DEFAULTS = {
    "scores": "sigmoid",
    "factors": False,
    "nms_pre": -1,
    "least_objectness": -1.0,
    "least_side": -1.0,
    "nms": None,
}
"""Of `dethandlers.mmdet_decoding.Head`."""


@dataclass(frozen=True)
class _Rows:
    """Candidates in pixels of the input: ``boxes`` ``(N, 4)`` xyxy, ``scores`` and ``labels`` of the network."""

    boxes: Array
    scores: Array
    labels: npt.NDArray[np.intp]


class MmdetOnnxEager:
    """An exported detector of MMDetection with a plain decoding.

    Raises:
        CheckpointError: onnxruntime cannot load the file.
        DetserveError: onnxruntime is missing.
    """

    def __init__(self, spec: Spec, weights: Path, *, source: str) -> None:
        self._session, version = open_on_cpu(weights, "an exported MMDetection model")
        self.provider = str(self._session.get_providers()[0])
        self.categories = spec.categories
        self.source = f"onnxruntime {version} on the CPU with a plain decoding, {source}"
        self._spec = spec
        self._head: dict[str, Any] = _DEFAULTS | spec.decoding.head
        self._kinds = {
            "dense": self._dense,
            "queries": self._queries,
            "yolov3": self._yolov3,
            "yolox": self._yolox,
        }
        self._label_of = {category.model_label: label for label, category in enumerate(spec.categories)}

    def detect(
        self,
        image: bytes,
        score_threshold: float,
        max_detections: int,
        *,
        masks: bool = False,  # noqa: ARG002
        keypoints: bool = False,  # noqa: ARG002
    ) -> Detections:
        """Find objects in one encoded image.

        Raises:
            DetserveError: it is no image, or the file and the spec disagree.
        """
        rgb = decode_rgb(image)
        feed, resized, clip = self._prepared(rgb)
        outputs = self._run(feed)
        try:
            rows = self._kinds[self._head["kind"]](outputs, score_threshold, clip)
        except (KeyError, IndexError, ValueError) as error:
            raise SpecError(
                f"network outputs: got {', '.join(outputs)}, expected those of decoding.head ({error}). Export it "
                "again."
            ) from error
        scale = np.asarray([rgb.shape[1] / resized[1], rgb.shape[0] / resized[0]] * 2)
        boxes = rows.boxes * scale
        wanted = np.asarray([label in self._label_of for label in rows.labels], dtype=bool)
        least = self._head["least_side"]
        if least >= 0:
            wanted &= (boxes[:, 2] - boxes[:, 0] > least) & (boxes[:, 3] - boxes[:, 1] > least)
        places = np.flatnonzero(wanted)
        places = places[np.argsort(-rows.scores[places], kind="stable")]
        if self._head["nms"]:
            places = self._suppressed(boxes, rows, places, self._head["nms"])
        places = places[:max_detections]
        return Detections(
            boxes[places].astype(np.float32).reshape(-1, 4),
            rows.scores[places].astype(np.float32),
            np.asarray([self._label_of[int(rows.labels[place])] for place in places], dtype=np.int64),
        ).filtered(score_threshold, max_detections)

    def _prepared(self, rgb: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.float32], tuple[int, int], tuple[int, int]]:
        """Return the input, and ``(h, w)`` px of the image in it without and with what MMDetection's Pad added."""
        settings = self._spec.preprocessing
        height, width = rgb.shape[:2]
        new = settings.size
        if settings.resize == "fit":
            scale = min(settings.longer_side / max(height, width), settings.shorter_side / min(height, width))
            new = math.floor(height * scale + 0.5), math.floor(width * scale + 0.5)
        resized = (bilinear_eight_bit if settings.interpolation == "eight_bit" else bilinear)(rgb, *new)
        canvas = {
            "none": new,
            "square": (max(new), max(new)),
            "size": (max(new[0], settings.size[0]), max(new[1], settings.size[1])),
        }[settings.pad_to]
        image = np.full((*canvas, 3), settings.pad_value)
        image[: new[0], : new[1]] = resized[:, :, :: -1 if settings.channel_order == "bgr" else 1]
        image = (image * settings.scale - np.asarray(settings.mean)) / np.asarray(settings.std)
        below, right = (-side % settings.divisor for side in canvas)
        padded = np.pad(image, ((0, below), (0, right), (0, 0)))
        return padded.transpose(2, 0, 1)[None].astype(np.float32), new, canvas

    def _run(self, feed: npt.NDArray[np.float32]) -> dict[str, Array]:
        first, *_ = self._session.get_inputs()
        count = first.shape[0] if isinstance(first.shape[0], int) else 1
        try:
            outputs = self._session.run(None, {first.name: np.repeat(feed, count, axis=0)})
        except Exception as error:  # onnxruntime's exceptions share no root
            raise SpecError(
                f"the network takes {first.name} {first.shape}, got {feed.shape}: {error}. Export it again."
            ) from error
        names = [one.name for one in self._session.get_outputs()]
        return {name: output[0].astype(np.float64) for name, output in zip(names, outputs, strict=True)}

    def _dense(self, outputs: Mapping[str, Array], threshold: float, clip: tuple[int, int]) -> _Rows:
        levels = []
        for level, (stride, first) in enumerate(zip(self._head["strides"], self._head["priors"], strict=True)):
            _, height, width = outputs[f"scores_{level}"].shape
            classes = _scores(outputs[f"scores_{level}"].reshape(len(first), -1, height, width), self._head["scores"])
            anchor, label, y, x = np.nonzero(classes >= np.float32(threshold))
            scores = classes[anchor, label, y, x]
            order = np.argsort(-scores, kind="stable")[: self._head["nms_pre"]]
            anchor, label, y, x, scores = anchor[order], label[order], y[order], x[order], scores[order]
            raw = outputs[f"boxes_{level}"].reshape(len(first), -1, height, width)[anchor, :, y, x]
            shift = np.stack([x * stride[0], y * stride[1]], axis=1)
            prior = np.asarray(first)[anchor] + np.tile(shift, len(first[0]) // 2)
            boxes = _box(raw, prior, stride[0], self._head["boxes"])
            if self._head["boxes"].get("clip", True):
                boxes = np.clip(boxes, 0, [clip[1], clip[0], clip[1], clip[0]])
            if self._head["factors"]:
                scores = scores * _sigmoid(outputs[f"factors_{level}"].reshape(len(first), height, width)[anchor, y, x])
            levels.append(_Rows(boxes, scores, label))
        return _joined(levels)

    def _yolox(self, outputs: Mapping[str, Array], threshold: float, _: tuple[int, int]) -> _Rows:
        levels = []
        for level, (stride, first) in enumerate(zip(self._head["strides"], self._head["priors"], strict=True)):
            classes = _sigmoid(outputs[f"scores_{level}"])
            scores = classes.max(axis=0) * _sigmoid(outputs[f"factors_{level}"][0])
            y, x = np.nonzero(scores >= np.float32(threshold))
            dx, dy, w, h = outputs[f"boxes_{level}"][:, y, x]
            centre_x, centre_y = (dx + x) * stride[0] + first[0][0], (dy + y) * stride[1] + first[0][1]
            boxes = _around(centre_x, centre_y, np.exp(w) * stride[0], np.exp(h) * stride[1])
            levels.append(_Rows(boxes, scores[y, x], classes.argmax(axis=0)[y, x]))
        return _joined(levels)

    def _yolov3(self, outputs: Mapping[str, Array], threshold: float, _: tuple[int, int]) -> _Rows:
        levels = []
        factors = []
        for level, (stride, first) in enumerate(zip(self._head["strides"], self._head["priors"], strict=True)):
            _, height, width = outputs[f"maps_{level}"].shape
            maps = outputs[f"maps_{level}"].reshape(len(first), -1, height, width)
            objectness, classes = _sigmoid(maps[:, 4]), _sigmoid(maps[:, 5:])
            wanted = (classes >= np.float32(threshold)) & (objectness >= self._head["least_objectness"])[:, None]
            anchor, label, y, x = np.nonzero(wanted)
            left, top, right, bottom = np.asarray(first)[anchor].T
            dx, dy, w, h = maps[anchor, :4, y, x].T
            boxes = _around(
                (left + right) / 2 + (x - 0.5 + _sigmoid(dx)) * stride[0],
                (top + bottom) / 2 + (y - 0.5 + _sigmoid(dy)) * stride[1],
                (right - left) * np.exp(w),
                (bottom - top) * np.exp(h),
            )
            levels.append(_Rows(boxes, classes[anchor, label, y, x], label))
            factors.append(objectness[anchor, y, x])
        every = _joined(levels)
        best = np.argsort(-every.scores, kind="stable")[: self._head["nms_pre"]]
        return _Rows(every.boxes[best], (every.scores * np.concatenate(factors))[best], every.labels[best])

    def _queries(self, outputs: Mapping[str, Array], threshold: float, clip: tuple[int, int]) -> _Rows:
        if self._head["scores"] == "softmax":
            scores = _softmax(outputs["scores"])[:, :-1]
            scores = np.where(scores == scores.max(axis=1, keepdims=True), scores, -1)
        else:
            scores = _sigmoid(outputs["scores"])
        query, label = np.nonzero(scores >= np.float32(threshold))
        height, width = clip
        x, y, w, h = (outputs["boxes"] * [width, height, width, height])[query].T
        boxes = np.clip(_around(x, y, w, h), 0, [width, height, width, height])
        return _Rows(boxes, scores[query, label], label)

    @staticmethod
    def _suppressed(
        boxes: Array, rows: _Rows, places: npt.NDArray[np.intp], settings: Mapping[str, Any]
    ) -> npt.NDArray[np.intp]:
        places = places[
            rows.scores[places] > settings.get("score_threshold", 0) - (not settings.get("score_threshold"))
        ]
        areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        kept = []
        while len(places):
            best, places = places[0], places[1:]
            kept.append(best)
            near = np.maximum(boxes[places, :2], boxes[best, :2])
            far = np.minimum(boxes[places, 2:], boxes[best, 2:])
            shared = np.clip(far - near, 0, None).prod(axis=1)
            with np.errstate(invalid="ignore", divide="ignore"):
                overlap = shared / (areas[places] + areas[best] - shared)
            same = (
                np.full(len(places), True)
                if settings.get("class_agnostic")
                else rows.labels[places] == rows.labels[best]
            )
            places = places[~(same & (overlap > settings["iou_threshold"]))]
        most = settings.get("max_num", -1)
        return np.asarray(kept[:most] if most > 0 else kept, dtype=np.intp)


def _joined(levels: list[_Rows]) -> _Rows:
    return _Rows(
        np.concatenate([one.boxes for one in levels]),
        np.concatenate([one.scores for one in levels]),
        np.concatenate([one.labels for one in levels]),
    )


def _scores(raw: Array, how: str) -> Array:
    """Return ``(anchors, classes, h, w)`` scores, without the background that ``softmax`` has last."""
    if how == "softmax":
        return np.moveaxis(_softmax(np.moveaxis(raw, 1, -1)), -1, 1)[:, :-1]
    return _sigmoid(raw) if how == "sigmoid" else raw


def _box(raw: Array, prior: Array, stride: float, coding: Mapping[str, Any]) -> Array:
    if coding["kind"] == "corners":
        return raw * stride
    if coding["kind"] == "delta":
        dx, dy, dw, dh = (raw * coding["stds"] + coding["means"]).T
        width, height = prior[:, 2] - prior[:, 0], prior[:, 3] - prior[:, 1]
        most, reach = abs(math.log(coding["wh_ratio_clip"])), coding["ctr_clamp"]
        x, y = width * dx, height * dy
        if reach is not None:
            x, y = np.clip(x, -reach, reach), np.clip(y, -reach, reach)
        least = -most if reach is None else -np.inf
        centre_x, centre_y = (prior[:, 0] + prior[:, 2]) / 2 + x, (prior[:, 1] + prior[:, 3]) / 2 + y
        return _around(
            centre_x, centre_y, width * np.exp(np.clip(dw, least, most)), height * np.exp(np.clip(dh, least, most))
        )
    if coding["kind"] == "distribution":
        shares = _softmax(raw.reshape(len(raw), 4, coding["bins"]))
        raw = (shares * np.arange(coding["bins"])).sum(axis=-1) * stride
    return np.concatenate([prior - raw[:, :2], prior + raw[:, 2:]], axis=1)


def _around(x: Array, y: Array, width: Array, height: Array) -> Array:
    return np.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], axis=1)


def _sigmoid(value: Array) -> Array:
    return np.asarray((1 + np.tanh(value / 2)) / 2)


def _softmax(value: Array) -> Array:
    powers = np.exp(value - value.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))
