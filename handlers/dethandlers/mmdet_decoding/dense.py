"""Heads with a class map and a box map a level: RetinaNet, SSD, ATSS, FCOS, RTMDet, VFNet, GFL, TOOD and their kin.

    per level: scores ─► threshold, the best nms_pre ─► boxes around their priors, clipped ─► all levels: factors, NMS

Source: `BaseDenseHead._predict_by_feat_single`; `TOODHead` and `GFLHead` differ in their coding of boxes alone.
"""

from collections.abc import Mapping

import torch

from dethandlers.mmdet_decoding import Found, Frame, Head, Wanted
from dethandlers.mmdet_decoding.boxes import box_channels, clipped, decode_boxes, priors_at, rows_of
from dethandlers.mmdet_decoding.selection import choose, finish


def decode_dense(outputs: Mapping[str, torch.Tensor], head: Head, frame: Frame, wanted: Wanted) -> Found:
    """Decode ``scores_0`` … ``(A · C, h, w)``, ``boxes_0`` … ``(A · 4, h, w)`` and, where there are, ``factors_0`` …

    A threshold is held against the scores before their factors, as MMDetection does.
    """
    boxes, scores, labels = [], [], []
    for level, (stride, first) in enumerate(zip(head.strides, head.priors, strict=True)):
        class_map = outputs[f"scores_{level}"]
        all_scores = _activated(rows_of(class_map, len(class_map) // len(first)), head.scores)
        chosen = choose(all_scores, head.nms_pre, wanted)
        raw = rows_of(outputs[f"boxes_{level}"], box_channels(head.boxes))[chosen.places]
        priors = priors_at(chosen.places, first, stride, class_map.shape[-1])
        boxes.append(decode_boxes(raw, priors, stride, head.boxes))
        labels.append(chosen.labels)
        found = chosen.scores
        if head.factors:
            found = found * rows_of(outputs[f"factors_{level}"], 1)[chosen.places, 0].sigmoid()
        scores.append(found)
    every = torch.cat(boxes)
    if head.boxes.get("clip", True):
        every = clipped(every, frame.size)
    return finish(every, torch.cat(scores), torch.cat(labels), head, frame, wanted)


def _activated(raw: torch.Tensor, how: str) -> torch.Tensor:
    if how == "softmax":
        return raw.softmax(dim=-1)[:, :-1]
    return raw.sigmoid() if how == "sigmoid" else raw
