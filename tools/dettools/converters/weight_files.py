"""Weight files of a conversion: read without executing anything, written in one step and never over the input.

.pth, .pt, … ─► restricted unpickler ─┐                      ┌─► OUT (.pth: tensors and plain values; .safetensors)
                                      ├─► state, meta ─► … ──┤      written beside, read back, then renamed
.safetensors ─► safetensors ──────────┘                      └─► OUT.certificate.json
"""

import json
import os
import tempfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dethandlers import __version__
from dethandlers.artefact import digest_file
from detserve.checkpoint import STATE_KEYS, is_state, load_state_dict, strip_prefixes, unpickle
from detserve.errors import CheckpointError
from detserve.published_metadata import as_texts, from_texts
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from dettools.converters.conversion import Conversion, ConversionError

SAFETENSORS = ".safetensors"
PICKLED = (".pth", ".pt", ".ckpt")
CERTIFICATE_SUFFIX = ".certificate.json"
# Where pycls keeps its weights; the others' places are those of every checkpoint.
_STATE_KEYS = ("state_dict", "model_state", *STATE_KEYS)
_MOST_VALUES = 1_000_000
# Tied weights are stored once; what repeats a number more often than this is no detector.
_MOST_COPIES, _SMALL = 4, 64 << 20


@dataclass(frozen=True)
class WeightFile:
    """A checkpoint: its weights, what its training told beside them, and the keys that are not carried over."""

    path: Path
    sha256: str
    state: dict[str, torch.Tensor]
    meta: dict[str, Any]
    dropped: tuple[str, ...]


@dataclass(frozen=True)
class Written:
    """What was written."""

    path: Path
    sha256: str
    size: int
    certificate: Path

    def to_json(self) -> dict[str, Any]:
        """Return it for the command's document."""
        return {
            "path": str(self.path),
            "sha256": self.sha256,
            "bytes": self.size,
            "certificate": str(self.certificate),
        }


def read_weight_file(path: Path) -> WeightFile:
    """Read a checkpoint of torch or safetensors.

    Raises:
        CheckpointError: no such file, damaged, without weights, or a pickle that needs more than data.
    """
    if not path.is_file():
        raise CheckpointError(f"weights: got {path}, which is no file. Give the checkpoint's path.")
    sha256 = digest_file(path)
    if path.suffix.lower() == SAFETENSORS:
        state = load_state_dict(path)
        with safe_open(path, "pt") as file:
            return WeightFile(path, sha256, state, from_texts(file.metadata() or {}), ())
    content = unpickle(path)
    if is_state(content):
        return WeightFile(path, sha256, _dense(content, path), {}, ())
    if isinstance(content, Mapping):
        for key in _STATE_KEYS:
            if is_state(content.get(key)):
                dropped = tuple(str(one) for one in content if one not in (key, "meta"))
                return WeightFile(path, sha256, _dense(content[key], path), _meta(content.get("meta"), path), dropped)
    told = ", ".join(map(str, list(content)[:8])) if isinstance(content, Mapping) else type(content).__name__
    raise CheckpointError(
        f"weights {path.name}: got {told or 'nothing'}, expected a state dict, alone or under one of "
        f"{', '.join(dict.fromkeys(_STATE_KEYS))}."
    )


def _dense(state: Mapping[str, torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
    """Return the weights, if all of them are plain arrays of the numbers that the file holds."""
    told, stored = 0, {}
    for key, tensor in state.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            kind = "quantised" if tensor.is_quantized else "empty (meta)" if tensor.is_meta else "sparse"
            raise CheckpointError(
                f"weights {path.name}: got {key} as a {kind} tensor, expected dense numbers. Save it dense, from the "
                "model before it was turned into that."
            )
        told += tensor.nbytes
        stored[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    if told > _MOST_COPIES * sum(stored.values()) + _SMALL:
        raise CheckpointError(
            f"weights {path.name}: got tensors of {told} bytes over {sum(stored.values())} stored ones, expected one "
            "number for each of their elements. Save them with .contiguous()."
        )
    return strip_prefixes(dict(state))


def _meta(meta: object, path: Path) -> dict[str, Any]:
    """Return what is told beside weights, as far as both kinds of files can hold it."""
    try:
        plain = _plain(meta, count()) if isinstance(meta, Mapping) else {}
    except RecursionError:
        raise CheckpointError(
            f"weights {path.name}: meta contains itself, or more than {_MOST_VALUES} values. "
            "Save the weights alone, with torch.save(model.state_dict(), …), and give --from."
        ) from None
    if not isinstance(plain.get("dataset_meta", {}), Mapping):
        del plain["dataset_meta"]
    return plain


def _plain(value: Any, seen: Iterator[int]) -> Any:
    """Copy plain values; what else a pickle held is left out.

    Raises:
        RecursionError: they contain each other without end, or so often that it comes to the same.
    """
    if next(seen) > _MOST_VALUES:
        raise RecursionError
    if isinstance(value, Mapping):
        return {key: _plain(one, seen) for key, one in value.items() if isinstance(key, str) and _is_plain(one)}
    if isinstance(value, list | tuple):
        kept = [_plain(one, seen) for one in value if _is_plain(one)]
        return tuple(kept) if isinstance(value, tuple) else kept
    return value.item() if isinstance(value, np.generic) else value


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | bool | int | float | np.generic | Mapping | list | tuple)


def check_output(source: Path, out: Path) -> None:
    """Refuse an output that cannot be.

    Raises:
        ConversionError: the input itself, no folder, an unknown kind of file, or no file's name.
    """
    try:
        _check_output(source, out)
    except OSError as error:
        raise ConversionError(f"got {error.filename}: {error.strerror}. Choose another name.") from None


def _check_output(source: Path, out: Path) -> None:
    if out.suffix.lower() not in (*PICKLED, SAFETENSORS):
        raise ConversionError(f"got {out}, expected a file named {', '.join(PICKLED)} or {SAFETENSORS}. Name it so.")
    if not out.parent.is_dir():
        raise ConversionError(f"got {out}, but there is no folder {out.parent}. Make it, or choose another.")
    for path in (out, certificate_path(out)):
        if path.is_dir():
            raise ConversionError(f"got {path}, which is a folder, expected a file's name. Choose another.")
    if source.exists() and out.exists() and source.samefile(out):
        raise ConversionError(f"got {out} as input and as output, expected two files. Nothing was changed.")


def certificate_path(out: Path) -> Path:
    """Return where the certificate of weights lies."""
    return out.with_name(out.name + CERTIFICATE_SUFFIX)


def save_conversion(conversion: Conversion, out: Path) -> Written:
    """Write the weights, and the certificate beside them; another file of that name is replaced.

    Raises:
        ConversionError: a proof failed, or they cannot be written there; nothing is left of it.
    """
    check_output(conversion.source, out)
    if not conversion.proven:
        raise ConversionError(f"{out}: not written, a proof failed.")
    certificate = certificate_path(out)
    temporary: list[Path] = []
    try:
        weights = _beside(out, temporary)
        _write(weights, conversion.state, conversion.meta, safetensors=out.suffix.lower() == SAFETENSORS)
        sha256, size = digest_file(weights), weights.stat().st_size
        document = {
            **conversion.to_json(),
            "target": {"name": out.name, "sha256": sha256, "bytes": size},
            "versions": {"detserve": __version__, "torch": torch.__version__},
        }
        text = _beside(certificate, temporary)
        text.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        weights.replace(out)
        text.replace(certificate)
    except (OSError, RuntimeError, SafetensorError, UnicodeError) as error:  # torch and safetensors have their own
        reason = str(getattr(error, "strerror", None) or error).partition("\n")[0][:200]
        raise ConversionError(f"{out}: cannot be written ({reason}). Make room, or choose another folder.") from error
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)
    return Written(out, sha256, size, certificate)


def _beside(path: Path, temporary: list[Path]) -> Path:
    handle, name = tempfile.mkstemp(prefix=".converted-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    made = Path(name)
    temporary.append(made)
    made.chmod(0o644)
    return made


def _write(path: Path, state: Mapping[str, torch.Tensor], meta: Mapping[str, Any], *, safetensors: bool) -> None:
    if safetensors:
        save_file(dict(state), path, as_texts(meta))
    else:
        torch.save({"meta": dict(meta), "state_dict": OrderedDict(state)}, path)
    try:
        reread = load_file(path) if safetensors else unpickle(path)["state_dict"]
        same = reread.keys() == state.keys() and all(_same(reread[key], one) for key, one in state.items())
    except (CheckpointError, SafetensorError):
        same = False
    if not same:
        raise ConversionError(f"{path.parent}: what was read back is not what was written. Check the disk.")


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether tensors are the same, bit by bit; NaN equals itself."""
    return one.dtype == other.dtype and torch.equal(
        one.contiguous().reshape(-1).view(torch.uint8), other.contiguous().reshape(-1).view(torch.uint8)
    )
