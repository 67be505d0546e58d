"""What is left to do when an exported torchvision graph is done: outputs by name, suppression outside it, keypoints."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from dethandlers.errors import ArtefactError
from dethandlers.exported_detections import detections_of
from dethandlers.families import Limits
from dethandlers.families.torchvision_detection import TorchvisionFamily
from dethandlers.preprocess import Prepared
from dethandlers.spec import Decoding, Spec
from small_artefacts import categories_of

WANTED = Limits(score_threshold=0.3, max_detections=100, masks=True, keypoints=True)


def outputs(boxes, scores, labels, **others) -> dict[str, torch.Tensor]:
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "scores": torch.tensor(scores, dtype=torch.float32),
        "labels": torch.tensor(labels, dtype=torch.int64),
        **others,
    }


def decoded(output, nms="host", limits=WANTED, nms_iou=0.5):
    return detections_of(output, nms=nms, nms_iou=nms_iou, limits=limits)


BOX, SAME, APART = [10, 10, 50, 50], [10, 10, 50, 48], [100, 100, 150, 150]


@pytest.mark.parametrize("missing", ["boxes", "scores", "labels"])
@pytest.mark.parametrize("nms", ["host", "graph"])
def test_a_file_with_other_outputs_is_refused_with_what_it_has(missing, nms):
    output = outputs([BOX], [0.9], [1])
    output["raw"] = output.pop(missing)
    with pytest.raises(ArtefactError, match=r"got .*raw, expected boxes, scores and labels") as caught:
        decoded(output, nms)
    assert "Export the model again" in str(caught.value)


def test_outside_the_graph_each_class_is_suppressed_by_itself_best_first():
    found = decoded(outputs([BOX, SAME, SAME, APART], [0.5, 0.9, 0.8, 0.7], [1, 1, 2, 1]))
    assert found["boxes"].tolist() == [SAME, SAME, APART]
    assert found["scores"].tolist() == pytest.approx([0.9, 0.8, 0.7])
    assert found["labels"].tolist() == [1, 2, 1]


def test_an_overlap_of_exactly_the_limit_is_no_reason_to_drop():
    half, most = [0, 0, 10, 10], [0, 0, 10, 5]
    assert len(decoded(outputs([half, most], [0.9, 0.8], [1, 1]), nms_iou=0.5)["boxes"]) == 2
    assert len(decoded(outputs([half, most], [0.9, 0.8], [1, 1]), nms_iou=0.49)["boxes"]) == 1


def test_many_candidates_are_chosen_as_the_definition_chooses():
    rng = np.random.default_rng(0)
    corners = rng.integers(0, 3, (400, 2)) * 60 + rng.uniform(0, 25, (400, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(20, 50, (400, 2))], axis=1).astype(np.float32)
    scores, labels = rng.random(400).astype(np.float32), rng.integers(0, 4, 400)
    found = decoded(outputs(boxes, scores, labels), limits=Limits(0.3, 40))

    kept: list[int] = []
    for place in np.argsort(-scores):
        if scores[place] >= 0.3 and all(
            labels[place] != labels[other] or overlap(boxes[place], boxes[other]) <= 0.5 for other in kept
        ):
            kept.append(int(place))
    assert 40 < len(kept) < (scores >= 0.3).sum()
    assert found["scores"].tolist() == scores[kept[:40]].tolist()
    assert found["boxes"].numpy().tolist() == boxes[kept[:40]].tolist()
    assert found["labels"].tolist() == labels[kept[:40]].tolist()


def overlap(one, other):
    common = np.clip(np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2]), 0, None).prod()
    return common / ((one[2:] - one[:2]).prod() + (other[2:] - other[:2]).prod() - common)


def test_a_score_at_the_threshold_as_float32_stays():
    at = float(np.float32(0.1))  # above 0.1, as float32 rounds it
    below = float(np.nextafter(np.float32(0.1), np.float32(0)))
    found = decoded(outputs([BOX, APART], [at, below], [1, 1]), limits=Limits(0.1, 10))
    assert found["boxes"].tolist() == [BOX]


@pytest.mark.parametrize("nms", ["host", "graph"])
def test_no_candidates_are_no_detections(nms):
    output = outputs([], [], [])
    found = decoded(output, nms)
    assert (found["boxes"].shape, found["scores"].shape, found["labels"].shape) == ((0, 4), (0,), (0,))
    assert len(decoded(outputs([BOX], [0.1], [1]))["boxes"]) == 0


@pytest.mark.parametrize("count", [0, 1, 3])
def test_inside_the_graph_the_number_of_detections_is_heeded(count):
    """What stands beyond belongs to another image of the batch, which has more."""
    rows = [BOX, SAME, APART, [0, 0, 0, 0]]
    found = decoded(outputs(rows, [0.9, 0.8, 0.2, 0.0], [1, 1, 1, 0], num_detections=torch.tensor(count)), "graph")
    assert found["boxes"].tolist() == rows[:count]
    assert len(found["scores"]) == len(found["labels"]) == count


def test_inside_the_graph_nothing_is_suppressed_again():
    assert len(decoded(outputs([BOX, SAME], [0.9, 0.8], [1, 1]), "graph")["boxes"]) == 2


def test_masks_and_heat_maps_are_left_alone_unless_they_are_asked_for():
    output = outputs([BOX], [0.9], [1], masks=torch.rand(1, 1, 28, 28), keypoint_maps=torch.rand(1, 5, 56, 56))
    assert set(decoded(output, "graph", Limits(0.3, 10))) == {"boxes", "scores", "labels"}
    assert set(decoded(output, "graph", Limits(0.3, 10, masks=True))) == {"boxes", "scores", "labels", "masks"}


def test_a_keypoint_is_where_its_heat_map_is_highest():
    maps = torch.zeros(2, 1, 56, 56)
    maps[0, 0, 14, 42] = 9.0  # a quarter down, three quarters right
    maps[1, 0, 28, 28] = 5.0
    found = decoded(outputs([[100, 100, 156, 156], [0, 0, 56, 56]], [0.9, 0.8], [1, 1], keypoint_maps=maps), "graph")
    assert found["keypoints"][0, 0, :2].tolist() == pytest.approx([142.5, 114.5])
    assert found["keypoints"][1, 0, :2].tolist() == pytest.approx([28.5, 28.5])
    assert found["keypoints_scores"].flatten().tolist() == pytest.approx([9.0, 5.0])


def test_no_detection_has_no_keypoint():
    found = decoded(outputs([], [], [], keypoint_maps=torch.zeros(0, 17, 56, 56)), "graph")
    assert (found["keypoints"].shape, found["keypoints_scores"].shape) == ((0, 17, 3), (0, 17))


def spec_of(nms="host", **changes) -> Spec:
    spec = Spec("x", "torchvision", categories_of([1, 2]), runtime="onnx", decoding=Decoding((), 0.5, nms))
    return replace(spec, **changes)


def test_the_family_brings_boxes_to_the_image_and_drops_what_the_category_map_does_not_know():
    """Of an image of 200×100 px that went in as 100×50."""
    family = TorchvisionFamily(spec_of(categories=categories_of([2, 1])))
    output = outputs([[10, 20, 30, 40], [50, 0, 100, 50], [1, 2, 3, 4]], [0.9, 0.8, 0.7], [1, 2, 7])
    prepared = Prepared(torch.zeros(3, 64, 128), (100, 200), (50, 100))
    (found,) = family.decode([output], [prepared], Limits(0.3, 10))
    assert found.boxes_xyxy.tolist() == [[20, 40, 60, 80], [100, 0, 200, 100]]
    assert found.labels.tolist() == [1, 0]
    assert found.scores.tolist() == pytest.approx([0.9, 0.8])


def test_each_image_of_a_batch_is_decoded_by_itself():
    family = TorchvisionFamily(spec_of())
    prepared = [
        Prepared(torch.zeros(3, 64, 64), (64, 64), (64, 64)),
        Prepared(torch.zeros(3, 64, 64), (32, 32), (64, 64)),
    ]
    one, other = family.decode(
        [outputs([BOX], [0.9], [1]), outputs([BOX, SAME], [0.8, 0.6], [2, 2])], prepared, Limits(0.3, 10)
    )
    assert (one.boxes_xyxy.tolist(), one.labels.tolist()) == ([BOX], [0])
    assert (other.boxes_xyxy.tolist(), other.labels.tolist()) == ([[5, 5, 25, 25]], [1])
