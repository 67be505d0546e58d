"""Building and verifying an archive of a small detector with random weights, and everything that must stop a build."""

import dataclasses
import io
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from builder_parity import spec_of
from dethandlers.artefact import load_artefact
from dethandlers.spec import Serving, Spec
from detserve.archive import build_archive, verify_archive
from detserve.eager import TorchvisionEager, eager_from_archive
from detserve.errors import ArchiveError, CheckpointError, DetserveError, SpecError
from detserve.mar import MANIFEST_FILE, check_archive, unpacked, write_mar
from dettools import cli
from PIL import Image
from random_detectors import NUM_CLASSES, RandomDetector, random_detector, random_images
from safetensors.torch import load_file, save, save_file

BUILDER = "ssdlite320_mobilenet_v3_large"


@pytest.fixture(scope="module")
def images() -> list[bytes]:
    return random_images()[:2]


@pytest.fixture(scope="module")
def detector(images) -> RandomDetector:
    return random_detector(BUILDER, images)


@pytest.fixture(scope="module")
def source(tmp_path_factory, detector, images) -> tuple[Spec, Path]:
    """A spec, and the folder with its weights and its golden image."""
    folder = tmp_path_factory.mktemp("source")
    (folder / "scene.jpg").write_bytes(images[0])
    spec = dataclasses.replace(spec_of(detector, "ssd", folder), golden_image="scene.jpg", description="größer")
    return spec, folder


@pytest.fixture(scope="module")
def built(source, tmp_path_factory) -> Path:
    spec, folder = source
    out = tmp_path_factory.mktemp("store") / "ssd.mar"
    archive = build_archive(spec, folder=folder, out=out)
    assert archive.golden_detections >= 20
    assert archive.notes == ()
    return out


def members_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refused(error: type[DetserveError], spec: Spec, folder: Path, out: Path, **how: object) -> str:
    """Build, and return why it was refused; nothing is left."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(error) as caught:
        build_archive(spec, folder=folder, out=out, **how)
    assert sorted(out.parent.iterdir()) == before
    return str(caught.value)


# What is built.


def test_building_twice_gives_the_same_bytes(source, built, tmp_path):
    spec, folder = source
    out = tmp_path / "another name.mar"
    out.write_bytes(b"an older one")
    again = build_archive(spec, folder=folder, out=out, force=True)
    assert out.read_bytes() == built.read_bytes()
    assert again.members == check_archive(built)
    assert names_in(tmp_path) == ["another name.mar"]


def test_the_members_are_what_the_design_lists(built, images, source):
    members = members_of(built)
    assert members["golden/golden.jpg"] == images[0]
    assert members["entry.py"] == members["dethandlers/entry.py"]
    package = Path(load_artefact.__code__.co_filename).parent
    code = {f"dethandlers/{path.relative_to(package).as_posix()}" for path in package.rglob("*.py")}
    rest = {
        *("MAR-INF/MANIFEST.json", "SHA256SUMS", "category_map.json", "entry.py", "golden/golden.jpg"),
        *("golden/golden.json", "model-config.yaml", "spec.json", "weights.safetensors"),
    }
    assert set(members) == code | rest
    spec = json.loads(members["spec.json"])
    assert (spec["name"], spec["weights"], spec["golden_image"]) == ("ssd", "weights.safetensors", "")
    assert spec["source"]["file"] == "ssd.safetensors"
    assert json.loads(members["category_map.json"])[0] == {
        "label": 0,
        "category_id": 11,
        "name": "class 1",
        "model_label": 1,
    }
    # What the spec leaves open (workers, batch size) stays open for the server that knows its machine.
    serving = source[0].serving
    assert yaml.safe_load(members["model-config.yaml"]) == {
        "maxBatchDelay": serving.max_batch_delay_ms,
        "responseTimeout": serving.response_timeout_s,
        "startupTimeout": serving.startup_timeout_s,
    }


def test_nothing_in_it_is_a_pickle(built):
    for name, content in members_of(built).items():
        assert not name.endswith((".pth", ".pt", ".pkl", ".bin")), name
        # A pickle of protocol 2 and later begins so; a zip may hold one.
        assert not content.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK")), name


def test_the_content_is_what_torch_model_archiver_packs(built, tmp_path):
    """The tool itself, in a process of its own; it empties TMPDIR/<model name>, so TMPDIR is the test's."""
    with zipfile.ZipFile(built) as archive:
        archive.extractall(tmp_path / "unpacked")
    extra = tmp_path / "extra"
    (tmp_path / "unpacked").rename(extra)
    given = tmp_path / "given"
    given.mkdir()
    for name in ("weights.safetensors", "entry.py", "model-config.yaml"):
        (extra / name).rename(given / name)
    (extra / MANIFEST_FILE).unlink()
    (extra / "MAR-INF").rmdir()
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    command = [
        *(str(Path(sys.executable).with_name("torch-model-archiver")), "--model-name", "ssd", "--version", "1.0"),
        *("--serialized-file", str(given / "weights.safetensors"), "--handler", str(given / "entry.py")),
        *("--config-file", str(given / "model-config.yaml"), "--extra-files", str(extra)),
        *("--export-path", str(tmp_path)),
    ]
    answer = subprocess.run(
        command, env={**os.environ, "TMPDIR": str(temporary)}, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr
    theirs, ours = members_of(tmp_path / "ssd.mar"), members_of(built)
    assert sorted(name for name in theirs if not name.endswith("/")) == sorted(ours)
    for name, content in ours.items():
        if name != MANIFEST_FILE:
            assert theirs[name] == content, name
    manifests = [json.loads(members[MANIFEST_FILE]) for members in (theirs, ours)]
    for manifest in manifests:
        assert manifest.pop("createdOn")
    assert manifests[0] == manifests[1]


def test_the_weights_are_those_of_the_checkpoint_whatever_it_was(source, built, detector, tmp_path):
    """A training checkpoint, and no golden image: the generated scene that detserve brings is packed."""
    import detserve

    spec, folder = source
    weights = tmp_path / "w.safetensors"
    weights.write_bytes(members_of(built)["weights.safetensors"])
    packed = load_file(weights)
    assert packed.keys() == detector.state.keys()
    assert all(torch.equal(packed[name], tensor) for name, tensor in detector.state.items())
    torch.save({"model": {f"module.{k}": v for k, v in detector.state.items()}, "epoch": 1}, tmp_path / "c.pth")
    bare = dataclasses.replace(spec, golden_image="")
    again = build_archive(bare, folder=folder, out=tmp_path / "b.mar", weights=tmp_path / "c.pth")
    assert again.spec.source.file == "c.pth"
    members = members_of(again.path)
    assert members["weights.safetensors"] == weights.read_bytes()
    assert members["golden/golden.jpg"] == Path(detserve.__file__).with_name("golden.jpg").read_bytes()


def test_half_precision_stays_half_the_size_and_gives_what_it_stores(source, built, detector, images, tmp_path):
    spec, folder = source
    half = {name: value.half() if value.is_floating_point() else value for name, value in detector.state.items()}
    save_file(half, tmp_path / "half.safetensors")
    archive = build_archive(spec, folder=folder, out=tmp_path / "half.mar", weights=tmp_path / "half.safetensors")
    sizes = [len(members_of(path)["weights.safetensors"]) for path in (archive.path, built)]
    assert 0.45 < sizes[0] / sizes[1] < 0.55
    assert verify_archive(archive.path).drift == ""
    widened = {name: value.float() if value.is_floating_point() else value for name, value in half.items()}
    one = eager_from_archive(archive.path).detect(images[1], detector.score_threshold, 100)
    other = TorchvisionEager(spec, widened, source="test").detect(images[1], detector.score_threshold, 100)
    assert len(one) >= 20
    assert np.array_equal(one.boxes_xyxy, other.boxes_xyxy)
    assert np.array_equal(one.scores, other.scores)


def test_frozen_norms_get_their_epsilon_and_a_note(source, detector, tmp_path):
    """And a golden image without objects gets one too."""
    spec, folder = source
    # A model that was fine-tuned from pretrained weights has frozen norms, which keep no num_batches_tracked.
    frozen = {name: value for name, value in detector.state.items() if "num_batches_tracked" not in name}
    # And one that holds everything for background sees nothing, however low the threshold.
    for name in [name for name in frozen if re.search(r"classification_head\.module_list\.\d\.1\.bias$", name)]:
        frozen[name] = frozen[name].clone()
        frozen[name][::NUM_CLASSES] += 1e6
    save_file(frozen, tmp_path / "frozen.safetensors")
    Image.new("RGB", (64, 48)).save(tmp_path / "black.png")
    blind = dataclasses.replace(spec, serving=Serving(score_threshold=1.0))
    how = {"folder": folder, "weights": tmp_path / "frozen.safetensors", "golden_image": tmp_path / "black.png"}
    archive = build_archive(blind, out=tmp_path / "f.mar", **how)
    assert archive.spec.norm_eps == pytest.approx(1e-3)  # as SSDlite's own norms
    norms, golden = archive.notes
    assert "frozen batch norms" in norms
    assert "--norm-eps 0" in norms
    assert "finds nothing on the golden image" in golden
    assert archive.golden_detections == 0
    assert "golden/golden.png" in members_of(archive.path)
    with unpacked(archive.path) as content:
        assert load_artefact(content).spec.norm_eps == archive.spec.norm_eps
    chosen = build_archive(dataclasses.replace(blind, norm_eps=0.0), out=tmp_path / "g.mar", **how)
    assert chosen.spec.norm_eps == 0.0
    assert len(chosen.notes) == 1


# What stops a build.


def test_weights_of_other_classes_are_refused_by_their_tensor(source, tmp_path):
    spec, folder = source
    other = dataclasses.replace(spec, num_classes=None, categories=spec.categories[:2])
    other = dataclasses.replace(
        other, categories=tuple(dataclasses.replace(c, model_label=-1) for c in other.categories)
    )
    message = refused(CheckpointError, other, folder, tmp_path / "a.mar")
    assert (
        "weights do not fit ssdlite320_mobilenet_v3_large with 3 classes: wrong shape: head.classification" in message
    )
    assert "(30, 672, 1, 1), expected (18, 672, 1, 1)" in message
    assert "tried 3, 13, 2 classes for 2 categories" in message
    message = refused(CheckpointError, dataclasses.replace(spec, num_classes=9), folder, tmp_path / "a.mar")
    assert "with 9 classes: wrong shape: head.classification_head" in message


def test_weights_of_another_builder_are_refused(source, tmp_path):
    spec, folder = source
    other = dataclasses.replace(spec, builder="fasterrcnn_mobilenet_v3_large_320_fpn")
    message = refused(CheckpointError, other, folder, tmp_path / "a.mar")
    assert "weights do not fit fasterrcnn_mobilenet_v3_large_320_fpn" in message
    assert "missing: " in message
    assert "not of this model: " in message


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda s, name: s | {name: s[name][:1]}, "wrong shape: {name} is (1,), expected ("),
        (lambda s, name: {k: v for k, v in s.items() if k != name}, "missing: {name}"),
        (lambda s, name: s | {"ema.extra": torch.ones(1)}, "not of this model: ema.extra"),
    ],
    ids=["shape", "missing", "extra"],
)
def test_one_tensor_that_does_not_fit_is_named(source, detector, tmp_path, change, wanted):
    spec, folder = source
    name = "backbone.features.0.0.1.bias"
    save_file(change(detector.state, name), tmp_path / "w.safetensors")
    message = refused(CheckpointError, spec, folder, tmp_path / "a.mar", weights=tmp_path / "w.safetensors")
    assert wanted.format(name=name) in message


@pytest.mark.parametrize(
    ("change", "error", "wanted"),
    [
        ({"builder": "yolov99"}, SpecError, "builder: got 'yolov99', expected one of torchvision's: fasterrcnn_mobile"),
        ({"builder": ""}, SpecError, "builder: got ''"),
        ({"builder_options": {"score_thresh": 0.5}}, SpecError, "got 'score_thresh', which every request sets"),
        ({"builder_options": {"detections_per_img": 5}}, SpecError, "Use serving.score_threshold and"),
        ({"builder_options": {"colour": 5}}, SpecError, "builder_options: got 'colour', expected one of"),
        ({"builder_options": {"nms_tresh": 0.5}}, SpecError, "nms_thresh"),
        ({"builder_options": {"norm_layer": 3}}, SpecError, "does not take builder_options {'norm_layer': 3}"),
        ({"golden_image": "nowhere.jpg"}, SpecError, "golden_image: cannot read"),
        ({"weights": "nowhere.pth"}, CheckpointError, "nowhere.pth, which is no file"),
        ({"weights": ""}, SpecError, "names no weights. Give them with --weights"),
        ({"runtime": "onnx"}, DetserveError, "runtime"),
    ],
)
def test_a_spec_that_cannot_be_packed_is_refused(source, tmp_path, change, error, wanted):
    spec, folder = source
    assert wanted in refused(error, dataclasses.replace(spec, **change), folder, tmp_path / "a.mar")


@pytest.mark.parametrize("option", ["pretrained", "weights", "weights_backbone", "num_classes"])
def test_a_builder_option_cannot_fetch_weights_from_the_net(source, tmp_path, option):
    spec, folder = source
    changed = dataclasses.replace(spec, builder_options={option: True})
    message = refused(DetserveError, changed, folder, tmp_path / "a.mar")
    assert option in message


def test_a_golden_image_that_is_no_image_is_refused(source, tmp_path):
    spec, folder = source
    (tmp_path / "text.jpg").write_text("no image")
    message = refused(DetserveError, spec, folder, tmp_path / "a.mar", golden_image=tmp_path / "text.jpg")
    assert "golden_image: got 8 bytes that eager cannot decode" in message


def test_an_existing_archive_is_replaced_only_by_force(source, tmp_path):
    spec, folder = source
    out = tmp_path / "a.mar"
    out.write_bytes(b"mine")
    assert "exists already. Replace it with --force" in refused(ArchiveError, spec, folder, out)
    assert out.read_bytes() == b"mine"
    # A build that fails leaves the old one, force or not.
    assert refused(SpecError, dataclasses.replace(spec, builder="x"), folder, out, force=True)
    assert out.read_bytes() == b"mine"


def test_a_worker_that_differs_from_eager_stops_the_build(source, tmp_path, monkeypatch):
    from dethandlers.families import torchvision_detection

    spec, folder = source
    monkeypatch.setattr(torchvision_detection, "normalise", lambda image, mean, std: image)
    assert "not built: " in refused(ArchiveError, spec, folder, tmp_path / "a.mar")


def test_a_malicious_checkpoint_stops_the_build_and_calls_nothing(source, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'marker'}",)

    spec, folder = source
    torch.save({"model": Evil()}, tmp_path / "evil.pth")
    message = refused(CheckpointError, spec, folder, tmp_path / "a.mar", weights=tmp_path / "evil.pth")
    assert "would call posix.system" in message
    assert not (tmp_path / "marker").exists()


# Verify.


def test_verify_reproduces_the_golden_detections(built):
    found = verify_archive(built)
    assert found.drift == ""
    assert found.golden_detections >= 20
    assert found.notes == ()
    assert found.members == check_archive(built)
    assert found.spec.name == "ssd"


def test_verify_names_a_changed_byte(built, tmp_path):
    content = bytearray(built.read_bytes())
    content[content.index(b"safetensors") - 5000] ^= 1
    (tmp_path / "a.mar").write_bytes(bytes(content))
    with pytest.raises(ArchiveError, match=r"archive a\.mar: member"):
        verify_archive(tmp_path / "a.mar")


def test_verify_finds_altered_weights_behind_right_digests(built, tmp_path, capsys):
    """Who can alter an archive can also compute its digests; what the model finds still gives it away."""
    members = members_of(built)
    (tmp_path / "w.safetensors").write_bytes(members["weights.safetensors"])
    state = load_file(tmp_path / "w.safetensors")
    name = "head.classification_head.module_list.0.1.bias"
    state[name][1] += 0.5  # class 1 of the first anchor on the first level
    del members["SHA256SUMS"]
    write_mar(tmp_path / "a.mar", {**members, "weights.safetensors": save(state)})
    assert check_archive(tmp_path / "a.mar")
    assert "on the golden image" in verify_archive(tmp_path / "a.mar").drift
    assert cli.main(["verify", str(tmp_path / "a.mar"), "--json"]) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["verified"] is False


def test_verify_says_when_the_golden_detections_were_altered(built, tmp_path):
    members = members_of(built)
    del members["SHA256SUMS"]
    golden = json.loads(members["golden/golden.json"])
    golden["boxes_xyxy"][0][0] += 3
    write_mar(tmp_path / "a.mar", {**members, "golden/golden.json": json.dumps(golden).encode()})
    assert "moved by 3.00 px" in verify_archive(tmp_path / "a.mar").drift


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("spec.json", b"{", "spec.json"),
        ("spec.json", b"{}", "spec.json"),
        ("spec.json", b"[]", "spec.json"),
        ("spec.json", None, "spec.json"),
        ("category_map.json", b"{}", "category_map.json"),
        ("category_map.json", b"[3]", "category_map.json"),
        ("golden/golden.json", b'{"image": "../../x"}', "golden.json"),
        ("weights.safetensors", b"text", "weights"),
        ("weights.safetensors", None, "weights.safetensors"),
    ],
)
def test_verify_names_a_member_that_cannot_be_read(built, tmp_path, name, content, wanted):
    members = members_of(built)
    del members["SHA256SUMS"]
    changed = {**members, name: content}
    write_mar(tmp_path / "a.mar", {key: value for key, value in changed.items() if value is not None})
    with pytest.raises(DetserveError, match=r"archive a\.mar: .*" + wanted.replace(".", r"\.")):
        verify_archive(tmp_path / "a.mar")


def test_a_foreign_archive_cannot_be_verified(tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "a.mar", "w") as archive:
        archive.writestr(MANIFEST_FILE, "{}")
    with pytest.raises(ArchiveError, match=r"archive a\.mar"):
        verify_archive(tmp_path / "a.mar")
    for command in ("verify", "inspect"):
        assert cli.main([command, str(tmp_path / "a.mar")]) == 2
        assert "a.mar" in capsys.readouterr().err


def test_verify_inspect_and_eager_execute_nothing_of_an_archive(built, tmp_path):
    """In processes of their own, so that a module which the archive brings would really be imported."""
    marker = tmp_path / "marker"
    evil = f"open({str(marker)!r}, 'w').close()\n".encode()
    members = members_of(built)
    del members["SHA256SUMS"]
    changed = {name: evil + content if name.endswith(".py") else content for name, content in members.items()}
    assert changed["dethandlers/__init__.py"].startswith(evil)
    write_mar(tmp_path / "a.mar", {**changed, "torch.py": evil, "sitecustomize.py": evil})
    script = f"""
import sys
from pathlib import Path
from dettools import cli
from detserve.eager import eager_from_archive
path = {str(tmp_path / "a.mar")!r}
print([cli.main(["verify", path]), cli.main(["inspect", path, "--json"])])
eager_from_archive(Path(path))
assert not [name for name, module in sys.modules.items() if "detserve-" in (getattr(module, "__file__", "") or "")]
"""
    answer = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300
    )
    assert answer.returncode == 0, answer.stderr
    assert "[0, 0]" in answer.stdout
    assert "the archive's worker code is not that of this detserve" in answer.stderr
    assert not marker.exists()
    # The code is live: a worker, which imports it, would leave the marker.
    (tmp_path / "live.py").write_bytes(changed["dethandlers/__init__.py"])
    subprocess.run([sys.executable, str(tmp_path / "live.py")], check=False, capture_output=True, timeout=60)
    assert marker.exists()


def test_an_archive_is_inspected_for_people_and_for_programs(built, capsys):
    assert cli.main(["inspect", str(built)]) == 0
    shown = capsys.readouterr().out
    for word in ("ssd 1.0", BUILDER, "category map", "class 1", "weights.safetensors", "größer"):
        assert word in shown
    assert cli.main(["inspect", str(built), "--json"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["spec"]["builder"] == BUILDER
    assert len(document["members"]) == len(check_archive(built))
    assert io.BytesIO(json.dumps(document).encode()).getvalue()
