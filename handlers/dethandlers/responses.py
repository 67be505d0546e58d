"""Detections to the JSON of the response contract; floats are written so that float32 survives the way back.

The text is compact and in UTF-8: so it is the same, byte for byte, when TorchServe's frontend reads and writes it
again, as it does for the Open Inference Protocol.
"""

import json
import time
from typing import Any

from dethandlers.detections import Category, Detections
from dethandlers.detector import Answer
from dethandlers.errors import RequestError
from dethandlers.options import Options


def to_json_text(
    answer: Answer, options: Options, categories: tuple[Category, ...], batch_begun: float | None = None
) -> str:
    """Write one image's answer in the form that the request asked for.

    With ``timings`` the detections are wrapped in an object that also holds ``timings_ms``, ``batch_size``,
    ``forward_size`` and ``image_size`` ``[width, height]``.

    Args:
        batch_begun: when the worker got the batch, by `time.perf_counter`; the time ``handler`` counts from it until
            this answer is written, the other images of the batch included.
    """
    begun = time.perf_counter()
    text = json_text(_FORMATS[options.format](answer.detections, options, categories))
    if not options.timings:
        return text
    written = time.perf_counter()
    timings = {**answer.timings_ms, "serialise": (written - begun) * 1e3}
    if batch_begun is not None:
        timings["handler"] = (written - batch_begun) * 1e3
    beside = {
        "timings_ms": {stage: round(value, 4) for stage, value in timings.items()},
        "batch_size": answer.batch_size,
        "forward_size": answer.forward_size,
        "image_size": list(answer.image_size),
    }
    return f'{{"detections":{text},{json_text(beside)[1:]}'


def json_text(value: Any) -> str:
    """Write JSON as the frontend writes what it has read: no spaces, no letter escaped that need not be."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, quoted from a request: the worker would die of it
        return json.dumps(value, separators=(",", ":"))
    return text.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def too_long(text: str, detections: int, most_bytes: int) -> RequestError | None:
    """Return the refusal of an answer that is longer than the frontend may pass on: it would cost the worker."""
    if len(text) * 4 <= most_bytes or (size := len(text.encode())) <= most_bytes:  # UTF-8 takes at most four a letter
        return None
    return RequestError(
        f"got an answer of {size:,} bytes for {detections} detections, expected at most {most_bytes:,}. Ask for fewer "
        "with max_detections or a higher score_threshold, leave masks out, or raise serving.max_response_bytes.",
        type="answer_too_long",
        code=413,
    )


def _list(detections: Detections, options: Options, categories: tuple[Category, ...]) -> list[dict[str, Any]]:
    """The form that MMDetection published: one object per detection."""
    return [
        {
            "class_label": label,
            "class_name": categories[label].name,
            "bbox": _floats(box),
            "score": _float(score),
            **_extras(detections, position, options, categories[label]),
        }
        for position, (label, box, score) in enumerate(
            zip(detections.labels.tolist(), detections.boxes_xyxy.tolist(), detections.scores.tolist(), strict=True)
        )
    ]


def _coco(detections: Detections, options: Options, categories: tuple[Category, ...]) -> list[dict[str, Any]]:
    """COCO results without the image_id, which only the client knows: bbox is xywh."""
    return [
        {
            "category_id": categories[label].id,
            "bbox": _floats([x1, y1, x2 - x1, y2 - y1]),
            "score": _float(score),
            **_extras(detections, position, options, None),
        }
        for position, (label, (x1, y1, x2, y2), score) in enumerate(
            zip(detections.labels.tolist(), detections.boxes_xyxy.tolist(), detections.scores.tolist(), strict=True)
        )
    ]


def _columns(detections: Detections, options: Options, categories: tuple[Category, ...]) -> dict[str, Any]:
    """One list per property, for clients that fill arrays."""
    labels = detections.labels.tolist()
    columns: dict[str, Any] = {
        "boxes_xyxy": [_floats(box) for box in detections.boxes_xyxy.tolist()],
        "scores": _floats(detections.scores.tolist()),
        "labels": labels,
        "class_names": [categories[label].name for label in labels],
    }
    if options.category_id:
        columns["category_ids"] = [categories[label].id for label in labels]
    if options.masks and detections.masks is not None:
        columns["segmentations"] = detections.masks
    if options.keypoints and detections.keypoints is not None:
        columns["keypoints"] = [[_floats(point) for point in points] for points in detections.keypoints.tolist()]
    return columns


def _extras(detections: Detections, position: int, options: Options, category: Category | None) -> dict[str, Any]:
    extras: dict[str, Any] = {}
    if options.category_id and category is not None:
        extras["category_id"] = category.id
    if options.masks and detections.masks is not None:
        extras["segmentation"] = detections.masks[position]
    if options.keypoints and detections.keypoints is not None:
        extras["keypoints"] = [_floats(point) for point in detections.keypoints[position].tolist()]
    return extras


def _floats(values: list[float]) -> list[float]:
    return [_float(value) for value in values]


def _float(value: float) -> float:
    """Nine significant digits: the fewest that bring every float32 back unchanged."""
    return float(f"{value:.9g}")


_FORMATS = {"list": _list, "coco": _coco, "columns": _columns}
