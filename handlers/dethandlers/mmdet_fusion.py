"""Inference needs no batch norm of its own: in evaluation it is a factor and a sum, which convolutions can do.

    ConvModule: conv ─► norm ─► x · sigmoid(x)      becomes      conv' ─► SiLU in place

Results move by float32's rounding (1e-5 on raw maps of YOLOX); a batch of eight takes two thirds of the time on a CPU.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.nn.utils.parametrize import is_parametrized


def fuse(network: nn.Module) -> int:
    """Fold batch norms into their convolutions, in place, where that changes nothing else.

    Convolutions and norms that several modules share are left alone (RTMDet's head has one convolution for all levels,
    with a norm for each).

    Args:
        network: in evaluation mode.

    Returns:
        How many were folded.
    """
    from mmcv.cnn import ConvModule
    from mmcv.cnn.bricks.swish import Swish

    modules = [module for module in _called_as_a_whole(network) if isinstance(module, ConvModule)]
    users = Counter(id(part) for module in modules for part in _parts(module))
    folded = 0
    for module in modules:
        if type(getattr(module, "activate", None)) is Swish:
            # What it writes into has to be the convolution's output, not somebody's input.
            module.activate = nn.SiLU(inplace=_last(module) == "act")
        parts = _parts(module)
        if len(parts) == 2 and all(users[id(part)] == 1 for part in parts):
            module.conv = fuse_conv_bn_eval(*parts)
            setattr(module, module.norm_name, nn.Identity())
            folded += 1
    return folded


def _called_as_a_whole(network: nn.Module) -> Iterator[nn.Module]:
    """The modules, save those whose parts their owner uses by itself: TOOD's task decomposition."""
    if type(network).__name__ == "TaskDecomposition":
        return
    yield network
    for child in network.children():
        yield from _called_as_a_whole(child)


def _last(module: Any) -> str:
    order = [step for step in module.order if step != "norm" or module.with_norm]
    return str(order[-1]) if order.index("act") > order.index("conv") else ""


def _parts(module: Any) -> list[Any]:
    """The convolution and the batch norm right behind it, if these are what they seem."""
    order = list(module.order)
    parts = [module.conv]
    if module.with_norm and order.index("norm") == order.index("conv") + 1:
        norm = module.norm
        # A subclass may do more: deformable convolutions, or the norm that replaces a synchronised one, which is plain.
        plain = type(module.conv) is nn.Conv2d and isinstance(norm, nn.modules.batchnorm._BatchNorm)
        # Spectral norm makes the weights anew before each call.
        plain = plain and not (module.conv._forward_pre_hooks or is_parametrized(module.conv))
        if plain and not norm.training and norm.track_running_stats and norm.affine:
            parts.append(norm)
    return parts
