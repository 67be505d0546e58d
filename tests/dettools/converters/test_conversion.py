"""The core of the converters: rows that fit, proofs that say something, files that are whole or not there."""

import json
from pathlib import Path

import pytest
import torch
from detserve.errors import CheckpointError
from dettools.converters.conversion import (
    Conversion,
    ConversionError,
    Fill,
    MoveBackground,
    Negate,
    Proof,
    Row,
    converted,
    prove,
    unused_keys,
)
from dettools.converters.weight_files import check_output, read_weight_file, save_conversion

STATE = {"a": torch.tensor([1.0, 2.0, 3.0]), "b": torch.zeros(2, 2), "c": torch.tensor(5)}


def test_rows_give_their_targets_and_nothing_else():
    rows = [
        Row("a", "scores", (3,), MoveBackground(3)),
        Row("a", "boxes", (2,), MoveBackground(3, kept=False)),
        Row("a", "mean", (3,), Negate()),
        Row("b", "variance", (2, 2), Fill(0.5)),
    ]
    state = converted(rows, STATE)
    assert state["scores"].tolist() == [2, 3, 1]
    assert state["boxes"].tolist() == [2, 3]
    assert state["mean"].tolist() == [-1, -2, -3]
    assert state["variance"].tolist() == [[0.5, 0.5], [0.5, 0.5]]
    # A constant takes nothing of the tensor whose shape it has.
    assert unused_keys(rows, STATE) == ("b", "c")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([Row("d", "x", (1,))], "got no d, expected it for x"),
        ([Row("a", "x", (4,))], r"a \(copy\) → x: got the shape \(3,\), expected \(4,\)"),
        ([Row("a", "x", (3,)), Row("b", "x", (2, 2))], "got two tensors for x"),
    ],
)
def test_a_row_that_does_not_fit_stops_the_conversion(rows, message):
    with pytest.raises(ConversionError, match=message):
        converted(rows, STATE)


@pytest.mark.parametrize(
    ("source", "target", "passed"),
    [
        ([1.0, 2.0], [1.0, 2.0], True),
        ([1.0, 2.0], [1.0, 2.0 + 1e-5], True),
        ([1.0, 2.0], [1.0, 2.1], False),
        ([1.0, 2.0], [1.0, float("nan")], False),
        ([1.0, float("nan")], [1.0, float("nan")], False),
        ([1.0, 2.0], [1.0, 2.0, 3.0], False),
        # Zeros equal zeros whatever was converted.
        ([0.0, 0.0], [0.0, 0.0], False),
        ([], [], False),
    ],
)
def test_a_proof_passes_when_outputs_agree_and_are_more_than_zeros(source, target, passed):
    proof = prove("x", [torch.tensor(source)], [torch.tensor(target)])
    assert proof.passed == passed
    json.dumps(proof.to_json(), allow_nan=False)


def test_large_outputs_may_differ_as_float32_rounds_them():
    source, target = [torch.tensor([500.0])], [torch.tensor([500.001])]
    assert prove("x", source, target).passed
    assert not prove("x", source, target, relative=False).passed


def test_fewer_outputs_prove_nothing():
    assert not prove("x", [torch.ones(2)], []).passed
    assert not prove("x", [], []).passed


def conversion(source: Path, **changes: object) -> Conversion:
    values = {"rows": (Row("a", "a", (3,)),), "state": {"a": STATE["a"]}, "proofs": (Proof("x", 0.0, 1e-5, 1.0, 3),)}
    return Conversion("regnet2mmdet", source, "0" * 64, **(values | changes))


def test_the_input_is_never_written_over(tmp_path):
    source = tmp_path / "in.pth"
    torch.save(STATE, source)
    before = source.read_bytes()
    link = tmp_path / "link.pth"
    link.symlink_to(source)
    for out in (source, link):
        with pytest.raises(ConversionError, match="as input and as output"):
            save_conversion(conversion(source), out)
    assert source.read_bytes() == before
    assert sorted(one.name for one in tmp_path.iterdir()) == ["in.pth", "link.pth"]


def test_what_is_not_proven_is_not_written(tmp_path):
    for wrong in ({"proofs": (Proof("x", 1.0, 1e-5, 1.0, 3),)}, {"missing": ("b",)}):
        with pytest.raises(ConversionError, match="not written"):
            save_conversion(conversion(tmp_path / "in.pth", **wrong), tmp_path / "out.pth")
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    out = tmp_path / "out.pth"
    out.write_bytes(b"older")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ConversionError, match="cannot be written"):
        save_conversion(conversion(tmp_path / "in.pth"), out)
    assert [one.name for one in tmp_path.iterdir()] == ["out.pth"]
    assert out.read_bytes() == b"older"


@pytest.mark.parametrize(
    ("name", "message"), [("out.onnx", "expected a file named .pth"), ("none/out.pth", "there is no folder")]
)
def test_an_output_that_cannot_be_is_refused_before_the_work(name, message, tmp_path):
    with pytest.raises(ConversionError, match=message):
        check_output(tmp_path / "in.pth", tmp_path / name)


def test_both_kinds_of_files_hold_weights_and_what_is_told_beside_them(tmp_path):
    for name in ("out.pth", "out.safetensors"):
        meta = {"CLASSES": ("cat", "dog"), "preprocessing": {"colours": "BGR"}, "mmdet_version": "1.2.0"}
        written = save_conversion(conversion(tmp_path / "in.pth", meta=meta), tmp_path / name)
        found = read_weight_file(written.path)
        assert found.sha256 == written.sha256
        assert torch.equal(found.state["a"], STATE["a"])
        assert found.meta["mmdet_version"] == "1.2.0"
        assert found.meta["preprocessing"] == {"colours": "BGR"}
    assert len(list(tmp_path.iterdir())) == 4


def test_files_without_weights_are_refused(tmp_path):
    path = tmp_path / "in.pth"
    torch.save({"epoch": 1}, path)
    with pytest.raises(CheckpointError, match="got epoch, expected a state dict"):
        read_weight_file(path)
    with pytest.raises(CheckpointError, match="which is no file"):
        read_weight_file(tmp_path / "none.pth")
