"""The model store's specs of foreign ONNX files: they alone make these files right, in process and served.

What is known of them stands in ../shared/data/README.md; objects on the photographs were looked at by eye.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from dethandlers.artefact import load_artefact
from dethandlers.detector import Detector, Request
from dethandlers.options import Options
from detserve.archive import build_archive
from detserve.client import Client
from detserve.eager import eager_from_archive, load_eager
from detserve.mar import unpacked
from detserve.spec import load_spec
from dettools.cli import main

STORE = Path(__file__).parents[2] / "model_store"
WEIGHTS = {
    "fastestdet": "models/fastestdet/FastestDet.onnx",
    "ultraface": "models/ultraface/version-RFB-320.onnx",
    "yolox_nano": "models/yolox_nano/yolox_nano.onnx",
}
# Where four faces are on persons.jpg, from left to right, px.
FACES = [[129, 93, 156, 129], [192, 77, 215, 109], [405, 174, 431, 208], [510, 158, 539, 195]]
# The best of each class on dog.jpg.
DOG = {"dog": [126, 201, 334, 536], "bicycle": [127, 150, 579, 439], "car": [457, 72, 703, 170]}


@pytest.fixture(scope="module")
def archives(shared_data, tmp_path_factory):
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("foreign")
    golden = {"fastestdet": "dog.jpg", "ultraface": "persons.jpg"}
    return {
        name: build_archive(
            load_spec(STORE / name / f"{name}.yaml"),
            folder=STORE / name,
            out=folder / f"{name}.mar",
            weights=shared_data / WEIGHTS[name],
            golden_image=shared_data / "photos" / image,
        ).path
        for name, image in golden.items()
    }


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_spec_names_its_layout_its_licence_and_what_it_reaches(name):
    spec = load_spec(STORE / name / f"{name}.yaml")
    assert (spec.name, spec.runtime, spec.weights) == (name, "onnx", "")
    assert spec.license
    assert spec.description
    # Faces have not been measured: nothing is declared.
    assert (spec.accuracy is None) == (name == "ultraface")


def detect(archive, images, threshold):
    with unpacked(archive) as folder:
        detector = Detector(load_artefact(folder), torch.device("cpu"))
        answers = detector.detect([Request(image, Options(threshold, 100)) for image in images])
        detector.close()
    return [answer.detections for answer in answers]


@pytest.mark.shared_data
@pytest.mark.parametrize(("name", "threshold", "least"), [("fastestdet", 0.2, 80), ("ultraface", 0.3, 7)])
def test_the_packed_detector_equals_eager_on_every_photograph(shared_data, archives, name, threshold, least):
    photographs = sorted((shared_data / "photos").glob("*.*"))
    assert len(photographs) >= 10
    eager = eager_from_archive(archives[name])
    compared = 0
    contents = [path.read_bytes() for path in photographs]
    for path, content, found in zip(photographs, contents, detect(archives[name], contents, threshold), strict=True):
        expected = eager.detect(content, threshold, 100)
        assert found.labels.tolist() == expected.labels.tolist(), path.name
        assert np.allclose(found.scores, expected.scores, rtol=0, atol=1e-3), path.name
        assert np.allclose(found.boxes_xyxy, expected.boxes_xyxy, rtol=0, atol=0.5), path.name
        compared += len(expected)
    assert compared >= least


@pytest.mark.shared_data
def test_the_eager_reference_is_found_by_spec_and_weights(shared_data):
    spec = STORE / "ultraface" / "ultraface.yaml"
    eager = load_eager(str(spec), model_store=STORE, weights=shared_data / WEIGHTS["ultraface"])
    found = eager.detect((shared_data / "photos" / "persons.jpg").read_bytes(), 0.7, 100)
    assert len(found) == 4
    assert "onnxruntime" in eager.source


@pytest.mark.shared_data
@pytest.mark.slow
@pytest.mark.parametrize("name", ["fastestdet", "yolox_nano"])
def test_the_declared_accuracy_is_reached(shared_data, name, capsys):
    folder = shared_data / "coco" / "liz50"
    spec = STORE / name / f"{name}.yaml"
    arguments = ["--images", str(folder / "val2017"), "--annotations", str(folder / "instances_val2017.json")]
    code = main(
        ["verify", str(spec), "--weights", str(shared_data / WEIGHTS[name]), *arguments, "--ap-tolerance", "0.002"]
    )
    assert code == 0, capsys.readouterr().out


@pytest.mark.shared_data
@pytest.mark.server
@pytest.mark.slow
def test_served_they_find_what_is_on_the_photographs_and_what_eager_finds(shared_data, archives, serve, tmp_path):
    instance = serve(list(archives.values()), "foreign")
    photos = shared_data / "photos"
    with Client.for_instance(instance) as client:
        faces = client.detect("ultraface", (photos / "persons.jpg").read_bytes())
        assert client.detect("ultraface", (photos / "dog.jpg").read_bytes()).boxes_xyxy.shape == (0, 4)
        objects = client.detect("fastestdet", (photos / "dog.jpg").read_bytes())
    left_to_right = faces.boxes_xyxy[np.argsort(faces.boxes_xyxy[:, 0])]
    assert np.allclose(left_to_right, FACES, rtol=0, atol=3)
    names = [category.name for category in load_spec(STORE / "fastestdet" / "fastestdet.yaml").categories]
    best = {}
    for label, box in zip(objects.labels.tolist(), objects.boxes_xyxy.tolist(), strict=True):
        best.setdefault(names[label], box)
    for name, box in DOG.items():
        assert best[name] == pytest.approx(box, abs=3), name
    pictures = [str(photos / name) for name in ("dog.jpg", "persons.jpg", "mmdet_demo.jpg", "palette.png")]
    for name, archive in archives.items():
        compared = ["compare", name, *pictures, "--instance", instance, "--model-store", str(archive.parent)]
        assert main([*compared, "--work-dir", str(tmp_path / name)]) == 0
