"""Class-aware non-maximum suppression that is exported as one ONNX NonMaxSuppression, whatever the batch.

torchvision's `batched_nms` becomes, when traced, one suppression over boxes that are shifted apart by class; at the
coordinates that this makes, float32 rounds overlaps differently from the eager model. Here every class is a plane of
its own, so that overlaps are computed from the very same coordinates.
"""

from typing import Any

import torch
from torch import Tensor
from torchvision.ops import nms

_ABSENT = -1.0
"""Score of what is not there; every real score is a probability."""


class _NonMaxSuppression(torch.autograd.Function):
    """ONNX NonMaxSuppression: ``(G, n, 4)`` xyxy and ``(G, C, n)`` scores to ``(M, 3)`` group, class, position."""

    @staticmethod
    def forward(_ctx: Any, boxes: Tensor, scores: Tensor, most: Tensor, iou: float) -> Tensor:
        rows = []
        for group in range(scores.shape[0]):
            for plane in range(scores.shape[1]):
                present = torch.where(scores[group, plane] > _ABSENT / 2)[0]
                kept = present[nms(boxes[group][present], scores[group, plane][present], iou)][: int(most)]
                rows.append(torch.stack([torch.full_like(kept, group), torch.full_like(kept, plane), kept], dim=1))
        return torch.cat(rows) if rows else boxes.new_zeros((0, 3), dtype=torch.int64)

    @staticmethod
    def symbolic(g: Any, boxes: Any, scores: Any, most: Any, iou: float) -> Any:
        one = g.op("Constant", value_t=torch.tensor([-1]))
        return g.op(
            "NonMaxSuppression",
            boxes,
            scores,
            g.op("Reshape", most, g.op("Abs", one)),
            g.op("Constant", value_t=torch.tensor([iou], dtype=torch.float32)),
            g.op("Constant", value_t=torch.tensor([_ABSENT / 2], dtype=torch.float32)),
        )


def suppress_planes(
    boxes: Tensor, scores: Tensor, labels: Tensor, alive: Tensor, *, classes: int, most: Tensor, iou: float
) -> Tensor:
    """Suppress among candidates of mixed classes.

    Args:
        boxes: ``(B, K, 4)`` xyxy px.
        scores: ``(B, K)``.
        labels: ``(B, K)`` in 0..classes-1.
        alive: ``(B, K)`` bool, of the candidates that take part.
        classes: number of planes.
        most: ``()`` int64, most to keep per image and class.
        iou: boxes of one class that overlap a better one by more than this are dropped.

    Returns:
        Positions of the kept in the flattened ``(B * K,)``.
    """
    wanted = labels[:, None, :] == torch.arange(classes)[None, :, None]
    present = torch.where(alive, scores, torch.full_like(scores, _ABSENT))[:, None, :]
    planes = torch.where(wanted, present, torch.full_like(present, _ABSENT))
    kept: Tensor = _NonMaxSuppression.apply(boxes, planes, most, iou)
    return kept[:, 0] * torch._shape_as_tensor(scores)[1] + kept[:, 2]


def suppress_blocks(boxes: Tensor, scores: Tensor, alive: Tensor, *, most: Tensor, iou: float) -> Tensor:
    """Suppress within blocks of candidates, each of one image and class.

    Args:
        boxes: ``(G, n, 4)`` xyxy px.
        scores: ``(G, n)``.
        alive: ``(G, n)`` bool.
        most: ``()`` int64, most to keep per block.
        iou: as for ``suppress_planes``.

    Returns:
        Positions of the kept in the flattened ``(G * n,)``.
    """
    present = torch.where(alive, scores, torch.full_like(scores, _ABSENT))
    kept: Tensor = _NonMaxSuppression.apply(boxes, present[:, None, :], most, iou)
    return kept[:, 0] * torch._shape_as_tensor(scores)[1] + kept[:, 2]


def best_of(kept: Tensor, scores: Tensor, most: Tensor) -> tuple[Tensor, Tensor]:
    """Choose each image's best among the kept.

    Args:
        kept: ``(M,)`` positions in the flattened scores.
        scores: ``(B, K)``.
        most: ``()`` int64, most per image.

    Returns:
        Scores ``(B, D)``, best first, and their positions ``(B, D)`` in ``K``; a place that nothing fills has a
        negative score. ``D`` is the smaller of ``most`` and ``K``.
    """
    flat = scores.flatten()
    only = torch.full_like(flat, _ABSENT).scatter(0, kept, flat[kept]).reshape(scores.shape[0], scores.shape[1])
    return least_topk(only, most, axis=1)


def least_topk(values: Tensor, most: Tensor | int, *, axis: int) -> tuple[Tensor, Tensor]:
    """Return the greatest ``most`` along an axis, or all where there are fewer."""
    there = torch._shape_as_tensor(values)[axis]
    wanted = most if isinstance(most, Tensor) else torch.tensor(most)
    return values.topk(torch.minimum(there, wanted), dim=axis)  # type: ignore[arg-type] # traced: k stays a tensor
