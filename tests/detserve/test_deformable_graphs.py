"""Deformable operators in plain ones: torchvision's convolution, attention by its definition, sizes free in ONNX."""

import itertools
import math

import onnxruntime
import pytest
import torch
from detserve.export.deformable_graphs import deformable_attention, deformable_convolution
from detserve.export.tracing import Signature, trace
from torchvision.ops import deform_conv2d


def normal(*shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation", "groups", "offset_groups", "modulated"),
    [
        ((3, 3), (1, 1), (1, 1), (1, 1), 1, 1, False),
        ((3, 3), (2, 2), (1, 1), (1, 1), 1, 2, True),
        ((3, 1), (1, 2), (2, 0), (2, 1), 2, 4, True),
        ((1, 1), (1, 1), (0, 0), (1, 1), 8, 8, False),
    ],
)
def test_the_convolution_is_torchvisions(kernel, stride, padding, dilation, groups, offset_groups, modulated):
    images = normal(2, 8, 11, 14)
    weight = normal(16, 8 // groups, *kernel, seed=1)
    height, width = (
        (side + 2 * padding[axis] - dilation[axis] * (kernel[axis] - 1) - 1) // stride[axis] + 1
        for axis, side in enumerate((11, 14))
    )
    points = math.prod(kernel)
    # Far enough that some places lie outside of the image.
    offsets = normal(2, 2 * offset_groups * points, height, width, seed=2, scale=4.0)
    mask = normal(2, offset_groups * points, height, width, seed=3).sigmoid() if modulated else None
    bias = normal(16, seed=4) if modulated else None
    expected = deform_conv2d(images, offsets, weight, bias, stride, padding, dilation, mask)
    found = deformable_convolution(
        images,
        offsets,
        weight,
        mask=mask,
        bias=bias,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        offset_groups=offset_groups,
    )
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


SHAPES = torch.tensor([[4, 6], [2, 3]])


def attention_inputs(count=2, heads=2, channels=3, queries=5, points=2):
    cells = int(SHAPES.prod(dim=1).sum())
    values = normal(count, cells, heads, channels)
    locations = normal(count, queries, heads, 2, points, 2, seed=1).mul(0.4).add(0.5)
    weights = (
        normal(count, queries, heads, 2, points, seed=2).flatten(3).softmax(-1).reshape(count, queries, heads, 2, -1)
    )
    return values, locations, weights


def sampled(level, x, y):
    """One value of ``(h, w, C)`` between its four nearest cells; beyond the map there is nothing."""
    height, width, channels = level.shape
    column, row = x * width - 0.5, y * height - 0.5
    total = torch.zeros(channels)
    for down, across in itertools.product((0, 1), repeat=2):
        at_row, at_column = math.floor(row) + down, math.floor(column) + across
        if 0 <= at_row < height and 0 <= at_column < width:
            share = (1 - abs(row - at_row)) * (1 - abs(column - at_column))
            total += share * level[at_row, at_column]
    return total


def test_the_attention_is_its_definition():
    values, locations, weights = attention_inputs()
    found = deformable_attention(values, SHAPES, locations, weights).reshape(2, 5, 2, 3)
    levels = [part.reshape(2, *shape, 2, 3) for part, shape in zip(values.split([24, 6], dim=1), SHAPES, strict=True)]
    for image, query, head in itertools.product(range(2), range(5), range(2)):
        expected = torch.zeros(3)
        for level, point in itertools.product(range(2), range(2)):
            x, y = locations[image, query, head, level, point].tolist()
            share = weights[image, query, head, level, point]
            expected += share * sampled(levels[level][image, :, :, head], x, y)
        torch.testing.assert_close(found[image, query, head], expected, atol=1e-5, rtol=1e-4)


WEIGHT = normal(4, 3, 3, 3)


class Convolution(torch.nn.Module):
    def forward(self, images, offsets):
        return (deformable_convolution(images, offsets, WEIGHT, padding=(1, 1)),)


def test_sizes_stay_free_in_the_graph():
    axes = {0: "batch", 2: "height", 3: "width"}
    signature = Signature(
        ("images", "offsets"), ("convolved",), dict.fromkeys(("images", "offsets", "convolved"), axes)
    )
    content = trace(Convolution(), (normal(2, 3, 8, 9), normal(2, 18, 8, 9, seed=1)), signature, opset=17)
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    images, offsets = normal(1, 3, 12, 5, seed=2), normal(1, 18, 12, 5, seed=3)
    (found,) = session.run(None, {"images": images.numpy(), "offsets": offsets.numpy()})
    expected = deform_conv2d(images, offsets, WEIGHT, padding=1)
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=2e-4, rtol=1e-4)
