"""Which candidates become detections: score threshold, the best of a level, factors, smallest side, NMS, number.

Source: `filter_scores_and_topk` (mmdet/models/utils/misc.py), `BaseDenseHead._bbox_post_process`, and mmcv's
`batched_nms` (mmcv/ops/nms.py).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torchvision.ops import nms

if TYPE_CHECKING:
    from dethandlers.mmdet_decoding import Found, Frame, Head, Wanted


@dataclass(frozen=True)
class Suppression:
    """NMS as a config's ``nms`` says it.

    Attributes:
        iou_threshold: boxes that overlap a better one by more are dropped.
        class_agnostic: of whatever class, instead of the same one.
        split_thr: from so many boxes on, class by class.
        max_num: most boxes that are kept; below 0 all are.
        score_threshold: boxes with no higher score are dropped before.
    """

    iou_threshold: float
    class_agnostic: bool = False
    split_thr: int = 10_000
    max_num: int = -1
    score_threshold: float = 0.0


@dataclass(frozen=True)
class Chosen:
    """Candidates above the threshold, best first: ``places`` of the rows, ``scores`` and ``labels``, each ``(K,)``."""

    places: torch.Tensor
    scores: torch.Tensor
    labels: torch.Tensor


def choose(scores: torch.Tensor, most: int, wanted: "Wanted") -> Chosen:
    """Choose among ``(N, C)`` scores; a row may be chosen for several classes.

    Args:
        scores: of every candidate and class.
        most: how many may be chosen.
        wanted: threshold, and which classes there are.
    """
    above = scores >= torch.tensor(wanted.score_threshold, dtype=torch.float32, device=scores.device)
    above &= wanted.known.to(scores.device)[: scores.shape[1]]
    pairs = above.nonzero()
    best, order = scores[above].sort(descending=True)
    # MMDetection cuts with a slice: -1, its default, leaves out the last alone.
    chosen = pairs[order[: min(most, len(pairs))]]
    return Chosen(chosen[:, 0], best[: len(chosen)], chosen[:, 1])


def finish(
    boxes: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor, head: "Head", frame: "Frame", wanted: "Wanted"
) -> "Found":
    """Take candidates back to the original image, suppress, and cut.

    Args:
        boxes: ``(K, 4)`` xyxy px of the input.
        scores: ``(K,)``, factors multiplied in.
        labels: ``(K,)``.
        head: settings.
        frame: of the image.
        wanted: limits.
    """
    from dethandlers.mmdet_decoding import Found

    boxes = boxes * torch.tensor([*frame.scale_xy, *frame.scale_xy], dtype=torch.float32, device=boxes.device)
    if head.least_side >= 0:
        large = ((boxes[:, 2:] - boxes[:, :2]) > head.least_side).all(dim=1)
        boxes, scores, labels = boxes[large], scores[large], labels[large]
    kept = suppressed(boxes, scores, labels, head.nms) if head.nms else scores.argsort(descending=True)
    kept = kept[: wanted.max_detections]
    return Found(boxes[kept], scores[kept], labels[kept])


def suppressed(boxes: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor, settings: Suppression) -> torch.Tensor:
    """Return the places of the boxes that NMS keeps, best first.

    Classes are moved apart as mmcv moves them, by the same distance: the rounding of coordinates decides which boxes
    lie at the threshold.
    """
    if not len(boxes):
        return torch.zeros(0, dtype=torch.int64, device=boxes.device)
    moved = boxes if settings.class_agnostic else boxes + (labels.to(boxes.dtype) * (boxes.max() + 1))[:, None]
    if len(boxes) < settings.split_thr:
        return _nms(moved, scores, settings)
    mask = torch.zeros_like(labels, dtype=torch.bool)
    for label in torch.unique(labels):
        places = (labels == label).nonzero()[:, 0]
        mask[places[_nms(moved[places], scores[places], settings)]] = True
    kept = mask.nonzero()[:, 0]
    kept = kept[scores[kept].argsort(descending=True)]
    return kept[: settings.max_num] if settings.max_num > 0 else kept


def _nms(boxes: torch.Tensor, scores: torch.Tensor, settings: Suppression) -> torch.Tensor:
    if settings.score_threshold > 0:
        places = (scores > settings.score_threshold).nonzero()[:, 0]
        kept = places[nms(boxes[places], scores[places], settings.iou_threshold)]
    else:
        kept = nms(boxes, scores, settings.iou_threshold)
    return kept[: settings.max_num] if settings.max_num > 0 else kept
