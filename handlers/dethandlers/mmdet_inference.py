"""What MMDetection's networks do otherwise when they serve: decoding in float32, masks only where they are wanted.

Methods of a built network's modules are replaced, on the objects alone; MMDetection itself stays as it is.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn


def decode_in_float32(network: nn.Module) -> None:
    """Let everything after the heads' last layers run in float32, also under autocast.

    Boxes in half precision lie 0.5 px apart at 512 px and 1 px at 1024, and NMS, which moves classes apart by multiples
    of the image's side, would work with coordinates of 10,000 px and more.
    """
    for module in network.modules():
        predict: Any = getattr(module, "predict_by_feat", None)
        if callable(predict):
            setattr(module, "predict_by_feat", _in_float32(predict))  # noqa: B010 - no attribute of a Module to mypy


class MaskSwitch:
    """Turns the mask head of a two-stage detector off for passes in which nobody wants masks.

    The boxes are those of a pass with masks, to the bit: there MMDetection finds them in the input's pixels and divides
    them in place when it pastes the masks; without masks they are divided in the same way.

    Args:
        network: any; without a mask head of the common kind the switch does nothing.
    """

    def __init__(self, network: nn.Module) -> None:
        self.wanted = True
        roi_head = getattr(network, "roi_head", None)
        # The others compute more from their masks than masks, or in another order.
        if type(roi_head).__name__ in ("StandardRoIHead", "CascadeRoIHead") and getattr(roi_head, "with_mask", False):
            self._predict = roi_head.predict_mask  # type: ignore[union-attr]
            roi_head.predict_mask = self._masks_or_boxes  # type: ignore[union-attr]

    def _masks_or_boxes(
        self, features: Any, metas: Sequence[Mapping[str, Any]], found: list[Any], *, rescale: bool = False
    ) -> list[Any]:
        if self.wanted:
            made: list[Any] = self._predict(features, metas, found, rescale=rescale)
            return made
        if rescale:
            for meta, one in zip(metas, found, strict=True):
                one.bboxes /= one.bboxes.new_tensor(meta["scale_factor"]).repeat((1, 2))
        return found


def _in_float32(predict: Callable[..., Any]) -> Callable[..., Any]:
    def decode(*arguments: Any, **named: Any) -> Any:
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            return predict(*_widened(arguments), **_widened(named))

    return decode


def _widened(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
    if type(value) in (list, tuple):
        return type(value)(_widened(item) for item in value)
    if type(value) is dict:
        return {key: _widened(item) for key, item in value.items()}
    return value
