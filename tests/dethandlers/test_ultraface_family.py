"""The ultraface family: its boxes and scores chosen as by a definition box by box."""

import numpy as np
import pytest
import torch
from dethandlers.detections import Category
from dethandlers.errors import ArtefactError
from dethandlers.families import Limits
from dethandlers.families.ultraface import UltrafaceFamily
from dethandlers.preprocess import Prepared
from dethandlers.spec import Decoding, Preprocessing, Spec

HEIGHT, WIDTH, BOXES = 48, 64, 60
NMS_IOU = 0.3


def spec_of(model_labels=(1,), **changes):
    defaults = {
        "preprocessing": Preprocessing(size=(HEIGHT, WIDTH), resize="stretch"),
        "decoding": Decoding(nms_iou=NMS_IOU),
        "runtime": "onnx",
    }
    categories = tuple(Category(id=label, name=f"class {label}", model_label=label) for label in model_labels)
    return Spec(name="faces", family="ultraface", categories=categories, **(defaults | changes))


def random_outputs(seed, classes=2):
    """Boxes as fractions of the input, some beyond it; the classes' probabilities, the background first."""
    rng = np.random.default_rng(seed)
    corner, size = rng.uniform(-0.1, 0.9, (BOXES, 2)), rng.uniform(0.05, 0.5, (BOXES, 2))
    scores = rng.dirichlet(np.ones(classes), BOXES)
    return {
        "scores": torch.from_numpy(scores.astype(np.float32)),
        "boxes": torch.from_numpy(np.concatenate([corner, corner + size], axis=1).astype(np.float32)),
    }


def prepared_of(original=(150, 200), resized=(HEIGHT, WIDTH)):
    return Prepared(torch.zeros(3, HEIGHT, WIDTH), original, resized)


def iou(one, other):
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = (one[2] - one[0]) * (one[3] - one[1]) + (other[2] - other[0]) * (other[3] - other[1])
    return width * height / (areas - width * height)


def by_definition(outputs, threshold, prepared, label_of):
    """Choose box by box, in pixels of the input and double precision."""
    rows = []
    for box, scores in zip(outputs["boxes"].tolist(), outputs["scores"].tolist(), strict=True):
        best = max(range(1, len(scores)), key=scores.__getitem__)
        if scores[best] >= threshold and best in label_of:
            sides = [WIDTH, HEIGHT, WIDTH, HEIGHT]
            rows.append((scores[best], label_of[best], [a * b for a, b in zip(box, sides, strict=True)]))
    kept = []
    for row in sorted(rows, key=lambda row: -row[0]):
        if all(row[1] != other[1] or iou(row[2], other[2]) <= NMS_IOU for other in kept):
            kept.append(row)
    (height, width), (new_height, new_width) = prepared.original_size, prepared.resized_size
    scale, limits = [width / new_width, height / new_height] * 2, [width, height] * 2
    return [
        (score, label, [min(max(a * b, 0), c) for a, b, c in zip(box, scale, limits, strict=True)])
        for score, label, box in kept
    ]


@pytest.mark.parametrize("threshold", [0.05, 0.4, 0.7])
@pytest.mark.parametrize(("model_labels", "classes"), [((1,), 2), ((1, 2, 3), 4), ((3, 1), 5), ((2,), 3)], ids=str)
def test_outputs_are_chosen_as_defined_and_unknown_classes_are_dropped(threshold, model_labels, classes):
    family = UltrafaceFamily(spec_of(model_labels))
    label_of = {model_label: label for label, model_label in enumerate(model_labels)}
    sources = [prepared_of(), prepared_of((48, 64)), prepared_of((100, 50), (48, 24))]
    outputs = [random_outputs(seed, classes) for seed in range(3)]
    for one, source, found in zip(
        outputs, sources, family.decode(outputs, sources, Limits(threshold, 1000)), strict=True
    ):
        expected = by_definition(one, threshold, source, label_of)
        assert len(expected) >= 1
        assert found.labels.tolist() == [label for _, label, _ in expected]
        assert np.allclose(found.scores, [score for score, _, _ in expected], rtol=0, atol=1e-6)
        assert np.allclose(found.boxes_xyxy, np.array([box for _, _, box in expected]), rtol=0, atol=1e-3)


def test_a_box_of_the_background_is_no_detection():
    outputs = {
        "scores": torch.tensor([[0.9, 0.1], [0.2, 0.8]]),
        "boxes": torch.tensor([[0, 0, 1, 1], [0, 0, 0.5, 0.25]]),
    }
    (found,) = UltrafaceFamily(spec_of()).decode([outputs], [prepared_of((96, 128))], Limits(0.5, 10))
    assert found.boxes_xyxy.tolist() == [[0, 0, 64, 24]]
    assert (found.labels.tolist(), found.scores.tolist()) == ([0], [pytest.approx(0.8)])


@pytest.mark.parametrize("names", [("boxes", "scores"), ("scores", "boxes"), ("450", "451"), ("451", "450")])
def test_outputs_are_found_by_name_or_by_width_in_any_order(names):
    family = UltrafaceFamily(spec_of())
    outputs = random_outputs(4)
    (expected,) = family.decode([outputs], [prepared_of()], Limits(0.3, 100))
    if names[0] in outputs:
        renamed = {name: outputs[name] for name in names}
    else:
        renamed = dict(zip(names, (outputs["boxes"], outputs["scores"]), strict=True))
        renamed = dict(sorted(renamed.items()))
    (found,) = family.decode([renamed], [prepared_of()], Limits(0.3, 100))
    assert len(found) > 0
    assert np.array_equal(found.boxes_xyxy, expected.boxes_xyxy)


def test_four_classes_are_told_from_boxes_by_their_names_alone():
    family = UltrafaceFamily(spec_of((1, 2, 3)))
    outputs = random_outputs(5, classes=4)
    assert len(family.decode([outputs], [prepared_of()], Limits(0.3, 100))[0]) > 0
    with pytest.raises(ArtefactError, match="the widths do not tell which is which"):
        family.decode([{"a": outputs["scores"], "b": outputs["boxes"]}], [prepared_of()], Limits(0.3, 100))


@pytest.mark.parametrize(
    ("outputs", "got"),
    [
        ({"out": (60, 6)}, r"got \(batch, 60, 6\), expected"),
        ({"scores": (60, 2), "boxes": (50, 4)}, r"got scores \(batch, 60, 2\) and boxes \(batch, 50, 4\), expected"),
        ({"scores": (60, 1), "boxes": (60, 4)}, r"got scores \(batch, 60, 1\) and"),
        ({"a": (60, 2), "b": (60, 5)}, r"got a \(batch, 60, 2\) and b \(batch, 60, 5\), expected"),
    ],
    ids=str,
)
def test_outputs_of_other_shapes_are_refused_with_the_keys_to_correct(outputs, got):
    tensors = {name: torch.zeros(shape) for name, shape in outputs.items()}
    with pytest.raises(ArtefactError, match=got) as caught:
        UltrafaceFamily(spec_of()).decode([tensors], [prepared_of()], Limits(0.3, 100))
    assert "Correct num_classes and the categories in the spec, or its family" in caught.value.message


def test_a_category_that_is_the_background_is_refused_with_the_number_of_classes():
    with pytest.raises(
        ArtefactError, match=r"got model_label 0 for 'class 0', which is the background .* num_classes: 2"
    ):
        UltrafaceFamily(spec_of((0,)))


def test_outputs_are_decoded_where_they_are():
    """On a GPU they do not leave it before they are few; the meta device refuses the CPU's tensors as a GPU does."""
    found = UltrafaceFamily(spec_of()).candidates({name: value.to("meta") for name, value in random_outputs(0).items()})
    assert {one.device.type for one in (found.boxes_xyxy, found.scores, found.model_labels)} == {"meta"}


def test_the_torch_runtime_is_refused():
    with pytest.raises(ArtefactError, match="runtime: got 'torch' with family 'ultraface', expected 'onnx'"):
        UltrafaceFamily(spec_of(runtime="torch"))
