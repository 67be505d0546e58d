"""The DETR family: a box and class scores a query, no NMS.

Source: `DETRHead._predict_by_feat_single`, which `DeformableDETRHead` and `DINOHead` share.
"""

from collections.abc import Mapping

import torch

from dethandlers.mmdet_decoding import Found, Frame, Head, Wanted
from dethandlers.mmdet_decoding.boxes import clipped


def decode_queries(outputs: Mapping[str, torch.Tensor], head: Head, frame: Frame, wanted: Wanted) -> Found:
    """Decode ``scores`` ``(Q, C)`` and ``boxes`` ``(Q, 4)``: centre and size as fractions of the image."""
    raw = outputs["scores"]
    known = wanted.known.to(raw.device)
    if head.scores == "softmax":
        best, labels = raw.softmax(dim=-1)[:, :-1].max(dim=-1)
        places = torch.arange(len(best), device=raw.device)
    else:
        best = raw.sigmoid().flatten()
        classes = raw.shape[1]
        order = torch.arange(len(best), device=raw.device)
        places, labels = order // classes, order % classes
    above = (best >= torch.tensor(wanted.score_threshold, dtype=torch.float32, device=raw.device)) & known[labels]
    places, labels, best = places[above], labels[above], best[above]
    scores, order = best.topk(min(wanted.max_detections, len(best)))
    coded = outputs["boxes"][places[order]]
    height, width = frame.size
    unit = torch.tensor([width, height, width, height], dtype=torch.float32, device=raw.device)
    halves = coded[:, 2:] * 0.5
    boxes = clipped(torch.cat([coded[:, :2] - halves, coded[:, :2] + halves], dim=1) * unit, frame.size)
    boxes = boxes * torch.tensor([*frame.scale_xy, *frame.scale_xy], dtype=torch.float32, device=raw.device)
    return Found(boxes, scores, labels[order])
