"""Eager, the reference: against the frameworks themselves, and the packed detector against it on real photographs."""

import contextlib
import io
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from builder_parity import spec_of
from dethandlers.artefact import load_artefact
from dethandlers.detections import Category, Detections
from dethandlers.detector import Answer, Detector, Request
from dethandlers.options import Options
from detserve.archive import build_archive
from detserve.eager import TorchvisionEager, decode_rgb, eager_from_archive, load_eager
from detserve.errors import ArchiveError, CheckpointError, DetserveError, SpecError
from detserve.mar import unpacked
from detserve.spec import load_spec
from PIL import Image, ImageOps
from random_detectors import model_labels, random_detector, random_images

YOLOX_SPEC = Path(__file__).parents[2] / "model_store" / "yolox_nano" / "yolox_nano.yaml"
BUILDER = "ssdlite320_mobilenet_v3_large"
# Published for these weights: ../shared/data/README.md.
DOG = {
    "dog": (0.86, [132, 206, 325, 543]),
    "bicycle": (0.80, [51, 137, 572, 423]),
    "car": (0.80, [466, 78, 692, 171]),
}


class Packed:
    """The detector of an archive, as the worker runs it."""

    def __init__(self, detector: Detector):
        self.detector = detector

    def detect(self, image: bytes, score_threshold: float, max_detections: int) -> Detections:
        (answer,) = self.detector.detect([Request(image, Options(score_threshold, max_detections))])
        assert isinstance(answer, Answer), answer
        return answer.detections


@pytest.fixture(scope="module")
def yolox_archive(shared_data, tmp_path_factory):
    pytest.importorskip("onnxruntime")
    out = tmp_path_factory.mktemp("store") / "yolox_nano.mar"
    weights = shared_data / "models" / "yolox_nano" / "yolox_nano.onnx"
    return build_archive(load_spec(YOLOX_SPEC), folder=YOLOX_SPEC.parent, out=out, weights=weights).path


@pytest.fixture(scope="module")
def yolox_eager(yolox_archive):
    return eager_from_archive(yolox_archive)


@pytest.fixture(scope="module")
def yolox_packed(yolox_archive):
    with unpacked(yolox_archive) as folder:
        detector = Detector(load_artefact(folder), torch.device("cpu"))
        yield Packed(detector)
        detector.close()


def named(found: Detections, categories: tuple[Category, ...]) -> dict[str, tuple[float, list[float]]]:
    """The best detection of each class."""
    best: dict[str, tuple[float, list[float]]] = {}
    for box, score, label in zip(found.boxes_xyxy.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True):
        best.setdefault(categories[label].name, (score, box))
    return best


def differences(one: Detections, other: Detections) -> tuple[float, float]:
    """The largest in a coordinate and in a score; the same detections in the same order, but for near ties."""
    assert len(one) == len(other)
    used = set()
    box_px = score = 0.0
    for place in range(len(one)):
        deltas = np.abs(other.boxes_xyxy - one.boxes_xyxy[place]).max(axis=1)
        deltas[(other.labels != one.labels[place])] = np.inf
        deltas[list(used)] = np.inf
        partner = int(deltas.argmin())
        used.add(partner)
        box_px = max(box_px, float(deltas[partner]))
        score = max(score, abs(float(one.scores[place] - other.scores[partner])))
    return box_px, score


# YOLOX-nano on real photographs.


@pytest.mark.shared_data
def test_the_dog_the_bicycle_and_the_car_are_found(shared_data, yolox_eager, yolox_packed):
    image = (shared_data / "photos" / "dog.jpg").read_bytes()
    for side in (yolox_eager, yolox_packed):
        found = named(side.detect(image, 0.3, 100), yolox_eager.categories)
        for name, (score, box) in DOG.items():
            assert found[name][0] == pytest.approx(score, abs=0.02), name
            assert found[name][1] == pytest.approx(box, abs=3), name


@pytest.mark.shared_data
def test_the_three_dogs_are_found_two_of_them_as_horses(shared_data, yolox_eager, yolox_packed):
    """All three animals are found; this small model calls the one in the middle a dog, and the other two horses."""
    image = (shared_data / "photos" / "3dogs.jpg").read_bytes()
    animals = [
        ("horse", 0.82, [394, 131, 571, 296]),
        ("dog", 0.71, [296, 197, 420, 282]),
        ("horse", 0.58, [199, 94, 310, 278]),
    ]
    for side in (yolox_eager, yolox_packed):
        found = side.detect(image, 0.5, 100)
        assert [yolox_eager.categories[label].name for label in found.labels] == [name for name, _, _ in animals]
        for place, (_, score, box) in enumerate(animals):
            assert found.scores[place] == pytest.approx(score, abs=0.02)
            assert found.boxes_xyxy[place].tolist() == pytest.approx(box, abs=3)


@pytest.mark.shared_data
def test_the_packed_detector_equals_eager_on_every_photograph(shared_data, yolox_eager, yolox_packed):
    photographs = sorted((shared_data / "photos").glob("*.*"))
    kinds = set()
    compared = 0
    for path in photographs:
        image = path.read_bytes()
        with Image.open(path) as opened:
            kinds |= {opened.mode} | ({"exif"} if opened.getexif().get(0x112, 1) > 1 else set())
        one, other = yolox_eager.detect(image, 0.05, 100), yolox_packed.detect(image, 0.05, 100)
        box_px, score = differences(one, other)
        assert box_px <= 0.05, path.name
        assert score <= 1e-4, path.name
        compared += len(one)
    assert len(photographs) >= 10
    assert {"RGB", "L", "P"} <= kinds
    assert compared >= 50


@pytest.mark.shared_data
def test_the_packed_detector_reaches_the_published_ap(shared_data, yolox_packed):
    """COCO AP by pycocotools over 50 photographs, single-label, at threshold 0.01 and 100 boxes."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    folder = shared_data / "coco" / "liz50"
    categories = yolox_packed.detector.spec.categories
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(folder / "instances_val2017.json"))
        rows = []
        for image in truth.loadImgs(truth.getImgIds()):
            found = yolox_packed.detect((folder / "val2017" / image["file_name"]).read_bytes(), 0.01, 100)
            for box, score, label in zip(found.boxes_xyxy.tolist(), found.scores, found.labels, strict=True):
                x1, y1, x2, y2 = box
                row = {"image_id": image["id"], "category_id": categories[label].id, "score": float(score)}
                rows.append({**row, "bbox": [x1, y1, x2 - x1, y2 - y1]})
        evaluation = COCOeval(truth, truth.loadRes(rows), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(0.323, abs=0.003)
    assert evaluation.stats[1] == pytest.approx(0.471, abs=0.003)


@pytest.mark.shared_data
def test_eager_decodes_as_pillow_does(shared_data):
    for path in sorted((shared_data / "photos").glob("*.*")):
        with Image.open(path) as image:
            expected = np.array(ImageOps.exif_transpose(image).convert("RGB"))
        got = decode_rgb(path.read_bytes())
        assert got.shape == expected.shape, path.name
        # Two JPEG decoders may round differently.
        assert np.abs(got.astype(int) - expected).mean() < 1.0, path.name


# torchvision.


@pytest.fixture(scope="module")
def images():
    return random_images()[:2]


@pytest.fixture(scope="module")
def detector(images):
    return random_detector(BUILDER, images)


@pytest.fixture(scope="module")
def store(tmp_path_factory, detector):
    """A model store with the model's spec and weights."""
    from detserve.spec import dump_spec

    folder = tmp_path_factory.mktemp("store")
    (folder / "ssd").mkdir()
    dump_spec(spec_of(detector, "ssd", folder / "ssd"), folder / "ssd" / "ssd.yaml")
    return folder


def test_eager_is_a_straight_call_of_torchvisions_model(store, detector, images):
    from torchvision.models import get_model

    heads = {"score_thresh": detector.score_threshold, "detections_per_img": 50}
    model = get_model(BUILDER, weights=None, weights_backbone=None, num_classes=5, **detector.options, **heads).eval()
    model.load_state_dict(detector.state)
    eager = load_eager("ssd", model_store=store)
    label_of = {label: place for place, label in enumerate(model_labels(BUILDER))}
    for image in images:
        pixels = torch.from_numpy(decode_rgb(image)).permute(2, 0, 1).float() / 255
        with torch.inference_mode():
            (expected,) = model([pixels])
        found = eager.detect(image, detector.score_threshold, 50)
        assert len(found) >= 20
        assert np.array_equal(found.boxes_xyxy, expected["boxes"].numpy())
        assert np.array_equal(found.scores, expected["scores"].numpy())
        assert found.labels.tolist() == [label_of[label] for label in expected["labels"].tolist()]


def test_a_class_that_the_map_does_not_know_is_left_out(store, detector, images):
    spec = load_spec(store / "ssd" / "ssd.yaml")
    some = replace(spec, categories=spec.categories[1:3])
    every = TorchvisionEager(spec, detector.state, source="test").detect(images[0], detector.score_threshold, 1000)
    found = TorchvisionEager(some, detector.state, source="test").detect(images[0], detector.score_threshold, 1000)
    assert set(found.labels.tolist()) == {0, 1}
    assert len(found) == int(np.isin(every.labels, [1, 2]).sum())


def test_what_is_no_image_is_refused():
    for data in (b"", b"text", b"\xff\xd8\xff" + b"\0" * 50):
        with pytest.raises(DetserveError, match=f"got {len(data)} bytes that eager cannot decode"):
            decode_rgb(data)


# Where eager comes from.


def test_a_spec_comes_before_the_model_store_and_that_before_the_archive(store, detector, images, tmp_path):
    weights = store / "ssd" / "ssd.safetensors"
    assert str(weights) in load_eager("ssd", model_store=store).source
    assert str(weights) in load_eager(store / "ssd" / "ssd.yaml", model_store=tmp_path).source
    other = tmp_path / "other.safetensors"
    shutil.copy(weights, other)
    assert str(other) in load_eager("ssd", model_store=store, weights=other).source
    given = load_eager("nothing", model_store=tmp_path, spec=store / "ssd" / "ssd.yaml", weights=other)
    assert str(other) in given.source
    assert given.categories == load_spec(store / "ssd" / "ssd.yaml").categories

    # An archive by its path is itself; by its name it is what remains when the spec's weights are not there.
    (tmp_path / "ssd").mkdir()
    shutil.copy(store / "ssd" / "ssd.yaml", tmp_path / "ssd" / "ssd.yaml")
    spec = load_spec(store / "ssd" / "ssd.yaml")
    archive = build_archive(spec, folder=store / "ssd", out=tmp_path / "ssd.mar").path
    for model in ("ssd", archive):
        eager = load_eager(model, model_store=tmp_path)
        assert "the weights inside ssd.mar" in eager.source
    one = eager.detect(images[0], detector.score_threshold, 100)
    assert differences(one, given.detect(images[0], detector.score_threshold, 100)) == (0.0, 0.0)


def test_what_is_missing_is_named(store, tmp_path):
    with pytest.raises(DetserveError, match=r"got 'nothing', but there is neither .*nothing\.yaml nor .*nothing\.mar"):
        load_eager("nothing", model_store=store)
    with pytest.raises(SpecError, match=r"nowhere\.yaml"):
        load_eager(tmp_path / "nowhere.yaml", model_store=store)
    with pytest.raises(SpecError, match=r"nowhere\.yaml"):
        load_eager("ssd", model_store=store, spec=tmp_path / "nowhere.yaml")
    with pytest.raises(CheckpointError, match=r"nowhere\.pth, which is no file"):
        load_eager("ssd", model_store=store, weights=tmp_path / "nowhere.pth")
    with pytest.raises(DetserveError, match=r"nowhere\.mar"):
        load_eager(tmp_path / "nowhere.mar", model_store=store)
    shutil.copy(store / "ssd" / "ssd.yaml", tmp_path / "ssd.yaml")
    with pytest.raises(CheckpointError, match=r"ssd\.safetensors, which is no file"):
        load_eager(tmp_path / "ssd.yaml", model_store=store)
    (tmp_path / "damaged.mar").write_bytes(b"no zip")
    with pytest.raises(ArchiveError, match=r"damaged\.mar: not a zip"):
        load_eager("damaged", model_store=tmp_path)


def test_weights_that_are_no_onnx_file_are_refused(tmp_path):
    pytest.importorskip("onnxruntime")
    (tmp_path / "w.onnx").write_text("no model")
    with pytest.raises(CheckpointError, match=r"w\.onnx"):
        load_eager(YOLOX_SPEC, model_store=tmp_path, weights=tmp_path / "w.onnx")
