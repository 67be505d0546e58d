"""CARAFE: upsampling by kernels that the content predicts."""

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it


def carafe_naive_forward(
    features: torch.Tensor,
    masks: torch.Tensor,
    output: torch.Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Reassemble features (Wang et al. 2019, "CARAFE", eq. 4): each output pixel weighs its source's neighbourhood.

    Args:
        features: ``(B, C, H, W)``.
        masks: ``(B, groups * kernel_size², H * scale_factor, W * scale_factor)``.
        output: ``(B, C, H * scale_factor, W * scale_factor)``, written.
        kernel_size: side of the neighbourhood in source pixels, odd.
        group_size: number of groups of channels, each with kernels of its own.
        scale_factor: of the upsampling.
    """
    batch, channels, height, width = features.shape
    around = (kernel_size - 1) // 2
    padded = F.pad(features.float(), (around,) * 4)
    kernels = masks.float().view(
        batch, group_size, 1, kernel_size, kernel_size, height, scale_factor, width, scale_factor
    )
    total = features.new_zeros(
        (batch, group_size, channels // group_size, height, scale_factor, width, scale_factor), dtype=torch.float32
    )
    for down in range(kernel_size):
        for across in range(kernel_size):
            source = padded[:, :, down : down + height, across : across + width]
            source = source.reshape(batch, group_size, -1, height, 1, width, 1)
            total += source * kernels[:, :, :, down, across]
    output.copy_(total.reshape(output.shape))


def carafe_forward(
    features: torch.Tensor,
    masks: torch.Tensor,
    rfeatures: torch.Tensor,  # noqa: ARG001 - the compiled operator's buffers
    routput: torch.Tensor,  # noqa: ARG001
    rmasks: torch.Tensor,  # noqa: ARG001
    output: torch.Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Do the same as `carafe_naive_forward`; the compiled operators differ in how they use memory alone."""
    carafe_naive_forward(features, masks, output, kernel_size, group_size, scale_factor)
