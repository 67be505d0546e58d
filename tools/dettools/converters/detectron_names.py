"""The names of a ResNet's tensors in Detectron (Caffe2's blobs) and in Detectron2."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple


class Place(NamedTuple):
    """Where a tensor belongs: stage 0 is the stem and the classifier, blocks count from 0."""

    stage: int
    block: int


@dataclass(frozen=True)
class Names:
    """One library's names; stages count from 1 here, from 2 in both libraries.

    Attributes:
        library: that has them.
        example: one of them.
        pattern: of a block's tensors, with the groups ``stage`` and ``block``.
        stem: pattern of the stem's tensors.
        classifier: pattern of the classifier's.
        others: beginning of the blocks' tensors that no ResNet with batch normalisation has.
        layer: of a stage, a block and a part, the convolution's name.
        norm_of: of a convolution's name, that of the normalisation behind it.
        weight_leaf: what is put behind a convolution's name.
        bias_leaf: likewise.
        norm_leaves: behind a normalisation's name: weight, bias, mean, variance.
    """

    library: str
    example: str
    pattern: str
    stem: str
    classifier: str
    others: str
    layer: Callable[[int, int, str], str]
    norm_of: Callable[[str], str]
    weight_leaf: str
    bias_leaf: str
    norm_leaves: tuple[str, str, str, str]

    def place(self, key: str) -> Place | None:
        """Return where a tensor belongs; None for what is no part of a ResNet."""
        if match := re.fullmatch(self.pattern, key):
            return Place(int(match["stage"]) - 1, int(match["block"]))
        return Place(0, 0) if re.fullmatch(self.stem, key) or self.is_classifier(key) else None

    def is_classifier(self, key: str) -> bool:
        """Whether a tensor belongs to the classifier."""
        return re.fullmatch(self.classifier, key) is not None

    def weight(self, stage: int, block: int, part: str) -> str:
        """Return the key of a convolution's weight; parts are stem, a, b, c and shortcut."""
        return self.layer(stage, block, part) + self.weight_leaf

    def bias(self, stage: int, block: int, part: str) -> str:
        """Return the key of a convolution's bias."""
        return self.layer(stage, block, part) + self.bias_leaf

    def norm(self, stage: int, block: int, part: str) -> tuple[str, str, str, str]:
        """Return the keys of weight, bias, mean and variance of the normalisation behind a convolution."""
        name = self.norm_of(self.layer(stage, block, part))
        weight, bias, mean, variance = (name + leaf for leaf in self.norm_leaves)
        return weight, bias, mean, variance


_BRANCHES = {"a": "branch2a", "b": "branch2b", "c": "branch2c", "shortcut": "branch1"}
_LAYERS = {"a": "conv1", "b": "conv2", "c": "conv3", "shortcut": "shortcut"}


def _caffe2_layer(stage: int, block: int, part: str) -> str:
    return f"res{stage + 1}_{block}_{_BRANCHES[part]}" if stage else "conv1"


def _detectron2_layer(stage: int, block: int, part: str) -> str:
    return f"res{stage + 1}.{block}.{_LAYERS[part]}" if stage else "stem.conv1"


_CAFFE2_LEAF = r"(_w|_b|_bn_(s|b|rm|riv))"
_DETECTRON2_LEAF = r"\.(weight|bias|norm\.(weight|bias|running_mean|running_var))"

CAFFE2 = Names(
    library="Detectron",
    example="res2_0_branch2a_w",
    pattern=rf"res(?P<stage>[2-5])_(?P<block>\d+)_(branch1|branch2[abc]){_CAFFE2_LEAF}",
    stem=r"conv1_[wb]|res_conv1_bn_(s|b|rm|riv)",
    classifier=r"(fc1000|pred)_[wb]",
    others=r"res[2-5]_\d+_(?!.*_momentum$)",
    layer=_caffe2_layer,
    norm_of=lambda name: "res_conv1_bn" if name == "conv1" else f"{name}_bn",
    weight_leaf="_w",
    bias_leaf="_b",
    norm_leaves=("_s", "_b", "_rm", "_riv"),
)
DETECTRON2 = Names(
    library="Detectron2",
    example="res2.0.conv1.weight",
    pattern=rf"res(?P<stage>[2-5])\.(?P<block>\d+)\.(shortcut|conv[123]){_DETECTRON2_LEAF}",
    stem=rf"stem\.conv1{_DETECTRON2_LEAF}",
    classifier=r"stem\.fc\.(weight|bias)|linear\.(weight|bias)",
    others=r"res[2-5]\.\d+\.(?!.*\.num_batches_tracked$)",
    layer=_detectron2_layer,
    norm_of=lambda name: f"{name}.norm",
    weight_leaf=".weight",
    bias_leaf=".bias",
    norm_leaves=(".weight", ".bias", ".running_mean", ".running_var"),
)
