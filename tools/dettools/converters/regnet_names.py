"""The names that pycls, timm, torchvision and MMDetection give to the parts of a RegNet.

A key is taken apart whole, never searched for a word in it: ``s1.b1.stem_like.weight`` is no stem. The part of a key
stands in the middle of every conversion: name ─► (stage, block, part, leaf) ─► name.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from dettools.converters.conversion import ConversionError

_LEAVES = "weight|bias|running_mean|running_var|num_batches_tracked"
COUNTER = "num_batches_tracked"
"""Counts training steps; older weights lack it, and no output depends on it."""


class Place(NamedTuple):
    """What a tensor is for: stage 0 is the stem and the classifier, blocks count from 0."""

    stage: int
    block: int
    part: str
    leaf: str


@dataclass(frozen=True)
class Naming:
    """One library's names.

    Attributes:
        outside: names of stem, stem_bn and fc.
        block: name of a block; ``{stage}`` counts from 1.
        first_block: number of a stage's first block.
        parts: names inside a block; without squeeze and excite where the library has none.
        colours: that its published weights are made for.
    """

    outside: Mapping[str, str]
    block: str
    first_block: int
    parts: Mapping[str, str]
    colours: str

    def key(self, place: Place) -> str | None:
        """Return a tensor's name; None where the library has no such part."""
        if place.stage == 0:
            return f"{self.outside[place.part]}.{place.leaf}"
        if place.part not in self.parts:
            return None
        block = self.block.format(stage=place.stage, block=place.block + self.first_block)
        return f"{block}.{self.parts[place.part]}.{place.leaf}"

    def place(self, key: str) -> Place | None:
        """Return what a name stands for; None for a name of something else."""
        stem, _, leaf = key.rpartition(".")
        for outside, name in self.outside.items():
            if stem == name and re.fullmatch(_LEAVES, leaf):
                return Place(0, 0, outside, leaf)
        match = re.fullmatch(rf"{self._pattern}\.(?P<part>.+)", stem)
        if not match or not re.fullmatch(_LEAVES, leaf):
            return None
        part = next((part for part, name in self.parts.items() if name == match["part"]), None)
        block = int(match["block"]) - self.first_block
        return None if part is None or block < 0 else Place(int(match["stage"]), block, part, leaf)

    def is_in_block(self, key: str) -> bool:
        """Whether a name is of something in a block, known or not."""
        return re.match(rf"{self._pattern}\.", key) is not None

    @property
    def _pattern(self) -> str:
        """Of a block's name, with the groups ``stage`` and ``block``."""
        pattern = re.escape(self.block).replace(r"\{stage\}", r"(?P<stage>[1-9])", 1)
        return pattern.replace(r"\{stage\}", r"(?P=stage)").replace(r"\{block\}", r"(?P<block>\d+)")


NAMINGS = {
    "pycls": Naming(
        {"stem": "stem.conv", "stem_bn": "stem.bn", "fc": "head.fc"},
        "s{stage}.b{block}",
        1,
        {
            "a": "f.a",
            "a_bn": "f.a_bn",
            "b": "f.b",
            "b_bn": "f.b_bn",
            "squeeze": "f.se.f_ex.0",
            "excite": "f.se.f_ex.2",
            "c": "f.c",
            "c_bn": "f.c_bn",
            "shortcut": "proj",
            "shortcut_bn": "bn",
        },
        "BGR",
    ),
    "timm": Naming(
        {"stem": "stem.conv", "stem_bn": "stem.bn", "fc": "head.fc"},
        "s{stage}.b{block}",
        1,
        {
            "a": "conv1.conv",
            "a_bn": "conv1.bn",
            "b": "conv2.conv",
            "b_bn": "conv2.bn",
            "squeeze": "se.fc1",
            "excite": "se.fc2",
            "c": "conv3.conv",
            "c_bn": "conv3.bn",
            "shortcut": "downsample.conv",
            "shortcut_bn": "downsample.bn",
        },
        "RGB",
    ),
    "torchvision": Naming(
        {"stem": "stem.0", "stem_bn": "stem.1", "fc": "fc"},
        "trunk_output.block{stage}.block{stage}-{block}",
        0,
        {
            "a": "f.a.0",
            "a_bn": "f.a.1",
            "b": "f.b.0",
            "b_bn": "f.b.1",
            "squeeze": "f.se.fc1",
            "excite": "f.se.fc2",
            "c": "f.c.0",
            "c_bn": "f.c.1",
            "shortcut": "proj.0",
            "shortcut_bn": "proj.1",
        },
        "RGB",
    ),
    "mmdet": Naming(
        {"stem": "conv1", "stem_bn": "bn1", "fc": "fc"},
        "layer{stage}.{block}",
        0,
        {
            "a": "conv1",
            "a_bn": "bn1",
            "b": "conv2",
            "b_bn": "bn2",
            "c": "conv3",
            "c_bn": "bn3",
            "shortcut": "downsample.0",
            "shortcut_bn": "downsample.1",
        },
        "BGR",
    ),
}


def recognized(keys: Iterable[str]) -> str:
    """Return whose names these are.

    Raises:
        ConversionError: no one's, or not a RegNet's.
    """
    names = list(keys)
    found = {name: sum(naming.place(key) is not None for key in names) for name, naming in NAMINGS.items()}
    best = max(found, key=lambda name: found[name])
    blocks = sum((place := NAMINGS[best].place(key)) is not None and place.stage > 0 for key in names)
    if not blocks:
        raise ConversionError(
            f"got keys such as {', '.join(names[:3])}, expected a RegNet of {', '.join(NAMINGS)}. For weights of "
            "Detectron see `detserve detectron2pytorch`."
        )
    return best


Tensors = dict[Place, torch.Tensor]
