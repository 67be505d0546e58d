"""Publishing a checkpoint: what a release needs of it, under a name that proves its content.

    checkpoint ─► restricted reading ─► weights chosen ─► metadata scrubbed ─► bytes, always the same ─► SHA-256
                                                                                                           │
    STEM-<first 8 digits>.pth ◄─ renamed in one step ◄─ read back, every tensor compared ◄─ written beside it

A ``.pth`` is written as torch's zip file, not as the older pickle stream that MMDetection's publish_model.py chose for
readers before torch 1.6: zip files are what ``torch.load(weights_only=True)`` is made for, and MMDetection loads both.
The name is the one that ``torch.hub.load_state_dict_from_url(…, check_hash=True)`` checks.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import struct
import tempfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from dethandlers.artefact import digest_file
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from detserve.checkpoint import unpickle
from detserve.errors import CheckpointError, DetserveError
from detserve.published_metadata import (
    PUBLISHED,
    Removed,
    as_texts,
    from_texts,
    plain_values,
    scrub_metadata,
    size_of,
)
from detserve.published_weights import Ema, State, Weights, choose_weights, stored

DEFAULT_SAVE_KEYS = ("meta", "state_dict")
_PICKLED = (".pth", ".pt")
_SAFETENSORS = ".safetensors"
_DIGITS = 8
_OLD_DIGEST = re.compile(r"-(?!(19|20)\d\d(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])$)[0-9a-f]{8}$")  # dates stay


class PublishError(DetserveError):
    """The release cannot be written as asked."""


@dataclass(frozen=True)
class Published:
    """A release.

    Attributes:
        path: of the file, named by its digest.
        sha256: of the file, hex.
        size: of the file in bytes.
        tensors: how many it holds.
        source: the checkpoint, with ``source_size`` in bytes and ``source_sha256``.
        weights: the checkpoint's key that was taken; empty when it is a state dict.
        averaged: whether these are the average; None when nothing tells of averaging.
        half: whether stored as float16.
        dropped: keys of the checkpoint that are not in the release.
        scrubbed: what of the kept keys is not in the release.
        written: False for a dry run, and when the very same file was there.
        existed: whether the very same file was there.
        notes: what a person should know.
    """

    path: Path
    sha256: str
    size: int
    tensors: int
    source: Path
    source_size: int
    source_sha256: str
    weights: str
    averaged: bool | None
    half: bool
    dropped: tuple[Removed, ...]
    scrubbed: tuple[Removed, ...]
    written: bool
    existed: bool
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Release:
    """What is written: weights, and what stands beside them; ``plain`` when the state dict is the whole file."""

    state: State
    others: dict[str, Any]
    plain: bool

    def pickled(self) -> bytes:
        content: Any = self.state if self.plain else {**self.others, "state_dict": self.state}
        # Written to a file by name, the name would be part of the bytes.
        buffer = io.BytesIO()
        torch.save(content, buffer)
        return buffer.getvalue()

    def as_safetensors(self) -> bytes:
        written = save(dict(self.state), as_texts(self.others.get("meta", {})))
        # safetensors writes its metadata in another order in each process, and the tensors' names in that of their
        # offsets; both orders are free.
        (length,) = struct.unpack("<Q", written[:8])
        header = json.loads(written[8 : 8 + length])
        metadata = dict(sorted(header.pop("__metadata__").items()))
        ordered = {"__metadata__": metadata, **{name: header[name] for name in self.state}}
        text = json.dumps(ordered, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text + written[8 + length :]


def publish(
    source: Path,
    out: Path,
    *,
    save_keys: Sequence[str] = DEFAULT_SAVE_KEYS,
    ema: Ema = "auto",
    half: bool = False,
    allow_nonfinite: bool = False,
    dry_run: bool = False,
    force: bool = False,
) -> Published:
    """Publish a checkpoint.

    The same checkpoint and options give the same bytes, so the same name, under one version of torch: how it lays out
    a zip file is part of the bytes.

    Args:
        source: ``.pth``, ``.pt`` or ``.ckpt`` (nothing in it is executed), or ``.safetensors``.
        out: ``released.pth``, ``.pt`` or ``.safetensors``; the file is ``released-<8 digits>.pth`` beside it. Digits
            that the name already ends in are replaced.
        save_keys: keys of the checkpoint to keep; the weights are always under ``state_dict``.
        ema: ``auto`` takes what `detserve archive` takes, ``use`` the averaged weights, ``drop`` the last step's.
        half: store floating-point tensors as float16.
        allow_nonfinite: publish NaN and infinity.
        dry_run: do all but write.
        force: replace another file of that name.

    Raises:
        CheckpointError: the checkpoint cannot be read, or its weights must not be published.
        PublishError: the release cannot be written there; nothing is left of it.
    """
    suffix = _checked_out(source, out)
    content, texts = _content(source)
    weights = choose_weights(content, ema, source.name)
    bare = weights.key == ""
    top: Mapping[str, Any] = {} if bare or not isinstance(content, Mapping) else content
    extra = _extra_keys(top, save_keys, weights, suffix)
    state, stored_notes = stored(weights.state, half=half, allow_nonfinite=allow_nonfinite, tied=suffix != _SAFETENSORS)
    if weights.versions:
        vars(state)["_metadata"] = OrderedDict(weights.versions)
    digest = digest_file(source)
    others: dict[str, Any] = {}
    scrubbed: list[Removed] = []
    if "meta" in save_keys:
        meta, scrubbed = scrub_metadata(from_texts(texts) if texts else top.get("meta"))
        told = {"source_sha256": digest, "weights": weights.key, **({"precision": "fp16"} if half else {})}
        # A release of a release stays what it was; with more in it, it is a checkpoint that training began from one.
        meta[PUBLISHED] = told | (meta.get(PUBLISHED, {}) if set(top) <= set(DEFAULT_SAVE_KEYS) else {})
        others["meta"] = meta
    others |= plain_values({key: top[key] for key in extra}, "", scrubbed)
    plain = bare and set(texts) <= {"format"} and suffix != _SAFETENSORS
    release = _Release(state, others, plain or (not others and bare))
    written = release.as_safetensors() if suffix == _SAFETENSORS else release.pickled()
    sha256 = hashlib.sha256(written).hexdigest()
    path = out.with_name(f"{_OLD_DIGEST.sub('', out.stem)}-{sha256[:_DIGITS]}{out.suffix}")
    existed = _is_there(path, sha256, source, force=force)
    if not dry_run and not existed:
        _write(path, written, release)
    kept = {weights.key.partition(".")[0], *extra, *(["meta"] if "meta" in save_keys else [])}
    dropped = [
        Removed(str(key), size_of(value), "not among the kept keys") for key, value in top.items() if key not in kept
    ]
    return Published(
        path=path,
        sha256=sha256,
        size=len(written),
        tensors=len(state),
        source=source,
        source_size=source.stat().st_size,
        source_sha256=digest,
        weights=weights.key,
        averaged=weights.averaged,
        half=half,
        dropped=tuple(dropped),
        scrubbed=tuple(scrubbed),
        written=not dry_run and not existed,
        existed=existed,
        notes=(*weights.notes, *stored_notes, *_hub_note(path)),
    )


def _checked_out(source: Path, out: Path) -> str:
    suffix = out.suffix.lower()
    if suffix not in (*_PICKLED, _SAFETENSORS):
        raise PublishError(f"got {out}, expected a file named .pth, .pt or .safetensors. Name the release so.")
    if not _OLD_DIGEST.sub("", out.stem):
        raise PublishError(f"got {out}, expected a name before the digest, such as detector{suffix}.")
    if not out.parent.is_dir():
        raise PublishError(f"got {out}, but there is no folder {out.parent}. Make it, or choose another.")
    if source.exists() and out.exists() and source.samefile(out):
        raise PublishError(
            f"got {source} as input and as output, expected two names. The release gets a name of its own; nothing "
            "was changed. Give another OUT."
        )
    return suffix


def _content(path: Path) -> tuple[Any, dict[str, str]]:
    """Read a checkpoint, and the metadata of a safetensors file."""
    if not path.is_file():
        raise CheckpointError(f"weights: got {path}, which is no file. Give the checkpoint's path.")
    if path.suffix.lower() != _SAFETENSORS:
        return unpickle(path), {}
    try:
        tensors = load_file(path)
        with path.open("rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"weights {path.name}: not safetensors, or damaged ({error}).") from error
    texts = header.pop("__metadata__", {})
    return {name: tensors[name] for name in header}, texts


def _extra_keys(top: Mapping[str, Any], save_keys: Sequence[str], weights: Weights, suffix: str) -> list[str]:
    if not {"state_dict", weights.key} & set(save_keys):
        raise PublishError(
            f"--save-keys: got {' '.join(save_keys)}, expected state_dict among them: weights are what is published."
        )
    extra = [key for key in dict.fromkeys(save_keys) if key not in ("meta", "state_dict", weights.key)]
    unknown = [key for key in extra if key not in top]
    if unknown:
        there = ", ".join(map(str, top)) or "none, it is a state dict"
        raise PublishError(f"--save-keys: got {' '.join(unknown)}, expected keys of the checkpoint ({there}).")
    if extra and suffix == _SAFETENSORS:
        raise PublishError(
            f"--save-keys: got {' '.join(extra)}, expected meta and state_dict: safetensors hold weights and texts "
            "only. Publish a .pth to keep more."
        )
    return extra


def _is_there(path: Path, sha256: str, source: Path, *, force: bool) -> bool:
    """Whether the very same file is there already.

    Raises:
        PublishError: another one is.
    """
    if not os.path.lexists(path):
        return False
    if path.is_file() and digest_file(path) == sha256:
        return True
    if path.is_file() and not path.samefile(source) and force:
        return False
    remedy = "Choose another OUT." if force else "Replace it with --force, or choose another OUT."
    raise PublishError(f"{path}: exists already, and is another file than the release. {remedy}")


def _write(path: Path, content: bytes, release: _Release) -> None:
    """Write beside the place, read back, compare, then rename: under the final name there is only what was checked."""
    temporary = ""
    try:
        handle, temporary = tempfile.mkstemp(prefix=".publish-", suffix=path.suffix, dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        _verify(Path(temporary), content, release)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise PublishError(
                f"{path}: cannot be written ({error.strerror or error}). Nothing was left; make room, or choose "
                "another folder."
            ) from error
        raise
    with contextlib.suppress(OSError):  # not every system lets a folder be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _verify(path: Path, content: bytes, release: _Release) -> None:
    """Read a written release back.

    Raises:
        PublishError: its digest, a tensor or its metadata is not what was to be written.
    """
    fault = "" if digest_file(path) == hashlib.sha256(content).hexdigest() else "its digest"
    reread, texts = _content(path)
    others: dict[str, Any] = {}
    if path.suffix.lower() == _SAFETENSORS:
        fault = fault or ("" if texts == as_texts(release.others.get("meta", {})) else "its metadata")
    elif not release.plain:
        others = {key: value for key, value in reread.items() if key != "state_dict"}
        reread = reread["state_dict"]
        fault = fault or ("" if _equal(others, release.others) else "its metadata")
    fault = fault or ("" if _equal(dict(reread), dict(release.state)) else "a tensor")
    if fault:
        raise PublishError(
            f"{path.parent}: {fault} is not what was written, when read back. Nothing was left; check the disk."
        )


def _equal(one: Any, other: Any) -> bool:
    """Whether values are the same, tensors bit by bit, names in the same order."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same_kind = one.dtype == other.dtype and one.shape == other.shape
        return same_kind and torch.equal(_bits(one), _bits(other))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return list(one) == list(other) and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(one == other) or (one != one and other != other)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _hub_note(path: Path) -> list[str]:
    # torch.hub takes the first of what looks like a digest.
    told = torch.hub.HASH_REGEX.search(path.name)
    if path.suffix == _SAFETENSORS:
        return []
    if told and path.stem.endswith(f"-{told.group(1)}"):
        return []
    return [f"torch.hub with check_hash=True reads another digest in {path.name}: give OUT a name without '-' and '.'"]
