"""YOLOv3: boxes around anchors, class scores of cells that are objects, cut over all levels together.

Source: `YOLOV3Head.predict_by_feat` and `YOLOBBoxCoder`.
"""

from collections.abc import Mapping

import torch

from dethandlers.mmdet_decoding import Found, Frame, Head, Wanted
from dethandlers.mmdet_decoding.boxes import priors_at, rows_of
from dethandlers.mmdet_decoding.selection import choose, finish


def decode_yolov3(outputs: Mapping[str, torch.Tensor], head: Head, frame: Frame, wanted: Wanted) -> Found:
    """Decode ``maps_0`` … ``(A · (5 + C), h, w)``: x, y, width, height, objectness, classes."""
    boxes, objectness, scores = [], [], []
    for level, (stride, first) in enumerate(zip(head.strides, head.priors, strict=True)):
        level_map = outputs[f"maps_{level}"]
        rows = rows_of(level_map, len(level_map) // len(first))
        objects = rows[:, 4].sigmoid()
        places = torch.arange(len(rows), device=rows.device)
        if head.least_objectness > 0:
            places = (objects >= head.least_objectness).nonzero()[:, 0]
        anchors = priors_at(places, first, stride, level_map.shape[-1])
        boxes.append(_decoded(rows[places, :4], anchors, stride))
        objectness.append(objects[places])
        scores.append(rows[places, 5:].sigmoid())
    chosen = choose(torch.cat(scores), head.nms_pre, wanted)
    final = chosen.scores * torch.cat(objectness)[chosen.places]
    return finish(torch.cat(boxes)[chosen.places], final, chosen.labels, head, frame, wanted)


def _decoded(raw: torch.Tensor, anchors: torch.Tensor, stride: tuple[float, float]) -> torch.Tensor:
    steps = torch.tensor(stride, dtype=torch.float32, device=raw.device)
    centres = (anchors[:, :2] + anchors[:, 2:]) * 0.5 + (raw[:, :2].sigmoid() - 0.5) * steps
    halves = (anchors[:, 2:] - anchors[:, :2]) * 0.5 * raw[:, 2:].exp()
    return torch.cat([centres - halves, centres + halves], dim=1)
