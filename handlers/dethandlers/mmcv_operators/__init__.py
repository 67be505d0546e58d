"""What `mmcv._ext` gives MMDetection at inference, on torchvision and plain torch: nothing has to be compiled.

mmcv's wheels hold no operators; `mmcv.ops` then fails when it is imported. `provide()` puts a module of that name into
`sys.modules` beforehand, unless compiled operators are installed, which are used as they are. The functions have the
compiled ones' names and arguments, run wherever torch runs, and compute in float32 inside for half-precision tensors.

What MMDetection 3.3 takes from mmcv.ops (its sources and all its packaged configs), and where it is answered:

    operator                       what asks for it at inference                          here
    nms                            every head with NMS, RPN                               suppression
    softnms                        CornerNet, CentripetalNet, soft-NMS configs            suppression
    roi_align_forward              two-stage heads, mask targets                          pooling
    roi_pool_forward               RoIPool (inference_detector takes it on CUDA alone)    pooling
    deform_roi_pool_forward        DeformRoIPoolPack, ModulatedDeformRoIPoolPack          pooling
    deform_conv_forward            DCN, SAC, TOOD, VFNet, RepPoints, FoveaBox, GA, Cascade RPN     deformation
    modulated_deform_conv_forward  DCNv2, DyHead, CenterNet                               deformation
    ms_deform_attn_forward         Deformable DETR, DINO, Mask2Former on CUDA; on the CPU mmcv does it itself
    carafe_forward, carafe_naive_forward     FPN_CARAFE, FCNMaskHead's carafe upsampling  upsampling
    masked_im2col_forward, masked_col2im_forward    MaskedConv2d of Guided Anchoring      masked_convolution
    sigmoid_focal_loss_forward, softmax_focal_loss_forward    losses (not at inference)   losses
    get_compiler_version, get_compiling_cuda_version    mmcv's report of its environment  here
    CornerPool, point_sample, SimpleRoIAlign, merge_cells    plain torch in mmcv          (ask for none)
    MMSyncBN                       turned into BatchNorm before inference                 (asks for none)
    nms_match, every *_backward    training                                               missing
    nms_rotated, sparse convolutions, points in 3-D, …    no detection config             missing
"""

import importlib.machinery
import importlib.util
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from dethandlers.mmcv_operators.deformation import (
    deform_conv_forward,
    modulated_deform_conv_forward,
    ms_deform_attn_forward,
)
from dethandlers.mmcv_operators.losses import sigmoid_focal_loss_forward, softmax_focal_loss_forward
from dethandlers.mmcv_operators.masked_convolution import masked_col2im_forward, masked_im2col_forward
from dethandlers.mmcv_operators.missing import MissingOperatorError as MissingOperatorError
from dethandlers.mmcv_operators.missing import missing
from dethandlers.mmcv_operators.pooling import deform_roi_pool_forward, roi_align_forward, roi_pool_forward
from dethandlers.mmcv_operators.suppression import nms, softnms
from dethandlers.mmcv_operators.upsampling import carafe_forward, carafe_naive_forward

NAME = "mmcv._ext"
OPERATORS = {
    function.__name__: function
    for function in (
        nms,
        softnms,
        roi_align_forward,
        roi_pool_forward,
        deform_roi_pool_forward,
        deform_conv_forward,
        modulated_deform_conv_forward,
        ms_deform_attn_forward,
        carafe_forward,
        carafe_naive_forward,
        masked_im2col_forward,
        masked_col2im_forward,
        sigmoid_focal_loss_forward,
        softmax_focal_loss_forward,
    )
}


@dataclass(frozen=True)
class Provided:
    """Whose operators `mmcv.ops` uses.

    Attributes:
        compiled: mmcv's own compiled ones; else ours.
        reason: why, for people.
    """

    compiled: bool
    reason: str


def provide() -> Provided:
    """Give `mmcv.ops` its operators; call it before anything imports `mmcv.ops`. mmcv itself is not imported.

    Compiled operators that are installed but cannot be loaded (built for another torch) are replaced by ours.
    """
    present = sys.modules.get(NAME)
    if present is not None:
        ours = isinstance(present, _Operators)
        return Provided(not ours, present.reason if isinstance(present, _Operators) else "mmcv._ext is loaded already")
    compiled = _compiled()
    reason = "mmcv is installed without compiled operators"
    if compiled is not None:
        try:
            module = importlib.util.module_from_spec(compiled)
            if compiled.loader is not None:
                compiled.loader.exec_module(module)
        except (ImportError, OSError) as error:
            reason = f"mmcv's compiled operators cannot be loaded ({str(error).partition(chr(10))[0][:160]})"
        else:
            sys.modules[NAME] = module
            return Provided(True, f"compiled operators, {compiled.origin}")
    sys.modules[NAME] = _Operators(reason)
    return Provided(False, reason)


def _compiled() -> importlib.machinery.ModuleSpec | None:
    """Find the compiled module without importing the package that it lies in."""
    package = importlib.util.find_spec("mmcv")
    if package is None or package.submodule_search_locations is None:
        return None
    return importlib.machinery.PathFinder.find_spec(NAME, list(package.submodule_search_locations))


class _Operators(ModuleType):
    def __init__(self, reason: str) -> None:
        super().__init__(NAME, f"Operators on torchvision and torch: {reason}.")
        self.reason = reason
        # mmcv and mmengine ask importlib whether there are operators.
        self.__spec__ = importlib.machinery.ModuleSpec(NAME, None)
        self.__dict__.update(OPERATORS)

    def get_compiler_version(self) -> str:
        return "not compiled"

    def get_compiling_cuda_version(self) -> str:
        return "not compiled"

    def __getattr__(self, name: str) -> Any:
        # mmcv.ops asks for all of its names when it is imported; calling one that is not here is the error.
        if name.startswith("__"):
            raise AttributeError(name)
        return missing(name)
