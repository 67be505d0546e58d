"""Convolution at chosen places alone, in the two steps into which mmcv divides it around its matrix product."""

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it


def masked_im2col_forward(
    im: torch.Tensor,
    mask_h_idx: torch.Tensor,
    mask_w_idx: torch.Tensor,
    col: torch.Tensor,
    kernel_h: int,
    kernel_w: int,
    pad_h: int,
    pad_w: int,
) -> None:
    """Gather the neighbourhoods of chosen places, stride 1.

    Args:
        im: ``(1, C, H, W)``.
        mask_h_idx: ``(M,)`` int64 rows of the chosen output places.
        mask_w_idx: ``(M,)`` int64 columns.
        col: ``(C * kernel_h * kernel_w, M)``, written.
        kernel_h: rows of a neighbourhood.
        kernel_w: columns of a neighbourhood.
        pad_h: zeros above and below.
        pad_w: zeros left and right.
    """
    # The compiled operator reads zeros beyond the padding, too: a place may lie near the end of a larger mask.
    padded = F.pad(im[0], (pad_w, kernel_w, pad_h, kernel_h))
    rows = mask_h_idx[None, None, :] + torch.arange(kernel_h, device=im.device)[:, None, None]
    columns = mask_w_idx[None, None, :] + torch.arange(kernel_w, device=im.device)[None, :, None]
    col.copy_(padded[:, rows, columns].reshape(col.shape))


def masked_col2im_forward(
    col: torch.Tensor,
    mask_h_idx: torch.Tensor,
    mask_w_idx: torch.Tensor,
    im: torch.Tensor,
    height: int,  # noqa: ARG001 - the tensor tells
    width: int,  # noqa: ARG001
    channels: int,  # noqa: ARG001
) -> None:
    """Put results at their chosen places.

    Args:
        col: ``(O, M)``.
        mask_h_idx: ``(M,)`` int64 rows.
        mask_w_idx: ``(M,)`` int64 columns.
        im: ``(1, O, H, W)``, written at those places.
        height: unused.
        width: unused.
        channels: unused.
    """
    im[0][:, mask_h_idx, mask_w_idx] = col.to(im.dtype)
