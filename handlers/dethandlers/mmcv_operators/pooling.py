"""Features of regions: RoIAlign, RoIPool and the deformable RoI pooling, as mmcv computes them."""

import torch
import torchvision

_MAX = 0
_SAMPLES_AT_ONCE = 1 << 24


def roi_align_forward(
    input: torch.Tensor,  # noqa: A002 - the compiled operator's name for it
    rois: torch.Tensor,
    output: torch.Tensor,
    argmax_y: torch.Tensor,  # noqa: ARG001 - for training
    argmax_x: torch.Tensor,  # noqa: ARG001
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """RoIAlign (He et al. 2017, "Mask R-CNN", section 3): the mean or the maximum of bilinear samples in each bin.

    Args:
        input: ``(B, C, H, W)``.
        rois: ``(R, 5)`` image in the batch, then xyxy in pixels of the image.
        output: ``(R, C, aligned_height, aligned_width)``, written.
        argmax_y: unused.
        argmax_x: unused.
        aligned_height: bins down.
        aligned_width: bins across.
        spatial_scale: of the features to the image.
        sampling_ratio: samples of each bin and direction; 0 takes as many as it has pixels.
        pool_mode: 0 maximum, 1 mean.
        aligned: pixel centres lie at half pixels.
    """
    if pool_mode != _MAX:
        pooled = torchvision.ops.roi_align(
            input.float(),
            rois.float(),
            (aligned_height, aligned_width),
            spatial_scale,
            sampling_ratio if sampling_ratio > 0 else -1,
            aligned,
        )
        output.copy_(pooled)
        return
    corners = rois[:, 1:].float() * spatial_scale - (0.5 if aligned else 0.0)
    start, size = corners[:, [1, 0]], corners[:, [3, 2]] - corners[:, [1, 0]]
    if not aligned:
        size = size.clamp(min=1.0)
    _pool_samples(input, rois[:, 0], start, size, (aligned_height, aligned_width), sampling_ratio, output, None, "max")


def deform_roi_pool_forward(
    input: torch.Tensor,  # noqa: A002
    rois: torch.Tensor,
    offset: torch.Tensor,
    output: torch.Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> None:
    """Deformable RoI pooling (Dai et al. 2017, "Deformable Convolutional Networks", section 2.2) over RoIAlign's bins.

    Args:
        input: ``(B, C, H, W)``.
        rois: ``(R, 5)`` image in the batch, then xyxy in pixels of the image.
        offset: ``(R, 2, pooled_height, pooled_width)`` x, y of each bin as a share of the region, or empty.
        output: ``(R, C, pooled_height, pooled_width)``, written.
        pooled_height: bins down.
        pooled_width: bins across.
        spatial_scale: of the features to the image.
        sampling_ratio: samples of each bin and direction; 0 takes as many as it has pixels.
        gamma: what offsets are multiplied with.
    """
    corners = rois[:, 1:].float() * spatial_scale - 0.5
    start, size = corners[:, [1, 0]], corners[:, [3, 2]] - corners[:, [1, 0]]
    shift = None
    if offset.numel():
        shift = gamma * size[:, :, None, None] * offset.float()[:, [1, 0]]
    _pool_samples(input, rois[:, 0], start, size, (pooled_height, pooled_width), sampling_ratio, output, shift, "mean")


def roi_pool_forward(
    input: torch.Tensor,  # noqa: A002
    rois: torch.Tensor,
    output: torch.Tensor,
    argmax: torch.Tensor,  # noqa: ARG001 - for training
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Take the maximum of each bin's pixels (Girshick 2015, "Fast R-CNN"), the region not rounded, its end inclusive.

    torchvision's rounds the region to whole pixels first and so pools others.

    Args:
        input: ``(B, C, H, W)``.
        rois: ``(R, 5)`` image in the batch, then xyxy in pixels of the image.
        output: ``(R, C, pooled_height, pooled_width)``, written; 0 for empty bins.
        argmax: unused.
        pooled_height: bins down.
        pooled_width: bins across.
        spatial_scale: of the features to the image.
    """
    output.zero_()
    height, width = input.shape[2:]
    start = rois[:, [2, 1]].float() * spatial_scale
    size = (rois[:, [4, 3]].float() + 1) * spatial_scale - start
    rows = _bin_limits(start[:, 0], size[:, 0], pooled_height, height)
    columns = _bin_limits(start[:, 1], size[:, 1], pooled_width, width)
    real = (size > 0).all(dim=1).tolist()
    for place, image in enumerate(rois[:, 0].long().tolist()):
        for down, (top, bottom) in enumerate(rows[place] if real[place] else []):
            if bottom <= top:
                continue
            row = input[image, :, top:bottom].amax(dim=1)
            for across, (left, right) in enumerate(columns[place]):
                if right > left:
                    output[place, :, down, across] = row[:, left:right].amax(dim=1)


def _bin_limits(start: torch.Tensor, size: torch.Tensor, bins: int, length: int) -> list[list[tuple[int, int]]]:
    """First and one past the last pixel of each region's bins along one direction."""
    step = (size / bins)[:, None]
    place = torch.arange(bins, device=start.device)
    first = torch.floor(place * step + start[:, None]).clamp(0, length)
    last = torch.ceil((place + 1) * step + start[:, None]).clamp(0, length)
    return [
        list(zip(low, high, strict=True)) for low, high in zip(first.long().tolist(), last.long().tolist(), strict=True)
    ]


def _pool_samples(
    features: torch.Tensor,
    images: torch.Tensor,
    start: torch.Tensor,
    size: torch.Tensor,
    bins: tuple[int, int],
    sampling_ratio: int,
    output: torch.Tensor,
    shift: torch.Tensor | None,
    how: str,
) -> None:
    """Pool bilinear samples of regions whose start and size are ``(R, 2)`` y, x in feature pixels."""
    output.zero_()
    if not len(start):
        return
    step = size / torch.tensor(bins, device=size.device)
    grids = (torch.full_like(size, sampling_ratio) if sampling_ratio > 0 else torch.ceil(step)).long()
    groups, group_of = torch.unique(torch.cat([images[:, None].long(), grids], 1), dim=0, return_inverse=True)
    for number, (image, down, across) in enumerate(groups.tolist()):
        if down < 1 or across < 1:
            continue
        members = torch.nonzero(group_of == number)[:, 0]
        at_once = max(1, _SAMPLES_AT_ONCE // (features.shape[1] * bins[0] * bins[1] * down * across))
        for first in range(0, len(members), at_once):
            some = members[first : first + at_once]
            y = _sample_places(start[some, 0], step[some, 0], bins[0], down)[:, :, None, :, None]
            x = _sample_places(start[some, 1], step[some, 1], bins[1], across)[:, None, :, None, :]
            if shift is not None:
                y, x = y + shift[some, 0][..., None, None], x + shift[some, 1][..., None, None]
            samples = _bilinear(features[image].float(), y, x)
            pooled = samples.amax(dim=(-2, -1)) if how == "max" else samples.mean(dim=(-2, -1))
            output[some] = pooled.transpose(0, 1).to(output.dtype)


def _sample_places(start: torch.Tensor, step: torch.Tensor, bins: int, samples: int) -> torch.Tensor:
    """``(R, bins, samples)`` coordinates, evenly inside each bin."""
    number = torch.arange(bins, device=start.device)[:, None]
    inside = (torch.arange(samples, device=start.device) + 0.5)[None, :]
    return start[:, None, None] + number * step[:, None, None] + inside * step[:, None, None] / samples


def _bilinear(features: torch.Tensor, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Sample ``(C, H, W)`` at ``y, x``, whose shapes broadcast.

    0 more than a pixel outside, the border's pixel up to there.
    """
    height, width = features.shape[1:]
    outside = (y < -1) | (y > height) | (x < -1) | (x > width)
    y, x = y.clamp(0, height - 1), x.clamp(0, width - 1)
    top, left = y.floor().long(), x.floor().long()
    bottom, right = (top + 1).clamp(max=height - 1), (left + 1).clamp(max=width - 1)
    down, across = y - top, x - left
    value = (
        features[:, top, left] * ((1 - down) * (1 - across))
        + features[:, top, right] * ((1 - down) * across)
        + features[:, bottom, left] * (down * (1 - across))
        + features[:, bottom, right] * (down * across)
    )
    return value.masked_fill(outside, 0.0)
