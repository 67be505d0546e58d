"""Pickles from strangers: every form of array and tensor comes through unchanged; nothing else is even named."""

import io
import pickle
import re
import struct
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from dettools.restricted_pickle import RestrictedPickleError, load_restricted

PROTOCOLS = (0, 1, 2, 3, 4, 5)


def through(tmp_path: Path, value: object, protocol: int = 2) -> object:
    path = tmp_path / "value.pkl"
    path.write_bytes(pickle.dumps(value, protocol))
    return load_restricted(path)


def message_of(tmp_path: Path, content: bytes) -> str:
    path = tmp_path / "bad.pkl"
    path.write_bytes(content)
    with pytest.raises(RestrictedPickleError) as error:
        load_restricted(path)
    assert str(error.value).startswith(str(path))
    return str(error.value)


ARRAYS = [
    np.arange(10, dtype=np.float32).reshape(2, 5),
    np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    np.arange(6.0).reshape(2, 3).T,
    np.zeros((0, 5), np.float32),
    np.array([1, 2], ">i4"),
    np.array([True, False]),
    np.array(["dog", "bicycle"]),
    np.array([b"ab", b"c"]),
    np.float16([0.5]),
    np.array([], np.int64),
]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("array", ARRAYS, ids=str)
def test_arrays_come_through(array, protocol, tmp_path):
    (found,) = through(tmp_path, [array], protocol)
    assert (found.dtype, found.shape) == (array.dtype, array.shape)
    np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(10.0).reshape(2, 5),
        torch.arange(10.0).reshape(2, 5).T,
        torch.arange(10)[3:7:2],
        torch.zeros(0, 4),
        torch.tensor(3.5),
        torch.tensor([True, False]),
        torch.tensor([1.5], dtype=torch.float16),
        torch.nn.Parameter(torch.ones(2)),
    ],
    ids=lambda tensor: f"{tensor.dtype}-{tuple(tensor.shape)}",
)
def test_tensors_come_through_as_arrays(tensor, protocol, tmp_path):
    (found,) = through(tmp_path, [tensor], protocol)
    np.testing.assert_array_equal(found, tensor.detach().numpy())
    assert found.dtype == tensor.detach().numpy().dtype


def test_bfloat16_comes_as_float32(tmp_path):
    found = through(tmp_path, torch.tensor([1.5, 2.5], dtype=torch.bfloat16))
    assert found.dtype == np.float32
    assert found.tolist() == [1.5, 2.5]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_plain_values_and_scalars_come_through(protocol, tmp_path):
    value = {"a": [1, 2.5, None, True, "ö", b"\x00\xff"], "b": (np.float32(0.5), np.int64(7)), 3: OrderedDict(c=())}
    found = through(tmp_path, value, protocol)
    assert found == {"a": value["a"], "b": (0.5, 7), 3: {"c": ()}}
    assert isinstance(found["b"][0], np.float32)


def test_an_array_of_objects_holds_arrays(tmp_path):
    value = np.empty(2, object)
    value[:] = [np.zeros((0, 5)), [np.ones(3)]]
    found = through(tmp_path, value)
    assert found.dtype == object
    assert found[0].shape == (0, 5)
    np.testing.assert_array_equal(found[1][0], np.ones(3))


def test_numpy_1_spelling_is_known(tmp_path):
    """NumPy 2 writes numpy._core; a file of 2021 says numpy.core."""
    content = pickle.dumps(np.arange(3), 2)
    assert b"numpy._core" in content
    path = tmp_path / "old.pkl"
    path.write_bytes(content.replace(b"numpy._core", b"numpy.core"))
    assert load_restricted(path).tolist() == [0, 1, 2]


def test_one_array_that_is_named_twice_is_no_endless_value(tmp_path):
    array = np.arange(3)
    first, second = through(tmp_path, [array, array])
    assert first.tolist() == second.tolist() == [0, 1, 2]


@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_torch_save(zipped, tmp_path):
    path = tmp_path / "saved.pkl"
    torch.save([{"boxes": torch.ones(2, 4)}], path, _use_new_zipfile_serialization=zipped)
    assert load_restricted(path)[0]["boxes"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 1]]
    torch.save([Malicious(tmp_path / "touched")], path, _use_new_zipfile_serialization=zipped)
    assert re.search(r"nothing was executed: unpickling it would call .*exec", message_of(tmp_path, path.read_bytes()))
    assert not (tmp_path / "touched").exists()


class Malicious:
    """Would touch a file if it were obeyed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (exec, (f"open({str(self.path)!r}, 'w').close()",))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_malicious_pickle_does_nothing(protocol, tmp_path):
    touched = tmp_path / "touched"
    content = pickle.dumps([np.zeros(3), Malicious(touched)], protocol)
    assert ".exec, but predictions and weights hold arrays" in message_of(tmp_path, content)
    assert not touched.exists()
    # The file is what it seems: Python's own unpickler obeys it.
    pickle.loads(content)
    assert touched.exists()


def test_a_malicious_storage_inside_a_tensor_does_nothing(tmp_path):
    """torch.storage._load_from_bytes is itself an unpickler without restrictions."""
    touched = tmp_path / "touched"
    inner = io.BytesIO()
    torch.save(Malicious(touched), inner, _use_new_zipfile_serialization=False)

    class Storage:
        def __reduce__(self):
            return (torch.storage._load_from_bytes, (inner.getvalue(),))

    content = pickle.dumps(Storage())
    assert ".exec, but predictions and weights hold arrays" in message_of(tmp_path, content)
    assert not touched.exists()
    pickle.loads(content)
    assert touched.exists()


@pytest.mark.parametrize(
    "name", ["os system", "builtins eval", "builtins getattr", "numpy load", "torch load", "functools partial"]
)
def test_no_other_name_is_found(name, tmp_path):
    module, function = name.split()
    assert f"names {module}.{function}" in message_of(tmp_path, f"c{module}\n{function}\n.".encode())
    # A dotted name does not lead from what is admitted to what is not.
    assert "names numpy.ndarray.__class__" in message_of(
        tmp_path, b"\x80\x04\x8c\x05numpy\x8c\x11ndarray.__class__\x93."
    )


def test_what_is_named_cannot_be_changed_for_later(tmp_path):
    """BUILD sets attributes of what it is given; the next file must not notice."""
    content = pickle.dumps(np.arange(3), 2)
    message_of(tmp_path, b"cnumpy\ndtype\n(NS'make'\nI1\nsS'code'\nI1\nsd\x86b.".replace(b"(N", b"N(", 1))
    assert message_of(tmp_path, b"cnumpy\ndtype\nN}S'make'\nNs\x86b.")
    path = tmp_path / "good.pkl"
    path.write_bytes(content)
    assert load_restricted(path).tolist() == [0, 1, 2]


def array_pickle(shape: bytes, dtype: bytes, content: bytes) -> bytes:
    """An array whose parts contradict each other."""
    return (
        b"\x80\x02cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"
        b"(K\x01" + shape + b"cnumpy\ndtype\nX" + struct.pack("<I", len(dtype)) + dtype + b"K\x00K\x01\x87R"
        b"(K\x03X\x01\x00\x00\x00<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        b"B" + struct.pack("<I", len(content)) + content + b"tb."
    )


def test_arrays_that_lie_about_themselves_are_damaged(tmp_path):
    path = tmp_path / "good.pkl"
    path.write_bytes(array_pickle(b"K\x02\x85", b"f4", struct.pack("<2f", 1, 2)))
    assert load_restricted(path).tolist() == [1, 2]
    assert "has not that many bytes" in message_of(tmp_path, array_pickle(b"K\x05\x85", b"f4", b"12345678"))
    assert "has not that many bytes" in message_of(tmp_path, array_pickle(b"J\xff\xff\xff\x7f\x85", b"f4", b""))
    assert "the shape" in message_of(tmp_path, array_pickle(b"J\xff\xff\xff\xff\x85", b"f4", b""))
    assert "array of the type 'V8'" in message_of(tmp_path, array_pickle(b"K\x01\x85", b"V8", b"12345678"))
    assert "array of objects" in message_of(tmp_path, array_pickle(b"K\x01\x85", b"O8", b"12345678"))


def test_a_tensor_that_reaches_beyond_its_storage_is_damaged(tmp_path):
    class Reaching:
        def __reduce__(self):
            storage = torch.ones(4).untyped_storage()
            typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
            return (torch._utils._rebuild_tensor_v2, (typed, 2, (3,), (1,), False, OrderedDict()))

    assert "beyond its storage" in message_of(tmp_path, pickle.dumps(Reaching()))


def test_endless_and_damaged_values_are_errors(tmp_path):
    endless: list[object] = []
    endless.append(endless)
    assert "without end" in message_of(tmp_path, pickle.dumps(endless))
    assert "damaged" in message_of(tmp_path, pickle.dumps(np.arange(9))[:-20])
    assert "damaged" in message_of(tmp_path, b"")
    assert "holds a type" in message_of(tmp_path, b"cnumpy\nndarray\n.")
    whole = pickle.dumps(torch.ones(3))
    place = whole.index(b"\x03\0\0\0\0\0\0\0")
    assert "has not the length that it tells" in message_of(tmp_path, whole[:place] + b"\x04" + whole[place + 1 :])
    with pytest.raises(RestrictedPickleError, match="cannot be read"):
        load_restricted(tmp_path / "none.pkl")


def test_a_value_that_is_named_a_billion_times_is_read_once(tmp_path):
    laughs: object = [np.arange(3)]
    for _ in range(60):
        laughs = [laughs, laughs]
    found = through(tmp_path, laughs)
    while len(found) == 2:
        assert found[0] is found[1]
        found = found[0]
    assert found[0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("saved_by_torch", [True, False])
def test_a_tensor_that_repeats_one_number_often_is_refused(saved_by_torch, tmp_path):
    path, large = tmp_path / "large.pkl", torch.zeros(1).expand(10**12)
    path.write_bytes(pickle.dumps(large))
    if saved_by_torch:
        torch.save(large, path)
    assert "1000000000000 elements over 1 stored ones" in message_of(tmp_path, path.read_bytes())


def test_a_huge_file_is_not_read_whole_to_be_refused(tmp_path):
    path = tmp_path / "huge.pkl"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(RestrictedPickleError, match="no pickle, or a damaged one"):
        load_restricted(path)
