"""Which of a checkpoint's weights are published, and how they are stored.

Training with averaging (EMA) leaves two sets of weights in one file, and each framework has its own way:

    torchvision   ``model_ema`` is the average, ``model`` the last step
    MMEngine      ``state_dict`` is the average, already exchanged; ``ema_state_dict`` (with ``steps``) is the last step
                  (EMAHook.before_save_checkpoint: "directly load the averaged model weights for deployment")
    MMCV 1.x      ``state_dict`` holds both: ``a.weight`` is the average, its twin ``ema_a_weight`` the last step
                  (EMAHook.after_train_epoch exchanges them before the checkpoint is saved)
"""

import sys
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from detserve.checkpoint import STATE_KEYS, is_state, strip_prefixes
from detserve.errors import CheckpointError

Ema = Literal["auto", "use", "drop"]
State = OrderedDict[str, torch.Tensor]
_AVERAGED_KEYS = ("model_ema", "ema")
# Averages that are not what `detserve.checkpoint` takes; they are published when they are asked for.
_OTHER_AVERAGES = ("state_dict_ema", "ema_state_dict")
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
_SMALLEST_HALF = torch.finfo(torch.float16).smallest_normal


@dataclass(frozen=True)
class Weights:
    """Chosen weights.

    Attributes:
        state: name to tensor, wrappers' prefixes dropped, in the checkpoint's order.
        key: where they lay; empty when the checkpoint is the state dict.
        averaged: whether they are the average; None when nothing is said about averaging.
        versions: of the modules (``state_dict()._metadata``), which some modules load by.
        notes: what a person should know.
    """

    state: dict[str, torch.Tensor]
    key: str
    averaged: bool | None
    versions: dict[str, dict[str, int]]
    notes: tuple[str, ...]


def choose_weights(content: object, ema: Ema, name: str) -> Weights:
    """Choose the weights to publish.

    Args:
        content: of the checkpoint.
        ema: ``auto`` takes what `load_state_dict` takes, so that what is published is what was evaluated; ``use`` the
            average, ``drop`` the last step's.
        name: of the checkpoint, for messages.

    Raises:
        CheckpointError: there are no weights, or none of the kind asked for.
    """
    places = _places(content)
    usual = next((key for key in STATE_KEYS if key in places), "" if "" in places else None)
    averages = [key for key in places if key in _AVERAGED_KEYS]
    others = [key for key in places if key in _OTHER_AVERAGES or "." in key]
    plain = next((key for key in STATE_KEYS if key in places and key not in _AVERAGED_KEYS), None)
    if usual is None and not others:
        keys = ", ".join(map(str, list(content)[:8])) if isinstance(content, Mapping) else type(content).__name__
        raise CheckpointError(
            f"weights {name}: got {keys}, expected a state dict, alone or under one of {', '.join(STATE_KEYS)}."
        )
    exchanged = plain == "state_dict" and "steps" in places.get("ema_state_dict", {})
    twins = _twins(places[plain or ""]) if plain or usual == "" else {}
    last: str | None
    mean: str | None
    if exchanged:
        last, mean = "ema_state_dict", "state_dict"
    elif twins:
        last = mean = plain or ""
    else:
        last, mean = usual if usual == "" else plain, next(iter([*averages, *others]), None)
    if ema == "use" and mean is None:
        raise CheckpointError(f"weights {name}: got --ema use, but there are no averaged weights. Leave --ema out.")
    if ema == "drop" and last is None:
        raise CheckpointError(f"weights {name}: got --ema drop, but only averaged weights ({mean}) are there.")
    key = {"use": mean, "drop": last, "auto": mean if usual is None else usual}[ema]
    if key is None:
        raise CheckpointError(f"weights {name}: no weights for --ema {ema}.")  # pragma: no cover - both told above
    state = {one: tensor for one, tensor in places[key].items() if one not in twins.values()}
    if twins and ema == "drop":
        state |= {one: places[key][twin] for one, twin in twins.items()}
    told = mean is not None
    averaged = (key == mean and not (twins and ema == "drop")) if told else None
    notes = _notes(places, key, mean, others if not exchanged else [], ema)
    if twins:
        size = sum(places[key][twin].nbytes for twin in twins.values())
        notes.append(
            f"{len(twins)} tensors of {key or 'the state dict'} ({size} bytes) are left out: ema_* holds every "
            f"parameter once more, {'the average' if ema == 'drop' else 'as the last step left it'}"
        )
    return _unwrapped(state, key, averaged, places[key], notes)


def stored(
    state: Mapping[str, torch.Tensor], *, half: bool, allow_nonfinite: bool, tied: bool
) -> tuple[State, tuple[str, ...]]:
    """Return the tensors as they are written, each in memory of its own, and notes.

    Args:
        state: name to tensor.
        half: floating-point tensors as float16; integers stay.
        allow_nonfinite: NaN and infinity are no error.
        tied: names that share their whole tensor go on sharing it (safetensors cannot).

    Raises:
        CheckpointError: names the tensor that is not finite, does not fit into float16, or is no plain tensor.
    """
    written: State = OrderedDict()
    known: dict[tuple[object, ...], torch.Tensor] = {}
    lost: list[str] = []
    variances: list[str] = []
    doubled = 0
    for name, given in state.items():
        if given.layout != torch.strided or given.is_quantized or given.device.type != "cpu":
            kind = "quantized" if given.is_quantized else f"{given.layout} on {given.device}"
            raise CheckpointError(f"weights: {name}: got a tensor that is {kind}, expected a dense one. Save it dense.")
        tensor = given.detach()
        wide = tensor.to(torch.float32) if tensor.is_floating_point() and tensor.itemsize == 1 else tensor
        if not allow_nonfinite and not bool(torch.isfinite(wide).all()):
            raise CheckpointError(
                f"weights: {name}: got {int((~torch.isfinite(wide)).sum())} values that are NaN or infinite, expected "
                "finite weights. Publish an earlier checkpoint, or say --allow-nonfinite."
            )
        place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
        identity = (*place, tensor.dtype)
        if tensor.numel() and identity in known:
            doubled += 1
            written[sys.intern(name)] = known[identity] if tied else known[identity].clone()
            continue
        kept = tensor.clone(memory_format=torch.contiguous_format)
        if half and tensor.is_floating_point() and tensor.itemsize > 1:
            kept = _halved(name, kept)
            if bool(((kept == 0) & (tensor != 0)).any()):
                lost.append(name)
            if name.endswith("running_var") and bool((tensor < _SMALLEST_HALF).any()):
                variances.append(name)
        known[identity] = written[sys.intern(name)] = kept
    notes = []
    if lost:
        notes.append(f"{len(lost)} tensors hold values too small for float16, which became 0 (first: {lost[0]})")
    if variances:
        notes.append(
            f"{len(variances)} running variances of batch norms lie below what float16 holds exactly "
            f"({_SMALLEST_HALF:.1e}; first: {variances[0]}); compare with the original before releasing"
        )
    if doubled and not tied:
        notes.append(f"{doubled} names share their tensor with another; safetensors hold each one apart")
    return written, tuple(notes)


def _halved(name: str, tensor: torch.Tensor) -> torch.Tensor:
    half = tensor.to(torch.float16)
    over = torch.isinf(half) & torch.isfinite(tensor)
    if bool(over.any()):
        largest = tensor[over].abs().max().item()
        raise CheckpointError(
            f"weights: {name}: got {largest:.6g}, expected at most {torch.finfo(torch.float16).max:g} for float16. "
            "Publish without --half."
        )
    return half


def _places(content: object) -> dict[str, Mapping[str, torch.Tensor]]:
    """Where state dicts lie: under the empty name when the checkpoint is one."""
    if not isinstance(content, Mapping):
        return {}
    if is_state(content):
        return {"": content}
    places = {key: content[key] for key in (*STATE_KEYS, *_OTHER_AVERAGES) if is_state(content.get(key))}
    for key in _AVERAGED_KEYS:
        inner = content.get(key)
        if key not in places and isinstance(inner, Mapping):
            # Such as RT-DETR's `ema`, with its `module` and how often it was updated.
            places |= {f"{key}.{name}": inner[name] for name in ("module", "state_dict") if is_state(inner.get(name))}
    return places


def _twins(state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Name to its twin in MMCV 1.x, where a buffer's name holds no dots."""
    twins = {name: f"ema_{name.replace('.', '_')}" for name in state}
    twins = {name: twin for name, twin in twins.items() if twin in state and state[twin].shape == state[name].shape}
    parameters = [name for name in state if not name.endswith(_BUFFERS) and name not in twins.values()]
    # The hook doubles every parameter; a pair or two are some module's own names.
    return twins if 2 * len(twins) >= len(parameters) else {}


def _notes(
    places: Mapping[str, Mapping[str, torch.Tensor]], key: str, mean: str | None, others: list[str], ema: Ema
) -> list[str]:
    notes = []
    if ema == "auto" and others and key not in others:
        notes.append(
            f"{key or 'the state dict'} is taken, as `detserve archive` takes it; {others[0]} holds averaged weights: "
            "if those were evaluated, say --ema use"
        )
    if key == mean:
        whole = next((place for one, place in places.items() if one in ("model", "state_dict") and one != key), {})
        missing = [name for name in _bare(whole) if name not in _bare(places[key])]
        if missing:
            notes.append(
                f"{key} lacks {len(missing)} of the other weights' tensors (first: {missing[0]}): it may not be a "
                "whole model; compare before releasing, or say --ema drop"
            )
    return notes


def _uncounted(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Drop the counters of averaging: torch's ``n_averaged``, MMEngine's ``steps`` beside its wrapped model."""
    weights = {name: tensor for name, tensor in state.items() if name != "n_averaged"}
    if "steps" in weights and all(name.startswith("module.") for name in weights if name != "steps"):
        del weights["steps"]
    return weights


def _bare(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return strip_prefixes(_uncounted(state))


def _unwrapped(
    state: Mapping[str, torch.Tensor], key: str, averaged: bool | None, place: object, notes: list[str]
) -> Weights:
    wrapped = _uncounted(state)
    bare = _bare(wrapped)
    prefix = next(iter(wrapped), "").removesuffix(next(iter(bare), ""))
    if prefix:
        notes = [*notes, f"the wrapper's prefix {prefix!r} is dropped from {len(bare)} names"]
    return Weights(bare, key, averaged, _versions(getattr(place, "_metadata", None), prefix), tuple(notes))


def _versions(metadata: Any, prefix: str) -> dict[str, dict[str, int]]:
    if not isinstance(metadata, Mapping):
        return {}
    versions: dict[str, dict[str, int]] = {}
    for name, told in metadata.items():
        version = told.get("version") if isinstance(told, Mapping) else None
        if isinstance(name, str) and f"{name}.".startswith(prefix) and isinstance(version, int):
            versions[sys.intern(f"{name}."[len(prefix) :].removesuffix("."))] = {sys.intern("version"): version}
    return versions
