"""The cost of torchvision's detectors, at the size that the network sees.

    prepared pixels ─► backbone, RPN                    once
                       box head      × proposals        0 … post_nms_top_n
                       mask, keypoint heads × detections  0 … max_detections

The number of proposals and detections is set while the network runs, so that the cost of one of each is measured and
not guessed: heads run image by image over RoIs, and the cost of n RoIs is n times that of one.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from dethandlers.preprocess import shorter_side_size
from torch import nn
from torchvision.models.detection.image_list import ImageList

from dettools.flops.cost import Cost, Part, Share
from dettools.flops.torch_count import TorchCount, count_call


@dataclass(frozen=True)
class InputSize:
    """What the network sees.

    Attributes:
        resized: ``(H, W)`` px of the image in it.
        padded: ``(H, W)`` px of the input.
        note: what a reader must know about it; empty when there is nothing.
    """

    resized: tuple[int, int]
    padded: tuple[int, int]
    note: str = ""


def input_size(module: nn.Module, asked: tuple[int, int] | None) -> InputSize:
    """Return the input's size: as asked, padded to the divisor; that of the builder when it is fixed.

    Args:
        module: a torchvision detector.
        asked: ``(H, W)`` px after resizing; None takes the transform's largest landscape image.
    """
    transform: Any = module.transform
    divisor = int(transform.size_divisible)
    if transform.fixed_size is not None:
        width, height = (int(side) for side in transform.fixed_size)
        note = ""
        if asked not in (None, (height, width)):
            note = f"every image is resized to the builder's fixed size {height}×{width}; --shape does not change it"
        return InputSize((height, width), _padded((height, width), divisor), note)
    size = asked or (int(transform.min_size[-1]), int(transform.max_size))
    return padded_input(size, divisor)


def padded_input(size: tuple[int, int], divisor: int) -> InputSize:
    """Return the input of an image resized to ``size`` ``(H, W)`` px: both sides padded to multiples of ``divisor``."""
    padded = _padded(size, divisor)
    note = "" if padded == size else f"padded from {size[0]}×{size[1]} to multiples of {divisor} px, as served"
    return InputSize(size, padded, note)


def size_of_image(module: nn.Module, original: tuple[int, int]) -> tuple[int, int]:
    """Return the ``(H, W)`` px to which an image of ``original`` size is resized when it is served."""
    transform: Any = module.transform
    if transform.fixed_size is not None:
        width, height = transform.fixed_size
        return int(height), int(width)
    return shorter_side_size(original, int(transform.min_size[-1]), int(transform.max_size))


def count_detector(
    module: nn.Module, size: InputSize, *, subject: str, max_detections: int, max_proposals: int | None = None
) -> Cost:
    """Count one image.

    Args:
        module: a torchvision detector in eval mode, on the CPU.
        size: of the input.
        subject: names it in the result.
        max_detections: detections of which the mask and keypoint heads run at most.
        max_proposals: proposals at most; None takes the model's ``post_nms_top_n``.
    """
    pixels = torch.rand((1, 3, *size.padded), generator=torch.Generator().manual_seed(0))
    two_stage = hasattr(module, "roi_heads")
    with _prepared(module, size.resized):
        if not two_stage:
            return cost_of(module, size, count_call(module, pixels), (), subject=subject)
        fixed, (proposal, detection) = _by_stage(module, pixels)
    most = max_proposals or int(_attribute(module, "rpn").post_nms_top_n())
    items = ("proposal", proposal, most), ("detection", detection, max_detections)
    return cost_of(module, size, fixed, items, subject=subject)


def cost_of(
    module: nn.Module, size: InputSize, fixed: TorchCount, items: Sequence[tuple[str, TorchCount, int]], *, subject: str
) -> Cost:
    """Join what was counted.

    Args:
        module: the whole network.
        size: of its input.
        fixed: without any item.
        items: what runs once per item, one of each, and how many there are at most; those that cost nothing fall out.
        subject: names it in the result.
    """
    items = [item for item in items if item[1].macs]
    counts = [count for _, count, _ in items]
    types: dict[str, int] = {}
    for tensor in module.parameters():
        types[_type_name(tensor)] = types.get(_type_name(tensor), 0) + tensor.numel()
    return Cost(
        subject=subject,
        engine="torch",
        input_size=size.padded,
        macs=fixed.macs,
        parts=tuple(Part(name, count.macs, most) for name, count, most in items),
        operators=_shares(fixed.by_operator, [one.by_operator for one in counts], calls=fixed.calls),
        modules=_module_shares(module, fixed.by_module, [one.by_module for one in counts]),
        uncounted=fixed.uncounted,
        elements=fixed.elements,
        parameters=sum(tensor.numel() for tensor in module.parameters()),
        buffers=sum(tensor.numel() for tensor in module.buffers()),
        parameter_types=types,
        activation_bytes=fixed.activation_bytes,
        largest_activation_bytes=fixed.largest_activation_bytes,
        measured_by=f"a forward pass by torch {torch.__version__}",
        notes=(size.note,) if size.note else (),
    )


def _by_stage(module: nn.Module, pixels: torch.Tensor) -> tuple[TorchCount, tuple[TorchCount, TorchCount]]:
    """Return the whole network with no proposal, and one proposal and one detection, each alone."""
    seen: list[tuple[Any, ...]] = []
    heads = _attribute(module, "roi_heads")
    handle = heads.register_forward_pre_hook(lambda _heads, inputs: seen.append(inputs))
    try:
        with _numbers(module, proposals=1, detections=1):
            whole = count_call(module, pixels)
    finally:
        handle.remove()
    features, _, sizes, *_ = seen[0]

    def heads_alone(proposals: int, detections: int) -> TorchCount:
        with _numbers(module, proposals=proposals, detections=detections):
            return below("roi_heads", count_call(heads, features, [_boxes(proposals, pixels)], sizes))

    none, one, both = heads_alone(0, 0), heads_alone(1, 0), heads_alone(1, 1)
    proposal, detection = difference(one, none), difference(both, one)
    return difference(difference(whole, proposal), detection), (proposal, detection)


def below(path: str, count: TorchCount) -> TorchCount:
    """Return the count of a part of the network under its path in the whole."""
    by_module = {f"{path}.{name}".rstrip("."): macs for name, macs in count.by_module.items()}
    return TorchCount(**{**vars(count), "by_module": {"": count.macs, **by_module}})


def difference(count: TorchCount, other: TorchCount) -> TorchCount:
    """Return ``count`` with the MACs of ``other`` taken off."""

    def less(mine: Mapping[str, int], others: Mapping[str, int]) -> dict[str, int]:
        return {name: macs - others.get(name, 0) for name, macs in mine.items()}

    return TorchCount(
        **{
            **vars(count),
            "macs": count.macs - other.macs,
            "by_operator": less(count.by_operator, other.by_operator),
            "by_module": less(count.by_module, other.by_module),
        }
    )


@contextmanager
def _prepared(module: nn.Module, resized: tuple[int, int]) -> Iterator[None]:
    """Put a transform that does nothing in place of the model's: the batch comes resized and padded."""
    transform = module.transform
    module.transform = _Untouched(resized)
    try:
        yield
    finally:
        module.transform = transform


class _Untouched(nn.Module):
    def __init__(self, resized: tuple[int, int]) -> None:
        super().__init__()
        self._resized = resized

    def forward(self, images: torch.Tensor, targets: None = None) -> tuple[ImageList, None]:
        return ImageList(images, [self._resized] * len(images)), targets

    def postprocess(self, result: Any, *_sizes: object) -> Any:
        return result


@contextmanager
def _numbers(module: nn.Module, *, proposals: int, detections: int) -> Iterator[None]:
    """Let the network work as ever, but go on with as many proposals and detections as are asked for."""
    rpn, heads = _attribute(module, "rpn"), _attribute(module, "roi_heads")
    choose, decide = rpn.filter_proposals, heads.postprocess_detections

    def chosen(boxes: torch.Tensor, *others: Any) -> Any:
        choose(boxes, *others)
        return [_boxes(proposals, boxes)], [boxes.new_ones(proposals)]

    def decided(logits: torch.Tensor, *others: Any) -> Any:
        decide(logits, *others)
        labels = torch.ones(detections, dtype=torch.int64, device=logits.device)
        return [_boxes(detections, logits)], [logits.new_ones(detections)], [labels]

    rpn.filter_proposals, heads.postprocess_detections = chosen, decided
    try:
        yield
    finally:
        del rpn.filter_proposals, heads.postprocess_detections


def _boxes(count: int, like: torch.Tensor) -> torch.Tensor:
    """Return ``count`` boxes xyxy of 16 px."""
    return like.new_tensor([[0.0, 0.0, 16.0, 16.0]]).expand(count, 4).contiguous()


def _attribute(module: nn.Module, name: str) -> Any:
    return getattr(module, name)


def _shares(fixed: Mapping[str, int], items: list[Mapping[str, int]], *, calls: Mapping[str, int]) -> tuple[Share, ...]:
    shares = [
        Share(name, macs, tuple(one.get(name, 0) for one in items), calls=calls.get(name, 0))
        for name, macs in fixed.items()
    ]
    return tuple(sorted(shares, key=lambda share: -(share.macs + sum(share.per_item))))


def _module_shares(module: nn.Module, fixed: Mapping[str, int], items: list[Mapping[str, int]]) -> tuple[Share, ...]:
    return tuple(
        Share(
            path,
            fixed[path],
            tuple(one.get(path, 0) for one in items),
            parameters=sum(tensor.numel() for tensor in part.parameters()),
        )
        for path, part in module.named_modules()
        if path in fixed and path
    )


def _type_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _padded(size: tuple[int, int], divisor: int) -> tuple[int, int]:
    height, width = (math.ceil(side / divisor) * divisor for side in size)
    return height, width
