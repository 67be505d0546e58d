"""MMDetection's models exported: what the worker finds in the file is what MMDetection finds, image by image."""

import io
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from builder_parity import worst
from dethandlers.detections import Detections
from dethandlers.options import Options
from detserve.eager import EagerModel, eager_from_file, load_eager
from detserve.eager_mmdet import load_mmdet
from detserve.errors import ExportError
from detserve.export.exporters import ExportOptions
from detserve.export.model import export_model
from detserve.mmdet_source import mmdet_spec_categories
from detserve.spec import parse_spec
from exported_demo import detect
from mmdet_models import (
    IMAGES,
    RandomModel,
    mmdet_warnings,
    needs_mmdet,
    packaged,
    random_model,
    untrained,
    write_files,
)

pytestmark = [needs_mmdet, *mmdet_warnings, pytest.mark.timeout(900)]

EVERY_CHANGE = ["yolox", "retinanet", "detr"]
NIGHTLY = ["rtmdet", "yolov3", "fcos", "atss", "tood", "vfnet", "gfl", "ssd", "deformable_detr", "dino"]
MOST = 300
PICTURES = IMAGES[:4]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """As the worker of these tests: more threads sum in another order, and random weights amplify that."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Exported:
    """A random model, the file made of it, and what MMDetection finds with it in each picture."""

    model: RandomModel
    file: Path
    eager: EagerModel
    found: list[Detections]


def spec_of(model: RandomModel, **more):
    categories = [vars(one) for one in mmdet_spec_categories(model.config, model.checkpoint)]
    value = {"name": model.config.stem, "family": "mmdet", "config": model.config.name, "categories": categories}
    serving = {"score_threshold": model.score_threshold, "max_detections": MOST}
    return parse_spec({**value, "serving": serving, **more}, where="test", folder=model.config.parent)


def export(model: RandomModel, out: Path, **options):
    return export_model(
        spec_of(model),
        folder=model.config.parent,
        weights=model.checkpoint,
        out=out,
        options=ExportOptions(**options),
    )


@pytest.fixture(
    scope="module", params=EVERY_CHANGE + [pytest.param(name, marks=pytest.mark.nightly) for name in NIGHTLY]
)
def exported(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = random_model(request.param, folder)
        file = folder / "file.onnx"
        export(model, file)
        eager = load_mmdet(model.config, model.checkpoint)
        found = [eager.detect(image, model.score_threshold, MOST) for image in PICTURES]
    return Exported(model, file, eager, found)


def require_same(expected: list[Detections], got: list[Detections], threshold: float) -> None:
    assert [len(one) for one in got] == [len(one) for one in expected]
    differs = worst(expected, got, threshold)
    assert (differs.unmatched, differs.flips) == (0, 0)
    assert differs.box_px <= 0.1
    assert differs.score <= 1e-3


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_worker_finds_in_the_file_what_mmdetection_finds(exported, batch_size):
    options = Options(exported.model.score_threshold, MOST)
    got = detect(exported.file, PICTURES, options, batch_size=batch_size)
    assert sum(map(len, exported.found)) > 80
    require_same(exported.found, got, exported.model.score_threshold)


def test_a_request_sets_its_own_limits(exported):
    every = exported.found[0]
    threshold = float((every.scores[9] + every.scores[10]) / 2)
    for options in (Options(threshold, MOST), Options(exported.model.score_threshold, 7)):
        expected = exported.eager.detect(PICTURES[0], options.score_threshold, options.max_detections)
        found = detect(exported.file, PICTURES[:1], options)
        require_same([expected], found, options.score_threshold)
        assert len(found[0]) in (7, 10)


def test_the_file_is_its_own_reference(exported):
    reference = eager_from_file(exported.file)
    assert "file.onnx itself" in reference.source
    threshold = exported.model.score_threshold
    require_same(exported.found, [reference.detect(image, threshold, MOST) for image in PICTURES], threshold)


@pytest.fixture(scope="module")
def retinanet(tmp_path_factory):
    values = packaged("retinanet/retinanet_r18_fpn_1x_coco.py")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return values, untrained(values).network.state_dict()


def changed(retinanet, folder, change):
    values, state = retinanet
    values = {**values, "model": {**values["model"]}}
    change(values)
    return write_files(values, state, folder, "changed")


@pytest.mark.parametrize("exported", ["yolox"], indirect=True)
def test_axes_are_free_unless_they_are_fixed(exported, tmp_path):
    three = export(exported.model, tmp_path / "three.onnx", batch=3)
    assert three.facts.dynamic == ()
    options = Options(exported.model.score_threshold, MOST)
    require_same(exported.found, detect(three.path, PICTURES, options, batch_size=4), options.score_threshold)
    with pytest.raises(ExportError, match="every image is resized to one size"):
        export(exported.model, tmp_path / "a.onnx", dynamic=("batch", "size"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp16"}, r"got fp16 with RetinaNet, expected fp32.*--serving precision=fp16"),
        ({"nms": "graph"}, "nms: got 'graph'"),
        ({"dynamic": ("batch",)}, "each image keeps its aspect ratio"),
        ({"batch": 2, "dynamic": ("batch", "size")}, "batch: got 2"),
    ],
)
def test_what_the_file_cannot_be_is_refused(retinanet, tmp_path, options, message):
    model = changed(retinanet, tmp_path, lambda values: None)
    with pytest.raises(ExportError, match=message):
        export(model, tmp_path / "a.onnx", **options)
    assert not (tmp_path / "a.onnx").exists()


def soft_nms(values):
    values["model"]["test_cfg"] = {**values["model"]["test_cfg"], "nms": {"type": "soft_nms", "iou_threshold": 0.5}}


def pipeline(*steps):
    def change(values):
        loading, resize, *_, packing = values["test_dataloader"]["dataset"]["pipeline"]
        chosen = [loading, *({**resize, **step} if step.get("type", "Resize") == "Resize" else step for step in steps)]
        dataset = {**values["test_dataloader"]["dataset"], "pipeline": [*chosen, packing]}
        values["test_dataloader"] = {**values["test_dataloader"], "dataset": dataset}

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (soft_nms, "test_cfg.nms: got .*soft_nms"),
        (pipeline({}, {"type": "RandomFlip", "prob": 0.5}), r"got the step RandomFlip\(prob=0.5\)"),
        (pipeline({"interpolation": "bicubic"}), "interpolation='bicubic'"),
        (pipeline({}, {"type": "Pad", "size_divisor": 32}), "size_divisor=32"),
        (pipeline({}, {"type": "Pad", "size": (300, 300), "pad_val": {"img": (1, 2, 3)}}), "one grey level"),
    ],
)
def test_what_cannot_be_described_is_refused_by_name(retinanet, tmp_path, change, message):
    model = changed(retinanet, tmp_path, change)
    with pytest.raises(ExportError, match=message):
        export(model, tmp_path / "a.onnx")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("faster_rcnn/faster-rcnn_r18_fpn_8xb8-amp-lsj-200e_coco.py", "FasterRCNN, which has two stages"),
        ("rtmdet/rtmdet-ins_tiny_8xb32-300e_coco.py", "RTMDetInsSepBNHead, whose decoding is its own"),
        ("solov2/solov2-light_r18_fpn_ms-3x_coco.py", "SOLOv2, whose masks are not exported"),
    ],
)
def test_other_models_are_refused_with_the_remedy(tmp_path, config, message):
    values = packaged(config)
    model = write_files(values, untrained(values).network.state_dict(), tmp_path, "other")
    with pytest.raises(ExportError, match=rf"{message}.*detserve archive CONFIG\.py CHECKPOINT\.pth"):
        export(model, tmp_path / "a.onnx")


@pytest.fixture(scope="module")
def nano(shared_data, tmp_path_factory):
    folder = shared_data / "models" / "mmdet_yolox_nano"
    photo = next(iter(sorted((shared_data / "photos").glob("*.jpg"))))
    model = RandomModel(folder / "yolox_nano_8xb8-300e_coco.py", folder / "yolox_nano_mmdet.pth", 0.01)
    out = tmp_path_factory.mktemp("nano") / "nano.onnx"
    made = export_model(spec_of(model), folder=folder, weights=model.checkpoint, out=out, golden_image=photo)
    assert made.rehearsal.detections > 10
    return out


WITHOUT_MMDET = """
import sys
for name in ("mmdet", "mmcv", "mmengine", "cv2"):
    sys.modules[name] = None
from pathlib import Path
from detserve.archive import build_archive, verify_archive
from detserve.export.onnx_file import require_described
file, out = Path(sys.argv[1]), Path(sys.argv[2])
described = require_described(file)
build_archive(described.spec, folder=file.parent, out=out, weights=file, golden=described.golden)
print(verify_archive(out).drift or "reproduced")
"""


@pytest.mark.shared_data
def test_the_archive_of_the_file_needs_no_mmdetection(nano, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_MMDET, str(nano), str(tmp_path / "nano.mar")],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout.strip().splitlines()[-1:] == ["reproduced"], done.stderr


@pytest.mark.shared_data
@pytest.mark.slow
def test_the_trained_model_keeps_its_ap(nano, shared_data):
    from contextlib import redirect_stdout

    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    folder = shared_data / "coco" / "liz50"
    annotations = next(folder.rglob("*instances*.json"), None) or next(folder.rglob("*.json"))
    with redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        numbers = list(truth.imgs)
        images = [next(folder.rglob(truth.imgs[number]["file_name"])).read_bytes() for number in numbers]
        categories = load_eager(nano, model_store=Path()).categories
        rows = []
        for number, found in zip(numbers, detect(nano, images, Options(0.01, 1000), batch_size=8), strict=True):
            for (x1, y1, x2, y2), score, label in zip(found.boxes_xyxy, found.scores, found.labels, strict=True):
                box = [float(side) for side in (x1, y1, x2 - x1, y2 - y1)]
                category = categories[label].id
                rows.append({"image_id": number, "category_id": category, "bbox": box, "score": float(score)})
        evaluation = COCOeval(truth, truth.loadRes(rows), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(0.3295, abs=1e-3)
    assert evaluation.stats[1] == pytest.approx(0.4913, abs=1e-3)
