"""The `.mar` that MMDetection's own script writes, read as data, so that what is in it can be packed anew.

    config.py, checkpoint, mmdet_handler.py, MAR-INF/MANIFEST.json ─► names and sizes checked ─► config and checkpoint
                                                                      on disk, nothing run

Such an archive does not start on TorchServe 0.12 (its Python config stands where TorchServe expects YAML), but the
config and the checkpoint in it are whole, and often nobody has them elsewhere any more.
"""

import ast
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from detserve.errors import ArchiveError
from detserve.mar import MANIFEST_FILE, check_archive, read_json_member
from detserve.mmdet_config import ConfigError, read_config
from detserve.spec import require_name

_LARGEST_TEXT = 16 << 20
_LARGEST_CHECKPOINT = 32 << 30
_CHUNK = 1 << 20
_CHECKPOINTS = (".pth", ".pt", ".ckpt", ".safetensors")


@dataclass(frozen=True)
class OriginalHandler:
    """What the handler in the archive does, by its text; it is not run.

    Attributes:
        name: of the member; a handler that is a name of TorchServe's own has no text.
        imports: packages and modules that it imports.
        threshold: the score below which it drops detections; None when it has no such constant.
        reads_masks: whether it touches masks at all.
        one_by_one: whether it hands the batch to `inference_detector`, which goes through it image by image.
        decodes_unchecked: whether it decodes by `imfrombytes`, whose result for a bad image is None.
        device_unchecked: whether it makes the device's name of a `gpu_id` that may be None.
    """

    name: str
    imports: tuple[str, ...]
    threshold: float | None
    reads_masks: bool
    one_by_one: bool
    decodes_unchecked: bool
    device_unchecked: bool


@dataclass(frozen=True)
class OriginalArchive:
    """What was taken out of an archive of MMDetection's script.

    Attributes:
        config: the flattened config, written into the folder that the caller gave.
        checkpoint: beside it.
        name: of the model.
        version: of the model.
        notes: what a person should know when it is packed anew.
        handler: what its handler does.
        config_slot: what the manifest names as TorchServe's worker settings; empty when nothing.
        members: names of all members.
    """

    config: Path
    checkpoint: Path
    name: str
    version: str
    notes: tuple[str, ...]
    handler: OriginalHandler
    config_slot: str
    members: tuple[str, ...]


def is_original(path: Path) -> bool:
    """Tell whether a file is an archive as MMDetection's script writes them; False for what cannot be read."""
    try:
        _measured(path)
        _model_of(path)
    except ArchiveError:
        return False
    return True


def read_original(path: Path, folder: Path, *, name: str | None = None, version: str | None = None) -> OriginalArchive:
    """Take the config and the checkpoint out of an archive of MMDetection's `mmdet2torchserve.py`.

    Nothing in it is run: the config has to be literal, as that script writes it, and the checkpoint is only copied.

    Args:
        path: the `.mar`.
        folder: where both are written, under their own names; it is made when it is not there.
        name: of the model, instead of the archive's.
        version: of the model, instead of the archive's.

    Raises:
        SpecError: the name or the version is none that a model can have: it would lead out of the model store.
        ArchiveError: it is none of that script's, damaged, too large for the disk, or has members that lead out of it.
        ConfigError: the config in it is not a detector's, or would have to be run.
    """
    entries = _measured(path)
    model = _model_of(path)
    name, version = name or str(model["modelName"]), version or str(model.get("modelVersion") or "1.0")
    require_name(name, version, where=f"archive {path.name}")
    members = tuple(member.name for member in check_archive(path))
    names = {key: PurePosixPath(str(model.get(key) or "")).name for key in ("modelFile", "serializedFile", "handler")}
    checkpoint = names["serializedFile"]
    if not checkpoint.endswith(_CHECKPOINTS):
        raise ArchiveError(
            f"archive {path.name}: got the weights {checkpoint or 'none'}, expected a checkpoint of MMDetection "
            f"({', '.join(_CHECKPOINTS)}). Pack the model's config and checkpoint instead."
        )
    for member in (names["modelFile"], checkpoint):
        if member not in entries:
            raise ArchiveError(f"archive {path.name}: its manifest names {member}, which is not in it. Copy it again.")
    _require_room(entries, names["modelFile"], checkpoint, path, folder)
    config, weights = folder / names["modelFile"], folder / checkpoint
    with zipfile.ZipFile(path) as archive:
        for target in (config, weights):
            with archive.open(target.name) as source, target.open("wb") as file:
                shutil.copyfileobj(source, file, _CHUNK)
        text = archive.read(names["handler"]).decode("utf-8", "replace") if names["handler"] in entries else ""
    _require_detector(config, path)
    handler = _handler(names["handler"], text)
    return OriginalArchive(
        config,
        weights,
        name,
        version,
        _notes(handler, members, {*names.values(), MANIFEST_FILE}),
        handler,
        str(model.get("configFile") or ""),
        members,
    )


def _model_of(path: Path) -> dict[str, Any]:
    """Return the manifest's model when it is laid out as the script does it: a Python config beside a checkpoint."""
    manifest = read_json_member(path, MANIFEST_FILE)
    model = manifest.get("model") if isinstance(manifest, dict) else None
    if not isinstance(model, dict) or not model.get("modelName"):
        raise ArchiveError(f"archive {path.name}: {MANIFEST_FILE} names no model. Copy or build it again.")
    model_file = PurePosixPath(str(model.get("modelFile") or "")).name
    same = model_file and PurePosixPath(str(model.get("configFile") or "")).name == model_file
    # Releases before the archiver had a place for worker settings wrote the config as the model's code alone.
    if model_file.endswith(".py") and (same or "mmdet" in str(model.get("handler"))):
        return model
    raise ArchiveError(
        f"archive {path.name}: got the model file {model_file or 'none'} and the handler {model.get('handler')}, "
        "expected those of MMDetection's mmdet2torchserve.py: a config in Python, and its handler. Pack the model's "
        "config and checkpoint instead."
    )


def _measured(path: Path) -> dict[str, int]:
    """Return the members' unpacked sizes in bytes, before anything is unpacked."""
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
    except Exception as error:  # a damaged directory fails in many ways
        raise ArchiveError(f"archive {path}: cannot be read as a zip file ({error}). Copy it again.") from error
    for name, size in sizes.items():
        most = _LARGEST_TEXT if name.endswith((".py", ".json")) else _LARGEST_CHECKPOINT
        if size > most:
            raise ArchiveError(
                f"archive {path.name}: {name} is {size:,} bytes when it is unpacked, expected at most {most:,}. "
                "Do not use this file."
            )
    return sizes


def _require_room(sizes: dict[str, int], config: str, checkpoint: str, path: Path, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise ArchiveError(f"folder {folder}: cannot be written to ({error}). Choose another.") from error
    needed = sizes[config] + sizes[checkpoint]
    if needed > free:
        raise ArchiveError(
            f"archive {path.name}: needs {needed / 1e9:.1f} GB unpacked, {folder} has {free / 1e9:.1f} GB free. Make "
            "room there, or set TMPDIR to a larger disk."
        )


def _require_detector(config: Path, path: Path) -> None:
    values = read_config(config).values
    model = values.get("model")
    if not isinstance(model, dict) or "type" not in model:
        raise ConfigError(
            f"archive {path.name}: {config.name} has no model with a type; expected a config of MMDetection. Pack the "
            "model's config and checkpoint instead."
        )


def _handler(name: str, text: str) -> OriginalHandler:
    try:
        nodes = list(ast.walk(ast.parse(text)))
    except (SyntaxError, ValueError, RecursionError):
        nodes = []
    imports: set[str] = set()
    threshold: float | None = None
    words: set[str] = set()
    for node in nodes:
        match node:
            case ast.Import():
                imports |= {one.name for one in node.names}
            case ast.ImportFrom(module=str() as module):
                imports.add(module)
            case ast.Assign(targets=[ast.Name(id="threshold")], value=ast.Constant(value=float() | int() as value)):
                threshold = float(value)
            case ast.Attribute(attr=word) | ast.Name(id=word) | ast.Constant(value=str() as word):
                words.add(word)
    return OriginalHandler(
        name,
        tuple(sorted(imports)),
        threshold,
        bool(words & {"masks", "segm"}),
        "inference_detector" in words,
        "imfrombytes" in words,
        "gpu_id" in words,
    )


def _notes(handler: OriginalHandler, members: tuple[str, ...], known: set[str]) -> tuple[str, ...]:
    notes = []
    if handler.threshold is not None:
        notes.append(
            f"its handler answered with scores of {handler.threshold:g} and more alone; requests now ask for the "
            f"threshold they want. The old one as the default: --serving score_threshold={handler.threshold:g}"
        )
    if handler.name and not any(one.partition(".")[0] in ("mmdet", "mmcv") for one in handler.imports):
        notes.append(f"its handler {handler.name} is not MMDetection's own; what it does otherwise is left behind")
    left = sorted(set(members) - known)
    if left:
        notes.append(f"left behind: {', '.join(left)}; modules that the config imports have to be installed")
    return tuple(notes)
