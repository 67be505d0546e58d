"""Reading weights without running anything that they contain.

safetensors hold no code. A `.pth` is a pickle: it is read by torch's restricted unpickler, which builds tensors and
plain containers, plus the few harmless types that training scripts leave beside the weights. What needs more is
refused.
"""

import argparse
import contextlib
import io
import pathlib
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from detserve.errors import CheckpointError


class LeftOut:
    """What stands for an object that training left beside the weights: it keeps what it was told and does nothing."""

    def __init__(self, *_: object) -> None:
        self.held: object = None

    def __new__(cls, *_: object) -> Self:
        """Take whatever a pickle passes."""
        made = super().__new__(cls)
        made.held = None
        return made

    def __setstate__(self, state: object) -> None:
        self.held = state


# torchvision's reference training saves its arguments, and metrics are often NumPy scalars: data, no code.
_HARMLESS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    argparse.Namespace,
    pathlib.PosixPath,
    np.dtype,
    np._core.multiarray.scalar,  # type: ignore[attr-defined]
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),  # type: ignore[attr-defined] # as NumPy 1 called it
    *(type(np.dtype(code)) for code in "?bBhHiIlLqQefd"),
]
# What MMEngine's and MMCV's training states hold beside plain values. Nothing of it is built.
_TRAINING_STATE: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (LeftOut, "mmengine.logging.history_buffer.HistoryBuffer"),
    (LeftOut, "numpy.ndarray"),
    (LeftOut, "numpy.core.multiarray._reconstruct"),
    (LeftOut, "numpy._core.multiarray._reconstruct"),
]
_DATA = re.compile(
    r"collections\.(OrderedDict|Counter)|_codecs\.encode|torch\._utils\._rebuild_\w+|torch\.(\w+Storage|[a-z]+\d+)"
)
# Where training scripts keep the weights, the averaged ones first: those are what is evaluated.
STATE_KEYS = ("model_ema", "ema", "state_dict", "model_state_dict", "model", "module")
_PREFIXES = ("module.", "_orig_mod.")


def load_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Read a checkpoint's weights onto the CPU.

    Args:
        path: ``.safetensors``, or a ``.pth`` holding a state dict, alone or under one of the usual keys.

    Raises:
        CheckpointError: no such file, damaged, no weights in it, or a pickle that needs more than data.
    """
    if not path.is_file():
        raise CheckpointError(f"weights: got {path}, which is no file. Give the checkpoint's path with --weights.")
    if path.suffix == ".safetensors":
        try:
            return strip_prefixes(load_file(path))
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"weights {path.name}: not safetensors, or damaged ({error}).") from error
    return strip_prefixes(_find_state(unpickle(path), path))


def unpickle(path: Path) -> Any:
    """Read a checkpoint's pickle by torch's restricted unpickler, onto the CPU.

    Raises:
        CheckpointError: damaged, or it needs more than data; nothing was executed.
    """
    try:
        with torch.serialization.safe_globals([*_HARMLESS, *_TRAINING_STATE]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle's protocol; if it matters, it is told below
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged pickles fail in every way that there is
        culprit = _refused_call(error, path)
        if culprit:
            raise CheckpointError(
                f"weights {path.name}: refused, nothing was executed: unpickling it would call {culprit}, expected "
                "tensors and plain containers only. Save the weights alone, with torch.save(model.state_dict(), …) or "
                "safetensors, where the file was made."
            ) from error
        with path.open("rb") as file:
            begins = file.read(24)
        reason = str(error).rpartition("WeightsUnpickler error: ")[2].strip().partition("\n")[0][:160]
        raise CheckpointError(
            f"weights {path.name}: damaged, or no checkpoint of torch ({type(error).__name__}: {reason}; it begins "
            f"with {begins!r}). Expected what torch.save(model.state_dict(), …) or safetensors writes."
        ) from error


def _refused_call(error: Exception, path: Path) -> str:
    """Return what unpickling would have called; empty when that is not why it failed."""
    if not isinstance(error, pickle.UnpicklingError):
        return ""
    told = re.search(r"(?:GLOBAL|unrecognized function|but got) (?:<\w+ '?)?([\w.]+)", str(error))
    if told:
        return told.group(1)
    # torch's unpickler reads protocols 2 and 3; what the others would import is read from their opcodes.
    names = [name for name in dict.fromkeys(_imports(path)) if not _DATA.fullmatch(name)]
    return " and ".join(names[:3])


def _imports(path: Path) -> list[str]:
    """The names that a file's pickles import, read without unpickling."""
    content = path.read_bytes()
    if zipfile.is_zipfile(path):
        with contextlib.suppress(Exception), zipfile.ZipFile(path) as archive:
            content = b"".join(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
    stream = io.BytesIO(content)
    names: list[str] = []
    with contextlib.suppress(Exception):  # what follows the pickles is no pickle
        while True:
            texts: list[str] = []
            memo: list[str] = []
            pushed = ""
            for opcode, value, _ in pickletools.genops(stream):
                if opcode.name == "MEMOIZE":
                    memo.append(pushed)
                    continue
                pushed = str(value) if "UNICODE" in opcode.name else ""
                if opcode.name in ("BINGET", "LONG_BINGET"):
                    pushed = memo[int(str(value))]
                if pushed:
                    texts.append(pushed)
                if opcode.name in ("GLOBAL", "INST"):
                    names.append(str(value).replace(" ", "."))
                elif opcode.name == "STACK_GLOBAL":
                    names.append(".".join(texts[-2:]))
    return names


def _find_state(value: Any, path: Path) -> dict[str, torch.Tensor]:
    if is_state(value):
        return dict(value)
    if isinstance(value, dict):
        for key in STATE_KEYS:
            if is_state(value.get(key)):
                return dict(value[key])
        raise CheckpointError(
            f"weights {path.name}: got the keys {', '.join(map(str, list(value)[:8]))}, expected a state dict, alone "
            f"or under one of {', '.join(STATE_KEYS)}."
        )
    raise CheckpointError(f"weights {path.name}: got {type(value).__name__}, expected a state dict.")


def is_state(value: Any) -> bool:
    """Whether a value is a state dict: names to tensors."""
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(key, str) and isinstance(tensor, torch.Tensor) for key, tensor in value.items())
    )


def strip_prefixes(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Drop what DataParallel, torch.compile and averaging wrap around the names."""
    state.pop("n_averaged", None)
    for prefix in _PREFIXES:
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state
