"""Pixels to network input: resize, pad, normalise; and the record of it that takes boxes back.

image (3, H, W) uint8 ─► resized (3, h, w) float ─► normalised ─► padded right and below (3, h', w')
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from dethandlers.eight_bit_resize import resize_eight_bit
from dethandlers.spec import Preprocessing


@dataclass(frozen=True)
class Prepared:
    """One image, ready for the network.

    Attributes:
        pixels: ``(3, h', w')`` float32, padded.
        original_size: ``(H, W)`` of the image, px.
        resized_size: ``(h, w)`` of the part of ``pixels`` that is image, px.
        sample: what the family's network wants to know of the image beside its pixels.
    """

    pixels: torch.Tensor
    original_size: tuple[int, int]
    resized_size: tuple[int, int]
    sample: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The padded shape: images that share it may share a forward pass without changing each other."""
        return tuple(self.pixels.shape)

    @property
    def scale_xy(self) -> tuple[float, float]:
        """Factors from network pixels to original pixels, for x and y."""
        (height, width), (resized_height, resized_width) = self.original_size, self.resized_size
        return width / resized_width, height / resized_height


def resize(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize ``(3, H, W)`` float by bilinear interpolation without antialiasing (as OpenCV's INTER_LINEAR).

    Args:
        image: float pixels.
        size: ``(h, w)`` px.
    """
    if tuple(image.shape[-2:]) == size:
        return image
    return functional.interpolate(image[None], size=size, mode="bilinear", align_corners=False)[0]


def shorter_side_size(size: tuple[int, int], min_size: int, max_size: int) -> tuple[int, int]:
    """Return ``(h, w)`` px such that the shorter side is ``min_size`` unless the longer one would pass ``max_size``.

    Both sides are rounded down, as torchvision's `GeneralizedRCNNTransform.resize` does.
    """
    height, width = size
    scale = min(min_size / min(size), max_size / max(size))
    return max(1, math.floor(height * scale)), max(1, math.floor(width * scale))


def normalise(image: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """Return ``(image - mean) / std`` per channel of ``(3, H, W)`` float."""
    channel_mean = torch.tensor(mean, dtype=image.dtype, device=image.device)[:, None, None]
    channel_std = torch.tensor(std, dtype=image.dtype, device=image.device)[:, None, None]
    return (image - channel_mean) / channel_std


def pad_to_multiple(image: torch.Tensor, divisor: int) -> torch.Tensor:
    """Pad ``(3, H, W)`` with zeros on the right and below, so that both sides are multiples of ``divisor`` px."""
    height, width = image.shape[-2:]
    pad_height = math.ceil(height / divisor) * divisor - height
    pad_width = math.ceil(width / divisor) * divisor - width
    return functional.pad(image, (0, pad_width, 0, pad_height))


def letterbox(image: torch.Tensor, settings: Preprocessing) -> Prepared:
    """Fit an image into the fixed input, top left, keeping its aspect ratio; the rest is the pad value.

    Args:
        image: ``(3, H, W)`` uint8 RGB.
        settings: size, channel order, pad value and normalisation.
    """
    height, width = image.shape[-2:]
    input_height, input_width = settings.size
    ratio = min(input_height / height, input_width / width)
    resized_size = (max(1, round(height * ratio)), max(1, round(width * ratio)))
    pixels = resize(image.float(), resized_size)
    canvas = pixels.new_full((3, input_height, input_width), settings.pad_value)
    canvas[:, : resized_size[0], : resized_size[1]] = _ordered(pixels, settings)
    return Prepared(_scaled(canvas, settings), (height, width), resized_size)


def stretch(image: torch.Tensor, settings: Preprocessing) -> Prepared:
    """Resize an image to the fixed input, whatever its aspect ratio.

    Args:
        image: ``(3, H, W)`` uint8 RGB.
        settings: size, channel order and normalisation.
    """
    height, width = image.shape[-2:]
    pixels = _ordered(resize(image.float(), settings.size), settings)
    return Prepared(_scaled(pixels, settings), (height, width), settings.size)


def prepare_fixed(image: torch.Tensor, settings: Preprocessing) -> Prepared:
    """Bring an image to a fixed input, by ``letterbox`` or ``stretch`` as the settings say.

    Args:
        image: ``(3, H, W)`` uint8 RGB.
        settings: of the network's input.
    """
    return stretch(image, settings) if settings.resize == "stretch" else letterbox(image, settings)


def fitted_size(size: tuple[int, int], shorter_side: int, longer_side: int) -> tuple[int, int]:
    """Return ``(h, w)`` px as large as both limits allow, rounded to the nearest as mmcv's `rescale_size` does."""
    height, width = size
    scale = min(longer_side / max(size), shorter_side / min(size))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def prepare_mmdet(image: torch.Tensor, settings: Preprocessing) -> Prepared:
    """Do what MMDetection's test pipeline (Resize, Pad) and its data preprocessor (normalise, pad) do.

    Args:
        image: ``(3, H, W)`` uint8 RGB.
        settings: ``resize`` is ``fit`` or ``stretch``.

    Returns:
        The input; its ``sample`` is ``(h, w)`` px of the image after Pad, to which MMDetection clips boxes.
    """
    original = (int(image.shape[-2]), int(image.shape[-1]))
    size = settings.size
    if settings.resize == "fit":
        size = fitted_size(original, settings.shorter_side, settings.longer_side)
    pixels = (
        resize_eight_bit(image, size).float() if settings.interpolation == "eight_bit" else resize(image.float(), size)
    )
    height, width = size
    if settings.pad_to == "square":
        height = width = max(size)
    elif settings.pad_to == "size":
        height, width = max(height, settings.size[0]), max(width, settings.size[1])
    padded = functional.pad(pixels, (0, width - size[1], 0, height - size[0]), value=settings.pad_value)
    normalised = _scaled(_ordered(padded, settings), settings)
    return Prepared(pad_to_multiple(normalised, settings.divisor), original, size, (height, width))


def _ordered(pixels: torch.Tensor, settings: Preprocessing) -> torch.Tensor:
    return pixels.flip(0) if settings.channel_order == "bgr" else pixels


def _scaled(pixels: torch.Tensor, settings: Preprocessing) -> torch.Tensor:
    if settings.scale != 1:
        pixels = pixels * settings.scale
    if any(settings.mean) or any(value != 1 for value in settings.std):
        pixels = normalise(pixels, settings.mean, settings.std)
    return pixels
