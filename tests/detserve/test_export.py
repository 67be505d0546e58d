"""The demo model to ONNX: what is in the file, what each choice changes, and everything that must stop an export."""

import ast
import dataclasses
import hashlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from checkout import ROOT
from dethandlers.detections import Category
from dethandlers.families.torchvision_detection import transform_settings
from dethandlers.options import Options
from dethandlers.spec import Spec
from detserve.archive import build_archive, verify_archive
from detserve.checkpoint import load_state_dict
from detserve.eager import eager_from_archive, eager_from_source
from detserve.errors import CheckpointError, DetserveError, ExportError, SpecError
from detserve.export import torchvision_export, torchvision_graphs
from detserve.export.exporters import ExportOptions, exporter_of
from detserve.export.model import export_model
from detserve.export.onnx_file import require_described
from detserve.resolve import resolve_spec
from detserve.spec import load_spec
from dettools.comparison import compare_image
from exported_demo import CHECKPOINT, DEFAULTS, SPEC, detect, differences, export_demo, scenes, worker_of
from PIL import Image
from torchvision.models import get_model

NAMES = ["circle", "square", "triangle", "star", "ring", "cross"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def images() -> list[bytes]:
    return scenes(5)


@pytest.fixture(scope="module")
def eager():
    return eager_from_source(load_spec(SPEC), CHECKPOINT)


@pytest.fixture(scope="module")
def reference(eager, images):
    found = [eager.detect(image, DEFAULTS.score_threshold, DEFAULTS.max_detections) for image in images]
    assert sum(map(len, found)) > 25
    return found


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return export_demo(tmp_path_factory.mktemp("host") / "shapes.onnx")


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    return export_demo(tmp_path_factory.mktemp("graph") / "shapes.onnx", nms="graph")


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    return export_demo(tmp_path_factory.mktemp("half") / "shapes.onnx", precision="fp16")


# What is in the file.


def test_it_says_all_that_the_checkpoint_and_the_spec_say(host, eager):
    described = require_described(host.path)
    spec = described.spec
    assert (spec.name, spec.version, spec.runtime, spec.builder) == ("shapes", "1.0", "onnx", load_spec(SPEC).builder)
    assert (spec.source.file, spec.source.sha256) == (
        "shapes.safetensors",
        hashlib.sha256(CHECKPOINT.read_bytes()).hexdigest(),
    )
    assert spec.categories == tuple(Category(place, name, place) for place, name in enumerate(NAMES, start=1))
    assert spec.serving == load_spec(SPEC).serving
    # torchvision's SSDlite: 320 px, pixels from -1 to 1.
    settings = spec.preprocessing
    assert (settings.resize, settings.size, settings.channel_order) == ("stretch", (320, 320), "rgb")
    assert (settings.mean, settings.std, settings.scale) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 1 / 255)
    assert (spec.decoding.nms, spec.decoding.nms_iou) == ("host", 0.55)

    name, golden = described.golden
    assert golden.image == SPEC.with_name("golden.jpg").read_bytes()
    assert (name, golden.score_threshold, golden.max_detections) == ("golden.jpg", 0.05, 100)
    found = eager.detect(golden.image, 0.05, 100)
    assert len(golden.detections) == len(found) == host.golden_detections > 5
    np.testing.assert_allclose(golden.detections.boxes_xyxy, found.boxes_xyxy, atol=1e-3)
    np.testing.assert_allclose(golden.detections.scores, found.scores, atol=1e-5)
    assert golden.detections.labels.tolist() == found.labels.tolist()


def test_it_says_how_it_was_made(host, graph):
    facts = require_described(host.path).facts
    assert (facts["torch"], facts["opset"], facts["precision"], facts["nms"]) == (torch.__version__, 17, "fp32", "host")
    assert (facts["dynamic"], facts["input_range"]) == (
        ["batch"],
        {"batch": [1, None], "height": [320, 320], "width": [320, 320]},
    )
    assert require_described(graph.path).facts["nms"] == "graph"
    assert host.sha256 == hashlib.sha256(host.path.read_bytes()).hexdigest()
    assert host.bytes == host.path.stat().st_size
    assert host.rehearsal.drift == ""
    # The golden image, and that smaller, turned and cut.
    assert len(set(host.rehearsal.sizes)) == host.rehearsal.images == 4


def test_any_reader_of_onnx_shows_the_metadata(host):
    model = onnx.load(str(host.path))
    properties = {one.key: one.value for one in model.metadata_props}
    assert set(properties) == {
        *("detserve.spec", "detserve.category_map", "detserve.golden", "detserve.export", "names"),
    }
    for value in properties.values():
        json.loads(value)
    # As other tools write and read it.
    assert {int(k): v for k, v in ast.literal_eval(properties["names"]).items()} == dict(enumerate(NAMES))
    assert (model.producer_name, model.graph.name) == ("detserve", "shapes")
    assert {one.domain or "ai.onnx" for one in model.opset_import} == {"ai.onnx"}, "operators that not all have"
    assert str(ROOT).encode() not in host.path.read_bytes(), "a path of this machine"


# What it is good for.


@pytest.mark.parametrize("nms", ["host", "graph"])
def test_it_finds_what_eager_finds_alone_and_in_a_batch(host, graph, nms, images, reference):
    path = (host if nms == "host" else graph).path
    for batch_size in (1, 5):
        unpaired, box_px, score = differences(reference, detect(path, images, batch_size=batch_size))
        assert unpaired == 0
        assert box_px <= 0.1
        assert score <= 1e-3


def test_an_archive_is_built_from_the_file_alone(host, tmp_path, images, reference):
    lonely = tmp_path / "empty folder" / "x.onnx"
    lonely.parent.mkdir()
    shutil.copy(host.path, lonely)
    described = require_described(lonely)
    out = tmp_path / "shapes.mar"

    build_archive(described.spec, folder=lonely.parent, out=out, weights=lonely, golden=described.golden)

    found = verify_archive(out)
    assert (found.drift, found.golden_detections) == ("", host.golden_detections)
    assert found.spec.source == host.spec.source
    assert found.spec.categories == host.spec.categories
    plain = eager_from_archive(out)
    unpaired, box_px, score = differences(reference, [plain.detect(image, 0.05, 100) for image in images])
    assert unpaired == 0
    assert box_px <= 0.1
    assert score <= 1e-3


def test_with_nms_inside_onnxruntime_alone_finds_the_same_from_the_images_alone(graph, eager, images):
    """Thresholds are optional inputs with the spec's values; the pixels are 320×320, so that nothing is resized."""
    session = onnxruntime.InferenceSession(str(graph.path), providers=["CPUExecutionProvider"])
    assert [one.name for one in session.get_inputs()] == ["images"]
    assert {one.name for one in session.get_overridable_initializers()} == {"score_threshold", "max_detections"}
    picture = _opened(images[0]).resize((320, 320))
    boxes, scores, labels, count = session.run(None, {"images": as_input(picture)[None]})
    found = eager.detect(_png(picture), 0.05, 100)
    assert count.tolist() == [len(found)]
    assert len(found) > 5
    np.testing.assert_allclose(boxes[0, : len(found)], found.boxes_xyxy, atol=0.1)
    np.testing.assert_allclose(scores[0, : len(found)], found.scores, atol=1e-3)
    assert (labels[0, : len(found)] - 1).tolist() == found.labels.tolist()
    assert not boxes[0, len(found) :].any()


def as_input(picture: Image.Image) -> np.ndarray:
    """``(3, 320, 320)`` float32, from -1 to 1, as torchvision's SSDlite takes it."""
    return ((np.asarray(picture, np.float32) / 255 - 0.5) / 0.5).transpose(2, 0, 1)


def _opened(image: bytes) -> Image.Image:
    return Image.open(io.BytesIO(image)).convert("RGB")


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("options", [Options(0.01, 100), Options(0.5, 100), Options(0.05, 1), Options(1.0, 100)])
def test_a_request_s_threshold_and_number_win_over_the_file_s(graph, eager, images, options):
    expected = [eager.detect(image, options.score_threshold, options.max_detections) for image in images]
    found = detect(graph.path, images, options, batch_size=5)
    unpaired, box_px, score = differences(expected, found, options)
    assert unpaired == 0
    assert box_px <= 0.1
    assert score <= 1e-3
    assert max(map(len, found)) <= options.max_detections


@pytest.fixture(scope="module")
def state() -> tuple[Spec, dict[str, torch.Tensor]]:
    weights = load_state_dict(CHECKPOINT)
    return resolve_spec(load_spec(SPEC), weights), weights


def test_every_opset_loads_and_agrees(state, images):
    spec, weights = state
    pixels = np.stack([as_input(_opened(image).resize((320, 320))) for image in images[:2]])
    answers = []
    for opset in range(16, 21):
        made = exporter_of("torchvision")(spec, weights, ExportOptions(nms="graph", opset=opset))
        assert {one.version for one in onnx.load_from_string(made.content).opset_import} == {opset}
        session = onnxruntime.InferenceSession(made.content, providers=["CPUExecutionProvider"])
        rest = {"score_threshold": np.float32(0.01), "max_detections": np.int64(50)}
        answers.append(session.run(None, {"images": pixels} | {k: np.asarray(v) for k, v in rest.items()}))
    assert answers[0][3].min() > 5
    for other in answers[1:]:
        for mine, theirs in zip(answers[0], other, strict=True):
            np.testing.assert_allclose(mine, theirs, atol=1e-4)


def test_a_fixed_batch_is_fed_in_chunks_and_equals_the_dynamic_one(host, images, tmp_path):
    fixed = export_demo(tmp_path / "three.onnx", batch=3)
    assert fixed.facts.dynamic == ()
    assert fixed.facts.input_range["batch"] == (3, 3)
    (inputs,) = onnx.load(str(fixed.path)).graph.input
    assert [axis.dim_value for axis in inputs.type.tensor_type.shape.dim] == [3, 3, 320, 320]
    for batch_size in (1, 5):
        found = detect(fixed.path, images, batch_size=batch_size)
        unpaired, box_px, score = differences(detect(host.path, images), found)
        assert unpaired == 0
        assert box_px <= 0.01
        assert score <= 1e-5


def test_half_precision_is_half_the_size_and_close(half, host, images, reference):
    assert half.bytes < 0.6 * host.bytes
    with worker_of(half.path) as detector:
        assert detector.describe()["precision"] == "fp16"
    assert require_described(half.path).spec.serving.precision == "fp16"
    for one, other in zip(reference, detect(half.path, images, batch_size=5), strict=True):
        compared = compare_image("", one, other, score_threshold=0.05, max_detections=100, required="reduced-precision")
        assert compared.passed, compared.findings
    _, box_px, _ = differences(reference, detect(half.path, images))
    assert box_px > 1e-4, "nothing was computed in half precision"


# What stops an export.


def refused(error: type[DetserveError], out: Path, options: ExportOptions | None = None, **how: object) -> str:
    """Export, and return why it was refused; nothing is left, and nothing that was there is gone."""
    before = {path: path.read_bytes() for path in out.parent.iterdir()} if out.parent.is_dir() else None
    given = {"spec": load_spec(SPEC), "folder": SPEC.parent} | how
    with pytest.raises(error) as caught:
        export_model(given.pop("spec"), out=out, options=options, **given)
    after = {path: path.read_bytes() for path in out.parent.iterdir()} if out.parent.is_dir() else None
    assert after == before
    return str(caught.value)


def test_an_existing_file_is_replaced_only_when_told_so_and_the_same_inputs_give_the_same_bytes(tmp_path, host):
    out = tmp_path / "another name.onnx"
    out.write_bytes(b"mine")
    assert "--force" in refused(ExportError, out)
    exported = export_model(load_spec(SPEC), folder=SPEC.parent, out=out, force=True)
    assert out.read_bytes() == host.path.read_bytes()
    assert exported.path == out
    assert [path.name for path in tmp_path.iterdir()] == ["another name.onnx"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (ExportOptions(dynamic=("size",)), "resizes every image to 320×320. Export it with --dynamic batch"),
        (ExportOptions(dynamic=("batch", "depth")), "got 'depth', expected batch, size, both with a comma, or none"),
        (ExportOptions(dynamic=("batch",), batch=4), "got 4 with --dynamic batch, expected one of the two"),
        (ExportOptions(batch=0), "got 0, expected 1 or more"),
        (ExportOptions(opset=15), "got 15, expected 16 to 20"),
        (ExportOptions(opset=21), "got 21, expected 16 to 20"),
    ],
)
def test_what_an_ssd_cannot_be_is_refused_with_the_reason(tmp_path, options, said):
    assert said in refused(ExportError, tmp_path / "x.onnx", options)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"runtime": "onnx"}, "'torchvision' with runtime 'onnx': there is nothing to export"),
        ({"family": "yolox"}, "'yolox' with runtime 'torch': there is nothing to export"),
    ],
)
def test_a_spec_that_holds_no_checkpoint_of_torchvision_is_refused(tmp_path, changes, said):
    spec = dataclasses.replace(load_spec(SPEC), **changes)
    assert said in refused(ExportError, tmp_path / "x.onnx", spec=spec)


def test_a_wrong_out_is_refused_before_anything_is_done(tmp_path):
    steps: list[str] = []
    assert "ends in .onnx" in refused(ExportError, tmp_path / "shapes.mar", on_progress=steps.append)
    assert "no folder" in refused(ExportError, tmp_path / "none" / "shapes.onnx", on_progress=steps.append)
    assert steps == []


def test_a_missing_checkpoint_or_golden_image_is_named(tmp_path):
    assert "none.pth" in refused(CheckpointError, tmp_path / "x.onnx", weights=tmp_path / "none.pth")
    assert "none.jpg" in refused(SpecError, tmp_path / "x.onnx", golden_image=tmp_path / "none.jpg")


def test_a_folder_that_cannot_be_written_is_said(tmp_path, monkeypatch):
    replace = Path.replace

    def full(path, target):
        if path.suffix == ".onnx":
            raise OSError(28, "No space left on device")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", full)
    assert "No space left on device" in refused(ExportError, tmp_path / "x.onnx")


def test_a_proof_that_fails_keeps_the_file_from_its_name(tmp_path):
    seen: list[tuple[str, int]] = []

    def prove(file: Path) -> str:
        seen.append((file.name, file.stat().st_size))
        return "it is worse"

    out = tmp_path / "x.onnx"
    out.write_bytes(b"the one before")
    exported = export_model(load_spec(SPEC), folder=SPEC.parent, out=out, force=True, prove=prove)
    assert exported.refused == "it is worse"
    assert seen == [("x.onnx", exported.bytes)]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"x.onnx": b"the one before"}


# A file that is not equal.


class ShiftedAnchors(torchvision_graphs.ClassCandidates):
    def __init__(self, *args):
        super().__init__(*args)
        self.anchors += 1.0


class ShiftedLabels(torchvision_graphs.ClassCandidates):
    def forward(self, images):
        boxes, scores, labels = super().forward(images)
        return boxes, scores, labels % self.classes + 1


def other_mean(module):
    return dataclasses.replace(transform_settings(module), mean=(0.45, 0.45, 0.45))


@pytest.mark.parametrize(
    ("nms", "where", "name", "fault", "said"),
    [
        ("host", torchvision_graphs, "ClassCandidates", ShiftedAnchors, "moved by 1"),
        ("graph", torchvision_graphs, "ClassCandidates", ShiftedLabels, "this worker does not find it"),
        ("graph", torchvision_export, "transform_settings", other_mean, "on the golden image"),
    ],
    ids=["anchors a pixel off", "labels shifted", "another mean"],
)
def test_a_file_that_is_not_equal_is_refused(tmp_path, monkeypatch, nms, where, name, fault, said):
    monkeypatch.setattr(where, name, fault)
    why = refused(ExportError, tmp_path / "x.onnx", ExportOptions(nms=nms))
    assert said in why
    assert "would answer differently" in why
    assert "runtime: torch" in why


# Other kinds of model.


def random_state(builder: str, **options: object) -> tuple[Spec, dict[str, torch.Tensor]]:
    weights = get_model(builder, weights=None, weights_backbone=None, num_classes=3, **options).state_dict()
    categories = tuple(Category(place, f"class {place}", place) for place in (1, 2))
    spec = Spec("x", "torchvision", categories, builder=builder, builder_options=options, num_classes=3)
    return spec, weights


@pytest.fixture(scope="module")
def retinanet():
    return random_state("retinanet_resnet50_fpn")


@pytest.fixture(scope="module")
def faster_rcnn():
    return random_state("fasterrcnn_mobilenet_v3_large_320_fpn")


@pytest.mark.parametrize("dynamic", [("batch",), ()])
def test_a_retinanet_without_a_free_size_is_refused(retinanet, dynamic):
    with pytest.raises(ExportError, match=r"pads to multiples of 32.*--dynamic batch,size"):
        exporter_of("torchvision")(*retinanet, ExportOptions(dynamic=dynamic))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (ExportOptions(nms="host"), "second stage needs the kept proposals inside the graph"),
        (ExportOptions(dynamic=("batch", "size")), "whose graph holds one image: each has its own number of proposals"),
        (ExportOptions(dynamic=()), "got no size"),
        (ExportOptions(batch=2), "got 2 with fasterrcnn_mobilenet_v3_large_320_fpn, whose graph holds one image"),
    ],
)
def test_what_a_two_stage_model_cannot_be_is_refused_with_the_reason(faster_rcnn, options, said):
    with pytest.raises(ExportError) as caught:
        exporter_of("torchvision")(*faster_rcnn, options)
    assert said in str(caught.value)


def test_weights_that_do_not_fit_are_refused_by_name(faster_rcnn):
    spec, weights = faster_rcnn
    with pytest.raises(CheckpointError, match=r"rpn\.head\.cls_logits\.weight"):
        exporter_of("torchvision")(
            spec, {key: value for key, value in weights.items() if key != "rpn.head.cls_logits.weight"}, ExportOptions()
        )
