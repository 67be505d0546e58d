"""ResNet and ResNeXt backbones of Detectron (Caffe2) and Detectron2 under torchvision's names.

    .pkl ─► restricted unpickler ─► parts by name ─► depth and groups by the shapes ─► torchvision's ResNet
                                        └─► the source's own forward pass ◄── compared, stage by stage ──┘

Detectron has an affine map where torchvision has batch normalisation. Normalisation divides by sqrt(variance + 1e-5):
with a variance of 1, as detectron2pytorch.py wrote it, every layer's scale is 5e-6 too small; 1 − 1e-5 is exact. A
convolution's bias in front of it becomes the mean, with the other sign.

Shapes do not tell where a block strides, nor for which images the weights were made; both are recorded as published.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from dethandlers.artefact import digest_file
from torch import nn

from dettools.converters.conversion import (
    COPY,
    Conversion,
    ConversionError,
    Copy,
    Fill,
    Negate,
    Proof,
    Row,
    converted,
    prove,
    random_input,
    unused_keys,
)
from dettools.converters.detectron_names import CAFFE2, DETECTRON2, Names
from dettools.converters.reference_passes import BATCH_NORM_EPSILON, caffe2_stages, detectron2_stages
from dettools.restricted_pickle import load_restricted

DEPTHS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
Style = Literal["caffe", "pytorch"]
# Of Detectron2's detectors.
_PREFIXES = ("", "backbone.bottom_up.", "backbone.")
_SIDE = 64
_TARGET_PARTS = {"a": ("conv1", "bn1"), "b": ("conv2", "bn2"), "c": ("conv3", "bn3")}


@dataclass(frozen=True)
class Preprocessing:
    """For which images weights were made: order of the colours, mean and deviation in pixels of that order.

    ``style`` is where a block strides, as MMDetection's ResNet calls it: ``caffe`` in its 1×1, ``pytorch`` in its 3×3.
    """

    origin: str
    colours: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    style: Style

    def to_json(self, style: Style) -> dict[str, Any]:
        """Return it for the certificate and for the weights' ``meta``."""
        return {
            "origin": self.origin,
            "colours": self.colours,
            "mean": list(self.mean),
            "std": list(self.std),
            "pixels": "0 to 255",
            "style": style,
            "data_preprocessor": {"mean": list(self.mean), "std": list(self.std), "bgr_to_rgb": self.colours == "RGB"},
        }


# As the model zoos of Detectron and Detectron2 publish them.
_MSRA = Preprocessing("Detectron, MSRA's ResNet", "BGR", (102.9801, 115.9465, 122.7717), (1.0, 1.0, 1.0), "caffe")
_MSRA2 = Preprocessing("Detectron2, MSRA's ResNet", "BGR", (103.53, 116.28, 123.675), (1.0, 1.0, 1.0), "caffe")
_FAIR = Preprocessing("Detectron, FAIR's ResNeXt", "BGR", (103.53, 116.28, 123.675), (57.375, 57.12, 58.395), "pytorch")
_TORCHVISION = Preprocessing(
    "Detectron2, torchvision's ResNet", "RGB", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375), "pytorch"
)


def convert_detectron(source: Path, *, depth: int | None = None, style: Style | None = None) -> Conversion:
    """Give a backbone's weights the names of torchvision, which are MMDetection's too.

    Args:
        source: pickle of Detectron (``blobs``) or Detectron2 (``model``); also what `torch.save` wrote of the latter.
        depth: 50, 101 or 152; None finds out.
        style: where a block strides; None takes what was published.

    Raises:
        RestrictedPickleError: the pickle names what it must not, or is damaged; nothing was run.
        ConversionError: no such backbone, another depth than told, or a tensor that does not fit.
    """
    if depth is not None and depth not in DEPTHS:
        raise ConversionError(
            f"depth: got {depth}, expected one of {', '.join(map(str, DEPTHS))}, or none to find out."
        )
    content = load_restricted(source, encoding="latin1")
    blobs = _blobs(content, source)
    names, prefix = _names(blobs, source)
    backbone = {key.removeprefix(prefix): one for key, one in blobs.items() if key.startswith(prefix)}
    state = {key: one for key, one in backbone.items() if names.place(key) is not None}
    if strange := [key for key in backbone if key not in state and re.match(names.others, key)]:
        raise ConversionError(
            f"{source.name}: got {', '.join(strange[:3])} in its blocks, expected convolutions with an affine map or "
            "batch normalisation only. ResNets with deformable convolutions or group normalisation are not converted: "
            "they compute something else without these."
        )
    found_depth, blocks = _depth(state, names, source)
    if depth is not None and depth != found_depth:
        raise ConversionError(
            f"depth: got {depth}, but {source.name} has {' + '.join(map(str, blocks))} blocks, which is {found_depth}. "
            f"Give {found_depth}, or leave it out."
        )
    groups, width = _groups(state, names)
    preprocessing = _preprocessing(content, state, names, groups)
    style = style or preprocessing.style
    network = _network(blocks, groups, width, classes=_classes(state, names), style=style)
    rows = list(_rows(state, names, blocks, {key: tuple(one.shape) for key, one in network.state_dict().items()}))
    result = converted(rows, state)
    rows = [replace(row, source=prefix + row.source) for row in rows]
    return Conversion(
        command="detectron2pytorch",
        source=source,
        source_sha256=digest_file(source),
        rows=tuple(rows),
        state=result,
        unused=unused_keys(rows, blobs),
        proofs=(_proof(state, names, blocks, result, network, style),),
        facts={
            "format": names.library,
            "architecture": f"ResNeXt-{found_depth} {groups}x{width}d" if groups > 1 else f"ResNet-{found_depth}",
            "depth": found_depth,
            "groups": groups,
            "width_per_group": width,
            "forward_passes": {
                names.library: "restated: the paper's formulas, the library's names",
                "torchvision": "the library's own",
            },
            "preprocessing": preprocessing.to_json(style),
        },
        meta={"preprocessing": preprocessing.to_json(style)},
        notes=(f"images and stride ({style} style) as published for {preprocessing.origin}: tensors do not tell them",),
    )


def _names(blobs: Mapping[str, torch.Tensor], source: Path) -> tuple[Names, str]:
    """Return whose names these are, and what stands in front of the backbone's."""
    for names in (CAFFE2, DETECTRON2):
        for prefix in _PREFIXES:
            if prefix + names.weight(1, 0, "b") in blobs:
                return names, prefix
    raise ConversionError(
        f"{source.name}: got keys such as {', '.join(list(blobs)[:3])}, expected a ResNet of Detectron "
        f"({CAFFE2.example}) or Detectron2 ({DETECTRON2.example})."
    )


def _blobs(content: Any, source: Path) -> dict[str, torch.Tensor]:
    inner = content
    for key in ("blobs", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            inner = content[key]
            break
    found: dict[str, torch.Tensor] = {}
    for key, value in inner.items() if isinstance(inner, dict) else ():
        if isinstance(key, str) and isinstance(value, np.ndarray) and value.dtype.kind == "f":
            found[key] = torch.from_numpy(value.astype(np.float32))
    if not found:
        told = ", ".join(map(str, list(content)[:6])) if isinstance(content, dict) else type(content).__name__
        raise ConversionError(
            f"{source.name}: got {told or 'nothing'}, expected a pickle with arrays by name, alone or under 'blobs' or "
            "'model'."
        )
    return found


def _depth(state: Mapping[str, torch.Tensor], names: Names, source: Path) -> tuple[int, tuple[int, ...]]:
    places = [place for key in state if (place := names.place(key)) is not None]
    blocks = tuple(len({place.block for place in places if place.stage == stage}) for stage in range(1, 5))
    for depth, expected in DEPTHS.items():
        if blocks == expected:
            return depth, blocks
    told = " or ".join(f"{' + '.join(map(str, one))} ({depth})" for depth, one in DEPTHS.items())
    raise ConversionError(
        f"{source.name}: got {' + '.join(map(str, blocks))} blocks, expected {told}. Is the file complete? ResNets "
        "without bottlenecks are not converted."
    )


def _groups(state: Mapping[str, torch.Tensor], names: Names) -> tuple[int, int]:
    """Return the number of groups and the channels of each in the first stage."""
    weight = state.get(names.weight(1, 0, "b"))
    if weight is None or weight.dim() != 4 or not weight.numel():
        raise ConversionError(f"got no convolution {names.weight(1, 0, 'b')}, expected one. Is the file complete?")
    return weight.shape[0] // weight.shape[1], int(weight.shape[1])


def _classes(state: Mapping[str, torch.Tensor], names: Names) -> int:
    classifier = next((one for key, one in state.items() if names.is_classifier(key) and one.dim() == 2), None)
    return 1 if classifier is None else int(classifier.shape[0])


def _preprocessing(content: Any, state: Mapping[str, torch.Tensor], names: Names, groups: int) -> Preprocessing:
    if groups > 1:
        return _FAIR
    if names is CAFFE2:
        return _MSRA
    author = str(content.get("__author__", "")).lower() if isinstance(content, dict) else ""
    mean = state.get(names.norm(0, 0, "stem")[2])
    # A frozen affine map has no mean; weights of torchvision have one.
    return _TORCHVISION if author == "torchvision" or (mean is not None and bool(mean.any())) else _MSRA2


def _network(blocks: tuple[int, ...], groups: int, width: int, *, classes: int, style: Style) -> Any:
    """Return torchvision's ResNet, with the stride where the style has it."""
    from torchvision.models.resnet import Bottleneck, ResNet

    with torch.device("meta"):  # its own weights are not needed
        network = ResNet(Bottleneck, list(blocks), num_classes=classes, groups=groups, width_per_group=width).eval()
    if style == "caffe":
        for stage in (network.layer2, network.layer3, network.layer4):
            stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
    return network


def _rows(
    state: Mapping[str, torch.Tensor], names: Names, blocks: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[Row]:
    def row(source: str, target: str, transform: Copy = COPY) -> Row:
        return Row(source, target, shapes[target], transform)

    def layer(stage: int, block: int, part: str, convolution: str, norm: str) -> Iterator[Row]:
        yield row(names.weight(stage, block, part), f"{convolution}.weight")
        weight, bias, mean, variance = names.norm(stage, block, part)
        yield row(weight, f"{norm}.weight")
        yield row(bias, f"{norm}.bias")
        if (mean in state) != (variance in state):
            raise ConversionError(f"got one of {mean} and {variance}, expected both or neither. Is the file complete?")
        if mean in state:
            yield row(mean, f"{norm}.running_mean")
            yield row(variance, f"{norm}.running_var")
            return
        before = names.bias(stage, block, part)
        yield row(
            before if before in state else weight, f"{norm}.running_mean", Negate() if before in state else Fill(0.0)
        )
        yield row(weight, f"{norm}.running_var", Fill(1.0 - BATCH_NORM_EPSILON))

    yield from layer(0, 0, "stem", "conv1", "bn1")
    for stage, depth in enumerate(blocks, 1):
        for block in range(depth):
            where = f"layer{stage}.{block}"
            if block == 0:
                yield from layer(stage, block, "shortcut", f"{where}.downsample.0", f"{where}.downsample.1")
            for part, (convolution, norm) in _TARGET_PARTS.items():
                yield from layer(stage, block, part, f"{where}.{convolution}", f"{where}.{norm}")
    for key in state:
        if names.is_classifier(key):
            yield row(key, f"fc.{'weight' if state[key].dim() == 2 else 'bias'}")


def _proof(
    state: Mapping[str, torch.Tensor],
    names: Names,
    blocks: tuple[int, ...],
    result: Mapping[str, torch.Tensor],
    network: Any,
    style: Style,
) -> Proof:
    """Run the source's tensors as Detectron does, and the converted ones in torchvision's network."""
    network.load_state_dict(dict(result), strict=False, assign=True)
    run = caffe2_stages if names is CAFFE2 else detectron2_stages
    image = random_input(2, 3, _SIDE, _SIDE)
    with torch.inference_mode():
        expected = run(state, blocks, image, stride_in_1x1=style == "caffe")
        pixels = nn.Sequential(network.conv1, network.bn1, network.relu, network.maxpool)(image)
        found = []
        for stage in (network.layer1, network.layer2, network.layer3, network.layer4):
            pixels = stage(pixels)
            found.append(pixels)
    targets = [key for key in result if not key.startswith("fc.")]
    return prove(f"{names.library} and torchvision, 4 stages", expected, found, targets=targets)
