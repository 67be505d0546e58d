"""The one place that knows torch's exporters.

torch has two. The newer one fails on what detectors do after their heads (numbers of boxes that depend on the image:
NonZero, NonMaxSuppression, RoIAlign over what they leave); the older one, by tracing, exports it. When the older one is
gone, this file is what has to change.
"""

import io
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from detserve.errors import ExportError

EXPORTER = "torch.onnx.export, tracing"
DEFAULT_OPSET = 17
OPSETS = range(16, 21)
"""RoIAlign samples as torchvision's from opset 16 on; 20 is the last that the tracing exporter writes."""


@dataclass(frozen=True)
class Signature:
    """A graph's inputs and outputs.

    Attributes:
        inputs: their names, in the order of the module's arguments.
        outputs: their names.
        dynamic: per name, the axes whose size is free, and how they are called.
    """

    inputs: Sequence[str]
    outputs: Sequence[str]
    dynamic: Mapping[str, Mapping[int, str]]


def check_opset(opset: int) -> None:
    """Refuse an operator set that the exporter does not write.

    Raises:
        ExportError: names those that it does.
    """
    if opset not in OPSETS:
        raise ExportError(f"opset: got {opset}, expected {OPSETS[0]} to {OPSETS[-1]}. Give another with --opset.")


def trace(module: nn.Module, example: tuple[Tensor, ...], signature: Signature, *, opset: int) -> bytes:
    """Export a module.

    Args:
        module: its forward takes tensors and gives a tuple of tensors.
        example: arguments to trace with.
        signature: names and free axes.
        opset: ONNX operator set.

    Returns:
        The ONNX file's bytes.

    Raises:
        ExportError: the opset is not supported, or an operator cannot be exported.
    """
    check_opset(opset)
    file = io.BytesIO()
    loggers = logging.getLogger("torch.onnx")
    level = loggers.level
    loggers.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            # Of the exporter being the older one, and of constants that are meant to be constants.
            warnings.simplefilter("ignore")
            torch.onnx.export(
                module.eval(),
                example,
                file,  # type: ignore[arg-type] # it also writes to open files
                input_names=list(signature.inputs),
                output_names=list(signature.outputs),
                dynamic_axes={name: dict(axes) for name, axes in signature.dynamic.items() if axes},
                opset_version=opset,
                dynamo=False,
            )
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise ExportError(f"{EXPORTER} of torch {torch.__version__} failed: {str(error)[:600]}") from error
    finally:
        loggers.setLevel(level)
    return file.getvalue()
