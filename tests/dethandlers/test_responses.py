"""The answer's JSON: exactly the published form, and every float32 brought back unchanged."""

import json

import numpy as np
import pytest
from dethandlers.detections import Category, Detections
from dethandlers.detector import Answer
from dethandlers.options import Options
from dethandlers.responses import to_json_text

CATEGORIES = (Category(3, "circle", 1), Category(7, 'süße "stars"', 2))
RLES = [{"size": [4, 4], "counts": "04"}, {"size": [4, 4], "counts": "52;"}]
FOUND = Detections(
    np.array([[1.5, 2.25, 11.5, 22.75], [0.0, 0.1, 5.0, 6.0]], np.float32),
    np.array([0.9, 0.125], np.float32),
    np.array([1, 0], np.int64),
    masks=RLES,
    keypoints=np.array([[[1, 2, 0.5], [3, 4, 0.25]], [[5, 6, 1.0], [7, 8, 0.1]]], np.float32),
)
TIMINGS = {"decode": 1.23456789, "preprocess": 2.0, "forward": 30.5, "postprocess": 0.25}


def answer(found=FOUND):
    return Answer(found, (640, 480), batch_size=8, forward_size=3, timings_ms=dict(TIMINGS))


def text(found=FOUND, **options):
    return to_json_text(answer(found), Options(score_threshold=0.05, max_detections=100, **options), CATEGORIES)


def test_the_default_is_the_published_list():
    assert text() == (
        '[{"class_label":1,"class_name":"süße \\"stars\\"","bbox":[1.5,2.25,11.5,22.75],"score":0.899999976},'
        '{"class_label":0,"class_name":"circle","bbox":[0.0,0.100000001,5.0,6.0],"score":0.125}]'
    )


def test_nothing_found_is_an_empty_list():
    assert text(Detections.empty()) == "[]"
    assert json.loads(text(Detections.empty(), format="coco")) == []
    assert json.loads(text(Detections.empty(), format="columns")) == {
        "boxes_xyxy": [],
        "scores": [],
        "labels": [],
        "class_names": [],
    }


def test_the_coco_form_has_category_ids_and_boxes_as_xywh():
    first, second = json.loads(text(format="coco"))
    assert list(first) == ["category_id", "bbox", "score"]
    assert first["category_id"] == 7
    assert first["bbox"] == [1.5, 2.25, 10.0, 20.5]
    assert second["category_id"] == 3


def test_the_columns_form_has_one_list_per_property():
    columns = json.loads(text(format="columns"))
    assert list(columns) == ["boxes_xyxy", "scores", "labels", "class_names"]
    assert columns["labels"] == [1, 0]
    assert columns["class_names"] == ['süße "stars"', "circle"]
    assert np.array_equal(np.float32(columns["boxes_xyxy"]), FOUND.boxes_xyxy)
    assert np.array_equal(np.float32(columns["scores"]), FOUND.scores)


def test_extras_come_when_asked_for_after_the_published_keys():
    first = json.loads(text(masks=True, keypoints=True, category_id=True))[0]
    assert list(first) == ["class_label", "class_name", "bbox", "score", "category_id", "segmentation", "keypoints"]
    assert first["category_id"] == 7
    assert first["segmentation"] == RLES[0]
    assert first["keypoints"] == [[1.0, 2.0, 0.5], [3.0, 4.0, 0.25]]
    coco = json.loads(text(masks=True, keypoints=True, category_id=True, format="coco"))[0]
    assert list(coco) == ["category_id", "bbox", "score", "segmentation", "keypoints"]
    columns = json.loads(text(masks=True, keypoints=True, category_id=True, format="columns"))
    assert columns["category_ids"] == [7, 3]
    assert columns["segmentations"] == RLES
    assert columns["keypoints"] == [FOUND.keypoints[0].tolist(), [[5.0, 6.0, 1.0], [7.0, 8.0, 0.100000001]]]


@pytest.mark.parametrize("form", ["list", "coco", "columns"])
def test_extras_that_were_not_computed_are_left_out(form):
    plain = Detections(FOUND.boxes_xyxy, FOUND.scores, FOUND.labels)
    assert text(plain, masks=True, keypoints=True, format=form) == text(plain, format=form)


def test_ten_thousand_float32_come_back_unchanged():
    bits = np.random.default_rng(0).integers(0, 2**32, 12_000, dtype=np.uint32)
    values = bits.view(np.float32)
    values = values[np.isfinite(values)][:10_000]
    assert len(values) == 10_000
    found = Detections(values[:8000].reshape(-1, 4), values[8000:], np.zeros(2000, np.int64))
    rows = json.loads(text(found))
    boxes = np.array([row["bbox"] for row in rows]).astype(np.float32)
    scores = np.array([row["score"] for row in rows]).astype(np.float32)
    assert np.array_equal(boxes.view(np.uint32), values[:8000].reshape(-1, 4).view(np.uint32))
    assert np.array_equal(scores.view(np.uint32), values[8000:].view(np.uint32))


@pytest.mark.parametrize("form", ["list", "coco", "columns"])
@pytest.mark.parametrize("found", [FOUND, Detections.empty()], ids=["found", "empty"])
def test_with_timings_the_answer_is_wrapped(form, found):
    wrapped = json.loads(text(found, timings=True, format=form))
    assert list(wrapped) == ["detections", "timings_ms", "batch_size", "forward_size", "image_size"]
    assert wrapped["detections"] == json.loads(text(found, format=form))
    assert list(wrapped["timings_ms"]) == [*TIMINGS, "serialise"]
    assert wrapped["timings_ms"]["decode"] == 1.2346
    assert wrapped["timings_ms"]["serialise"] >= 0
    assert (wrapped["batch_size"], wrapped["forward_size"], wrapped["image_size"]) == (8, 3, [640, 480])
