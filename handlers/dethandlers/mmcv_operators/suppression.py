"""Suppressing boxes that overlap a better one: the NMS of mmcv, with its threshold in float32 and its order of ties."""

import numpy as np
import numpy.typing as npt
import torch
import torchvision

Floats = npt.NDArray[np.float32]
_NAIVE, _LINEAR, _GAUSSIAN = 0, 1, 2


def nms(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float, offset: int = 0) -> torch.Tensor:
    """Suppress every box whose IoU with a better kept one is above the threshold.

    Equal scores keep the order in which they came.

    Args:
        boxes: ``(N, 4)`` xyxy in pixels.
        scores: ``(N,)``.
        iou_threshold: rounded to float32, as the compiled operator takes it.
        offset: width is ``x2 - x1 + offset``.

    Returns:
        ``(K,)`` int64, the kept boxes' places, best first.
    """
    threshold = np.float32(iou_threshold)
    if offset == 0:
        kept: torch.Tensor = torchvision.ops.nms(boxes.float(), scores.float(), float(threshold))
        return kept
    order = scores.float().sort(stable=True, descending=True).indices
    by_score = boxes.float()[order].cpu().numpy()
    areas = _areas(by_score, offset)
    alive = np.ones(len(by_score), dtype=bool)
    for place in range(len(by_score)):
        if alive[place]:
            rest = slice(place + 1, None)
            overlap = _iou(by_score[place], areas[place], by_score[rest], areas[rest], offset)
            alive[rest] &= ~(overlap > threshold)
    return order[torch.from_numpy(alive).to(order.device)]


def softnms(
    boxes: torch.Tensor,
    scores: torch.Tensor,
    dets: torch.Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int = 0,
) -> torch.Tensor:
    """Lower the scores of boxes that overlap a better one (Bodla et al. 2017, "Soft-NMS", eqs. 2 and 3).

    A box that falls below ``min_score`` is replaced by the last one, so that equal scores come out in the compiled
    operator's order.

    Args:
        boxes: ``(N, 4)`` xyxy in pixels.
        scores: ``(N,)``.
        dets: ``(N, 5)``; its first K rows become the boxes and their new scores, in the order of selection.
        iou_threshold: for methods 0 and 1.
        sigma: for method 2.
        min_score: what falls below is dropped.
        method: 0 drops what overlaps, 1 lowers it linearly, 2 by a Gaussian.
        offset: width is ``x2 - x1 + offset``.

    Returns:
        ``(K,)`` int64, the boxes' places.
    """
    box = boxes.detach().float().cpu().numpy().copy()
    score = scores.detach().float().cpu().numpy().copy()
    index = np.arange(len(box))
    count, chosen = len(box), 0
    while chosen < count:
        best = chosen + _first_best(score[chosen:count])
        for column in (box, score, index):
            column[[chosen, best]] = column[[best, chosen]]
        rest = slice(chosen + 1, count)
        overlap = _iou(
            box[chosen], _areas(box[chosen : chosen + 1], offset)[0], box[rest], _areas(box[rest], offset), offset
        )
        score[rest] *= _weights(overlap, np.float32(iou_threshold), np.float32(sigma), method)
        count = _without_low(box, score, index, chosen + 1, count, np.float32(min_score))
        chosen += 1
    found = np.concatenate([box[:count], score[:count, None]], axis=1)
    dets[:count] = torch.from_numpy(found).to(dets)
    return torch.from_numpy(index[:count].astype(np.int64)).to(boxes.device)


def _without_low(
    box: Floats, score: Floats, index: npt.NDArray[np.intp], first: int, count: int, lowest: np.float32
) -> int:
    """Replace what lies below ``lowest`` by the last one still there; return how many are left."""
    place = first
    while place < count:
        low = np.flatnonzero(score[place:count] < lowest)
        if not len(low):
            break
        place += int(low[0])
        count -= 1
        for column in (box, score, index):
            column[place] = column[count]
    return count


def _weights(overlap: Floats, threshold: np.float32, sigma: np.float32, method: int) -> Floats:
    if method == _GAUSSIAN:
        # The C library's float exponential is the rounded exact one; NumPy's of float32 may be off by more.
        return np.exp((-(overlap * overlap) / sigma).astype(np.float64)).astype(np.float32)
    lowered = np.zeros_like(overlap) if method == _NAIVE else 1 - overlap
    return np.where(overlap >= threshold, lowered, np.float32(1))


def _first_best(score: Floats) -> int:
    """The first highest; a NaN is never higher, and nothing is higher than it."""
    if np.isnan(score[0]):
        return 0
    return int(np.argmax(np.where(np.isnan(score), -np.inf, score)))


def _areas(box: Floats, offset: int) -> Floats:
    one = np.float32(offset)
    return np.asarray((box[:, 2] - box[:, 0] + one) * (box[:, 3] - box[:, 1] + one))


def _iou(one: Floats, area: np.float32, others: Floats, areas: Floats, offset: int) -> Floats:
    """IoU of one box with others; NaN for boxes without area, which no threshold is below."""
    low, high = np.maximum(one[:2], others[:, :2]), np.minimum(one[2:], others[:, 2:])
    sides = np.maximum(high - low + np.float32(offset), np.float32(0))
    common = sides[:, 0] * sides[:, 1]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(common / (area + areas - common))
