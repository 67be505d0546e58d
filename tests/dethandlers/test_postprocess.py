"""Boxes back to original pixels, and masks: pasted as torchvision does, encoded as pycocotools does."""

import numpy as np
import pytest
import torch
from dethandlers.postprocess import clip_boxes, encode_masks, encode_rle, scale_boxes
from pycocotools import mask as coco_mask
from torchvision.models.detection.roi_heads import paste_masks_in_image

# pycocotools' decode, under NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")

RNG = np.random.default_rng(11)


def special_masks():
    empty = np.zeros((13, 17), bool)
    corners = {}
    for name, place in (("first pixel", (0, 0)), ("last pixel", (-1, -1)), ("inner pixel", (6, 9))):
        corners[name] = empty.copy()
        corners[name][place] = True
    checkers = np.indices((9, 8)).sum(axis=0) % 2 == 0
    half = np.zeros((400, 300), bool)
    half[:, 150:] = True
    return {
        "empty": empty,
        "full": ~empty,
        **corners,
        "single row": np.array([[False, True, True, False, True]]),
        "single column": np.array([[True], [False], [True], [True]]),
        "one pixel set": np.ones((1, 1), bool),
        "one pixel unset": np.zeros((1, 1), bool),
        "checkers": checkers,
        "long runs": half,
        "not contiguous": np.asfortranarray(RNG.random((30, 20)) > 0.5),
    }


SPECIAL = special_masks()


def by_pycocotools(mask):
    encoded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(encoded["size"]), "counts": encoded["counts"].decode()}


@pytest.mark.parametrize("name", SPECIAL)
def test_a_special_mask_is_encoded_as_by_pycocotools(name):
    mask = SPECIAL[name]
    encoded = encode_rle(mask)
    assert encoded == by_pycocotools(mask)
    assert np.array_equal(coco_mask.decode(encoded).astype(bool), mask)


def test_random_masks_are_encoded_as_by_pycocotools_and_decode_back():
    for _ in range(300):
        height, width = RNG.integers(1, 70, 2)
        mask = RNG.random((height, width)) < RNG.choice([0.02, 0.5, 0.98])
        if RNG.random() < 0.5:  # blobs, which have the long runs of real masks
            mask = np.kron(mask, np.ones((7, 9), bool)).astype(bool)
        encoded = encode_rle(mask)
        assert encoded == by_pycocotools(mask)
        assert np.array_equal(coco_mask.decode(encoded).astype(bool), mask)


HEIGHT, WIDTH = 60, 80


def pasted_by_torchvision(masks, boxes):
    pasted = paste_masks_in_image(masks, boxes.clone(), (HEIGHT, WIDTH))
    return (pasted[:, 0] > 0.5).numpy()


@pytest.mark.parametrize("cells", [28, 14, 7])
def test_masks_are_pasted_as_by_torchvision(cells):
    torch.manual_seed(cells)
    corner = torch.rand(60, 2) * torch.tensor([WIDTH, HEIGHT]) * 0.9
    extent = torch.rand(60, 2) ** 2 * torch.tensor([WIDTH, HEIGHT])
    boxes = torch.cat([corner, torch.minimum(corner + extent, torch.tensor([float(WIDTH), float(HEIGHT)]))], dim=1)
    masks = torch.rand(60, 1, cells, cells)
    expected = pasted_by_torchvision(masks, boxes)
    for encoded, mask in zip(encode_masks(masks, boxes, (HEIGHT, WIDTH)), expected, strict=True):
        assert encoded == by_pycocotools(mask)


@pytest.mark.parametrize(
    "box",
    [
        [-20.5, -10.2, 30.1, 40.7],
        [60.0, 30.0, 100.0, 90.0],
        [-30.0, -30.0, 120.0, 130.0],
        [10.2, 10.4, 10.9, 10.8],
        [10.0, 10.0, 10.0, 10.0],
        [10.0, 20.0, 30.0, 20.0],
        [0.0, 0.0, 80.0, 60.0],
        [79.5, 59.5, 80.0, 60.0],
    ],
    ids=["out top left", "out bottom right", "around all", "tiny", "no size", "no height", "whole", "last pixel"],
)
def test_a_box_at_the_edge_is_pasted_as_by_torchvision(box):
    torch.manual_seed(1)
    masks = torch.rand(1, 1, 28, 28).clamp(min=0.3)
    boxes = torch.tensor([box])
    (encoded,) = encode_masks(masks, boxes, (HEIGHT, WIDTH))
    assert encoded == by_pycocotools(pasted_by_torchvision(masks, boxes)[0])


def test_a_box_that_lies_wholly_outside_has_an_empty_mask():
    (encoded,) = encode_masks(torch.ones(1, 1, 28, 28), torch.tensor([[200.0, 200.0, 240.0, 230.0]]), (HEIGHT, WIDTH))
    assert coco_mask.area(encoded) == 0
    assert encoded["size"] == [HEIGHT, WIDTH]


def test_no_masks_are_no_masks():
    assert encode_masks(torch.zeros(0, 1, 28, 28), torch.zeros(0, 4), (HEIGHT, WIDTH)) == []


def test_half_precision_masks_are_pasted_too():
    masks = torch.rand(1, 1, 28, 28)
    boxes = torch.tensor([[10.0, 10.0, 50.0, 50.0]])
    half = masks.half()
    assert encode_masks(half, boxes, (HEIGHT, WIDTH)) == encode_masks(half.float(), boxes, (HEIGHT, WIDTH))


def test_boxes_are_scaled_per_axis_in_float32():
    boxes = torch.tensor([[1, 2, 3, 4], [0, 0, 10, 10]], dtype=torch.float16)
    scaled = scale_boxes(boxes, (2.0, 0.5))
    assert scaled.dtype == torch.float32
    assert scaled.tolist() == [[2, 1, 6, 2], [0, 0, 20, 5]]
    assert scale_boxes(torch.zeros(0, 4), (2.0, 0.5)).shape == (0, 4)


def test_boxes_are_clipped_to_the_image():
    boxes = torch.tensor([[-5.0, -1.0, 90.0, 70.0], [3.0, 4.0, 5.0, 6.0], [90.0, 70.0, 95.0, 75.0]])
    assert clip_boxes(boxes, (HEIGHT, WIDTH)).tolist() == [[0, 0, 80, 60], [3, 4, 5, 6], [80, 60, 80, 60]]
