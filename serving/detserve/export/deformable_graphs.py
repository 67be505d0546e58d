"""Deformable sampling in operators that ONNX has, put in the place of mmcv's while a model is traced.

    deformable convolution (DCN v1, v2, TOOD's alignment) ─► GridSample and a matrix product
    multi-scale deformable attention ─► GridSample a level, sizes left free

ONNX has a DeformConv of its own only from opset 19 on, and mmcv's attention writes the sizes of the traced image into
the graph.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_CONVOLUTIONS = ("mmcv.ops.deform_conv", "mmdet.models.dense_heads.tood_head", "mmcv.ops.saconv")
"""Modules that call mmcv's ``deform_conv2d`` by their own name for it."""


@contextmanager
def plain_operators() -> Iterator[None]:
    """Let mmcv's modules compute by the functions below."""
    places: list[tuple[str, str, Any]] = [
        *((module, "deform_conv2d", _deform_conv2d) for module in _CONVOLUTIONS),
        ("mmcv.ops.modulated_deform_conv", "modulated_deform_conv2d", _modulated_deform_conv2d),
        ("mmcv.ops.multi_scale_deform_attn", "multi_scale_deformable_attn_pytorch", deformable_attention),
    ]
    found = [(sys.modules[module], name, new) for module, name, new in places if module in sys.modules]
    before = [(module, name, getattr(module, name)) for module, name, _ in found if hasattr(module, name)]
    for module, name, new in found:
        setattr(module, name, new)
    try:
        yield
    finally:
        for module, name, old in before:
            setattr(module, name, old)


def deformable_convolution(
    images: Tensor,
    offsets: Tensor,
    weight: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    offset_groups: int = 1,
) -> Tensor:
    """Convolve ``(B, C, H, W)`` with each weight's place moved, as `torchvision.ops.deform_conv2d` does.

    Args:
        images: features.
        offsets: ``(B, 2 · offset_groups · kh · kw, h, w)`` px, y before x.
        weight: ``(O, C / groups, kh, kw)``.
        mask: ``(B, offset_groups · kh · kw, h, w)`` factors.
        bias: ``(O,)``.
        stride, padding, dilation: ``(y, x)`` px.
        groups: of the weights.
        offset_groups: of channels that share their offsets.

    Returns:
        ``(B, O, h, w)``.
    """
    count, channels = images.shape[0], int(weight.shape[1]) * groups
    height, width = images.shape[2], images.shape[3]
    kernel_height, kernel_width = int(weight.shape[2]), int(weight.shape[3])
    points = kernel_height * kernel_width
    out_height, out_width = offsets.shape[2], offsets.shape[3]
    rows = torch.arange(out_height, device=images.device) * stride[0] - padding[0]
    columns = torch.arange(out_width, device=images.device) * stride[1] - padding[1]
    within_y = (torch.arange(points, device=images.device) // kernel_width * dilation[0]).view(1, points, 1, 1)
    within_x = (torch.arange(points, device=images.device) % kernel_width * dilation[1]).view(1, points, 1, 1)
    share = channels // offset_groups
    sampled = []
    for group in range(offset_groups):
        own = offsets[:, 2 * points * group : 2 * points * (group + 1)]
        y = own[:, 0::2] + (rows.view(1, 1, -1, 1) + within_y)
        x = own[:, 1::2] + (columns.view(1, 1, 1, -1) + within_x)
        grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], dim=-1)
        values = functional.grid_sample(
            images[:, share * group : share * (group + 1)],
            grid.reshape(count, points * out_height, out_width, 2),
            mode="bilinear",
            padding_mode="zeros",
            align_corners=False,
        ).reshape(count, share, points, out_height, out_width)
        if mask is not None:
            values = values * mask[:, None, points * group : points * (group + 1)]
        sampled.append(values)
    # A matrix product, since TOOD's weights are made while it runs, and a convolution's must be constants in ONNX.
    gathered = torch.cat(sampled, dim=1).reshape(count, groups, channels // groups * points, -1)
    kernels = int(weight.shape[0])
    product = weight.reshape(groups, kernels // groups, -1) @ gathered
    convolved = product.reshape(count, kernels, out_height, out_width)
    return convolved if bias is None else convolved + bias.view(1, -1, 1, 1)


def deformable_attention(values: Tensor, shapes: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """Sample several maps around each query, as mmcv's `multi_scale_deformable_attn_pytorch` does.

    Args:
        values: ``(B, cells of all levels, heads, channels)``.
        shapes: ``(levels, 2)`` int64, ``(h, w)`` cells of each map.
        locations: ``(B, queries, heads, levels, points, 2)``, x and y in 0..1.
        weights: ``(B, queries, heads, levels, points)``.

    Returns:
        ``(B, queries, heads · channels)``.
    """
    count, heads, channels = values.shape[0], int(values.shape[2]), int(values.shape[3])
    queries, levels, points = locations.shape[1], int(locations.shape[3]), int(locations.shape[4])
    grids = (2 * locations - 1).permute(3, 0, 2, 1, 4, 5)
    begin = shapes[0, 0] * 0
    sampled = []
    for level in range(levels):
        height, width = shapes[level, 0], shapes[level, 1]
        end = begin + height * width
        # Sizes as tensors, so that they stay free in the graph.
        size: Any = (count * heads, channels, height, width)
        own = values[:, begin:end].flatten(2).transpose(1, 2).reshape(size)
        grid = grids[level].reshape(count * heads, queries, points, 2)
        sampled.append(functional.grid_sample(own, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
        begin = end
    shares = weights.transpose(1, 2).reshape(count * heads, 1, queries, levels * points)
    mixed = (torch.stack(sampled, dim=-2).flatten(-2) * shares).sum(-1)
    return mixed.reshape(count, heads * channels, queries).transpose(1, 2)


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _deform_conv2d(
    images: Tensor,
    offsets: Tensor,
    weight: Tensor,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    deform_groups: int = 1,
    *_: Any,
) -> Tensor:
    return deformable_convolution(
        images,
        offsets,
        weight,
        stride=_pair(stride),
        padding=_pair(padding),
        dilation=_pair(dilation),
        groups=groups,
        offset_groups=int(deform_groups),
    )


def _modulated_deform_conv2d(
    images: Tensor,
    offsets: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    deform_groups: int = 1,
) -> Tensor:
    return deformable_convolution(
        images,
        offsets,
        weight,
        mask=mask,
        bias=bias,
        stride=_pair(stride),
        padding=_pair(padding),
        dilation=_pair(dilation),
        groups=groups,
        offset_groups=int(deform_groups),
    )
