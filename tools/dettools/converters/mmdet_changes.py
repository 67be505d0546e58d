"""What MMDetection's versions changed in the weights of its detectors: one row for each change, and nothing else.

A change applies to weights that were made before the version named by ``since`` and are wanted for it or a later one.
Changes apply in the order of the table, each to the name that those before it gave. Where a layer's classes move is
read from its shape and that of its neighbour for boxes, not from the config: a config's text need not be there, and
tells what was meant, while the shapes tell what is.

Source: MMDetection's notes on compatibility (2.0: labels without background in front; 2.5: the same for the RPN; 2.14:
SSD in backbone, neck and head), its upgrade_model_version.py and upgrade_ssd_version.py.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from packaging.version import Version

from dettools.converters.conversion import COPY, ConversionError, Copy, MoveBackground

State = Mapping[str, torch.Tensor]
_BOX = 4
_RPN_CLASSES = 2


@dataclass(frozen=True)
class Layer:
    """A layer of the source whose channels are classes.

    Attributes:
        key: of its weight or bias in the source.
        state: the source.
        classes: of the detector, the background among them.
    """

    key: str
    state: State
    classes: int

    @property
    def channels(self) -> int:
        """Its outputs."""
        return _outputs(self.key, self.state)

    def anchors(self, scores: str, boxes: str) -> int:
        """Return how many anchors it has, by its neighbour for boxes: where its key has the one, that has the other."""
        neighbour = self.key.replace(scores, boxes)
        if neighbour == self.key or neighbour not in self.state:
            raise ConversionError(
                f"{self.key}: got no {neighbour} beside it, expected it: it tells the number of anchors."
            )
        outputs = _outputs(neighbour, self.state)
        if outputs % _BOX:
            raise ConversionError(f"{neighbour}: got {outputs} outputs, expected 4 for each anchor.")
        return outputs // _BOX


def _outputs(key: str, state: State) -> int:
    tensor = state[key]
    if tensor.dim() not in ((1,) if key.endswith(".bias") else (2, 4)) or not tensor.numel():
        raise ConversionError(
            f"{key}: got the shape {tuple(tensor.shape)}, expected a linear layer's or a convolution's."
        )
    return int(tensor.shape[0])


def _softmax_or_sigmoid(layer: Layer, anchors: int, classes: int) -> Copy:
    """Scores by softmax have a background to move; scores by sigmoid never had one."""
    each = layer.channels / anchors
    if each == classes:
        return MoveBackground(classes, anchors)
    if each == classes - 1:
        return COPY
    raise _misfit(layer, f"{anchors * classes} or {anchors * (classes - 1)} for {_told(classes)}")


def _scores(layer: Layer) -> Copy:
    if re.search(r"(^|\.)fc_cls\.", layer.key):
        if layer.channels != layer.classes:
            raise _misfit(layer, f"{layer.classes} for {_told(layer.classes)}")
        return MoveBackground(layer.classes)
    return _softmax_or_sigmoid(layer, layer.anchors("_cls.", "_reg."), layer.classes)


def _ssd_scores(layer: Layer) -> Copy:
    return _softmax_or_sigmoid(layer, layer.anchors(".cls_convs.", ".reg_convs."), layer.classes)


def _rpn_scores(layer: Layer) -> Copy:
    return _softmax_or_sigmoid(layer, layer.anchors("_cls.", "_reg."), _RPN_CLASSES)


def _boxes(layer: Layer) -> Copy:
    return _each_class_or_one(layer, _BOX)


def _masks(layer: Layer) -> Copy:
    return _each_class_or_one(layer, 1)


def _each_class_or_one(layer: Layer, per_class: int) -> Copy:
    if layer.channels == per_class:
        return COPY
    if layer.channels == layer.classes * per_class:
        return MoveBackground(layer.classes, per_class=per_class, kept=False)
    raise _misfit(layer, f"{layer.classes * per_class} for {_told(layer.classes)}, or {per_class} for all at once")


def _misfit(layer: Layer, expected: str) -> ConversionError:
    return ConversionError(
        f"{layer.key}: got {layer.channels} outputs, expected {expected}. Give the number with --num-classes."
    )


def _told(classes: int) -> str:
    return f"{classes} classes, the background among them"


def has_roi_heads(state: State) -> bool:
    """Whether a detector has heads on regions of interest, with proposals of its own or given ones."""
    return any(re.match(r"rpn_head\.|bbox_head\.(\d+\.)?(fc_cls|fc_reg)\.", key) for key in state)


def layout_of(state: State) -> str:
    """Return a version that names two-stage heads as these weights do; empty for detectors that cannot tell."""
    if any(key.startswith("roi_head.") for key in state):
        return "2.0.0"
    # DETR's bbox_head has an fc_cls too, in all versions, but no RPN.
    parts = {key.partition(".")[0] for key in state}
    return "1.2.0" if {"rpn_head", "bbox_head"} <= parts and has_roi_heads(state) else ""


def _is_retinanet(state: State) -> bool:
    return "bbox_head.retina_cls.weight" in state and not has_roi_heads(state)


def _is_ssd(state: State) -> bool:
    return any(key.startswith(("backbone.extra.", "backbone.l2_norm.")) for key in state)


def _any_detector(_: State) -> bool:
    return True


@dataclass(frozen=True)
class Change:
    """A change of one version.

    Attributes:
        since: first version with the new form.
        why: what changed, for people.
        pattern: of the keys that it is about.
        detectors: which detectors it is about.
        rename: of the key, as `re.sub` takes it; empty when the name stays.
        move: what happens to the channels; None when they stay.
    """

    since: str
    why: str
    pattern: str
    detectors: Callable[[State], bool] = _any_detector
    rename: str | Callable[[re.Match[str]], str] = ""
    move: Callable[[Layer], Copy] | None = None

    def applies(self, made_by: Version, wanted: Version) -> bool:
        """Whether weights made by one version need it for another."""
        return made_by < Version(self.since) <= wanted


def _extra_layer(match: re.Match[str]) -> str:
    place = int(match["place"])
    return f"neck.extra_layers.{place // 2}.{place % 2}.conv.{match['leaf']}"


CHANGES = (
    Change(
        "0.5.4",
        "RetinaNet's convolutions became ConvModules",
        r"^(bbox_head\.(?:cls_convs|reg_convs)\.\d+)\.(weight|bias)$",
        _is_retinanet,
        rename=r"\1.conv.\2",
    ),
    Change(
        "2.0.0",
        "heads on regions moved under roi_head",
        r"^(bbox_head|mask_head|semantic_head|grid_head|mask_iou_head|shared_head)\.",
        has_roi_heads,
        rename=r"roi_head.\1.",
    ),
    Change(
        "2.0.0",
        "the background became the last class",
        r"(^|\.)(conv_cls|retina_cls|fc_cls|fcos_cls|fovea_cls)\.(weight|bias)$",
        move=_scores,
    ),
    Change(
        "2.0.0",
        "the background became the last class",
        r"^bbox_head\.cls_convs\.\d+\.(weight|bias)$",
        _is_ssd,
        move=_ssd_scores,
    ),
    Change("2.0.0", "the background has no box any more", r"(^|\.)fc_reg\.(weight|bias)$", move=_boxes),
    Change(
        "2.0.0",
        "the background has no mask any more",
        r"(^|\.)mask_head\.(\d+\.)?conv_logits\.(weight|bias)$",
        move=_masks,
    ),
    Change(
        "2.0.0",
        "the background has no mask any more",
        r"(^|\.)mask_iou_head\.fc_mask_iou\.(weight|bias)$",
        move=_masks,
    ),
    Change(
        "2.5.0",
        "the background became the RPN's last class",
        r"^rpn_head\.rpn_cls\.(weight|bias)$",
        move=_rpn_scores,
    ),
    Change(
        "2.14.0",
        "SSD's extra layers moved to its neck",
        r"^backbone\.extra\.(?P<place>\d+)\.(?P<leaf>weight|bias)$",
        _is_ssd,
        rename=_extra_layer,
    ),
    Change(
        "2.14.0",
        "SSD's normalisation moved to its neck",
        r"^backbone\.l2_norm\.weight$",
        _is_ssd,
        rename="neck.l2_norm.weight",
    ),
    Change(
        "2.14.0",
        "SSD's scores and boxes became sequences",
        r"^(bbox_head\.(?:cls|reg)_convs\.\d+)\.(weight|bias)$",
        _is_ssd,
        rename=r"\1.0.\2",
    ),
)

NOT_IN_THE_TABLE = (
    # MMDetection 3.0 took these apart anew; its own releases of these weights were trained again.
    ("3.0.0", r"^bbox_head\.transformer\.", "DETR and its kin"),
    ("3.0.0", r"^panoptic_head\.(pixel_decoder|transformer_decoder)\.", "MaskFormer and its kin"),
)
