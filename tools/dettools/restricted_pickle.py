"""Reading a pickle of predictions or weights from a stranger: arrays, tensors and plain values, and nothing else.

A pickle is a program. Its instructions call whatever they name; here they can name a dozen functions, all of them of
this file, which build plain values:

    pickle ─► find_class (this table, or an error that tells the name) ─► stand-ins ─► ndarray, dict, list, str, …

NumPy's and torch's own builders are not among them: ``dtype.__setstate__`` and ``Tensor.set_`` believe the sizes and
offsets that a file tells. Stand-ins hold what was told, and an array is made only where it agrees with the bytes there
are. What `pickle.dump` (MMDetection 2.x and 3.x) writes of NumPy 1 and 2 and of torch is understood; a file of
`torch.save` is read by torch's own restricted reader.
"""

import io
import math
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from detserve.errors import CheckpointError, DetserveError

_DTYPE = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248]|c8|c16|[SU]\d{1,6}|O8?)")
_MOST_REPEATED = 1 << 24
_ZIP = b"PK\x03\x04"
# The pickle of torch.serialization.MAGIC_NUMBER, which a file of torch before 1.6 begins with.
_LEGACY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_STORAGES = {
    "DoubleStorage": "f8",
    "FloatStorage": "f4",
    "HalfStorage": "f2",
    "BFloat16Storage": "bf16",
    "LongStorage": "i8",
    "IntStorage": "i4",
    "ShortStorage": "i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "b1",
}


class RestrictedPickleError(DetserveError):
    """A pickle holds what it must not hold, or is damaged."""


def load_restricted(path: Path, *, encoding: str = "ASCII") -> Any:
    """Read a pickle, or a file of `torch.save`; tensors come as arrays.

    Args:
        path: the file.
        encoding: of the texts that Python 2 wrote; ``latin1`` where arrays are among them.

    Returns:
        Nested lists, tuples, sets and dicts of numbers, texts, bytes, None and ``numpy.ndarray``.

    Raises:
        RestrictedPickleError: it names anything else, cannot be read, or is damaged.
    """
    try:
        with path.open("rb") as stream:
            saved_by_torch = stream.peek(len(_LEGACY_TORCH)).startswith((_ZIP, _LEGACY_TORCH))
            return _finished(
                _torch_load(path) if saved_by_torch else _Unpickler(stream, encoding=encoding).load(), {}, set()
            )
    except (RestrictedPickleError, CheckpointError) as error:
        raise RestrictedPickleError(f"{path}: {str(error).removeprefix(f'weights {path.name}: ')}") from None
    except OSError as error:
        raise RestrictedPickleError(
            f"{path}: cannot be read: {error.strerror or error}, expected a pickle. Give its path."
        ) from None
    except RecursionError:
        raise RestrictedPickleError(f"{path}: its values contain each other without end") from None
    except MemoryError:
        raise RestrictedPickleError(f"{path}: asks for more memory than there is. Is it whole?") from None
    except Exception as error:  # noqa: BLE001 - damaged bytes can raise nearly anything
        reason = str(error).partition("\n")[0][:160]
        raise RestrictedPickleError(
            f"{path}: no pickle, or a damaged one: {reason}. Give the file that pickle.dump or torch.save wrote, whole."
        ) from None


class _Maker:
    """What a name stands for. An instance, and a new one each time: a pickle may set attributes of what it names."""

    __slots__ = ("make",)

    def __init__(self, make: Callable[..., Any]) -> None:
        self.make = make

    def __call__(self, *arguments: Any) -> Any:
        return self.make(*arguments)


class _Dtype:
    """``numpy.dtype``: its code and byte order."""

    __slots__ = ("code", "order")

    def __init__(self, code: object, *_: object) -> None:
        if not isinstance(code, str) or not _DTYPE.fullmatch(code):
            raise RestrictedPickleError(f"got an array of the type {code!r}, expected numbers, truth values or texts")
        self.code = code.lstrip("<>|=")
        self.order = code[0] if code[0] in "<>" else "<"

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", ">", "|", "="):
            raise RestrictedPickleError("damaged: the type of an array has a strange state")
        if state[1] in ("<", ">"):
            self.order = state[1]

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.code if self.code[0] in "OS" else self.order + self.code)


class _Array:
    """``numpy.ndarray`` between its creation and its state, and after."""

    __slots__ = ("dtype", "elements", "fortran", "shape")

    def __init__(self, *_: object) -> None:
        self.dtype: object = None
        self.elements: object = b""
        self.shape: object = (0,)
        self.fortran = False

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) not in (4, 5):
            raise RestrictedPickleError("damaged: an array has a strange state")
        self.shape, self.dtype, self.fortran, self.elements = state[-4:]

    def finished(self, visit: Callable[[Any], Any]) -> npt.NDArray[Any]:
        """Return the array; ``visit`` finishes the elements of an array of objects."""
        shape = _shape(self.shape)
        if not isinstance(self.dtype, _Dtype):
            raise RestrictedPickleError("damaged: an array has no type")
        dtype = self.dtype.dtype
        if dtype.hasobject:
            if not isinstance(self.elements, list) or len(self.elements) != math.prod(shape):
                raise RestrictedPickleError("damaged: an array of objects has not the length that it tells")
            objects = np.empty(len(self.elements), dtype)
            for place, element in enumerate(self.elements):
                objects[place] = visit(element)
            return objects.reshape(shape, order="F" if self.fortran else "C")
        content = self.elements
        if isinstance(content, str):
            content = content.encode("latin1")
        if not isinstance(content, bytes | bytearray) or len(content) != math.prod(shape) * dtype.itemsize:
            raise RestrictedPickleError(f"damaged: an array of the shape {shape} has not that many bytes")
        if not content:
            return np.empty(shape, dtype)
        return np.frombuffer(bytes(content), dtype).reshape(shape, order="F" if self.fortran else "C")


def _from_buffer(content: object, dtype: object, shape: object, order: object) -> _Array:
    """Stand for ``numpy._core.numeric._frombuffer``, which pickle protocol 5 names."""
    array = _Array()
    array.elements, array.dtype, array.shape, array.fortran = content, dtype, shape, order == "F"
    return array


def _scalar(dtype: object, content: object = b"") -> _Array:
    """Stand for ``numpy.core.multiarray.scalar``."""
    array = _Array()
    array.elements, array.dtype, array.shape = content, dtype, ()
    return array


def _storage(content: object) -> npt.NDArray[Any]:
    """Stand for ``torch.storage._load_from_bytes``, which unpickles without any restriction.

    Layout (torch.serialization, legacy): pickles of a magic number, a protocol, the machine's sizes, the storage itself
    as a persistent id and its keys; then the number of elements as int64 and the elements.
    """
    if not isinstance(content, bytes) or not content.startswith(_LEGACY_TORCH):
        raise RestrictedPickleError("damaged: the storage of a tensor is not as torch writes it")
    stream = io.BytesIO(content)
    *_, told, _keys = (_StorageUnpickler(stream).load() for _ in range(5))
    if not isinstance(told, _Storage):
        raise RestrictedPickleError("holds something else where the storage of a tensor was expected")
    count = int.from_bytes(stream.read(8), "little")
    elements = stream.read()
    dtype = np.dtype("<u2") if told.code == "bf16" else np.dtype(told.code).newbyteorder("<")
    if count != told.elements or len(elements) != count * dtype.itemsize:
        raise RestrictedPickleError("damaged: the storage of a tensor has not the length that it tells")
    flat = np.frombuffer(elements, dtype)
    if told.code == "bf16":
        # The upper half of a float32; NumPy has no bfloat16.
        flat = (flat.astype("<u4") << 16).view("<f4")
    return flat if told.view is None else flat[told.view]


class _Storage:
    """What the persistent id of a storage tells."""

    __slots__ = ("code", "elements", "view")

    def __init__(self, identifier: object) -> None:
        match identifier:
            case ("storage", _StorageType(code=code), _, _, int(elements), *rest):
                self.code, self.elements = code, elements
            case _:
                raise RestrictedPickleError("damaged: the storage of a tensor has a strange name")
        self.view: slice | None = None
        match rest:
            case [] | [None]:
                pass
            case [(_, int(start), int(length))] if start >= 0 and length >= 0:
                self.view = slice(start, start + length)
            case _:
                raise RestrictedPickleError("damaged: the storage of a tensor is a strange view")


class _StorageType:
    """A class of torch such as ``FloatStorage``, as the code of its elements."""

    __slots__ = ("code",)

    def __init__(self, code: str) -> None:
        self.code = code


class _StorageUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        code = _STORAGES.get(name) if module == "torch" else None
        if code is None:
            raise _refusal(module, name)
        return _StorageType(code)

    def persistent_load(self, identifier: Any) -> _Storage:
        return _Storage(identifier)


def _tensor(storage: object, offset: object, size: object, stride: object, *_: object) -> npt.NDArray[Any]:
    """Stand for ``torch._utils._rebuild_tensor_v2``: a view into the storage, if it lies within."""
    if not isinstance(storage, np.ndarray) or storage.ndim != 1:
        raise RestrictedPickleError("damaged: a tensor has no storage")
    shape, steps, (start,) = _shape(size), _shape(stride), _shape((offset,))
    last = start + sum((length - 1) * step for length, step in zip(shape, steps, strict=True))
    if 0 in shape:
        return np.empty(shape, storage.dtype)
    if last >= len(storage):
        raise RestrictedPickleError("damaged: a tensor reaches beyond its storage")
    _require_stored(math.prod(shape), len(storage))
    strides = [step * storage.itemsize for step in steps]
    return np.lib.stride_tricks.as_strided(storage[start:], shape, strides).copy()


def _require_stored(told: int, stored: int) -> None:
    """Refuse a tensor that repeats few numbers often: a small file would fill the memory."""
    if told > max(stored, _MOST_REPEATED):
        raise RestrictedPickleError(f"got a tensor of {told} elements over {stored} stored ones. Save it contiguous.")


def _torch_load(path: Path) -> Any:
    from detserve.checkpoint import unpickle

    return unpickle(path)


def _bytes(content: object = b"", encoding: object = "latin1") -> bytes:
    """Stand for ``_codecs.encode`` and ``bytes``: protocol 2 writes bytes as Latin-1 text."""
    if isinstance(content, str) and encoding in ("latin1", "latin-1"):
        return content.encode("latin1")
    if isinstance(content, bytes):
        return content
    raise RestrictedPickleError(f"damaged: got {type(content).__name__} where bytes were expected")


def _plain_list(items: object = ()) -> list[Any]:
    return list(items) if isinstance(items, list | tuple) else []


_ARRAY: dict[str, Callable[..., Any]] = {"_reconstruct": _Array, "scalar": _scalar}
_MAKERS: dict[tuple[str, str], Callable[..., Any]] = {
    **{(f"numpy.{core}.multiarray", name): make for core in ("core", "_core") for name, make in _ARRAY.items()},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")},
    # Named, but never called, where an array is reconstructed.
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _bytes,
    **{(builtins, "bytes"): _bytes for builtins in ("__builtin__", "builtins")},
    **{(builtins, "bytearray"): _bytes for builtins in ("__builtin__", "builtins")},
    **{(builtins, "set"): _plain_list for builtins in ("__builtin__", "builtins")},
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): _plain_list,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Return the maker of that name.

        Raises:
            RestrictedPickleError: it is not in the table.
        """
        make = _MAKERS.get((module, name))
        if make is None:
            raise _refusal(module, name)
        return _Maker(make)


def _refusal(module: str, name: str) -> RestrictedPickleError:
    return RestrictedPickleError(
        f"names {module}.{name}, but predictions and weights hold arrays, tensors and plain values only; nothing of it "
        "was run. If the file is your own, write it again with plain arrays, or predictions as COCO results JSON."
    )


def _finished(value: Any, done: dict[int, Any], above: set[int]) -> Any:
    """Replace stand-ins and tensors by arrays.

    Args:
        value: what was read.
        done: by their ``id``, the results for what was visited: a value that is named a billion times is visited once.
        above: the ``id`` of the values that this one lies in.
    """
    if value is None or isinstance(value, np.ndarray | str | bytes | bytearray | int | float | complex):
        return value
    if id(value) in above:
        raise RecursionError
    if id(value) not in done:
        above.add(id(value))
        done[id(value)] = _replaced(value, lambda inner: _finished(inner, done, above))
        above.remove(id(value))
    return done[id(value)]


def _replaced(value: Any, visit: Callable[[Any], Any]) -> Any:
    """Return what one value becomes; ``visit`` does that for those within."""
    if isinstance(value, _Array):
        array = value.finished(visit)
        return array if array.shape else array[()]
    if isinstance(value, dict):
        return {visit(key): visit(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [visit(inner) for inner in value]
    if isinstance(value, tuple):
        return tuple(visit(inner) for inner in value)
    if isinstance(value, set | frozenset):
        return {visit(inner) for inner in value}
    if type(value).__module__.startswith("torch") and hasattr(value, "detach"):
        return _numpy(value)
    if isinstance(value, _Maker | _Dtype):
        raise RestrictedPickleError("holds a type where a value was expected")
    raise RestrictedPickleError(
        f"holds a {type(value).__name__}, but predictions and weights hold arrays, tensors and plain values"
    )


def _numpy(tensor: Any) -> npt.NDArray[Any]:
    import torch

    _require_stored(tensor.numel(), tensor.untyped_storage().nbytes() // tensor.element_size())
    # NumPy has no bfloat16.
    array: npt.NDArray[Any] = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().cpu().numpy()
    return array


def _shape(value: object) -> tuple[int, ...]:
    if (
        not isinstance(value, tuple | list)
        or len(value) > 32
        or not all(type(one) is int and one >= 0 for one in value)
    ):
        raise RestrictedPickleError(f"damaged: got the shape {value!r}")
    return tuple(value)
