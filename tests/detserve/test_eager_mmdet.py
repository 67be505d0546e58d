"""The reference for MMDetection against MMDetection itself, and against the trained model's published figures."""

import copy
import importlib.util
import io
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from dethandlers.mmcv_operators import provide
from detserve.archive import build_archive
from detserve.eager import load_eager
from detserve.eager_mmdet import MmdetEager, load_mmdet
from detserve.errors import CheckpointError, DetserveError, SpecError
from detserve.mmdet_checkpoint import MmdetCheckpoint
from detserve.mmdet_config import ConfigError, read_config
from detserve.spec import parse_spec
from mmdet_models import write_files
from PIL import Image
from pycocotools import mask as coco_mask

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("mmdet") is None, reason="MMDetection is not installed (the extra detserve[mmdet])"
    ),
    # MMDetection's imports and constructors warn of their own past.
    pytest.mark.filterwarnings(
        "ignore::ImportWarning", "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"
    ),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword"),
]

SIZE = (160, 160)
NAMES = tuple(f"thing {number}" for number in range(80))


def packaged(name):
    """A config of MMDetection's own, its test scale made small."""
    folder = Path(importlib.util.find_spec("mmdet").submodule_search_locations[0])
    values = read_config(folder / ".mim" / "configs" / name).values
    for step in values["test_dataloader"]["dataset"]["pipeline"]:
        if step["type"] == "Resize":
            step["scale"] = SIZE
        if step["type"] == "Pad":
            step["size"] = SIZE
    return values


def random_state(values, seed=3):
    """Weights as torch makes them, the classifier's spread so that some scores are high."""
    provide()
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules
    from mmengine.config import Config

    register_all_modules()
    model = Config(copy.deepcopy(values)).model
    model.backbone.init_cfg = None
    torch.manual_seed(seed)
    state = MODELS.build(model).state_dict()
    for name, tensor in state.items():
        if name.endswith(("fc_cls.weight", "retina_cls.weight", "rtm_cls.0.weight")):
            tensor.mul_(40)
    return {name: tensor.clone() for name, tensor in state.items()}


@pytest.fixture(scope="module")
def picture():
    random = np.random.default_rng(5)
    small = Image.fromarray(random.integers(0, 255, (12, 16, 3), dtype=np.uint8))
    out = io.BytesIO()
    small.resize((220, 150), Image.Resampling.BICUBIC).save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize(
    ("name", "threshold"),
    [
        ("retinanet/retinanet_r18_fpn_1x_coco.py", 0.5),
        ("rtmdet/rtmdet-ins_tiny_8xb32-300e_coco.py", 0.4),
        ("faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py", 0.013),
        ("ssd/ssdlite_mobilenetv2-scratch_8xb24-600e_coco.py", 0.013),
    ],
)
def test_it_finds_what_mmdetection_finds(name, threshold, picture, tmp_path):
    """Once more by MMDetection's own functions, its config changed by hand, from a file that it loads itself."""
    values = packaged(name)
    state = random_state(values)
    eager = MmdetEager(values, MmdetCheckpoint(state, {}, NAMES, ()), source="random")
    found = eager.detect(picture, threshold, 20, masks=True)
    assert 5 < len(found) <= 20

    import mmcv
    from mmdet.apis import inference_detector, init_detector
    from mmdet.models.dense_heads import SSDHead
    from mmengine.config import Config

    torch.save({"state_dict": state, "meta": {"dataset_meta": {"classes": NAMES}}}, tmp_path / "a.pth")
    config = Config(copy.deepcopy(values))
    test_cfg = config.model.test_cfg
    test_cfg = test_cfg.get("rcnn", test_cfg)
    test_cfg.score_thr, test_cfg.max_per_img = threshold, 20
    SSDHead.loss_cls = None
    try:
        model = init_detector(config, str(tmp_path / "a.pth"), device="cpu", palette="random")
        expected = inference_detector(model, mmcv.imfrombytes(picture)).pred_instances
    finally:
        del SSDHead.loss_cls
    np.testing.assert_array_equal(found.boxes_xyxy, expected.bboxes.numpy())
    np.testing.assert_array_equal(found.scores, expected.scores.numpy())
    np.testing.assert_array_equal(found.labels, expected.labels.numpy())
    if "masks" in expected:
        decoded = np.stack([coco_mask.decode(rle) for rle in found.masks])
        np.testing.assert_array_equal(decoded, expected.masks.numpy())
        assert decoded.shape[1:] == (150, 220)


def test_requests_change_what_is_found(picture):
    values = packaged("retinanet/retinanet_r18_fpn_1x_coco.py")
    eager = MmdetEager(values, MmdetCheckpoint(random_state(values), {}, NAMES, ()), source="random")
    many = eager.detect(picture, 0.02, 150)
    assert len(many) == 150  # more than the config's 100
    few = eager.detect(picture, 0.02, 7)
    np.testing.assert_array_equal(few.boxes_xyxy, many.boxes_xyxy[:7])
    edge = float(many.scores[4])
    exact = eager.detect(picture, edge, 150)
    assert len(exact) >= 5
    assert (exact.scores >= np.float32(edge)).all()
    assert exact.masks is None


def test_more_detections_than_queries_may_be_asked_for(picture):
    values = packaged("detr/detr_r18_8xb2-500e_coco.py")
    eager = MmdetEager(values, MmdetCheckpoint(random_state(values), {}, NAMES, ()), source="random")
    assert len(eager.detect(picture, 0.0, 1000)) == 100


@pytest.fixture(scope="module")
def retina():
    values = packaged("retinanet/retinanet_r18_fpn_1x_coco.py")
    return values, random_state(values)


def test_weights_that_do_not_fit_are_refused(retina):
    values, state = retina
    lacking = {name: tensor for name, tensor in state.items() if "retina_cls" not in name}
    with pytest.raises(CheckpointError, match=r"2 missing \(first: bbox_head\.retina_cls\.weight\)"):
        MmdetEager(values, MmdetCheckpoint(lacking, {}, NAMES, ()), source="a.pth")
    with pytest.raises(CheckpointError, match=r"1 not the model's \(first: more\)"):
        MmdetEager(values, MmdetCheckpoint(state | {"more": torch.ones(1)}, {}, NAMES, ()), source="a.pth")
    other = state | {"bbox_head.retina_cls.bias": torch.ones(3)}
    with pytest.raises(CheckpointError, match="1 of another shape"):
        MmdetEager(values, MmdetCheckpoint(other, {}, NAMES, ()), source="a.pth")


def test_what_would_run_code_is_refused(retina):
    values, state = retina
    checkpoint = MmdetCheckpoint(state, {}, NAMES, ())
    evil = copy.deepcopy(values)
    evil["model"]["test_cfg"]["nms"]["type"] = "__import__('os').system('true')"
    with pytest.raises(ConfigError, match=r"model\.test_cfg\.nms\.type"):
        MmdetEager(evil, checkpoint, source="a.pth")
    with pytest.raises(ConfigError, match="custom_imports"):
        MmdetEager(values | {"custom_imports": {"imports": ["json"]}}, checkpoint, source="a.pth")
    MmdetEager(values | {"custom_imports": {"imports": ["json"]}}, checkpoint, source="a.pth", allow_code=True)
    with pytest.raises(ConfigError, match="default_scope 'antigravity'"):
        MmdetEager(values | {"default_scope": "antigravity"}, checkpoint, source="a.pth")


def test_a_config_that_does_not_build_says_why(retina):
    values, state = retina
    wrong = copy.deepcopy(values)
    wrong["model"]["neck"]["type"] = "NoSuchNeck"
    with pytest.raises(ConfigError, match="NoSuchNeck"):
        MmdetEager(wrong, MmdetCheckpoint(state, {}, NAMES, ()), source="a.pth")


def test_classes_are_the_checkpoints_the_configs_or_refused(retina):
    values, state = retina
    assert MmdetEager(values, MmdetCheckpoint(state, {}, NAMES, ()), source="a").categories[3].name == "thing 3"
    assert MmdetEager(values, MmdetCheckpoint(state, {}, (), ()), source="a").categories[-1].name == "toothbrush"
    voc = copy.deepcopy(values)
    voc["test_dataloader"]["dataset"]["type"] = "VOCDataset"
    with pytest.raises(SpecError, match="got 20 from data set type VOCDataset"):
        MmdetEager(voc, MmdetCheckpoint(state, {}, (), ()), source="a")


@pytest.mark.parametrize("data", [b"", b"no image", b"\xff\xd8\xff\xe0broken"])
def test_bytes_that_are_no_image_are_an_error(retina, data):
    values, state = retina
    with pytest.raises(DetserveError, match="cannot decode"):
        MmdetEager(values, MmdetCheckpoint(state, {}, NAMES, ()), source="a").detect(data, 0.5, 10)


def test_exif_orientation_is_applied(retina, picture):
    values, state = retina
    eager = MmdetEager(values, MmdetCheckpoint(state, {}, NAMES, ()), source="a")
    with Image.open(io.BytesIO(picture)) as image:
        lying = image.transpose(Image.Transpose.ROTATE_90)
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned clockwise
        out = io.BytesIO()
        lying.save(out, "PNG", exif=exif)
    upright, turned = eager.detect(picture, 0.3, 20), eager.detect(out.getvalue(), 0.3, 20)
    np.testing.assert_array_equal(turned.boxes_xyxy, upright.boxes_xyxy)


@pytest.fixture(scope="module")
def nano(shared_data):
    folder = shared_data / "models" / "mmdet_yolox_nano"
    expected = json.loads((folder / "expected.json").read_text("utf-8"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_mmdet(folder / "yolox_nano_8xb8-300e_coco.py", folder / "yolox_nano_mmdet.pth"), expected


@pytest.mark.shared_data
def test_the_trained_model_finds_what_is_published(nano, shared_data):
    eager, expected = nano
    photos = expected["detections"]["photos"]
    seen = 0
    for name, rows in photos.items():
        path = shared_data / "photos" / name
        if not path.is_file():
            continue
        seen += 1
        found = eager.detect(path.read_bytes(), 0.3, 100)
        assert found.labels.tolist() == [row["label"] for row in rows]
        assert [eager.categories[label].name for label in found.labels] == [row["name"] for row in rows]
        np.testing.assert_allclose(found.scores, [row["score"] for row in rows], atol=1e-4)
        np.testing.assert_allclose(found.boxes_xyxy, [row["bbox_xyxy"] for row in rows], atol=0.02)
    assert seen >= 3


@pytest.mark.shared_data
@pytest.mark.slow
def test_the_trained_model_has_the_published_ap(nano, shared_data):
    from contextlib import redirect_stdout

    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    eager, expected = nano
    folder = shared_data / "coco" / "liz50"
    annotations = next(folder.rglob("*instances*.json"), None) or next(folder.rglob("*.json"))
    with redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        rows = []
        for number, image in truth.imgs.items():
            found = eager.detect(next(folder.rglob(image["file_name"])).read_bytes(), 0.01, 1000)
            for (x1, y1, x2, y2), score, label in zip(found.boxes_xyxy, found.scores, found.labels, strict=True):
                box = [float(side) for side in (x1, y1, x2 - x1, y2 - y1)]
                category = eager.categories[label].id
                rows.append({"image_id": number, "category_id": category, "bbox": box, "score": float(score)})
        evaluation = COCOeval(truth, truth.loadRes(rows), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    figures = expected["coco_ap"]["config_score_thr_0_01"]
    assert len(rows) == figures["detections"]
    assert evaluation.stats[0] == pytest.approx(figures["AP"], abs=1e-4)
    assert evaluation.stats[1] == pytest.approx(figures["AP50"], abs=1e-4)


def test_nothing_is_written_to_standard_output(retina, capsys):
    values, state = retina
    MmdetEager(values, MmdetCheckpoint(state, {}, NAMES, ()), source="a")
    assert capsys.readouterr().out == ""


def test_what_fails_inside_is_told(retina):
    """A picture of one pixel in height is resized to nothing."""
    values, state = retina
    eager = MmdetEager(values, MmdetCheckpoint(state, {}, NAMES, ()), source="a")
    out = io.BytesIO()
    Image.new("RGB", (2000, 1)).save(out, "PNG")
    with pytest.raises(DetserveError, match="MMDetection fails on this image"):
        eager.detect(out.getvalue(), 0.5, 10)


def test_an_archive_alone_is_a_reference(tmp_path, picture):
    """`evaluate --against eager` and `compare` have nothing else where the store has no spec."""
    model = write_files(
        values := packaged("fcos/fcos_r18_fpn_gn-head-center-normbbox-centeronreg-giou_8xb8-amp-lsj-200e_coco.py"),
        random_state(values),
        tmp_path,
        "own",
    )
    categories = [{"id": number, "name": name} for number, name in enumerate(NAMES, 1)]
    described = {"name": "own", "family": "mmdet", "config": "own.py", "categories": categories}
    spec = parse_spec(described, where="test", folder=tmp_path)
    archive = tmp_path / "a.mar"
    build_archive(spec, folder=tmp_path, out=archive, weights=model.checkpoint)
    model.config.unlink()
    expected = MmdetEager(values, MmdetCheckpoint(random_state(values), {}, NAMES, ()), source="random")
    for found in (
        load_eager(archive, model_store=tmp_path),
        load_eager(archive, model_store=tmp_path, weights=model.checkpoint),
    ):
        one, other = found.detect(picture, 0.005, 20), expected.detect(picture, 0.005, 20)
        assert len(one) == len(other) > 0
        np.testing.assert_allclose(one.boxes_xyxy, other.boxes_xyxy, atol=1e-3)
