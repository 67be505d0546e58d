"""Suppression as it is exported: in torch and by onnxruntime it keeps what the definition keeps, class by class."""

import numpy as np
import onnxruntime
import pytest
import torch
from detserve.export.non_max_suppression import best_of, least_topk, suppress_blocks, suppress_planes
from detserve.export.tracing import Signature, trace
from torch import nn

IOU = 0.5
CLASSES = 3


def iou(one: np.ndarray, other: np.ndarray) -> float:
    low, high = np.maximum(one[:2], other[:2]), np.minimum(one[2:], other[2:])
    common = float(np.clip(high - low, 0, None).prod())
    both = float((one[2:] - one[:2]).prod() + (other[2:] - other[:2]).prod()) - common
    return common / both if both > 0 else 0.0


def kept_of(boxes: np.ndarray, scores: np.ndarray, alive: np.ndarray, most: int) -> list[int]:
    """The definition: best first, of equals the first; one that overlaps a kept one by more than the limit goes."""
    kept: list[int] = []
    for place in np.argsort(-scores, kind="stable"):
        if alive[place] and all(iou(boxes[place], boxes[other]) <= IOU for other in kept):
            kept.append(int(place))
    return kept[:most]


def kept_per_class(boxes, scores, labels, alive, most: int) -> list[int]:
    return [place for label in range(CLASSES) for place in kept_of(boxes, scores, alive & (labels == label), most)]


class Planes(nn.Module):
    def forward(self, boxes, scores, labels, alive, most):
        kept = suppress_planes(boxes, scores, labels, alive, classes=CLASSES, most=most, iou=IOU)
        return kept, *best_of(kept, scores, most)


class Blocks(nn.Module):
    def forward(self, boxes, scores, alive, most):
        return (suppress_blocks(boxes, scores, alive, most=most, iou=IOU),)


class Greatest(nn.Module):
    def forward(self, values, most):
        return least_topk(values, most, axis=1)


class Runner:
    """A module in torch, and the same exported, with every axis free, and run by onnxruntime."""

    def __init__(self, module: nn.Module, inputs: dict[str, torch.Tensor], outputs: list[str], opset: int = 17):
        self.module, self.names = module, list(inputs)
        axes = {name: {axis: f"{name}{axis}" for axis in range(value.ndim)} for name, value in inputs.items()}
        content = trace(module, tuple(inputs.values()), Signature(self.names, outputs, axes), opset=opset)
        self.session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def both(self, *values: np.ndarray) -> list[list[np.ndarray]]:
        in_torch = self.module(*(torch.from_numpy(np.asarray(value)) for value in values))
        by_onnxruntime = self.session.run(None, dict(zip(self.names, map(np.asarray, values), strict=True)))
        return [[one.numpy() for one in in_torch], by_onnxruntime]


def scene(images: int, count: int, *, seed: int, grid: float = 0.0) -> tuple[np.ndarray, ...]:
    """Boxes on a few heaps, so that many overlap; ``grid`` rounds scores and boxes, so that many are equal."""
    rng = np.random.default_rng(seed)
    corners = rng.integers(0, 2, (images, count, 2)) * 40 + rng.uniform(0, 15, (images, count, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(15, 40, (images, count, 2))], axis=2)
    scores = rng.uniform(0.01, 1, (images, count))
    if grid:
        boxes, scores = np.round(boxes / 10) * 10, np.round(scores / grid) * grid
    labels = rng.integers(0, CLASSES, (images, count))
    alive = rng.random((images, count)) < 0.8
    return boxes.astype(np.float32), scores.astype(np.float32), labels.astype(np.int64), alive


def most_of(value: int) -> np.ndarray:
    return np.asarray(value, dtype=np.int64)


@pytest.fixture(scope="module", params=[16, 17, 20])
def planes(request) -> Runner:
    boxes, scores, labels, alive = map(torch.from_numpy, scene(2, 6, seed=0))
    inputs = {"boxes": boxes, "scores": scores, "labels": labels, "alive": alive, "most": torch.tensor(4)}
    return Runner(Planes(), inputs, ["kept", "best", "places"], request.param)


@pytest.fixture(scope="module")
def blocks() -> Runner:
    boxes, scores, _, alive = map(torch.from_numpy, scene(2, 6, seed=0))
    inputs = {"boxes": boxes, "scores": scores, "alive": alive, "most": torch.tensor(4)}
    return Runner(Blocks(), inputs, ["kept"])


@pytest.mark.parametrize("grid", [0.0, 0.25], ids=["no ties", "ties and equal boxes"])
@pytest.mark.parametrize(("images", "count", "most"), [(1, 1, 5), (1, 40, 100), (3, 60, 100), (8, 25, 2), (2, 60, 1)])
def test_planes_keep_of_every_image_and_class_what_the_definition_keeps(planes, images, count, most, grid):
    given = scene(images, count, seed=count + most, grid=grid)
    wanted = [place + count * i for i in range(images) for place in kept_per_class(*(a[i] for a in given), most)]
    assert count < 20 or len(wanted) < given[3].sum(), "nothing was suppressed"
    for kept, best, places in planes.both(*given, most_of(most)):
        assert sorted(kept.tolist()) == sorted(wanted)
        assert best.shape == places.shape == (images, min(most, count))
        for i in range(images):
            of_image = [place - count * i for place in wanted if place // count == i]
            expected = sorted((given[1][i, place] for place in of_image), reverse=True)[:most]
            there = best[i] >= 0
            assert best[i][there].tolist() == expected
            assert there.sum() == min(most, len(of_image))
            assert set(places[i][there].tolist()) <= set(of_image)
            assert given[1][i, places[i][there]].tolist() == expected


def test_boxes_of_other_classes_do_not_suppress_each_other(planes):
    boxes = np.tile(np.array([10, 10, 50, 50], np.float32), (1, 4, 1))
    scores = np.array([[0.9, 0.8, 0.7, 0.6]], np.float32)
    for kept, _, _ in planes.both(boxes, scores, np.array([[0, 1, 0, 2]]), np.ones((1, 4), bool), most_of(10)):
        assert sorted(kept.tolist()) == [0, 1, 3]


def test_a_box_without_area_overlaps_nothing_not_even_itself(planes):
    boxes = np.array([[[10, 10, 10, 40], [10, 10, 10, 40], [5, 5, 20, 50], [5, 5, 20, 50]]], np.float32)
    scores = np.array([[0.9, 0.8, 0.7, 0.6]], np.float32)
    for kept, _, _ in planes.both(boxes, scores, np.zeros((1, 4), np.int64), np.ones((1, 4), bool), most_of(10)):
        assert sorted(kept.tolist()) == [0, 1, 2]


def test_a_candidate_that_takes_no_part_suppresses_nothing(planes):
    boxes = np.tile(np.array([10, 10, 50, 50], np.float32), (1, 2, 1))
    given = boxes, np.array([[0.9, 0.8]], np.float32), np.zeros((1, 2), np.int64), np.array([[False, True]])
    for kept, best, places in planes.both(*given, most_of(2)):
        assert kept.tolist() == [1]
        assert best.tolist() == [[np.float32(0.8), -1]]
        assert places[0, 0] == 1


def test_a_score_of_zero_takes_part(planes):
    given = scene(1, 1, seed=1)[0], np.zeros((1, 1), np.float32), np.zeros((1, 1), np.int64), np.ones((1, 1), bool)
    for kept, best, _ in planes.both(*given, most_of(3)):
        assert (kept.tolist(), best.tolist()) == ([0], [[0.0]])


def test_where_no_candidate_is_alive_nothing_is_kept(planes):
    boxes, scores, labels, _ = scene(2, 9, seed=2)
    for kept, best, _ in planes.both(boxes, scores, labels, np.zeros((2, 9), bool), most_of(5)):
        assert kept.tolist() == []
        assert (best < 0).all()


@pytest.mark.parametrize("grid", [0.0, 0.25], ids=["no ties", "ties and equal boxes"])
@pytest.mark.parametrize(("groups", "count", "most"), [(1, 30, 100), (6, 30, 100), (6, 30, 2), (4, 1, 1)])
def test_blocks_keep_what_the_definition_keeps(blocks, groups, count, most, grid):
    boxes, scores, _, alive = scene(groups, count, seed=groups, grid=grid)
    wanted = [
        place + count * group
        for group in range(groups)
        for place in kept_of(boxes[group], scores[group], alive[group], most)
    ]
    for (kept,) in blocks.both(boxes, scores, alive, most_of(most)):
        assert sorted(kept.tolist()) == sorted(wanted)


@pytest.mark.parametrize("none_alive", [True, False])
def test_blocks_without_candidates_keep_nothing(blocks, none_alive):
    boxes, scores, _, alive = scene(3, 4 if none_alive else 0, seed=3)
    for (kept,) in blocks.both(boxes, scores, np.zeros_like(alive), most_of(5)):
        assert kept.tolist() == []


@pytest.mark.parametrize(("count", "most"), [(3, 5), (5, 5), (9, 5), (0, 5)])
def test_the_greatest_are_all_where_there_are_fewer(count, most):
    runner = Runner(Greatest(), {"values": torch.rand(2, 4), "most": torch.tensor(3)}, ["greatest", "places"])
    values = np.random.default_rng(0).random((2, count)).astype(np.float32)
    for greatest, places in runner.both(values, most_of(most)):
        assert greatest.tolist() == (-np.sort(-values, axis=1))[:, :most].tolist()
        assert np.take_along_axis(values, places, axis=1).tolist() == greatest.tolist()
