"""Formulas for operators that torch.utils.flop_counter has none for, and what the rest of them are.

A formula returns FLOPs, twice the MACs, as torch's own do.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torchvision  # noqa: F401 - registers torch.ops.torchvision
from torch.utils.flop_counter import sdpa_flop_count

# Weighted samples of one interpolated value, each a MAC.
BILINEAR = 4


def roi_align_macs(
    rois: Sequence[tuple[float, float]], channels: int, pooled: tuple[int, int], sampling_ratio: int
) -> int:
    """Return RoIAlign's MACs: each output value averages a grid of samples, each of four weighted pixels.

    Args:
        rois: height and width of each RoI in feature-map pixels; used only with ``sampling_ratio`` 0.
        channels: of the feature map.
        pooled: ``(h, w)`` of the output.
        sampling_ratio: samples per bin and axis; 0 takes ceil(roi / pooled), as Mask R-CNN's operator does.
    """
    if sampling_ratio > 0:
        samples = len(rois) * sampling_ratio**2
    else:
        samples = sum(
            max(0, math.ceil(height / pooled[0])) * max(0, math.ceil(width / pooled[1])) for height, width in rois
        )
    return samples * BILINEAR * channels * pooled[0] * pooled[1]


def deform_conv_macs(out_shape: Sequence[int], weight_shape: Sequence[int], in_channels: int) -> int:
    """Return a deformable convolution's MACs: the convolution itself and the bilinear samples that it reads.

    Args:
        out_shape: ``(N, C_out, H, W)``.
        weight_shape: ``(C_out, C_in / groups, kh, kw)``.
        in_channels: ``C_in``; each channel is sampled once per kernel position and output position.
    """
    batch, _, height, width = out_shape
    kernel = math.prod(weight_shape[2:])
    sampled = batch * height * width * in_channels * kernel
    return math.prod(out_shape) * weight_shape[1] * kernel + BILINEAR * sampled


def _roi_align(
    features: Any,
    rois: Any,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    sampling_ratio: int,
    aligned: bool,
    *_: Any,
    **__: Any,
) -> int:
    sizes = [(0.0, 0.0)] * len(rois)
    if sampling_ratio <= 0:
        floor = 0.0 if aligned else 1.0
        spans = (rois[:, 3:5] - rois[:, 1:3]) * spatial_scale
        sizes = [(max(height, floor), max(width, floor)) for width, height in spans.tolist()]
    return 2 * roi_align_macs(sizes, features.shape[1], (pooled_height, pooled_width), sampling_ratio)


# torch's counter hands over the tensors themselves, not their shapes, when a formula says so.
_roi_align._get_raw = True  # type: ignore[attr-defined]


def _deform_conv(x_shape: Any, w_shape: Any, *_: Any, out_shape: Sequence[int], **__: Any) -> int:
    return 2 * deform_conv_macs(out_shape, w_shape, x_shape[1])


def _weighted_samples(count: int) -> Callable[..., int]:
    def flops(*_: Any, out_shape: Sequence[int], **__: Any) -> int:
        return 2 * count * math.prod(out_shape)

    return flops


def _grid_sampler(_x: Any, _grid: Any, mode: int = 0, *_: Any, out_shape: Sequence[int], **__: Any) -> int:
    # bilinear, nearest, bicubic
    return 2 * (BILINEAR, 0, 16)[mode] * math.prod(out_shape)


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _matrix_vector(matrix: Sequence[int], _vector: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(matrix)


def _added_matrix_vector(_added: Any, matrix: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(matrix)


FORMULAS: dict[Any, Callable[..., int]] = {
    torch.ops.torchvision.roi_align: _roi_align,
    torch.ops.torchvision.deform_conv2d: _deform_conv,
    torch.ops.aten.upsample_linear1d: _weighted_samples(2),
    torch.ops.aten.upsample_bilinear2d: _weighted_samples(BILINEAR),
    torch.ops.aten.upsample_trilinear3d: _weighted_samples(8),
    # No bicubic: detectors have it only in enlarging keypoints' heatmaps to boxes, whose sizes are not known.
    torch.ops.aten.grid_sampler_2d: _grid_sampler,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten.mv: _matrix_vector,
    torch.ops.aten.dot: _matrix_vector,
    torch.ops.aten.addmv: _added_matrix_vector,
}


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


COMPARISONS = _names(
    "nms topk sort argsort max min amax amin argmax argmin maximum minimum max_pool2d_with_indices max_pool2d "
    "adaptive_max_pool2d where gt ge lt le eq ne clamp clamp_min clamp_max logical_and logical_or logical_not "
    "bitwise_and bitwise_or bitwise_not nonzero searchsorted bucketize isfinite isnan any all unique"
)
COPIES = _names(
    "cat stack clone copy copy_ _to_copy contiguous index index_select gather scatter index_put constant_pad_nd "
    "repeat masked_select flip roll upsample_nearest2d upsample_nearest1d _unsafe_index embedding take "
    "native_dropout pixel_shuffle lift_fresh_copy tril triu meshgrid"
)
FILLS = _names(
    "zeros ones full empty arange linspace eye zeros_like ones_like full_like empty_like new_zeros new_ones new_full "
    "new_empty fill zero scalar_tensor empty_strided rand randn normal uniform _efficientzerotensor"
)


def kind_of(operator: str) -> str:
    """Return what an uncounted operator of torch does; ``operator`` without namespace and overload."""
    name = operator.rstrip("_")
    for kind, names in (("comparisons", COMPARISONS), ("copies", COPIES), ("fill", FILLS)):
        if name in names or operator in names:
            return kind
    return "arithmetic"
