"""The core of the converters: rows that fit, proofs that say something, files that are whole or not there."""

import json
import resource
import signal
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
    unproven = {"rows": (Row("a", "a", (3,), Negate()),)}
    for wrong in ({"proofs": (Proof("x", 1.0, 1e-5, 1.0, 3),)}, {"missing": ("b",)}, unproven):
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


def test_small_outputs_may_not_differ_as_much_as_large_ones_beside_them():
    features, scores = torch.tensor([5000.0]), torch.tensor([0.5])
    assert prove("x", [features, scores], [features + 0.01, scores]).passed
    assert not prove("x", [features, scores], [features, scores + 0.01]).passed


def test_the_certificate_tells_what_stands_behind_which_tensors(tmp_path):
    rows = (Row("a", "a", (3,)), Row("b", "b", (2, 2)), Row("c", "d", ()), Row("c", "e", (), Negate()))
    proof = Proof("x", 0.0, 1e-5, 1.0, 3, ("a",))
    assert conversion(tmp_path / "in.pth", rows=rows, proofs=(proof,)).to_json()["tensors"] == {
        "by_outputs": 1,
        "copied_under_their_name": 1,
        "copied_under_another_name": 1,
        "changed_without_proof": 1,
    }


def test_no_weights_are_written_where_their_certificate_cannot_be(tmp_path):
    (tmp_path / "out.pth.certificate.json").mkdir()
    with pytest.raises(ConversionError, match=r"out.pth.certificate.json, which is a folder"):
        save_conversion(conversion(tmp_path / "in.pth"), tmp_path / "out.pth")
    assert [one.name for one in tmp_path.iterdir()] == ["out.pth.certificate.json"]


@pytest.mark.parametrize(("source", "out"), [("a" * 300, "out.pth"), ("in.pth", "a" * 300 + ".pth")])
def test_a_name_that_no_file_can_have_is_an_error(source, out, tmp_path):
    (tmp_path / "in.pth").touch()
    with pytest.raises(ConversionError, match="Choose another name"):
        check_output(tmp_path / source, tmp_path / out)


@pytest.mark.parametrize("name", ["out.pth", "out.safetensors"])
def test_a_full_disk_leaves_nothing(name, tmp_path):
    """torch and safetensors raise errors of their own where writing stops."""
    state = {"a": torch.zeros(100_000)}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(ConversionError, match="cannot be written"):
            save_conversion(conversion(tmp_path / "in.pth", state=state), tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "meta",
    [
        {"dataset_meta": None},
        {"dataset_meta": ["cat"]},
        {3: "number", "dataset_meta": {"classes": ("cat",), 4: "number"}},
    ],
)
def test_strange_metadata_does_not_stop_a_safetensors_file(meta, tmp_path):
    path = tmp_path / "in.pth"
    torch.save({"state_dict": STATE, "meta": {"mmdet_version": "1.2.0", **meta}}, path)
    written = save_conversion(conversion(path, meta=read_weight_file(path).meta), tmp_path / "out.safetensors")
    assert read_weight_file(written.path).meta["mmdet_version"] == "1.2.0"


def test_text_that_no_file_can_hold_is_an_error(tmp_path):
    with pytest.raises(ConversionError, match="surrogates not allowed"):
        save_conversion(conversion(tmp_path / "in.pth", meta={"x": "\ud800"}), tmp_path / "out.safetensors")


def test_metadata_that_is_named_a_billion_times_is_refused(tmp_path):
    path, laughs = tmp_path / "in.pth", [1]
    for _ in range(60):
        laughs = [laughs, laughs]
    torch.save({"state_dict": STATE, "meta": {"x": laughs}}, path)
    with pytest.raises(CheckpointError, match="more than 1000000 values"):
        read_weight_file(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.ones(2, 2).to_sparse(), "got w as a sparse tensor"),
        (lambda: torch.ones(2, 2).to_sparse_csr(), "got w as a sparse tensor"),
        (lambda: torch.ones(2, device="meta"), "got w as a empty"),
        (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "got w as a quantised tensor"),
        (lambda: torch.zeros(1).expand(10**12), "expected one number for each of their elements"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # torch calls these kinds of tensors a beta, or deprecated
def test_tensors_that_are_no_plain_numbers_are_refused(make, message, tmp_path):
    path = tmp_path / "in.pth"
    torch.save({"v": torch.ones(1), "w": make()}, path)
    with pytest.raises(CheckpointError, match=message):
        read_weight_file(path)
