"""Weights of an older MMDetection for a newer one: the table of changes applied, and every moved layer run twice.

    version of the weights ─► changes between the two versions ─► rows ─► each head layer on random features:
                                                                          old score of a class = new score of it

The class order is proven through the layers' outputs, weights and bias together. A bias that is one class off, as
upgrade_model_version.py left it, differs there at once.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from packaging.version import InvalidVersion, Version
from torch.nn import functional

from dettools.converters.conversion import (
    COPY,
    Conversion,
    ConversionError,
    Copy,
    MoveBackground,
    Proof,
    Row,
    converted,
    prove,
    random_input,
)
from dettools.converters.mmdet_changes import CHANGES, NOT_IN_THE_TABLE, Change, Layer, State, layout_of
from dettools.converters.weight_files import WeightFile, read_weight_file

NEWEST = "3.3.0"
UPGRADED = "upgraded"
"""In ``meta`` of upgraded weights: what they were made of."""


def upgrade_checkpoint(
    source: Path,
    *,
    classes: int | None = None,
    made_by: str | None = None,
    wanted: str | None = None,
    config: Path | None = None,
    allow_code: bool = False,
) -> Conversion:
    """Convert a detector's weights for another version of MMDetection.

    Args:
        source: the checkpoint.
        classes: of the detector, the background among them; None takes it from the weights.
        made_by: version that made the weights; None takes it from their ``meta``.
        wanted: version that shall load them; None is the newest known, or ``made_by`` where that is newer.
        config: of the wanted version: which of its model's keys the weights do not give, and which they have too many.
        allow_code: a config that is no literal, and modules that it names, are run.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        ConversionError: the version is unknown, or a layer has not the shape that its version gives it.
    """
    file = read_weight_file(source)
    old, new = _versions(file, made_by, wanted)
    _refuse_contradictions(file, old)
    _refuse_unknown_changes(file.state, old, new)
    changes = [one for one in CHANGES if one.applies(old, new) and one.detectors(file.state)]
    moving = any(one.move and re.search(one.pattern, key) for one in changes for key in file.state)
    number, names = _classes(file, classes) if moving else (classes or 0, ())
    rows, told = _rows(file.state, changes, number)
    state = converted(rows, file.state)
    proofs = _proofs(rows, file.state, state)
    missing, unexpected = _fit(state, config, allow_code=allow_code) if config else ((), ())
    notes = list(_notes(file, rows, old, new))
    # The version is that of the weights as they are now, also for what reads nothing else: no background moves twice.
    meta = {**file.meta, "mmdet_version": str(new), UPGRADED: {"from": str(old), "source_sha256": file.sha256}}
    facts: dict[str, Any] = {
        "made_by": str(old),
        "wanted": str(new),
        "changes": [{"since": since, "what": why, "tensors": count} for (since, why), count in told.items()],
        "needed": bool(told),
    }
    if number:
        facts |= {"num_classes": number, "classes": list(names)}
    if config:
        facts["config"] = config.name
    return Conversion(
        command="upgrade-checkpoint",
        source=source,
        source_sha256=file.sha256,
        rows=tuple(rows),
        state=state,
        missing=missing,
        unexpected=unexpected,
        proofs=tuple(proofs),
        facts=facts,
        meta=meta,
        notes=tuple(notes),
    )


def _versions(file: WeightFile, given: str | None, wanted: str | None) -> tuple[Version, Version]:
    told = file.meta.get("mmdet_version")
    if given is None and told is None:
        raise ConversionError(
            f"{file.path.name}: got no meta.mmdet_version, expected the version of MMDetection that made the weights: "
            "what has to change depends on it. Give it with --from, such as --from 1.2.0."
        )
    old, newest = _version(given if given is not None else told, "--from"), Version(NEWEST)
    new = max(old, newest) if wanted is None else _version(wanted, "--to")
    if old > new:
        raise ConversionError(f"got weights of MMDetection {old} for {new}, expected an older version than --to.")
    if wanted is not None and new > newest:
        raise ConversionError(f"--to: got {wanted}, expected at most {NEWEST}: what later versions changed is unknown.")
    return old, new


def _version(text: object, option: str) -> Version:
    """Return a version without what is built on top of it: 1.0rc1+0d3c2fe is 1.0."""
    try:
        return Version(Version(str(text)).base_version)
    except InvalidVersion:
        raise ConversionError(
            f"got the version {text!r}, expected one of MMDetection such as 1.2.0. Give it with {option}."
        ) from None


def _refuse_contradictions(file: WeightFile, old: Version) -> None:
    """Refuse names of another version than the weights are said to be of: their background would move twice, or never.

    The original script leaves the old version beside upgraded weights, and so did trainings on the way to 2.0.
    """
    layout = layout_of(file.state)
    if layout and (layout == "2.0.0") != (old >= Version("2.0.0")):
        known = "roi_head.*, as they are since" if layout == "2.0.0" else "bbox_head.*, as they were before"
        raise ConversionError(
            f"{file.path.name}: got heads named {known} MMDetection 2.0.0, in weights that are said to be of {old}, "
            f"expected names of that version. Were they upgraded before? Give the version whose order of classes they "
            f"have, such as --from {layout}."
        )


def _refuse_unknown_changes(state: State, old: Version, new: Version) -> None:
    for since, pattern, detectors in NOT_IN_THE_TABLE:
        if old < Version(since) <= new and any(re.search(pattern, key) for key in state):
            raise ConversionError(
                f"got weights of {old} of {detectors}, whose parts MMDetection {since} named and ordered anew, "
                f"expected another detector. Load them with MMDetection before {since} (--to), or take weights that "
                "were trained with it."
            )


def _classes(file: WeightFile, given: int | None) -> tuple[int, tuple[str, ...]]:
    """Return the number of classes, the background among them, and the names of the others."""
    heads = {
        key: int(one.shape[0])
        for key, one in file.state.items()
        if re.search(r"(^|\.)fc_cls\.weight$", key) and one.dim()
    }
    names = _names(file.meta)
    number = given
    if number is None and len(set(heads.values())) == 1:
        number = next(iter(heads.values()))
    if number is None and names:
        number = len(names) + 1
    number = 81 if number is None else number
    if number < 2:
        raise ConversionError(f"--num-classes: got {number}, expected at least 2: a class and the background.")
    for key, outputs in heads.items():
        if outputs != number:
            raise ConversionError(
                f"{key}: got {outputs} outputs, expected {number} classes, the background among them. "
                f"Give --num-classes {outputs}, or leave it out."
            )
    return number, names if len(names) == number - 1 else ()


def _names(meta: Mapping[str, Any]) -> tuple[str, ...]:
    dataset = meta.get("dataset_meta")
    found = dataset.get("classes", ()) if isinstance(dataset, Mapping) else meta.get("CLASSES")
    return tuple(map(str, found)) if isinstance(found, list | tuple) else ()


def _rows(state: State, changes: list[Change], classes: int) -> tuple[list[Row], dict[tuple[str, str], int]]:
    """Return the table, and how many tensors each change is about."""
    rows: list[Row] = []
    told: dict[tuple[str, str], int] = {}
    for key, tensor in state.items():
        name, transform = key, COPY
        for change in changes:
            if not re.search(change.pattern, name):
                continue
            moved = change.move(Layer(key, state, classes)) if change.move else COPY
            if change.move and moved == COPY:
                continue
            told[change.since, change.why] = told.get((change.since, change.why), 0) + 1
            transform = moved if change.move else transform
            name = re.sub(change.pattern, change.rename, name) if change.rename else name
        rows.append(Row(key, name, _shape(tensor, transform), transform))
    return rows, told


def _shape(tensor: torch.Tensor, transform: Copy) -> tuple[int, ...]:
    if isinstance(transform, MoveBackground) and not transform.kept:
        return (tensor.shape[0] - transform.anchors * transform.per_class, *tensor.shape[1:])
    return tuple(tensor.shape)


def _proofs(rows: list[Row], source: State, target: State) -> list[Proof]:
    """Run each layer whose classes move, as it was and as it is, on the same features."""
    proofs = []
    by_source = {row.source: row for row in rows}
    for row in rows:
        if not isinstance(row.transform, MoveBackground) or not row.source.endswith(".weight"):
            continue
        bias = by_source.get(row.source.removesuffix("weight") + "bias")
        old = _outputs(source[row.source], None if bias is None else source[bias.source])
        new = _outputs(target[row.target], None if bias is None else target[bias.target])
        outputs = _by_class(old, new, row.transform)
        targets = [row.target] if bias is None else [row.target, bias.target]
        proofs.append(prove(row.target.removesuffix(".weight"), *outputs, relative=False, targets=targets))
    return proofs


def _outputs(weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return the outputs ``(4, channels)`` of a linear layer, or of a convolution at one place.

    In float64: a bias that is small beside the outputs must not hide in their rounding.
    """
    weight, bias = weight.double(), None if bias is None else bias.double()
    features = random_input(4, *weight.shape[1:]).double()
    layer = functional.linear if weight.dim() == 2 else functional.conv2d
    return layer(features, weight, bias).flatten(1)


def _by_class(
    old: torch.Tensor, new: torch.Tensor, move: MoveBackground
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return the objects' outputs and the background's: as MMDetection reads them, before 2.0 and since."""
    kept = move.classes if move.kept else move.classes - 1
    before = old.reshape(len(old), -1, move.classes, move.per_class)
    since = new.reshape(len(new), -1, kept, move.per_class)
    objects = move.classes - 1
    if not move.kept:
        return [before[:, :, 1:]], [since]
    return [before[:, :, 1:], before[:, :, 0]], [since[:, :, :objects], since[:, :, objects]]


def _fit(state: State, config: Path, *, allow_code: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Load the weights into a config's model; return which keys it misses and which it does not know."""
    from dethandlers.mmdet_model import build_network
    from detserve.mmdet_config import read_config

    network = build_network(read_config(config, allow_code=allow_code).values, allow_code=allow_code)
    try:
        found = network.load_state_dict(dict(state), strict=False)
    except RuntimeError as error:
        raise ConversionError(f"{config.name}: the weights do not fit its model: {str(error)[:600]}") from None
    return tuple(found.missing_keys), tuple(found.unexpected_keys)


def _notes(file: WeightFile, rows: list[Row], old: Version, new: Version) -> list[str]:
    notes = []
    if all(row.source == row.target and row.transform == COPY for row in rows):
        notes.append(
            f"nothing is needed: MMDetection {new} loads weights of {old} as they are; OUT holds the same tensors"
        )
    if old < Version("2.0.0") <= new:
        notes.append(
            "coordinates changed in 2.0.0, weights cannot tell that: for the old boxes and AP, the config needs "
            "LegacyAnchorGenerator, LegacyDeltaXYWHBBoxCoder and RoIAlign with aligned=False"
        )
    if file.dropped:
        notes.append(f"left out: {', '.join(file.dropped)}; the state of a training does not fit converted weights")
    return notes
