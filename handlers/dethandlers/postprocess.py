"""Network output to pixels of the original image: boxes scaled back, masks pasted and run-length coded."""

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from dethandlers.detections import Rle

MASK_THRESHOLD = 0.5


def scale_boxes(boxes_xyxy: torch.Tensor, scale_xy: tuple[float, float]) -> torch.Tensor:
    """Scale ``(N, 4)`` xyxy boxes from network pixels to original pixels."""
    scale = torch.tensor([*scale_xy, *scale_xy], dtype=torch.float32, device=boxes_xyxy.device)
    return boxes_xyxy.float() * scale


def clip_boxes(boxes_xyxy: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Clip ``(N, 4)`` xyxy boxes to an image of ``size`` ``(H, W)`` px."""
    height, width = size
    limit = torch.tensor([width, height, width, height], dtype=boxes_xyxy.dtype, device=boxes_xyxy.device)
    return torch.minimum(boxes_xyxy.clamp(min=0), limit)


def encode_masks(masks: torch.Tensor, boxes_xyxy: torch.Tensor, size: tuple[int, int]) -> list[Rle]:
    """Paste each box's mask into the image and run-length encode it, one at a time, so that memory stays small.

    The geometry is Mask R-CNN's: the mask grows by one cell on each side, its box by the same factor around its centre,
    and the box is rounded outwards to whole pixels (torchvision's `expand_masks` and `paste_mask_in_image`).

    Args:
        masks: ``(N, 1, M, M)`` float probabilities inside the boxes.
        boxes_xyxy: ``(N, 4)`` px of the original image.
        size: ``(H, W)`` px of the original image.

    Returns:
        One COCO RLE per box, of the pixels where the probability is above 0.5.
    """
    cells = masks.shape[-1]
    grown = functional.pad(masks.float(), (1, 1, 1, 1)).cpu()
    factor = (cells + 2) / cells
    corners = boxes_xyxy.float().cpu()
    centre = (corners[:, :2] + corners[:, 2:]) * 0.5
    half = (corners[:, 2:] - corners[:, :2]) * 0.5 * factor
    grown_boxes = torch.cat([centre - half, centre + half], dim=1).to(torch.int64).tolist()
    return [encode_rle(_pasted(mask, box, size)) for mask, box in zip(grown, grown_boxes, strict=True)]


def _pasted(mask: torch.Tensor, box: list[int], size: tuple[int, int]) -> npt.NDArray[np.bool_]:
    height, width = size
    left, top, right, bottom = box
    box_width, box_height = max(right - left + 1, 1), max(bottom - top + 1, 1)
    inside = functional.interpolate(mask[None], size=(box_height, box_width), mode="bilinear", align_corners=False)
    pixels = (inside[0, 0] > MASK_THRESHOLD).numpy()
    image = np.zeros((height, width), dtype=np.bool_)
    x0, x1 = max(left, 0), min(right + 1, width)
    y0, y1 = max(top, 0), min(bottom + 1, height)
    if x1 > x0 and y1 > y0:
        image[y0:y1, x0:x1] = pixels[y0 - top : y1 - top, x0 - left : x1 - left]
    return image


def encode_rle(mask: npt.NDArray[np.bool_]) -> Rle:
    """Encode ``(H, W)`` bool as COCO's compressed RLE (column-major runs, beginning with zeros).

    The characters are those of `rleToString` in cocoapi's maskApi.c: each run length, from the third one on as the
    difference to the one before the last, in groups of five bits, lowest first, plus 48.
    """
    column_major = np.asarray(mask, dtype=np.bool_).ravel(order="F")
    changes = np.flatnonzero(column_major[1:] != column_major[:-1]) + 1
    bounds = np.concatenate(([0], changes, [column_major.size]))
    runs = np.diff(bounds).tolist()
    if column_major.size and column_major[0]:
        runs.insert(0, 0)
    characters: list[str] = []
    for position, run in enumerate(runs):
        value = run - runs[position - 2] if position > 2 else run
        more = True
        while more:
            group = value & 0x1F
            value >>= 5
            more = value != -1 if group & 0x10 else value != 0
            characters.append(chr((group | 0x20 if more else group) + 48))
    return {"size": [int(mask.shape[0]), int(mask.shape[1])], "counts": "".join(characters)}
