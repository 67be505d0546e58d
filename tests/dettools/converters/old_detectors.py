"""Weights as MMDetection 1.x laid them out, and what its upgrade_model_version.py made of them, restated."""

import torch

CLASSES = ("cat", "dog", "cow", "hen")
WITH_BACKGROUND = len(CLASSES) + 1
ANCHORS = 3


def numbered(*shape: int) -> torch.Tensor:
    """A tensor whose numbers tell their channel: channel c holds c and fractions."""
    flat = torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.5
    return flat + torch.arange(shape[0], dtype=torch.float32).reshape(-1, *[1] * (len(shape) - 1))


def two_stage(classes: int = WITH_BACKGROUND, *, agnostic: bool = False) -> dict[str, torch.Tensor]:
    """A Mask R-CNN's heads."""
    boxes = 4 if agnostic else 4 * classes
    return {
        "backbone.conv1.weight": numbered(2, 3, 3, 3),
        "rpn_head.rpn_conv.weight": numbered(2, 2, 3, 3),
        "rpn_head.rpn_cls.weight": numbered(ANCHORS, 2, 1, 1),
        "rpn_head.rpn_cls.bias": numbered(ANCHORS),
        "rpn_head.rpn_reg.weight": numbered(ANCHORS * 4, 2, 1, 1),
        "rpn_head.rpn_reg.bias": numbered(ANCHORS * 4),
        "bbox_head.fc_cls.weight": numbered(classes, 6),
        "bbox_head.fc_cls.bias": numbered(classes),
        "bbox_head.fc_reg.weight": numbered(boxes, 6),
        "bbox_head.fc_reg.bias": numbered(boxes),
        "mask_head.conv_logits.weight": numbered(classes, 2, 1, 1),
        "mask_head.conv_logits.bias": numbered(classes),
    }


def retinanet(each: int = len(CLASSES), *, modules: bool = True) -> dict[str, torch.Tensor]:
    """A RetinaNet: ``each`` scores of an anchor, without the background for sigmoid, with it for softmax."""
    conv = "conv." if modules else ""
    return {
        f"bbox_head.cls_convs.0.{conv}weight": numbered(4, 4, 3, 3),
        f"bbox_head.reg_convs.0.{conv}bias": numbered(4),
        "bbox_head.retina_cls.weight": numbered(ANCHORS * each, 4, 3, 3),
        "bbox_head.retina_cls.bias": numbered(ANCHORS * each),
        "bbox_head.retina_reg.weight": numbered(ANCHORS * 4, 4, 3, 3),
        "bbox_head.retina_reg.bias": numbered(ANCHORS * 4),
    }


def ssd(classes: int = WITH_BACKGROUND) -> dict[str, torch.Tensor]:
    """An SSD with two scales."""
    return {
        "backbone.features.0.weight": numbered(2, 3, 3, 3),
        "backbone.extra.0.weight": numbered(4, 2, 1, 1),
        "backbone.extra.0.bias": numbered(4),
        "backbone.extra.3.weight": numbered(4, 4, 3, 3),
        "backbone.l2_norm.weight": numbered(4),
        **{f"bbox_head.cls_convs.{one}.weight": numbered((4 + one) * classes, 4, 3, 3) for one in range(2)},
        **{f"bbox_head.cls_convs.{one}.bias": numbered((4 + one) * classes) for one in range(2)},
        **{f"bbox_head.reg_convs.{one}.weight": numbered((4 + one) * 4, 4, 3, 3) for one in range(2)},
        **{f"bbox_head.reg_convs.{one}.bias": numbered((4 + one) * 4) for one in range(2)},
    }


def original_reorder(tensor: torch.Tensor, classes: int) -> torch.Tensor:
    """reorder_cls_channel: any bias is rolled by one, whatever it belongs to."""
    if tensor.dim() > 1 and len(tensor) % classes:
        return tensor
    if tensor.dim() == 1 or len(tensor) == classes:
        return tensor.roll(-1, 0)
    return tensor.reshape(-1, classes, *tensor.shape[1:]).roll(-1, 1).reshape(tensor.shape)


def original_truncate(tensor: torch.Tensor, classes: int) -> torch.Tensor:
    """truncate_reg_channel, truncate_cls_channel: weights lose the first class, biases the last."""
    if len(tensor) % classes:
        return tensor
    blocks = tensor.reshape(classes, -1, *tensor.shape[1:])
    blocks = blocks[:-1] if tensor.dim() == 1 else blocks[1:]
    return blocks.reshape(-1, *tensor.shape[1:])
