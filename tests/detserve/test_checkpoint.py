"""Checkpoints: the forms that training scripts leave are read, and no pickle is obeyed."""

import argparse
import builtins
import os
import pickle
import random
import sys
import types
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from detserve.checkpoint import load_state_dict
from detserve.errors import CheckpointError
from safetensors.torch import save_file


@pytest.fixture
def weights():
    return {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2, dtype=torch.float16)}


class Calls:
    """Unpickles into a call."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def same(got, expected):
    assert list(got) == list(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor)


def saved(path: Path, value: object, **how: object) -> Path:
    torch.save(value, path, **how)
    return path


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_plain_state_dict(tmp_path, weights, zipped):
    path = saved(tmp_path / "w.pth", OrderedDict(weights), _use_new_zipfile_serialization=zipped)
    same(load_state_dict(path), weights)


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict", "module"])
def test_a_state_dict_under_a_usual_key(tmp_path, weights, key):
    path = saved(tmp_path / "w.pth", {"epoch": 3, key: weights, "meta": {"classes": ("cat", "dog")}})
    same(load_state_dict(path), weights)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_what_torchvisions_reference_training_saves(tmp_path, zipped):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    checkpoint = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": torch.optim.lr_scheduler.MultiStepLR(optimizer, [16, 22]).state_dict(),
        "args": argparse.Namespace(lr=0.02, output_dir=Path("out"), aspect=(1, 2), resume=None),
        "epoch": 25,
        "scaler": {"scale": 65536.0},
        "metrics": [np.float64(0.3), np.float32(0.2), np.float16(0.5), np.int64(3), np.int32(3), np.bool_(True)],
        "seen": Counter({"cat": 3}),
    }
    path = saved(tmp_path / "model_25.pth", checkpoint, _use_new_zipfile_serialization=zipped)
    same(load_state_dict(path), model.state_dict())


def test_numpy_scalars_of_numpy_1(tmp_path, weights):
    path = saved(tmp_path / "w.pth", {"model": weights, "ap": np.float64(0.3)}, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    assert b"numpy._core.multiarray" in content
    path.write_bytes(content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    same(load_state_dict(path), weights)


def test_the_averaged_weights_come_first_without_their_wrapping(tmp_path, weights):
    class Averaged(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Linear(3, 2)

    averaged = torch.optim.swa_utils.AveragedModel(Averaged())
    path = saved(tmp_path / "w.pth", {"model": weights, "model_ema": averaged.state_dict()})
    assert "n_averaged" in averaged.state_dict()
    same(load_state_dict(path), averaged.module.state_dict())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_the_prefix_of_a_wrapper_is_dropped(tmp_path, weights, prefix):
    wrapped = {prefix + name: tensor for name, tensor in weights.items()}
    same(load_state_dict(saved(tmp_path / "w.pth", wrapped)), weights)
    save_file(wrapped, tmp_path / "w.safetensors")
    loaded = load_state_dict(tmp_path / "w.safetensors")
    same({name: loaded[name] for name in weights}, weights)


def test_a_prefix_that_only_some_have_is_a_name(tmp_path, weights):
    mixed = {"module.a": torch.ones(1), "b": torch.ones(1)}
    assert set(load_state_dict(saved(tmp_path / "w.pth", mixed))) == {"module.a", "b"}


def test_safetensors(tmp_path, weights):
    save_file(weights, tmp_path / "w.safetensors")
    loaded = load_state_dict(tmp_path / "w.safetensors")
    same({name: loaded[name] for name in weights}, weights)


def test_a_damaged_safetensors_is_refused_by_name(tmp_path, weights):
    path = tmp_path / "w.safetensors"
    save_file(weights, path)
    for content in (path.read_bytes()[:-1], b"", b"not safetensors at all, but long enough", saved(path, weights)):
        if isinstance(content, bytes):
            path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"weights w\.safetensors: not safetensors, or damaged"):
            load_state_dict(path)


def in_zip(path, value):
    torch.save(value, path)


def in_legacy(path, value):
    torch.save(value, path, _use_new_zipfile_serialization=False)


def in_zip_protocol_4(path, value):
    torch.save(value, path, pickle_protocol=4)


def in_legacy_protocol_4(path, value):
    torch.save(value, path, pickle_protocol=4, _use_new_zipfile_serialization=False)


def in_a_bare_pickle(path, value):
    path.write_bytes(pickle.dumps(value))


def in_a_bare_pickle_of_protocol_0(path, value):
    path.write_bytes(pickle.dumps(value, protocol=0))


@pytest.mark.parametrize(
    "write",
    [
        in_zip,
        in_legacy,
        in_zip_protocol_4,
        in_legacy_protocol_4,
        in_a_bare_pickle,
        in_a_bare_pickle_of_protocol_0,
    ],
    ids=lambda write: write.__name__,
)
@pytest.mark.parametrize("nested", [False, True], ids=["alone", "nested"])
def test_a_malicious_pickle_is_refused_by_what_it_would_call(tmp_path, monkeypatch, weights, write, nested):
    marker = tmp_path / "marker"
    (tmp_path / "imported_by_a_pickle.py").write_text(f"open({str(marker)!r}, 'w').close()\ndef run(): pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    calls = {
        f"{os.system.__module__}.system": Calls(os.system, f"touch {marker}"),
        "eval": Calls(builtins.eval, f"open({str(marker)!r}, 'w').close()"),
        "exec": Calls(builtins.exec, f"open({str(marker)!r}, 'w').close()"),
        "imported_by_a_pickle.run": Calls(importable("imported_by_a_pickle", "run")),
    }
    path = tmp_path / "evil.pth"
    for name, call in calls.items():
        with monkeypatch.context() as patch:
            module = types.ModuleType("imported_by_a_pickle")
            module.run = calls["imported_by_a_pickle.run"].function
            patch.setitem(sys.modules, "imported_by_a_pickle", module)
            write(path, OrderedDict(weights, meta=OrderedDict(inner=[call])) if nested else call)
            obeyed = pickle.dumps(call)
        with pytest.raises(CheckpointError) as caught:
            load_state_dict(path)
        message = str(caught.value)
        assert "weights evil.pth: refused, nothing was executed" in message
        called = message.partition("would call ")[2].partition(", expected")[0].split(" and ")
        assert name in [one.removeprefix("builtins.").removeprefix("__builtin__.") for one in called]
        assert not marker.exists()
        assert "imported_by_a_pickle" not in sys.modules
        # The call is real: an unpickler that obeys leaves the marker.
        pickle.loads(obeyed)
        assert marker.exists()
        marker.unlink()
        sys.modules.pop("imported_by_a_pickle", None)


def importable(module: str, name: str):
    """A function that pickles as ``module.name``."""

    def function():
        pass

    function.__module__, function.__qualname__, function.__name__ = module, name, name
    return function


def test_a_whole_model_is_refused_by_its_class(tmp_path):
    with pytest.raises(CheckpointError, match=r"would call torch\.nn\.modules\.linear\.Linear"):
        load_state_dict(saved(tmp_path / "model.pth", torch.nn.Linear(2, 2)))


def test_a_pickle_that_torch_did_not_save_is_refused(tmp_path, weights):
    for protocol in (0, 2, 4, 5):
        (tmp_path / "w.pkl").write_bytes(pickle.dumps(weights, protocol=protocol))
        with pytest.raises(CheckpointError, match=r"would call .*torch\.storage\._load_from_bytes"):
            load_state_dict(tmp_path / "w.pkl")


def test_what_could_hold_more_than_data_is_refused(tmp_path, weights):
    with pytest.raises(CheckpointError, match=r"would call collections\.defaultdict"):
        load_state_dict(saved(tmp_path / "w.pth", {"model": weights, "x": defaultdict(list)}))
    with pytest.raises(CheckpointError, match="would call numpy"):
        load_state_dict(saved(tmp_path / "w.pth", {"model": weights, "x": np.array(["a"], dtype=object)}))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_truncated_checkpoint_is_refused_wherever_it_ends(tmp_path, weights, zipped):
    path = saved(tmp_path / "w.pth", {"model": weights}, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    for length in [*range(0, len(content), max(1, len(content) // 60)), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"weights w\.pth: "):
            load_state_dict(path)


def test_a_damaged_checkpoint_is_read_or_refused(tmp_path, weights):
    content = saved(tmp_path / "w.pth", {"model": weights}, _use_new_zipfile_serialization=False).read_bytes()
    chance = random.Random(5)
    refused = 0
    for _ in range(200):
        damaged = bytearray(content)
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        (tmp_path / "w.pth").write_bytes(bytes(damaged))
        try:
            load_state_dict(tmp_path / "w.pth")
        except CheckpointError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello\n" * 9,
        b"<!DOCTYPE html><html>404</html>",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n",
        b"\x00" * 100,
        b"\x89PNG\r\n\x1a\n" + b"\0" * 40,
    ],
    ids=["empty", "text", "html", "lfs", "zeros", "png"],
)
def test_what_is_no_checkpoint_is_refused_with_its_beginning(tmp_path, content):
    path = tmp_path / "w.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        load_state_dict(path)
    assert "weights w.pth: damaged, or no checkpoint of torch" in str(caught.value)
    assert repr(content[:8])[2:-1] in str(caught.value)
    assert "executed" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ([torch.ones(1)], "got list, expected a state dict"),
        (torch.ones(1), "got Tensor, expected a state dict"),
        (3, "got int, expected a state dict"),
        ({}, "expected a state dict"),
        ({"weights": {"a": torch.ones(1)}, "epoch": 3}, "got the keys weights, epoch, expected a state dict, alone or"),
        ({"model": {"a": 3}}, "got the keys model, expected"),
        ({1: torch.ones(1)}, "got the keys 1, expected"),
    ],
)
def test_what_is_no_state_dict_is_refused_by_what_it_is(tmp_path, value, wanted):
    with pytest.raises(CheckpointError, match=wanted):
        load_state_dict(saved(tmp_path / "w.pth", value))


def test_a_missing_file_is_named(tmp_path):
    for path in (tmp_path / "nowhere.pth", tmp_path / "nowhere.safetensors", tmp_path):
        with pytest.raises(CheckpointError, match=r"which is no file\. Give the checkpoint's path with --weights"):
            load_state_dict(path)
