"""Forward passes of RegNet and ResNet as pycls, timm, Caffe2 and Detectron2 name their tensors.

They stand for libraries that need not be installed. Each pass spells its library's names out once more, apart from the
tables that convert them: a name that is wrong in a table is then wrong in one of two places, and outputs differ. The
formulas are those of the papers (RegNet: arXiv 2003.13678, squeeze-excite behind the 3×3; ResNet: arXiv 1512.03385).
"""

from collections.abc import Mapping, Sequence

import torch
from torch.nn import functional

BATCH_NORM_EPSILON = 1e-5
State = Mapping[str, torch.Tensor]


def _convolved(
    pixels: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, stride: int = 1
) -> torch.Tensor:
    """Convolve, padded so that the size is kept, in as many groups as the shapes tell."""
    groups = pixels.shape[1] // weight.shape[1]
    return functional.conv2d(pixels, weight, bias, stride, weight.shape[-1] // 2, 1, groups)


class _Torch:
    """Layers of a state dict as torch names their tensors."""

    def __init__(self, state: State) -> None:
        self.state = state

    def conv(self, name: str, pixels: torch.Tensor, stride: int = 1) -> torch.Tensor:
        return _convolved(pixels, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"), stride)

    def norm(self, name: str, pixels: torch.Tensor) -> torch.Tensor:
        weight, bias, mean, variance = (
            self.state[f"{name}.{leaf}"] for leaf in ("weight", "bias", "running_mean", "running_var")
        )
        return functional.batch_norm(pixels, mean, variance, weight, bias, eps=BATCH_NORM_EPSILON)

    def has(self, name: str) -> bool:
        return f"{name}.weight" in self.state


class _Caffe2:
    """Layers of Detectron's blobs: an affine map behind a convolution, with statistics where there are any."""

    def __init__(self, state: State) -> None:
        self.state = state

    def conv(self, name: str, pixels: torch.Tensor, stride: int = 1) -> torch.Tensor:
        return _convolved(pixels, self.state[f"{name}_w"], self.state.get(f"{name}_b"), stride)

    def norm(self, name: str, pixels: torch.Tensor) -> torch.Tensor:
        scale, shift = (self.state[f"{name}_{leaf}"][:, None, None] for leaf in "sb")
        if f"{name}_rm" in self.state:
            mean, variance = (self.state[f"{name}_{leaf}"][:, None, None] for leaf in ("rm", "riv"))
            pixels = (pixels - mean) / torch.sqrt(variance + BATCH_NORM_EPSILON)
        return pixels * scale + shift

    def has(self, name: str) -> bool:
        return f"{name}_w" in self.state


def pycls_stages(state: State, depths: Sequence[int], pixels: torch.Tensor) -> list[torch.Tensor]:
    """Return the outputs of the stages of pycls' RegNet."""
    net, found = _Torch(state), []
    pixels = net.norm("stem.bn", net.conv("stem.conv", pixels, 2)).relu()
    for stage, depth in enumerate(depths, 1):
        for number in range(1, depth + 1):
            block, stride = f"s{stage}.b{number}", 2 if number == 1 else 1
            inner = net.norm(f"{block}.f.a_bn", net.conv(f"{block}.f.a", pixels)).relu()
            inner = net.norm(f"{block}.f.b_bn", net.conv(f"{block}.f.b", inner, stride)).relu()
            if net.has(f"{block}.f.se.f_ex.0"):
                squeezed = net.conv(f"{block}.f.se.f_ex.0", inner.mean((2, 3), keepdim=True)).relu()
                inner = inner * net.conv(f"{block}.f.se.f_ex.2", squeezed).sigmoid()
            inner = net.norm(f"{block}.f.c_bn", net.conv(f"{block}.f.c", inner))
            if net.has(f"{block}.proj"):
                pixels = net.norm(f"{block}.bn", net.conv(f"{block}.proj", pixels, stride))
            pixels = (pixels + inner).relu()
        found.append(pixels)
    return found


def timm_stages(state: State, depths: Sequence[int], pixels: torch.Tensor) -> list[torch.Tensor]:
    """Return the outputs of the stages of timm's RegNet."""
    net, found = _Torch(state), []

    def conv_norm(name: str, given: torch.Tensor, stride: int = 1) -> torch.Tensor:
        return net.norm(f"{name}.bn", net.conv(f"{name}.conv", given, stride))

    pixels = conv_norm("stem", pixels, 2).relu()
    for stage, depth in enumerate(depths, 1):
        for number in range(1, depth + 1):
            block, stride = f"s{stage}.b{number}", 2 if number == 1 else 1
            inner = conv_norm(f"{block}.conv1", pixels).relu()
            inner = conv_norm(f"{block}.conv2", inner, stride).relu()
            if net.has(f"{block}.se.fc1"):
                squeezed = net.conv(f"{block}.se.fc1", inner.mean((2, 3), keepdim=True)).relu()
                inner = inner * net.conv(f"{block}.se.fc2", squeezed).sigmoid()
            inner = conv_norm(f"{block}.conv3", inner)
            if net.has(f"{block}.downsample.conv"):
                pixels = conv_norm(f"{block}.downsample", pixels, stride)
            pixels = (pixels + inner).relu()
        found.append(pixels)
    return found


def caffe2_stages(
    state: State, depths: Sequence[int], pixels: torch.Tensor, *, stride_in_1x1: bool
) -> list[torch.Tensor]:
    """Return the outputs of the stages of Detectron's ResNet."""
    net, found = _Caffe2(state), []
    pixels = net.norm("res_conv1_bn", net.conv("conv1", pixels, 2)).relu()
    pixels = functional.max_pool2d(pixels, 3, 2, 1)
    for stage, depth in enumerate(depths, 2):
        for number in range(depth):
            block, stride = f"res{stage}_{number}", 2 if number == 0 and stage > 2 else 1
            first, second = (stride, 1) if stride_in_1x1 else (1, stride)
            inner = net.norm(f"{block}_branch2a_bn", net.conv(f"{block}_branch2a", pixels, first)).relu()
            inner = net.norm(f"{block}_branch2b_bn", net.conv(f"{block}_branch2b", inner, second)).relu()
            inner = net.norm(f"{block}_branch2c_bn", net.conv(f"{block}_branch2c", inner))
            if net.has(f"{block}_branch1"):
                pixels = net.norm(f"{block}_branch1_bn", net.conv(f"{block}_branch1", pixels, stride))
            pixels = (pixels + inner).relu()
        found.append(pixels)
    return found


def detectron2_stages(
    state: State, depths: Sequence[int], pixels: torch.Tensor, *, stride_in_1x1: bool
) -> list[torch.Tensor]:
    """Return the outputs of the stages of Detectron2's ResNet."""
    net, found = _Torch(state), []

    def conv_norm(name: str, given: torch.Tensor, stride: int = 1) -> torch.Tensor:
        return net.norm(f"{name}.norm", net.conv(name, given, stride))

    pixels = functional.max_pool2d(conv_norm("stem.conv1", pixels, 2).relu(), 3, 2, 1)
    for stage, depth in enumerate(depths, 2):
        for number in range(depth):
            block, stride = f"res{stage}.{number}", 2 if number == 0 and stage > 2 else 1
            first, second = (stride, 1) if stride_in_1x1 else (1, stride)
            inner = conv_norm(f"{block}.conv1", pixels, first).relu()
            inner = conv_norm(f"{block}.conv2", inner, second).relu()
            inner = conv_norm(f"{block}.conv3", inner)
            if net.has(f"{block}.shortcut"):
                pixels = conv_norm(f"{block}.shortcut", pixels, stride)
            pixels = (pixels + inner).relu()
        found.append(pixels)
    return found
