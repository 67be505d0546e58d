"""The fastestdet family: its raw map decoded as by a definition cell by cell."""

import math

import numpy as np
import pytest
import torch
from dethandlers.detections import Category
from dethandlers.errors import ArtefactError
from dethandlers.families import Limits
from dethandlers.families.fastestdet import FastestdetFamily
from dethandlers.preprocess import Prepared
from dethandlers.spec import Decoding, Preprocessing, Spec

HEIGHT, WIDTH, STRIDE = 64, 96, 16
ROWS, COLUMNS = HEIGHT // STRIDE, WIDTH // STRIDE
NMS_IOU = 0.45


def spec_of(model_labels=(0, 1, 2), **changes):
    defaults = {
        "preprocessing": Preprocessing(size=(HEIGHT, WIDTH), resize="stretch"),
        "decoding": Decoding(strides=(STRIDE,), nms_iou=NMS_IOU),
        "runtime": "onnx",
    }
    categories = tuple(Category(id=label + 1, name=f"class {label}", model_label=label) for label in model_labels)
    return Spec(name="tiny", family="fastestdet", categories=categories, **(defaults | changes))


def random_map(seed, classes=3):
    """Objectness and classes in 0..1, offsets and sizes of any sign."""
    rng = np.random.default_rng(seed)
    raw = rng.random((5 + classes, ROWS, COLUMNS)).astype(np.float32)
    raw[1:3] = rng.normal(0, 1.5, (2, ROWS, COLUMNS))
    raw[3:5] = rng.normal(-0.5, 1, (2, ROWS, COLUMNS))
    return torch.from_numpy(raw)


def prepared_of(original=(150, 200)):
    return Prepared(torch.zeros(3, HEIGHT, WIDTH), original, (HEIGHT, WIDTH))


def iou(one, other):
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = (one[2] - one[0]) * (one[3] - one[1]) + (other[2] - other[0]) * (other[3] - other[1])
    return width * height / (areas - width * height)


def by_definition(raw, threshold, original, label_of):
    """Decode one image, cell by cell, in double precision; boxes as fractions of the image until the end."""
    rows = []
    for row in range(ROWS):
        for column in range(COLUMNS):
            objectness, x, y, w, h, *classes = (float(value) for value in raw[:, row, column])
            best = classes.index(max(classes))
            score = objectness**0.6 * classes[best] ** 0.4
            if score < threshold or best not in label_of:
                continue
            x, y = (column + math.tanh(x)) / COLUMNS, (row + math.tanh(y)) / ROWS
            w, h = 1 / (1 + math.exp(-w)), 1 / (1 + math.exp(-h))
            rows.append((score, label_of[best], [x - w / 2, y - h / 2, x + w / 2, y + h / 2]))
    kept = []
    for row in sorted(rows, key=lambda row: -row[0]):
        if all(row[1] != other[1] or iou(row[2], other[2]) <= NMS_IOU for other in kept):
            kept.append(row)
    height, width = original
    return [
        (score, label, [min(max(value, 0), 1) * side for value, side in zip(box, [width, height] * 2, strict=True)])
        for score, label, box in kept
    ]


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("model_labels", [(0, 1, 2), (2, 0), (1,)], ids=str)
def test_the_map_is_decoded_as_defined_and_unknown_classes_are_dropped(threshold, model_labels):
    family = FastestdetFamily(spec_of(model_labels))
    label_of = {model_label: label for label, model_label in enumerate(model_labels)}
    total = 0
    for seed, original in enumerate([(150, 200), (64, 96), (33, 40)]):
        raw = random_map(seed)
        (found,) = family.decode([{"758": raw}], [prepared_of(original)], Limits(threshold, 1000))
        expected = by_definition(raw.numpy(), threshold, original, label_of)
        assert found.labels.tolist() == [label for _, label, _ in expected]
        assert np.allclose(found.scores, [score for score, _, _ in expected], rtol=0, atol=1e-6)
        boxes = np.array([box for _, _, box in expected]).reshape(-1, 4)
        assert np.allclose(found.boxes_xyxy, boxes, rtol=0, atol=1e-3)
        assert (found.boxes_xyxy.dtype, found.scores.dtype) == (np.float32, np.float32)
        total += len(expected)
    assert total >= 3


def test_one_cell_by_hand():
    raw = torch.zeros(8, ROWS, COLUMNS)
    # Row 1, column 2: centre (2 · 16, 1 · 16), half of the input wide and high.
    raw[:, 1, 2] = torch.tensor([0.81, 0.0, 0.0, 0.0, 0.0, 0.1, 0.64, 0.2])
    (found,) = FastestdetFamily(spec_of()).decode([{"out": raw}], [prepared_of((128, 192))], Limits(0.3, 10))
    # x 32 ± 24, y 16 ± 16, twice as large in the image.
    assert found.boxes_xyxy.tolist() == [[16, 0, 112, 64]]
    assert found.labels.tolist() == [1]
    assert found.scores[0] == pytest.approx(0.81**0.6 * 0.64**0.4)


def test_the_best_are_kept_up_to_the_maximum():
    family = FastestdetFamily(spec_of())
    raw = [{"out": random_map(1)}]
    (everything,) = family.decode(raw, [prepared_of()], Limits(0.05, 1000))
    (few,) = family.decode(raw, [prepared_of()], Limits(0.05, 3))
    assert len(everything) > 3
    assert np.array_equal(few.scores, everything.scores[:3])


def test_the_map_is_found_among_other_outputs_by_its_shape():
    family = FastestdetFamily(spec_of())
    raw = random_map(2)
    (alone,) = family.decode([{"out": raw}], [prepared_of()], Limits(0.3, 100))
    others = {"features": torch.zeros(16, ROWS * 2, COLUMNS * 2), "flat": torch.zeros(24, 8), "map": raw}
    (among,) = family.decode([others], [prepared_of()], Limits(0.3, 100))
    assert len(alone) > 0
    assert np.array_equal(alone.boxes_xyxy, among.boxes_xyxy)


def test_raw_values_beyond_probabilities_stay_finite():
    raw = torch.full((8, ROWS, COLUMNS), -3.0)
    raw[1:5] = 1e4
    (found,) = FastestdetFamily(spec_of()).decode([{"out": raw}], [prepared_of()], Limits(0.0, 1000))
    assert np.isfinite(found.scores).all()
    assert np.isfinite(found.boxes_xyxy).all()


@pytest.mark.parametrize(
    "shape", [(7, ROWS, COLUMNS), (8, ROWS, COLUMNS + 1), (8, COLUMNS, ROWS), (ROWS, COLUMNS, 8), (24, 8)], ids=str
)
def test_a_map_of_another_shape_is_refused_with_the_keys_to_correct(shape):
    with pytest.raises(ArtefactError) as caught:
        FastestdetFamily(spec_of()).decode([{"out": torch.zeros(shape)}], [prepared_of()], Limits(0.05, 10))
    got = ", ".join(map(str, shape))
    assert f"network output: got (batch, {got}), expected (batch, 8 or more, {ROWS}, {COLUMNS})" in caught.value.message
    assert "from the categories, preprocessing.size and decoding.strides. Correct the spec." in caught.value.message


def test_outputs_are_decoded_where_they_are():
    """On a GPU they do not leave it before they are few; the meta device refuses the CPU's tensors as a GPU does."""
    found = FastestdetFamily(spec_of()).candidates({"out": torch.zeros(8, ROWS, COLUMNS, device="meta")})
    assert {one.device.type for one in (found.boxes_xyxy, found.scores, found.model_labels)} == {"meta"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoding": Decoding()}, r"decoding.strides: got \[8, 16, 32\], expected one"),
        ({"preprocessing": Preprocessing(size=(64, 90))}, "decoding.strides: got 16, expected divisors of the input"),
        ({"runtime": "torch"}, "runtime: got 'torch' with family 'fastestdet', expected 'onnx'"),
        (
            {"decoding": Decoding(strides=(16,), nms="graph")},
            "decoding.nms: got 'graph' with family 'fastestdet', whose outputs are raw; expected 'host'",
        ),
    ],
)
def test_a_spec_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ArtefactError, match=message):
        FastestdetFamily(spec_of(**changes))
