"""The trained YOLOX-nano of MMDetection behind a real TorchServe: its photographs, and COCO AP through the endpoint."""

import json
import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from detserve.archive import build_archive
from detserve.client import Client
from detserve.export.model import export_model
from detserve.export.onnx_file import require_described
from detserve.instance import Instance
from detserve.mmdet_source import mmdet_spec_categories
from detserve.model_store import spec_path
from detserve.spec import dump_spec, load_spec, parse_spec
from dettools.cli import main
from mmdet_models import mmdet_warnings, needs_mmdet

pytestmark = [
    needs_mmdet,
    *mmdet_warnings,
    pytest.mark.server,
    pytest.mark.shared_data,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
]


@pytest.fixture(scope="module")
def nano(shared_data):
    return shared_data / "models" / "mmdet_yolox_nano"


@pytest.fixture(scope="module")
def expected(nano):
    return json.loads((nano / "expected.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def served(nano, serve, tmp_path_factory):
    """The instance, and the folder with the spec and the archive."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    store = tmp_path_factory.mktemp("nano")
    config, checkpoint = nano / "yolox_nano_8xb8-300e_coco.py", nano / "yolox_nano_mmdet.pth"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        described = {
            "name": "nano",
            "family": "mmdet",
            "config": str(config),
            "weights": str(checkpoint),
            "categories": [vars(one) for one in mmdet_spec_categories(config, checkpoint)],
            "serving": {"score_threshold": 0.01, "max_detections": 300, "batch_size": 8, "threads": 1},
        }
        spec = parse_spec(described, where="test", folder=store)
        spec_path(store, "nano").parent.mkdir()
        dump_spec(spec, spec_path(store, "nano"))
        build_archive(spec, folder=store, out=store / "nano.mar")
    yield serve([store / "nano.mar"], "nano"), store
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def exported(served, serve):
    """The instance that serves the exported file; its workers tell in their log what they import."""
    _, store = served
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spec = load_spec(spec_path(store, "nano"))
        file = export_model(replace(spec, name="nano_onnx"), folder=store, out=store / "nano.onnx").path
    build_archive(require_described(file).spec, folder=store, out=store / "nano_onnx.mar", weights=file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPROFILEIMPORTTIME", "1")
        return serve([store / "nano_onnx.mar"], "nano-onnx")


def test_an_exported_model_is_served_without_mmdetection(exported):
    texts = [path.read_text("utf-8", "replace") for path in Instance.named(exported).log_folder.glob("*.log")]
    imported = set(re.findall(r"import time: .*\|\s+(\w+)", "\n".join(texts)))
    assert {"torch", "dethandlers", "onnxruntime"} <= imported
    assert not imported & {"mmdet", "mmcv", "mmengine", "cv2"}


def test_the_photographs_give_what_is_published(served, shared_data, expected):
    instance, _ = served
    photos = expected["detections"]["photos"]
    assert len(photos) >= 3
    with Client.for_instance(instance) as client:
        for name, rows in photos.items():
            found = client.predict("nano", shared_data / "photos" / name, options={"score_threshold": 0.3})
            assert [one["class_name"] for one in found] == [row["name"] for row in rows]
            assert [one["class_label"] for one in found] == [row["label"] for row in rows]
            np.testing.assert_allclose([one["score"] for one in found], [row["score"] for row in rows], atol=1e-3)
            np.testing.assert_allclose([one["bbox"] for one in found], [row["bbox_xyxy"] for row in rows], atol=0.1)


@pytest.mark.parametrize("model", ["nano", "nano_onnx"])
def test_ap_through_the_endpoint_is_eagers_and_the_published_one(
    model, served, shared_data, expected, tmp_path, capsys, request
):
    instance, store = served
    if model == "nano_onnx":
        instance = request.getfixturevalue("exported")
    folder = shared_data / "coco" / "liz50"
    data = ["--images", folder / "val2017", "--annotations", folder / "instances_val2017.json"]
    against = ["--against", "eager", "--instance", instance, "--concurrency", 8, "--out", tmp_path]
    # As it was evaluated: every detection above the config's own threshold.
    asked = ["--score-threshold", 0.01, "--max-detections", 300]
    its = ["--spec", spec_path(store, "nano")]
    arguments = [model, *data, *against, *asked, *its, "--model-store", store, "--json"]

    code = main(["evaluate", *map(str, arguments)])

    said = capsys.readouterr()
    assert code == 0, said.err
    told = json.loads(said.out.splitlines()[-1])
    figures = told["metrics"]["bbox"]["figures"]
    published = expected["coco_ap"]["config_score_thr_0_01"]
    assert (told["answered"], told["failed"]) == (50, 0)
    assert told["certificate"]["ap_served"] == pytest.approx(told["certificate"]["ap_reference"], abs=1e-3)
    assert figures["AP"] == pytest.approx(published["AP"], abs=3e-3)
    assert figures["AP50"] == pytest.approx(published["AP50"], abs=3e-3)
