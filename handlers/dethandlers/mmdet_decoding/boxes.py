"""Priors and the codings of boxes around them.

Source: `MlvlPointGenerator` and `AnchorGenerator` (mmdet/models/task_modules/prior_generators), the coders in
mmdet/models/task_modules/coders, and `Integral` (mmdet/models/dense_heads/gfl_head.py).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch


def rows_of(level_map: torch.Tensor, channels: int) -> torch.Tensor:
    """Bring a ``(A · channels, h, w)`` map to ``(h · w · A, channels)``, row after row of cells."""
    return level_map.permute(1, 2, 0).reshape(-1, channels)


def priors_at(
    places: torch.Tensor, first: Sequence[Sequence[float]], stride: Sequence[float], width: int
) -> torch.Tensor:
    """Return the priors of some rows, ``(K, 2)`` points or ``(K, 4)`` xyxy anchors, px.

    Args:
        places: ``(K,)`` of the rows that ``rows_of`` makes.
        first: the first cell's priors.
        stride: ``(x, y)`` px.
        width: cells in a row of the map.
    """
    base = torch.tensor(first, dtype=torch.float32, device=places.device)
    cells = places // len(first)
    steps = torch.tensor(stride, dtype=torch.float32, device=places.device)
    shift = torch.stack([cells % width, cells // width], dim=1) * steps
    return base[places % len(first)] + shift.repeat(1, base.shape[1] // 2)


def decode_boxes(raw: torch.Tensor, priors: torch.Tensor, stride: Sequence[float], coding: Mapping[str, Any]) -> Any:
    """Decode the boxes of one level's candidates.

    Args:
        raw: ``(K, channels)`` as the network put them out.
        priors: of the same rows.
        stride: ``(x, y)`` px of the level.
        coding: ``kind`` and its settings.

    Returns:
        ``(K, 4)`` xyxy px of the input, not clipped.
    """
    kind = coding["kind"]
    if kind == "corners":
        return raw * stride[0]
    if kind == "delta":
        return _from_deltas(raw, priors, coding)
    if kind == "distribution":
        bins = torch.arange(coding["bins"], dtype=torch.float32, device=raw.device)
        raw = (raw.reshape(len(raw), 4, len(bins)).softmax(dim=-1) @ bins) * stride[0]
    elif kind != "distance":
        raise KeyError(f"no coding of boxes called {kind!r}")
    return torch.cat([priors - raw[:, :2], priors + raw[:, 2:]], dim=1)


def box_channels(coding: Mapping[str, Any]) -> int:
    """How many channels a coding has for a box."""
    return 4 * int(coding["bins"]) if coding["kind"] == "distribution" else 4


def clipped(boxes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Clip ``(K, 4)`` xyxy to ``(h, w)`` px."""
    height, width = size
    limit = torch.tensor([width, height, width, height], dtype=boxes.dtype, device=boxes.device)
    return torch.minimum(boxes.clamp(min=0), limit)


def _from_deltas(raw: torch.Tensor, anchors: torch.Tensor, coding: Mapping[str, Any]) -> torch.Tensor:
    means = torch.tensor(coding["means"], dtype=torch.float32, device=raw.device)
    deviations = torch.tensor(coding["stds"], dtype=torch.float32, device=raw.device)
    deltas = raw * deviations + means
    centres, sides = (anchors[:, :2] + anchors[:, 2:]) * 0.5, anchors[:, 2:] - anchors[:, :2]
    moves, growths = sides * deltas[:, :2], deltas[:, 2:]
    most = abs(math.log(coding["wh_ratio_clip"]))
    if coding["ctr_clamp"] is None:
        growths = growths.clamp(min=-most, max=most)
    else:
        moves = moves.clamp(min=-coding["ctr_clamp"], max=coding["ctr_clamp"])
        growths = growths.clamp(max=most)
    centres, halves = centres + moves, sides * growths.exp() * 0.5
    return torch.cat([centres - halves, centres + halves], dim=1)
