"""What an MMDetection checkpoint holds: weights, and the classes that it was trained for.

MMDetection falls back to COCO's 80 classes when a checkpoint names none, and then serves wrong names. Here the classes
come from the checkpoint, or from the data set that the config tests on, or they are asked for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from dethandlers.detections import Category

from detserve.checkpoint import load_state_dict, unpickle
from detserve.errors import CheckpointError, SpecError
from detserve.published_weights import choose_weights

# The ids that COCO's 80 categories have in its annotation files; ten of the 90 numbers were never used.
_COCO_IDS = tuple(number for number in range(1, 91) if number not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83))
_COCO_ENDS = ("person", "bicycle", "car", "motorcycle"), ("teddy bear", "hair drier", "toothbrush")


@dataclass(frozen=True)
class MmdetCheckpoint:
    """A checkpoint, read without running anything in it.

    Attributes:
        state: name to tensor.
        versions: of the modules (``state_dict()._metadata``), which some modules load by.
        class_names: of its own, label 0 first; empty when it names none.
        notes: about the weights chosen, for people.
    """

    state: dict[str, torch.Tensor]
    versions: dict[str, dict[str, int]]
    class_names: tuple[str, ...]
    notes: tuple[str, ...]


def read_checkpoint(path: Path) -> MmdetCheckpoint:
    """Read MMDetection's checkpoint (1.x to 3.x), or bare weights, by the restricted unpickler.

    Raises:
        CheckpointError: no such file, damaged, no weights in it, or a pickle that needs more than data.
    """
    if path.suffix == ".safetensors" or not path.is_file():
        return MmdetCheckpoint(load_state_dict(path), {}, (), ())
    content = unpickle(path)
    weights = choose_weights(content, "auto", path.name)
    meta = content.get("meta") if isinstance(content, Mapping) else None
    return MmdetCheckpoint(weights.state, weights.versions, _names_in(meta), weights.notes)


def model_class_count(model: Mapping[str, Any]) -> int | None:
    """Return the number of classes that a config's ``model`` detects; None when its heads do not say."""
    inner = model.get("detector")
    if isinstance(inner, Mapping):
        return model_class_count(inner)
    roi_head = model.get("roi_head")
    heads = [
        *(_heads(roi_head.get("bbox_head")) if isinstance(roi_head, Mapping) else []),
        *_heads(model.get("bbox_head")),
        *_heads(model.get("mask_head")),
        *_heads(model.get("panoptic_head")),
    ]
    for head in heads:
        for key in ("num_classes", "num_things_classes"):
            if isinstance(head.get(key), int):
                return int(head[key])
    return None


def config_class_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the classes of the data set that a config tests on, as far as the config names them; else none."""
    dataset: Any = config.get("test_dataloader")
    dataset = dataset.get("dataset") if isinstance(dataset, Mapping) else None
    while isinstance(dataset, Mapping):
        names = _names_in({"dataset_meta": dataset.get("metainfo")})
        if names:
            return names
        wrapped = dataset.get("dataset") or dataset.get("datasets")
        dataset = wrapped[0] if isinstance(wrapped, Sequence) and wrapped else wrapped
    return ()


def config_dataset_type(config: Mapping[str, Any]) -> str:
    """Return the type of the data set that a config tests on; empty when it has none."""
    dataset: Any = config.get("test_dataloader")
    kind = ""
    while isinstance(dataset, Mapping):
        kind = str(dataset.get("type", kind))
        wrapped = dataset.get("dataset") or dataset.get("datasets")
        dataset = wrapped[0] if isinstance(wrapped, Sequence) and wrapped else wrapped
    return kind


def mmdet_categories(
    config: Mapping[str, Any],
    named: Sequence[str],
    *,
    of_dataset_type: Sequence[str] = (),
    given: Sequence[Category] | None = None,
) -> tuple[Category, ...]:
    """Join the classes to the model's labels.

    In this order: the categories given, the checkpoint's names, the config's, those of its data set's type.

    Args:
        config: flattened.
        named: the checkpoint's class names.
        of_dataset_type: class names that MMDetection knows for the config's data set type.
        given: the user's categories. Model labels that they state are taken; open ones (-1) go by name when the
            checkpoint, else the config, has the very same names, and by order when not.

    Raises:
        SpecError: no names, or not as many as the model has classes.
    """
    model = config.get("model")
    count = model_class_count(model) if isinstance(model, Mapping) else None
    if given is not None:
        places = _places(given, _named(config, named)[0])
        categories = tuple(
            Category(one.id, one.name, place if one.model_label < 0 else one.model_label)
            for place, one in zip(places, given, strict=True)
        )
        return _counted(categories, count, "the categories given")
    for names, source in (
        (tuple(named), "the checkpoint"),
        (config_class_names(config), "the config"),
        (tuple(of_dataset_type), f"data set type {config_dataset_type(config)}"),
    ):
        if names:
            return _counted(_numbered(names), count, source)
    raise SpecError(
        "categories: neither the checkpoint nor the config names the classes. MMDetection would take COCO's; give the "
        "annotation file that the model was trained with, or set metainfo of test_dataloader.dataset in the config."
    )


def naming_notes(
    config: Mapping[str, Any],
    named: Sequence[str],
    categories: Sequence[Category],
    *,
    of_dataset_type: Sequence[str] = (),
) -> tuple[str, ...]:
    """Tell people what is uncertain about a model's class names; nothing when they are the checkpoint's.

    Args:
        config: flattened.
        named: the checkpoint's class names.
        categories: as the spec has them, open model labels (-1) included.
        of_dataset_type: class names that MMDetection knows for the config's data set type.
    """
    names = tuple(one.name for one in categories)
    known, source = _named(config, named)
    if any(one.model_label < 0 for one in categories):
        if _same_names(names, known):
            return ()
        if not known:
            return ("categories: joined to the model's labels by their order; neither checkpoint nor config names any",)
        pairs = ((place, *pair) for place, pair in enumerate(zip(names, known, strict=False)) if pair[0] != pair[1])
        place, ours, theirs = next(pairs, (0, "", ""))
        differ = f"label {place} is {theirs!r} there and {ours!r} in the categories given" if ours else "counts differ"
        return (f"categories: {source} names the classes otherwise ({differ}), so they were joined by their order",)
    if named:
        return ()
    ordered = tuple(one.name for one in sorted(categories, key=lambda one: one.model_label))
    if known and ordered == known:
        return ("categories: named by the config (metainfo of its test data set); the checkpoint names none",)
    if ordered == tuple(of_dataset_type):
        kind = config_dataset_type(config)
        return (f"categories: those of the config's data set type {kind}; neither checkpoint nor config names any",)
    return ()


def _named(config: Mapping[str, Any], named: Sequence[str]) -> tuple[tuple[str, ...], str]:
    return (tuple(named), "the checkpoint") if named else (config_class_names(config), "the config")


def _same_names(names: Sequence[str], known: Sequence[str]) -> bool:
    return len(set(known)) == len(known) and sorted(names) == sorted(known)


def _places(given: Sequence[Category], known: Sequence[str]) -> list[int]:
    """Return each category's label among the known names when they are the same names, else its place."""
    names = [one.name for one in given]
    if _same_names(names, known):
        return [list(known).index(name) for name in names]
    return list(range(len(names)))


def _counted(categories: tuple[Category, ...], count: int | None, source: str) -> tuple[Category, ...]:
    labels = {category.model_label for category in categories}
    if len(labels) != len(categories) or (count is not None and (len(labels) != count or max(labels) >= count)):
        raise SpecError(
            f"categories: got {len(categories)} from {source} ({', '.join(one.name for one in categories[:4])}, …), "
            f"expected {count}, as many as the model has classes. Give the annotation file that it was trained with."
        )
    return categories


def _numbered(names: tuple[str, ...]) -> tuple[Category, ...]:
    coco = len(names) == len(_COCO_IDS) and (names[:4], names[-3:]) == _COCO_ENDS
    ids = _COCO_IDS if coco else range(1, len(names) + 1)
    return tuple(Category(number, name, place) for place, (number, name) in enumerate(zip(ids, names, strict=True)))


def _names_in(meta: Any) -> tuple[str, ...]:
    if not isinstance(meta, Mapping):
        return ()
    inner = meta.get("dataset_meta")
    names: Any = None
    if isinstance(inner, Mapping):
        names = next((value for key, value in inner.items() if str(key).lower() == "classes"), None)
    names = names if names is not None else meta.get("CLASSES")
    if isinstance(names, str):
        names = (names,)
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        return ()
    return tuple(names)


def _heads(value: Any) -> list[Mapping[str, Any]]:
    rows = value if isinstance(value, list | tuple) else [value]
    return [one for one in rows if isinstance(one, Mapping)]


def require_fit(missing: Sequence[str], unexpected: Sequence[str], wrong: Sequence[str], name: str) -> None:
    """Refuse weights that are not the model's, naming what differs.

    Raises:
        CheckpointError: something is missing, left over, or of another shape.
    """
    parts = [
        f"{len(rows)} {what} (first: {rows[0]})"
        for rows, what in ((missing, "missing"), (unexpected, "not the model's"), (wrong, "of another shape"))
        if rows
    ]
    if parts:
        raise CheckpointError(
            f"weights {name}: {', '.join(parts)}; expected every tensor of the config's model. Give the checkpoint "
            "that belongs to this config."
        )
