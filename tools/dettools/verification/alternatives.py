"""Other descriptions of a model than the one it has: the mistakes that are made when a foreign file is described.

    how the input is made: channel order × normalisation × resize   ─┐
    how the output is read: levels from the last, classes by one off ─┴─ the network is asked again
    what a label means: by one off, by id, in another order              another reading of the same detections

What is wrong in a description cannot be seen in the file, and an AP of 0 does not tell it. It can be measured: under
the right description the very same file reaches its AP.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from dethandlers.detections import Category
from dethandlers.spec import Preprocessing, Spec

from dettools.evaluation.category_mapping import map_categories
from dettools.ground_truth import CategoryEntry

_Channels = tuple[float, float, float]
_Order = Literal["bgr", "rgb"]
_Resize = Literal["letterbox", "stretch", "shorter_side"]
_ZERO: _Channels = (0.0, 0.0, 0.0)
_ONE: _Channels = (1.0, 1.0, 1.0)
# ImageNet's mean and standard deviation of R, G and B, as torchvision and MMDetection use them.
_IMAGENET_MEAN: _Channels = (0.485, 0.456, 0.406)
_IMAGENET_STD: _Channels = (0.229, 0.224, 0.225)
_CAFFE_MEAN: _Channels = (123.675, 116.28, 103.53)
_ONE_HIGHER, _ONE_LOWER = "the model_label of each category one higher", "the model_label of each category one lower"


@dataclass(frozen=True)
class Reading:
    """What the labels mean.

    Attributes:
        change: what the spec would have to say, for people; empty as described.
        category_ids: the data set's category id of each label; None for a class that it does not have.
    """

    change: str
    category_ids: tuple[int | None, ...]


def other_descriptions(spec: Spec) -> list[Spec]:
    """Return the spec of a foreign ONNX file with other inputs and outputs."""
    others = [replace(spec, preprocessing=one) for one in _other_inputs(spec.preprocessing)]
    strides = spec.decoding.strides
    if strides != strides[::-1]:
        others.append(replace(spec, decoding=replace(spec.decoding, strides=strides[::-1])))
    for shift in (1, -1):
        moved = tuple(replace(one, model_label=one.model_label + shift) for one in spec.categories)
        if min(one.model_label for one in moved) >= 0:
            others.append(replace(spec, categories=moved))
    return others


def _other_inputs(current: Preprocessing) -> list[Preprocessing]:
    orders: tuple[_Order, ...] = ("bgr", "rgb")
    fixed: tuple[_Resize, ...] = ("letterbox", "stretch")
    resizes = fixed if current.resize in fixed else (current.resize,)
    found: list[Preprocessing] = []
    for order, resize in itertools.product(orders, resizes):
        for scale, mean, std in _normalisations(order):
            one = replace(current, channel_order=order, resize=resize, scale=scale, mean=mean, std=std)
            if not _same(one, current) and one not in found:
                found.append(one)
    return found


def other_readings(
    model: Sequence[Category], data: Sequence[CategoryEntry], described: Sequence[int | None]
) -> list[Reading]:
    """Return other meanings of the labels than the described one.

    Args:
        model: the category map, by label.
        data: the data set's categories.
        described: the data set's category id of each label as the category map has it.
    """
    ids = tuple(described)
    known = {entry.id for entry in data}
    by_name = sorted(range(len(model)), key=lambda place: model[place].name)
    in_data_order = [entry.id for entry in data][: len(model)]
    readings = [
        Reading(_ONE_HIGHER, (None, *ids[:-1])),
        Reading(_ONE_LOWER, (*ids[1:], None)),
        Reading("the category ids as model_label", tuple(one if one in known else None for one in range(len(model)))),
        Reading("the categories in alphabetical order", tuple(ids[place] for place in by_name)),
        Reading(
            "the categories in the order of the annotation file",
            (*in_data_order, *[None] * (len(model) - len(in_data_order))),
        ),
        Reading(
            "the categories' names as the annotation file has them for their ids",
            map_categories(model, data, "id").category_ids,
        ),
    ]
    different = {ids: Reading("", ids)}
    for reading in readings:
        different.setdefault(reading.category_ids, reading)
    return [reading for reading in different.values() if reading.change]


def changed_keys(current: Spec, other: Spec) -> dict[str, Any]:
    """Return the keys of ``preprocessing`` and ``decoding`` that differ, with the other's values."""
    one, two = current.preprocessing, other.preprocessing
    keys = ("channel_order", "scale", "mean", "std", "resize")
    changes: dict[str, Any] = {
        key: getattr(two, key) for key in keys if not _close(getattr(one, key), getattr(two, key))
    }
    if current.decoding.strides != other.decoding.strides:
        changes["strides"] = other.decoding.strides
    return changes


def changed_labels(current: Spec, other: Spec) -> str:
    """Say how the other's model labels differ; or empty."""
    shift = other.categories[0].model_label - current.categories[0].model_label
    return {1: _ONE_HIGHER, -1: _ONE_LOWER}.get(shift, "")


def describe_changes(changes: Mapping[str, Any], categories: str) -> str:
    """Return changes as a person would write them into the spec, such as ``channel_order: bgr, scale: 1/255``.

    Args:
        changes: keys with their other values.
        categories: what is to change in the category map; or empty.
    """
    parts = [f"{key}: {_value(key, value)}" for key, value in changes.items()]
    return ", ".join([*parts, *([categories] if categories else [])])


def _normalisations(order: _Order) -> list[tuple[float, _Channels, _Channels]]:
    """Return ``scale, mean, std`` of the usual inputs: 0..255, 0..1, ImageNet's, -1..1, Caffe's."""

    def ordered(rgb: _Channels) -> _Channels:
        return rgb if order == "rgb" else (rgb[2], rgb[1], rgb[0])

    return [
        (1.0, _ZERO, _ONE),
        (1 / 255, _ZERO, _ONE),
        (1 / 255, ordered(_IMAGENET_MEAN), ordered(_IMAGENET_STD)),
        (1.0, (127.5,) * 3, (127.5,) * 3),
        (1.0, ordered(_CAFFE_MEAN), _ONE),
    ]


def _same(one: Preprocessing, other: Preprocessing) -> bool:
    """Whether both make the same input, within what 8-bit pixels can show: (x·scale - mean) / std."""

    def line(settings: Preprocessing) -> list[float]:
        pairs = zip(settings.mean, settings.std, strict=True)
        return [value for mean, std in pairs for value in (255 * settings.scale / std, mean / std)]

    return (one.channel_order, one.resize) == (other.channel_order, other.resize) and all(
        abs(a - b) <= 0.01 * max(abs(a), abs(b), 1.0) for a, b in zip(line(one), line(other), strict=True)
    )


def _close(one: Any, other: Any) -> bool:
    if isinstance(one, str):
        return bool(one == other)
    pairs = zip(one, other, strict=True) if isinstance(one, tuple) else [(one, other)]
    return all(abs(a - b) <= 1e-6 * max(abs(a), abs(b), 1e-3) for a, b in pairs)


def _value(key: str, value: Any) -> str:
    if key == "scale" and abs(255 * value - 1) < 1e-6:
        return "1/255"
    if isinstance(value, tuple):
        return (
            f"{value[0]:g}"
            if len(set(value)) == 1 and key != "strides"
            else f"[{', '.join(f'{one:g}' for one in value)}]"
        )
    return value if isinstance(value, str) else f"{value:g}"
