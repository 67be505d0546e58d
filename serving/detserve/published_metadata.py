"""What a published checkpoint tells besides its weights: what loading and evaluating need, and nothing of its makers.

meta of the checkpoint ─► kept names only ─► plain values ─► no paths, no addresses ─► meta of the release
                              └───────────────── each removal with its reason and size ─────┘
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np
import torch

from detserve.checkpoint import LeftOut

# What MMDetection (2.x: CLASSES, 3.x: dataset_meta) and detserve read, and what tells how far training had come.
_VERSIONS = ("mmdet_version", "mmengine_version", "mmcv_version")
_KEPT = frozenset({"dataset_meta", "CLASSES", "PALETTE", "classes", "palette", *_VERSIONS, "epoch", "iter"})
_KEPT_OF_DATASET = frozenset(
    {"classes", "palette", "CLASSES", "PALETTE", "dataset_type", "task_name", "thing_classes", "stuff_classes"}
)
_UNNEEDED = "not needed to load the weights"
# MMEngine's and MMCV's.
_CONFIGS = ("cfg", "config")
_CONFIGURATION = "configuration may tell of its makers; publish it as a file of its own"
_DEEPEST = 20
PUBLISHED = "published"
_KEPT_OF_PUBLISHED = frozenset({"source_sha256", "weights", "precision"})
_ADDRESS = re.compile(r"[\w.+-]+@[\w-]+(\.[\w-]+)*")
_WHOLE_PATH = re.compile(r"\s*(/[\w.~@+-]|~[\w.-]*/|[A-Za-z]:[\\/]|\\\\\w|file:)")
_PATH_INSIDE = re.compile(r"(?<![\w/.:~-])(~?/[\w.@+-]+/|[A-Za-z]:[\\/]\w|\\\\\w+\\)|file:/")
# Open Images names its classes by these identifiers.
_MACHINE_ID = re.compile(r"/[mgt]/[0-9a-z_]+")


@dataclass(frozen=True)
class Removed:
    """Something that is not published: its key (``meta.cfg``), the bytes that it took in memory, and why."""

    key: str
    size: int
    reason: str


def scrub_metadata(meta: object) -> tuple[dict[str, Any], list[Removed]]:
    """Return what of a checkpoint's ``meta`` may be published, as plain values, and what may not.

    A list that holds something private is removed whole: without one of its entries, class names would name others.
    """
    removed: list[Removed] = []
    if not isinstance(meta, Mapping):
        return {}, [] if meta is None else [Removed("meta", size_of(meta), "no table of names and values")]
    kept: dict[str, Any] = {}
    for key, value in meta.items():
        allowed = {"dataset_meta": _KEPT_OF_DATASET, PUBLISHED: _KEPT_OF_PUBLISHED}.get(key)
        if key not in _KEPT and allowed is None:
            removed.append(Removed(f"meta.{key}", size_of(value), _CONFIGURATION if key in _CONFIGS else _UNNEEDED))
        elif allowed is None:
            kept |= plain_values({key: value}, "meta.", removed)
        elif isinstance(value, Mapping):
            others = [name for name in value if name not in allowed]
            removed += [
                Removed(f"meta.{key}.{name}", size_of(value[name]), "not needed to load the weights") for name in others
            ]
            inner = {name: one for name, one in value.items() if name in allowed}
            kept[key] = plain_values(inner, f"meta.{key}.", removed)
        else:
            removed.append(Removed(f"meta.{key}", size_of(value), "no table of names and values"))
    return kept, removed


def plain_values(values: Mapping[Any, Any], where: str, removed: list[Removed]) -> dict[Any, Any]:
    """Return a fresh copy of a table without what is private or no plain value; what goes is added to ``removed``."""
    kept: dict[Any, Any] = {}
    for key, given in values.items():
        value = vars(given) if isinstance(given, argparse.Namespace) else given
        # A pickle can hold a table that contains itself.
        reason = _unfit_key(key) or ("nested too deeply" if where.count(".") > _DEEPEST else "")
        if not reason and isinstance(value, Mapping):
            kept[_plain(key)] = plain_values(value, f"{where}{key}.", removed)
            continue
        reason = reason or _reason(value)
        if reason:
            removed.append(Removed(f"{where}{key}", size_of(value), reason))
        else:
            kept[_plain(key)] = _plain(value)
    return kept


def size_of(value: object) -> int:
    """Return about how many bytes a value takes: each storage of tensors once, texts and numbers as they are saved."""
    storages: dict[int, int] = {}
    total = 0
    seen: set[int] = set()
    waiting: list[object] = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, torch.Tensor):
            if one.layout == torch.strided:
                storages[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
        elif isinstance(one, str | bytes | bytearray):
            total += len(one)
        elif isinstance(one, Mapping | list | tuple | set | LeftOut | argparse.Namespace):
            if id(one) in seen:
                continue
            seen.add(id(one))
            if isinstance(one, Mapping):
                waiting += [*one.keys(), *one.values()]
            elif isinstance(one, LeftOut):
                waiting.append(one.held)
            else:
                waiting += vars(one).items() if isinstance(one, argparse.Namespace) else one
        elif one is not None:
            total += 8
    return total + sum(storages.values())


def as_texts(meta: Mapping[str, Any]) -> dict[str, str]:
    """Return published metadata as safetensors can hold it: texts, all else as JSON, class names under ``classes``."""
    flat = {key: value for key, value in meta.items() if key != "dataset_meta"}
    flat |= {key.lower(): value for key, value in meta.get("dataset_meta", {}).items()}
    flat |= {key.lower(): flat.pop(key) for key in ("CLASSES", "PALETTE") if key in flat}
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in flat.items()}
    return {"format": "pt", **dict(sorted(texts.items()))}


def from_texts(texts: Mapping[str, str]) -> dict[str, Any]:
    """Return the metadata of a safetensors file as the ``meta`` of a ``.pth``, where MMDetection looks for classes."""
    meta: dict[str, Any] = {}
    for key, text in texts.items():
        if key == "format":
            continue
        value: Any = text
        if text[:1] in ("[", "{") or key in ("epoch", "iter"):
            try:
                value = _tuples(json.loads(text))
            except ValueError:
                value = text
        if key in _KEPT_OF_DATASET:
            meta.setdefault("dataset_meta", {})[key] = value
        else:
            meta[key] = value
    return meta


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples(inner) for key, inner in value.items()}
    return tuple(_tuples(inner) for inner in value) if isinstance(value, list) else value


def _unfit_key(key: object) -> str:
    return _unfit(key) if isinstance(key, str | int) else f"named by a {type(key).__name__}"


def _reason(value: object) -> str:
    try:
        return _unfit(value)
    except RecursionError:
        return "contains itself"


def _unfit(value: object) -> str:
    """Why a value is not published; empty when it may be."""
    if isinstance(value, str):
        return _leak(value)
    if isinstance(value, PurePath):
        return "a path of the machine that it was made on"
    if isinstance(value, list | tuple):
        return next(filter(None, map(_unfit, value)), "")
    if isinstance(value, Mapping):
        reasons = (_unfit_key(key) or _unfit(inner) for key, inner in value.items())
        return next(filter(None, reasons), "")
    if value is None or isinstance(value, bool | int | float | np.number | np.bool_ | torch.Tensor):
        return ""
    return f"a {type(value).__name__}, no plain value"


def _leak(text: str) -> str:
    if _MACHINE_ID.fullmatch(text):
        return ""
    if not text.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in text):
        return "no text that can be written"
    if _ADDRESS.search(text):
        return "holds an address of someone"
    if _WHOLE_PATH.match(text) or _PATH_INSIDE.search(text):
        return "holds a path of the machine that it was made on"
    return ""


def _plain(value: Any) -> Any:
    """Copy: equal texts are one object, all else is its own, so that a pickle of it depends on the values alone."""
    if isinstance(value, str):
        return sys.intern(str(value))
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, torch.Tensor):
        return value.detach().clone(memory_format=torch.contiguous_format)
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if isinstance(value, tuple):
        return tuple(_plain(inner) for inner in value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(inner) for key, inner in value.items()}
    return value
