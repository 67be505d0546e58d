"""Convolution and attention at learned places: deformable convolution 1 and 2, multi-scale deformable attention."""

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
import torchvision


def deform_conv_forward(
    input: torch.Tensor,  # noqa: A002 - the compiled operator's name for it
    weight: torch.Tensor,
    offset: torch.Tensor,
    output: torch.Tensor,
    columns: torch.Tensor,  # noqa: ARG001 - the compiled operator's buffers
    ones: torch.Tensor,  # noqa: ARG001
    kW: int,  # noqa: ARG001, N803 - the weight tells
    kH: int,  # noqa: ARG001, N803
    dW: int,  # noqa: N803
    dH: int,  # noqa: N803
    padW: int,  # noqa: N803
    padH: int,  # noqa: N803
    dilationW: int,  # noqa: N803
    dilationH: int,  # noqa: N803
    group: int,  # noqa: ARG001 - the weight tells
    deformable_group: int,  # noqa: ARG001 - the offsets tell
    im2col_step: int,  # noqa: ARG001
) -> None:
    """Convolve at places moved by offsets (Dai et al. 2017, "Deformable Convolutional Networks", eq. 2).

    Args:
        input: ``(B, C, H, W)``.
        weight: ``(O, C / groups, kH, kW)``.
        offset: ``(B, 2 * deformable groups * kH * kW, OH, OW)`` y, x of each place in pixels.
        output: ``(B, O, OH, OW)``, written.
        columns: unused.
        ones: unused.
        kW: unused.
        kH: unused.
        dW: stride across.
        dH: stride down.
        padW: padding across.
        padH: padding down.
        dilationW: dilation across.
        dilationH: dilation down.
        group: unused.
        deformable_group: unused.
        im2col_step: unused.
    """
    found = torchvision.ops.deform_conv2d(
        input.float(),
        _without_nan(offset),
        weight.float(),
        stride=(dH, dW),
        padding=(padH, padW),
        dilation=(dilationH, dilationW),
    )
    output.copy_(found)


def modulated_deform_conv_forward(
    input: torch.Tensor,  # noqa: A002
    weight: torch.Tensor,
    bias: torch.Tensor,
    ones: torch.Tensor,  # noqa: ARG001
    offset: torch.Tensor,
    mask: torch.Tensor,
    output: torch.Tensor,
    columns: torch.Tensor,  # noqa: ARG001
    kernel_h: int,  # noqa: ARG001
    kernel_w: int,  # noqa: ARG001
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,  # noqa: ARG001
    deformable_group: int,  # noqa: ARG001
    with_bias: bool,
) -> None:
    """Convolve at places moved by offsets and weighed by a mask (Zhu et al. 2019, "Deformable ConvNets v2", eq. 1).

    Args:
        input: ``(B, C, H, W)``.
        weight: ``(O, C / groups, kernel_h, kernel_w)``.
        bias: ``(O,)``, or anything without ``with_bias``.
        ones: unused.
        offset: ``(B, 2 * deformable groups * kernel_h * kernel_w, OH, OW)`` y, x of each place in pixels. A larger one
            is read as the compiled operator reads it, its first numbers in memory: DyHead is trained so.
        mask: ``(B, deformable groups * kernel_h * kernel_w, OH, OW)``, or larger.
        output: ``(B, O, OH, OW)``, written.
        columns: unused.
        kernel_h: unused.
        kernel_w: unused.
        stride_h: stride down.
        stride_w: stride across.
        pad_h: padding down.
        pad_w: padding across.
        dilation_h: dilation down.
        dilation_w: dilation across.
        group: unused.
        deformable_group: unused.
        with_bias: whether the bias is added.
    """
    size = output.shape[2:]
    found = torchvision.ops.deform_conv2d(
        input.float(),
        _without_nan(_first_in_memory(offset, size)),
        weight.float(),
        bias.float() if with_bias else None,
        stride=(stride_h, stride_w),
        padding=(pad_h, pad_w),
        dilation=(dilation_h, dilation_w),
        mask=_first_in_memory(mask, size).float(),
    )
    output.copy_(found)


def _first_in_memory(planes: torch.Tensor, size: torch.Size) -> torch.Tensor:
    """Return ``(B, C, *size)``: larger planes' first numbers, laid out anew."""
    batch, channels = planes.shape[:2]
    if planes.shape[2:] == size or planes.shape[2:].numel() < size.numel():
        return planes
    return planes.reshape(batch, -1)[:, : channels * size.numel()].reshape(batch, channels, *size)


def _without_nan(offset: torch.Tensor) -> torch.Tensor:
    """Move places that are not a number far outside, where samples are 0: torchvision would read there and crash."""
    infinity = float("inf")
    return offset.float().nan_to_num(nan=-infinity, posinf=infinity, neginf=-infinity)


def ms_deform_attn_forward(
    value: torch.Tensor,
    value_spatial_shapes: torch.Tensor,
    value_level_start_index: torch.Tensor,  # noqa: ARG001 - the shapes tell
    sampling_locations: torch.Tensor,
    attention_weights: torch.Tensor,
    im2col_step: int,  # noqa: ARG001
) -> torch.Tensor:
    """Attend to a few points of each level (Zhu et al. 2021, "Deformable DETR", eq. 3, after the value projection).

    Args:
        value: ``(B, sum of H * W, heads, D)``.
        value_spatial_shapes: ``(L, 2)`` int64 height, width of each level.
        value_level_start_index: unused.
        sampling_locations: ``(B, Q, heads, L, P, 2)`` x, y in 0..1 of the level.
        attention_weights: ``(B, Q, heads, L, P)``.
        im2col_step: unused.

    Returns:
        ``(B, Q, heads * D)``, of value's type.
    """
    batch, _, heads, width = value.shape
    queries = sampling_locations.shape[1]
    shapes: list[list[int]] = value_spatial_shapes.tolist()
    levels = value.float().split_with_sizes([high * wide for high, wide in shapes], dim=1)
    grids = (2 * sampling_locations.float() - 1).transpose(1, 2).flatten(0, 1)
    weights = attention_weights.float().transpose(1, 2).flatten(0, 1)
    total = value.new_zeros((batch * heads, width, queries), dtype=torch.float32)
    for number, (high, wide) in enumerate(shapes):
        level = levels[number].permute(0, 2, 3, 1).reshape(batch * heads, width, high, wide)
        samples = F.grid_sample(level, grids[:, :, number], padding_mode="zeros", align_corners=False)
        total += (samples * weights[:, None, :, number]).sum(dim=-1)
    return total.view(batch, heads * width, queries).transpose(1, 2).contiguous().to(value.dtype)
