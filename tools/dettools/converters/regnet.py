"""RegNetX and RegNetY between the names of pycls, timm, torchvision and MMDetection.

    keys ─► places ─► architecture (depths, widths, groups, squeeze-excite) ─► torchvision's RegNet: all shapes
              └─► target keys ─► the source's forward pass and the target's, stage by stage, on one random image

The architecture is read from the shapes. MMDetection's RegNet has no squeeze-excite: a RegNetY's weights would load
there with the excitation left out, so they are refused for it.
"""

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dettools.converters.conversion import (
    COPY,
    Conversion,
    ConversionError,
    Proof,
    Row,
    SwapColours,
    converted,
    prove,
    random_input,
)
from dettools.converters.reference_passes import pycls_stages, timm_stages
from dettools.converters.regnet_names import COUNTER, NAMINGS, Naming, Place, Tensors, recognized
from dettools.converters.weight_files import read_weight_file

_SIDE = 64
# pycls divides by 255 and normalises BGR; mean and standard deviation are ImageNet's, in pixels.
_MEAN_RGB, _STD_RGB = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
# What torchvision rounds to the channels of every RegNetY that was published.
_SQUEEZE_RATIO = 0.25


@dataclass(frozen=True)
class Architecture:
    """A RegNet, as its tensors' shapes tell it; one entry for each stage."""

    stem: int
    depths: tuple[int, ...]
    widths: tuple[int, ...]
    group_widths: tuple[int, ...]
    bottlenecks: tuple[int, ...]
    squeeze_ratio: float | None
    classes: int | None

    @property
    def name(self) -> str:
        """X, or Y with squeeze-excite."""
        return "RegNetX" if self.squeeze_ratio is None else "RegNetY"

    def network(self) -> nn.Module:
        """Return torchvision's."""
        from torchvision.models.regnet import BlockParams, RegNet

        stages = len(self.depths)
        ratios = [inner / width for inner, width in zip(self.bottlenecks, self.widths, strict=True)]
        blocks = BlockParams(
            list(self.depths), list(self.widths), list(self.group_widths), ratios, [2] * stages, self.squeeze_ratio
        )
        with torch.device("meta"):  # its own weights are not needed
            network: nn.Module = RegNet(blocks, num_classes=self.classes or 1, stem_width=self.stem)
        return network.eval()


def convert_regnet(
    source: Path, *, names: str | None = None, to: str = "mmdet", swap_colours: bool = False
) -> Conversion:
    """Give a RegNet's weights the names of another library.

    Args:
        source: the checkpoint: of pycls (``model_state``), timm, torchvision or MMDetection.
        names: whose names the source has; None finds out.
        to: whose names are wanted.
        swap_colours: turn the first convolution for images of the other colour order.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        ConversionError: no RegNet, tensors are missing or misshapen, or the target cannot hold the architecture.
    """
    file = read_weight_file(source)
    state = _backbone(file.state)
    names = names or recognized(state)
    naming, target = NAMINGS[names], NAMINGS[to]
    if strange := [key for key in state if naming.place(key) is None and naming.is_in_block(key)]:
        raise ConversionError(
            f"{source.name}: got {', '.join(strange[:3])} in its blocks, expected a RegNet's tensors only: the network "
            "that made them is another one, and computes something else without them."
        )
    places: Tensors = {place: state[key] for key in state if (place := naming.place(key)) is not None}
    architecture = architecture_of(places)
    if architecture.squeeze_ratio is not None and "squeeze" not in target.parts:
        raise ConversionError(
            f"{source.name}: got a RegNetY, expected a RegNetX for --to {to}: MMDetection's RegNet has no "
            "squeeze-excite, and would compute something else without its weights. Convert it --to torchvision or --to "
            "timm, whose models a config can take as a backbone."
        )
    rows: list[Row] = []
    shapes = _shapes(architecture)
    for place in places:
        key, new = naming.key(place), target.key(place)
        if key is None or new is None or place not in shapes:
            raise ConversionError(f"{key}: got a tensor that a {architecture.name} of this shape has not.")
        turn = SwapColours() if swap_colours and place.part == "stem" else COPY
        rows.append(Row(key, new, shapes[place], turn))
    missing = [str(naming.key(place)) for place in shapes if place not in places and place.leaf != COUNTER]
    if missing:
        raise ConversionError(
            f"{source.name}: got no {', '.join(missing[:4])}, expected all tensors of a {architecture.name} with "
            f"{' + '.join(map(str, architecture.depths))} blocks. Is the file complete?"
        )
    result = converted(rows, state)
    taken = {row.source for row in rows}
    # In float64: rounding behind large features must not hide a difference of small scores.
    image = random_input(2, 3, _SIDE, _SIDE).double()
    seen = image.flip(1) if swap_colours else image
    runs = [(names, state, image), (to, result, seen)]
    if "torchvision" not in (names, to):
        runs.append(("torchvision", _renamed(naming, state), image))
    with torch.inference_mode():
        outputs = [(name, _outputs(name, tensors, architecture, pixels)) for name, tensors, pixels in runs]
    targets = {row.target: place.part for row, place in zip(rows, places, strict=True) if place.leaf != COUNTER}
    proofs = [_proof(*outputs[0], *other, targets) for other in outputs[1:]]
    colours = naming.colours if not swap_colours else {"BGR": "RGB", "RGB": "BGR"}[naming.colours]
    return Conversion(
        command="regnet2mmdet",
        source=source,
        source_sha256=file.sha256,
        rows=tuple(rows),
        state=result,
        unused=tuple(key for key in file.state if key.removeprefix("backbone.") not in taken),
        proofs=tuple(proofs),
        facts=_facts(architecture, names, to, colours)
        | {"forward_passes": {name: _pass_of(name) for name, *_ in runs}},
        meta={"preprocessing": _preprocessing(colours)},
        notes=tuple(_notes(names, to, swap=swap_colours)),
    )


def _backbone(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a detector's backbone alone; other weights as they are."""
    inner = {key.removeprefix("backbone."): one for key, one in state.items() if key.startswith("backbone.")}
    return inner or dict(state)


def architecture_of(tensors: Tensors) -> Architecture:
    """Read a RegNet's architecture from its tensors' shapes.

    Raises:
        ConversionError: a tensor that tells it is missing or no convolution's.
    """

    def shape(stage: int, block: int, part: str) -> tuple[int, ...]:
        tensor = tensors.get(Place(stage, block, part, "weight"))
        if tensor is None or tensor.dim() != 4 or not tensor.numel():
            where = f"block {block + 1} of stage {stage}" if stage else "the stem"
            raise ConversionError(f"got no convolution {part} in {where}, expected a RegNet's. Is the file complete?")
        return tuple(tensor.shape)

    stages = sorted({place.stage for place in tensors if place.stage})
    if stages != list(range(1, len(stages) + 1)):
        raise ConversionError(f"got the stages {stages}, expected all from 1 on. Is the file complete?")
    blocks = [sorted({place.block for place in tensors if place.stage == stage}) for stage in stages]
    if any(found != list(range(len(found))) for found in blocks):
        raise ConversionError(
            "got stages with gaps between their blocks, expected all from 1 on. Is the file complete?"
        )
    depths = tuple(len(found) for found in blocks)
    stem = shape(0, 0, "stem")[0]
    widths = tuple(shape(stage, 0, "c")[0] for stage in stages)
    ratio = None
    if any(place.part in ("squeeze", "excite") for place in tensors):
        last, block = len(stages), depths[-1] - 1
        inputs = widths[-1] if block else (stem, *widths)[last - 1]
        squeezed = shape(last, block, "squeeze")[0]
        ratio = _SQUEEZE_RATIO if round(_SQUEEZE_RATIO * inputs) == squeezed else squeezed / inputs
    classifier = tensors.get(Place(0, 0, "fc", "weight"))
    return Architecture(
        stem=stem,
        depths=depths,
        widths=widths,
        group_widths=tuple(shape(stage, 0, "b")[1] for stage in stages),
        bottlenecks=tuple(shape(stage, 0, "a")[0] for stage in stages),
        squeeze_ratio=ratio,
        classes=None if classifier is None else int(classifier.shape[0]),
    )


def _shapes(architecture: Architecture) -> dict[Place, tuple[int, ...]]:
    """Return the shape of every tensor, by torchvision's own network."""
    try:
        state = architecture.network().state_dict()
    except (ValueError, RuntimeError, ZeroDivisionError) as error:
        raise ConversionError(f"got shapes that make no RegNet: {error}. Is the file complete?") from None
    found = {}
    for key, tensor in state.items():
        place = NAMINGS["torchvision"].place(key)
        if place is not None and (place.part != "fc" or architecture.classes is not None):
            found[place] = tuple(tensor.shape)
    return found


def _renamed(naming: Naming, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors under torchvision's names."""
    places = {key: naming.place(key) for key in state}
    return {str(NAMINGS["torchvision"].key(place)): state[key] for key, place in places.items() if place is not None}


def _proof(
    source: str, expected: list[torch.Tensor], target: str, found: list[torch.Tensor], parts: Mapping[str, str]
) -> Proof:
    """Compare; ``parts`` tells what each target is."""
    count = min(len(expected), len(found))
    # MMDetection's backbone has no classifier.
    scored = len(expected) == len(found)
    targets = [key for key, part in parts.items() if scored or part != "fc"]
    return prove(f"{source} and {target}, {count} outputs", expected[:count], found[:count], targets=targets)


def _outputs(
    names: str, state: Mapping[str, torch.Tensor], architecture: Architecture, image: torch.Tensor
) -> list[torch.Tensor]:
    """Return the outputs of all stages, and the scores where there is a classifier, of the library with these names."""
    naming = NAMINGS[names]
    state = {key: one.double() if one.is_floating_point() else one for key, one in state.items()}
    if names == "mmdet" and _has_mmdet():
        return _mmdet_stages(state, architecture, image)
    if names in ("torchvision", "mmdet"):
        stages = _torchvision_stages(_renamed(naming, state), architecture, image)
    else:
        stages = {"pycls": pycls_stages, "timm": timm_stages}[names](state, architecture.depths, image)
    weight = state.get(str(naming.key(Place(0, 0, "fc", "weight"))))
    if weight is None:
        return stages
    scores = nn.functional.linear(
        stages[-1].mean((2, 3)), weight, state.get(str(naming.key(Place(0, 0, "fc", "bias"))))
    )
    return [*stages, scores]


def _pass_of(names: str) -> str:
    """Tell for the certificate whose code computed the outputs."""
    if names == "torchvision" or (names == "mmdet" and _has_mmdet()):
        return "the library's own"
    return (
        "torchvision's own, with these tensors"
        if names == "mmdet"
        else "restated: the paper's formulas, the library's names"
    )


def _torchvision_stages(
    state: Mapping[str, torch.Tensor], architecture: Architecture, image: torch.Tensor
) -> list[torch.Tensor]:
    network: Any = architecture.network()
    _load(network, state)
    stages = []
    pixels = network.stem(image)
    for stage in network.trunk_output.children():
        pixels = stage(pixels)
        stages.append(pixels)
    return stages


def _mmdet_stages(
    state: Mapping[str, torch.Tensor], architecture: Architecture, image: torch.Tensor
) -> list[torch.Tensor]:
    """Run MMDetection's own backbone; its parameters are widths of blocks here, not the line that they lie on."""
    from dethandlers.mmcv_operators import provide
    from dethandlers.mmdet_model import quiet

    provide()
    with quiet():
        from mmdet.models.backbones.regnet import RegNet

        blocks = [
            width for width, depth in zip(architecture.widths, architecture.depths, strict=True) for _ in range(depth)
        ]
        stages = len(architecture.depths)

        class _Backbone(RegNet):  # type: ignore[misc]
            def generate_regnet(self, *_: object) -> tuple[list[int], int]:
                return blocks, stages

            def adjust_width_group(self, widths: list[int], *_: object) -> tuple[list[int], tuple[int, ...]]:
                return widths, architecture.group_widths

        ratio = architecture.bottlenecks[0] / architecture.widths[0]
        arch = {"w0": 8, "wa": 1.0, "wm": 2.0, "depth": len(blocks), "group_w": 1, "bot_mul": ratio}
        network = _Backbone(
            arch,
            stem_channels=architecture.stem,
            strides=(2,) * stages,
            dilations=(1,) * stages,
            out_indices=tuple(range(stages)),
        )
    network.eval()  # MMEngine's returns nothing
    _load(network, {key: tensor for key, tensor in state.items() if not key.startswith("fc.")})
    return list(network(image))


def _load(network: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    found = network.load_state_dict(dict(state), strict=False, assign=True)
    missing = [key for key in found.missing_keys if not key.endswith((COUNTER, "fc.weight", "fc.bias"))]
    if missing or found.unexpected_keys:
        wrong = [*missing, *found.unexpected_keys]
        raise ConversionError(f"the target's network disagrees about {', '.join(wrong[:4])}: this is a defect of ours.")


def _facts(architecture: Architecture, names: str, to: str, colours: str) -> dict[str, Any]:
    return {
        "architecture": architecture.name,
        "depths": list(architecture.depths),
        "widths": list(architecture.widths),
        "group_widths": list(architecture.group_widths),
        "stem_width": architecture.stem,
        "squeeze_excite_ratio": architecture.squeeze_ratio,
        "num_classes": architecture.classes,
        "names": names,
        "to": to,
        "preprocessing": _preprocessing(colours),
    }


def _preprocessing(colours: str) -> dict[str, Any]:
    turn = 1 if colours == "RGB" else -1
    return {"colours": colours, "mean": list(_MEAN_RGB[::turn]), "std": list(_STD_RGB[::turn]), "pixels": "0 to 255"}


def _notes(names: str, to: str, *, swap: bool) -> Iterator[str]:
    made, used = NAMINGS[names].colours, NAMINGS[to].colours
    if made != used and not swap:
        yield (
            f"{names}'s published weights are for {made} images, {to}'s for {used}: feed {made}, or use --swap-colours"
        )
    if "mmdet" in (names, to) and not _has_mmdet():
        yield "MMDetection is not installed: its own RegNet was not run, but torchvision's with the same tensors"


def _has_mmdet() -> bool:
    return importlib.util.find_spec("mmdet") is not None
