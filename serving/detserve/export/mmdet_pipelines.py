"""A config's test pipeline and data preprocessor as the spec's ``preprocessing``; what it cannot say is refused."""

from collections.abc import Mapping, Sequence
from typing import Any

from dethandlers.spec import Preprocessing

from detserve.errors import ExportError

_REMEDY = "Serve the model as it is: detserve archive CONFIG.py CHECKPOINT.pth"
_LOADING = ("LoadImageFromFile", "LoadImageFromNDArray")
_WITHOUT_EFFECT = ("LoadAnnotations", "PackDetInputs", "LoadPanopticAnnotations")


def describe_preprocessing(steps: Sequence[Mapping[str, Any]], preprocessor: Any) -> Preprocessing:
    """Describe what happens to an image before the network sees it.

    Args:
        steps: of the test pipeline.
        preprocessor: the built model's `DetDataPreprocessor`.

    Raises:
        ExportError: a step that the worker does not have, named.
    """
    found: dict[str, Any] = {}
    eight_bit = True
    for step in steps:
        name = str(step.get("type")).rpartition(".")[2]
        if name in _LOADING:
            eight_bit = not step.get("to_float32", False)
            _require(step, color_type="color")
        elif name == "Resize" and "resize" not in found:
            found |= _resize(step)
        elif name == "Pad" and "pad_to" not in found and found.get("resize") == "fit":
            found |= _pad(step)
        elif name not in _WITHOUT_EFFECT:
            raise ExportError(f"test pipeline: got the step {_shown(step)}, which cannot be exported. {_REMEDY}")
    if "resize" not in found:
        raise ExportError(f"test pipeline: got no Resize, expected one. {_REMEDY}")
    return Preprocessing(
        **{**found, **_normalisation(preprocessor)}, interpolation="eight_bit" if eight_bit else "float"
    )


def _resize(step: Mapping[str, Any]) -> dict[str, Any]:
    scale = step.get("scale")
    if not isinstance(scale, Sequence) or len(scale) != 2:
        raise ExportError(f"test pipeline: got {_shown(step)}, expected a scale of two sides. {_REMEDY}")
    _require(step, backend="cv2", interpolation="bilinear")
    if not step.get("keep_ratio", False):
        return {"resize": "stretch", "size": (int(scale[1]), int(scale[0]))}
    return {"resize": "fit", "shorter_side": int(min(scale)), "longer_side": int(max(scale))}


def _pad(step: Mapping[str, Any]) -> dict[str, Any]:
    _require(step, size_divisor=None, padding_mode="constant")
    value = step.get("pad_val", 0)
    value = value.get("img", 0) if isinstance(value, Mapping) else value
    grey = set(value) if isinstance(value, Sequence) else {value}
    if len(grey) != 1:
        raise ExportError(f"test pipeline: got {_shown(step)}, expected one grey level to pad with. {_REMEDY}")
    padding = {"pad_value": float(grey.pop())}
    if step.get("pad_to_square", False):
        return {"pad_to": "square", **padding}
    size = step.get("size")
    if not isinstance(size, Sequence) or len(size) != 2:
        raise ExportError(f"test pipeline: got {_shown(step)}, expected a size. {_REMEDY}")
    return {"pad_to": "size", "size": (int(size[1]), int(size[0])), **padding}


def _normalisation(preprocessor: Any) -> dict[str, Any]:
    divisor = int(getattr(preprocessor, "pad_size_divisor", 1))
    if divisor > 1 and float(preprocessor.pad_value) != 0:
        raise ExportError(
            f"data_preprocessor: got pad_value {preprocessor.pad_value}, expected 0 with pad_size_divisor. {_REMEDY}"
        )
    settings: dict[str, Any] = {
        "channel_order": "rgb" if getattr(preprocessor, "_channel_conversion", False) else "bgr",
        "divisor": divisor,
    }
    if getattr(preprocessor, "_enable_normalize", False):
        settings["mean"] = _three(preprocessor.mean)
        settings["std"] = _three(preprocessor.std)
    return settings


def _three(values: Any) -> tuple[float, float, float]:
    first, *more = (float(value) for value in values.flatten().tolist())
    if more:
        return first, more[0], more[1]
    return first, first, first


def _require(step: Mapping[str, Any], **settings: Any) -> None:
    for key, value in settings.items():
        if step.get(key, value) != value:
            raise ExportError(
                f"test pipeline: got {key}={step[key]!r} in {_shown(step)}, expected {value!r}. {_REMEDY}"
            )


def _shown(step: Mapping[str, Any]) -> str:
    settings = ", ".join(f"{key}={value!r}" for key, value in step.items() if key != "type")
    return f"{step.get('type')}({settings})"[:160]
