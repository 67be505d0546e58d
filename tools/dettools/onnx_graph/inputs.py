"""What to feed an ONNX detector whose image has a size that the caller chooses.

The image is the first input with three or four dimensions; other inputs of a detector are small: the images' sizes, a
score threshold, a number of detections.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dettools.onnx_graph.model_file import OnnxFile, OnnxFileError, import_onnx

Array = npt.NDArray[Any]
# For files that take these without a default.
_SMALL = {"score_threshold": 0.05, "max_detections": 100}


@dataclass(frozen=True)
class ModelInput:
    """An input of a file.

    Attributes:
        name: of the tensor.
        type: element type as ONNX calls it, such as ``float``.
        shape: dimensions; a name or None where they are open.
        has_default: the file holds a value for it.
    """

    name: str
    type: str
    shape: tuple[int | str | None, ...]
    has_default: bool = False


@dataclass(frozen=True)
class Feed:
    """Arrays for one run.

    Attributes:
        arrays: by input.
        size: ``(H, W)`` px of the image input.
        batch: images in it.
    """

    arrays: Mapping[str, Array]
    size: tuple[int, int]
    batch: int


def model_inputs(file: OnnxFile) -> tuple[ModelInput, ...]:
    """Return the inputs, those with a default last as the file orders them."""
    defaults = {tensor.name for tensor in file.proto.graph.initializer}
    return tuple(
        ModelInput(value.name, *value_type(value), has_default=value.name in defaults)
        for value in file.proto.graph.input
    )


def value_type(value: Any) -> tuple[str, tuple[int | str | None, ...]]:
    """Return element type and dimensions of a ``ValueInfoProto``; a sequence has no dimensions."""
    onnx = import_onnx()
    kind = value.type.WhichOneof("value")
    if kind != "tensor_type":
        return kind or "unknown", ()
    tensor = value.type.tensor_type
    name = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
    sides = [(dim.WhichOneof("value"), dim) for dim in tensor.shape.dim]
    return name, tuple(getattr(dim, field) if field else None for field, dim in sides)


def has_open_size(file: OnnxFile) -> bool:
    """Tell whether the image's height or width is for the caller to choose.

    Raises:
        OnnxFileError: there is no image input.
    """
    image = _image_input(file)
    rows = _rows(image)
    return any(not isinstance(side, int) or side <= 0 for side in image.shape[rows : rows + 2])


def make_feed(file: OnnxFile, asked: tuple[int, int] | None) -> Feed:
    """Make noise of the asked size, and sensible values for the other inputs.

    Args:
        file: the model.
        asked: ``(H, W)`` px; None where the file fixes them.

    Raises:
        OnnxFileError: no image input, or a size that is missing or contradicts the file.
    """
    image = _image_input(file)
    rows = _rows(image)
    fixed = tuple(image.shape[axis] for axis in (rows, rows + 1))
    size = _size(file, image, fixed, asked)
    shape = [side if isinstance(side, int) and side > 0 else 1 for side in image.shape]
    if not isinstance(image.shape[_channels(image)], int):
        shape[_channels(image)] = 3
    shape[rows], shape[rows + 1] = size
    batch = shape[0] if len(shape) == 4 else 1
    arrays = {image.name: _noise(tuple(shape), image.type)}
    for one in _needed_inputs(file):
        if one != image:
            arrays[one.name] = _small(file, one, size, batch)
    return Feed(arrays, size, batch)


def _needed_inputs(file: OnnxFile) -> list[ModelInput]:
    return [one for one in model_inputs(file) if not one.has_default]


def _image_input(file: OnnxFile) -> ModelInput:
    inputs = _needed_inputs(file)
    image = next((one for one in inputs if len(one.shape) in (3, 4)), None)
    if image is None:
        shapes = ", ".join(f"{one.name} {format_shape(one.shape)}" for one in inputs) or "none"
        raise OnnxFileError(
            f"{file.subject}: got the inputs {shapes}, expected an image of three or four dimensions. Give a detector."
        )
    return image


def format_shape(shape: tuple[int | str | None, ...]) -> str:
    """Return ``[1, 3, height, ?]``."""
    return "[" + ", ".join("?" if side is None else str(side) for side in shape) + "]"


def _rows(image: ModelInput) -> int:
    """The axis of the height: of channels-last images the one before."""
    last = len(image.shape) - 1
    channels_last = image.shape[last] in (1, 3) and image.shape[last - 2] not in (1, 3)
    return last - 2 if channels_last else last - 1


def _channels(image: ModelInput) -> int:
    last = len(image.shape) - 1
    return last if _rows(image) == last - 2 else last - 2


def _size(
    file: OnnxFile, image: ModelInput, fixed: tuple[int | str | None, ...], asked: tuple[int, int] | None
) -> tuple[int, int]:
    known = [side if isinstance(side, int) and side > 0 else None for side in fixed]
    if asked is None:
        if None in known:
            raise OnnxFileError(
                f"{file.subject}: {image.name} is {format_shape(image.shape)}: got no size for its open dimensions, "
                "expected one. Give it with --shape HEIGHT WIDTH."
            )
        return known[0] or 0, known[1] or 0
    if any(side is not None and side != wanted for side, wanted in zip(known, asked, strict=True)):
        raise OnnxFileError(
            f"{file.subject}: got --shape {asked[0]} {asked[1]}, expected what the file fixes: {image.name} is "
            f"{format_shape(image.shape)}. Leave --shape away, or export the file for that size."
        )
    return asked


def _noise(shape: tuple[int, ...], type_name: str) -> Array:
    dtype = _dtype(type_name)
    noise = np.random.default_rng(0).random(shape, dtype=np.float32)
    return noise.astype(dtype) if np.issubdtype(dtype, np.inexact) else (noise * 255).astype(dtype)


def _small(file: OnnxFile, one: ModelInput, size: tuple[int, int], batch: int) -> Array:
    shape = tuple(side if isinstance(side, int) else batch for side in one.shape)
    if any(not isinstance(side, int) for side in one.shape[1:]):
        raise OnnxFileError(
            f"{file.subject}: the input {one.name} is {format_shape(one.shape)}: got an open dimension beyond the "
            "batch, expected fixed ones in every input but the image. Export the file with fixed dimensions."
        )
    dtype = _dtype(one.type)
    if one.name in _SMALL:
        return np.full(shape, _SMALL[one.name], dtype=dtype)
    # (B, 2): the height and width of the images in the batch.
    values = size if shape[-1:] == (2,) and np.issubdtype(dtype, np.integer) else 1
    return np.broadcast_to(np.asarray(values, dtype=dtype), shape).copy()


def _dtype(type_name: str) -> np.dtype[Any]:
    onnx = import_onnx()
    dtype: np.dtype[Any] = onnx.helper.tensor_dtype_to_np_dtype(onnx.TensorProto.DataType.Value(type_name.upper()))
    return dtype
