"""YOLOX: the best class of each cell, times its objectness.

Source: `YOLOXHead.predict_by_feat`.
"""

from collections.abc import Mapping

import torch

from dethandlers.mmdet_decoding import Found, Frame, Head, Wanted
from dethandlers.mmdet_decoding.boxes import priors_at, rows_of
from dethandlers.mmdet_decoding.selection import finish


def decode_yolox(outputs: Mapping[str, torch.Tensor], head: Head, frame: Frame, wanted: Wanted) -> Found:
    """Decode ``scores_0`` … ``(C, h, w)``, ``boxes_0`` … ``(4, h, w)`` and ``factors_0`` … ``(1, h, w)``."""
    boxes, scores, labels = [], [], []
    known = wanted.known.to(next(iter(outputs.values())).device)
    threshold = torch.tensor(wanted.score_threshold, dtype=torch.float32, device=known.device)
    for level, (stride, first) in enumerate(zip(head.strides, head.priors, strict=True)):
        class_map = outputs[f"scores_{level}"]
        best, label = rows_of(class_map, len(class_map)).sigmoid().max(dim=1)
        score = best * rows_of(outputs[f"factors_{level}"], 1)[:, 0].sigmoid()
        places = ((score >= threshold) & known[label]).nonzero()[:, 0]
        raw = rows_of(outputs[f"boxes_{level}"], 4)[places]
        steps = torch.tensor(stride, dtype=torch.float32, device=raw.device)
        centres = raw[:, :2] * steps + priors_at(places, first, stride, class_map.shape[-1])
        halves = raw[:, 2:].exp() * steps / 2
        boxes.append(torch.cat([centres - halves, centres + halves], dim=1))
        scores.append(score[places])
        labels.append(label[places])
    return finish(torch.cat(boxes), torch.cat(scores), torch.cat(labels), head, frame, wanted)
