"""What is wrong with an archive of MMDetection's mmdet2torchserve.py, each with what was got, expected, and to be done.

Found by reading the archive: its manifest, its config, the text of its handler and the contents of its checkpoint.
Nothing of it is run.
"""

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from shlex import quote
from typing import Any

from dethandlers.artefact import CATEGORY_MAP_FILE, DIGESTS_FILE, GOLDEN_FILE
from detserve.errors import CheckpointError, DetserveError
from detserve.mmdet_archive import OriginalArchive, OriginalHandler, read_original
from detserve.mmdet_checkpoint import config_class_names, model_class_count, read_checkpoint
from detserve.mmdet_config import read_config

from dettools.diagnosis import Finding

_REPACK = "Pack it anew (last line)."
_DO_NOT_LOAD = "Do not load it. Get a checkpoint that holds only data."


def diagnose_original(path: Path) -> list[Finding]:
    """Look at one archive; never raises for what it finds. The last finding is how it is repaired."""
    with tempfile.TemporaryDirectory(prefix="detserve-") as folder:
        try:
            archive = read_original(path, Path(folder))
            config = read_config(archive.config).values
            findings = [*_worker(archive), *_weights(archive, config), *_handler(archive, config), *_contents(archive)]
        except DetserveError as error:
            return [Finding(path.name, "fail", str(error), "Pack the model's config and checkpoint anew.")]
    repaired = path.with_name(f"{path.stem}-repaired.mar")
    refused = any(one.subject == "weights" and "refused" in one.found for one in findings)
    summary = (
        f"{sum(one.state == 'fail' for one in findings)} faults, {sum(one.state == 'warn' for one in findings)} more"
    )
    if refused:
        remedy = "Get a checkpoint that holds only data; then `detserve archive CONFIG.py CHECKPOINT.pth`."
        return [*findings, Finding("repair", "fail", f"{summary}; its checkpoint must not be read", remedy)]
    found = f"{summary}; config and checkpoint ({archive.name} {archive.version}) can be taken out and packed anew"
    return [
        *findings,
        Finding("repair", "ok", found, f"detserve archive {quote(str(path))} --out {quote(str(repaired))}"),
    ]


def _worker(archive: OriginalArchive) -> Iterator[Finding]:
    if archive.config_slot.endswith(".py"):
        yield Finding(
            "worker settings",
            "fail",
            f"got the Python config {archive.config_slot} where TorchServe expects YAML: TorchServe 0.12 cannot parse "
            "it and the workers never start",
            _REPACK,
        )
    else:
        yield Finding(
            "worker settings", "warn", "got none, expected batch size, delay, workers and time limits", _REPACK
        )


def _weights(archive: OriginalArchive, config: Mapping[str, Any]) -> Iterator[Finding]:
    name = archive.checkpoint.name
    if archive.checkpoint.suffix == ".safetensors":
        return
    yield Finding(
        "weights",
        "fail",
        f"got the pickle {name}, expected safetensors: MMEngine unpickles it in full (with torch before 2.6; its "
        "maintained fork as the fallback), which runs whatever code is in it with the rights of the server",
        _REPACK,
    )
    try:
        checkpoint = read_checkpoint(archive.checkpoint)
    except CheckpointError as error:
        yield Finding("weights", "fail", str(error), _DO_NOT_LOAD)
        return
    size = archive.checkpoint.stat().st_size
    useful = sum(tensor.numel() * tensor.element_size() for tensor in checkpoint.state.values())
    if size > 1.5 * useful + 1e6:
        yield Finding(
            "weights",
            "warn",
            f"got {size / 1e6:.0f} MB, of which {useful / 1e6:.0f} MB are the model's; the rest is the optimizer's "
            "and other training state",
            _REPACK,
        )
    if not checkpoint.class_names:
        count = model_class_count(config["model"])
        own = config_class_names(config)
        remedy = "The config names them: they are taken." if own else "Give them: --categories COCO.json."
        yield Finding(
            "class names",
            "fail",
            f"got none in the checkpoint of a model with {count} classes, expected theirs: `init_detector` then "
            "answers with the names of COCO's",
            remedy,
        )


def _handler(archive: OriginalArchive, config: Mapping[str, Any]) -> Iterator[Finding]:
    handler = archive.handler
    yield from _imports(handler)
    if handler.one_by_one:
        yield Finding(
            "batches",
            "fail",
            "got `inference_detector` for the whole batch, expected one forward pass: it goes through the images one "
            "by one and builds the test pipeline again on every call, so that batching gains nothing",
            _REPACK,
        )
    if handler.decodes_unchecked:
        yield Finding(
            "bad images",
            "fail",
            "got no check of what is decoded, expected an error for that image alone: one broken upload fails its "
            "whole batch",
            _REPACK,
        )
    if handler.threshold is not None:
        yield Finding(
            "threshold",
            "fail",
            f"got the constant {handler.threshold:g}, expected the request's: what scores less is never answered, and "
            "an AP measured through it is cut off",
            f"{_REPACK} To keep it as the default: --serving score_threshold={handler.threshold:g}",
        )
    if handler.device_unchecked:
        yield Finding(
            "device",
            "warn",
            "got `gpu_id` unchecked: without one on a machine with CUDA the device is 'cuda:None'",
            _REPACK,
        )
    if not handler.reads_masks and _has_masks(config["model"]):
        yield Finding("masks", "fail", "got a model with masks and a handler that drops them", _REPACK)


def _imports(handler: OriginalHandler) -> Iterator[Finding]:
    needs = [one for one in handler.imports if one.partition(".")[0] in ("mmcv", "mmdet", "mmengine")]
    if not needs:
        return
    yield Finding(
        "handler",
        "fail",
        f"got {handler.name}, which imports {', '.join(needs)}: mmcv then wants its compiled operators, without which "
        "every worker dies; expected one that says what it needs and does without them",
        f"{_REPACK} The worker still needs MMDetection; nothing has to be compiled.",
    )


def _has_masks(part: Any) -> bool:
    """Whether a head for masks stands anywhere in a config's model."""
    if isinstance(part, Mapping):
        return bool(part.get("mask_head")) or any(_has_masks(inner) for inner in part.values())
    return isinstance(part, list | tuple) and any(_has_masks(inner) for inner in part)


def _contents(archive: OriginalArchive) -> Iterator[Finding]:
    lacking = {
        DIGESTS_FILE: "digests of its members: nothing tells whether it was changed",
        CATEGORY_MAP_FILE: "a category map: labels cannot be joined with a data set's categories",
        GOLDEN_FILE: "a golden image with its detections: wrong results are never noticed",
    }
    for name, what in lacking.items():
        if name not in archive.members:
            yield Finding(name, "warn", f"got none, expected {what}", _REPACK)
