"""Deformable convolutions and attention, CARAFE, masked convolution and focal losses against their papers' formulas."""

import math

import numpy as np
import pytest
import torch
from dethandlers.mmcv_operators import OPERATORS


def random_tensor(seed, *shape, scale=1.0):
    return torch.from_numpy((np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32))


def sample(plane, y, x):
    """Bilinear interpolation of a plane with zeros around it."""
    total = 0.0
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < plane.shape[0] and 0 <= column < plane.shape[1]:
                total += plane[row, column] * (1 - abs(y - row)) * (1 - abs(x - column))
    return total


STRIDE, PADDING, DILATION = (2, 1), (1, 2), (1, 2)
GROUPS, DEFORM_GROUPS = 2, 2


@pytest.fixture
def case():
    """A convolution whose every number down differs from that across."""
    features, weight = random_tensor(1, 2, 4, 7, 9), random_tensor(2, 6, 2, 3, 2)
    high = (7 + 2 * PADDING[0] - DILATION[0] * 2 - 1) // STRIDE[0] + 1
    wide = (9 + 2 * PADDING[1] - DILATION[1] * 1 - 1) // STRIDE[1] + 1
    offset = random_tensor(3, 2, DEFORM_GROUPS * 2 * 6, high, wide, scale=2.0)
    mask = random_tensor(4, 2, DEFORM_GROUPS * 6, high, wide).sigmoid()
    return features, weight, offset, mask, random_tensor(5, 6)


def convolved(features, weight, offset, mask, bias):
    """Zhu et al. 2019, eq. 1: the sum over the kernel's places of weight times mask times the moved sample."""
    features, weight, offset, mask, bias = (part.double().numpy() for part in (features, weight, offset, mask, bias))
    batch, (high, wide) = len(features), offset.shape[2:]
    out = np.zeros((batch, len(weight), high, wide))
    for image, channel, row, column in np.ndindex(*out.shape):
        group = channel // (len(weight) // GROUPS)
        total = bias[channel]
        for inner, down, across in np.ndindex(*weight.shape[1:]):
            source = group * weight.shape[1] + inner
            place = (source // (features.shape[1] // DEFORM_GROUPS)) * 6 + down * 2 + across
            y = row * STRIDE[0] - PADDING[0] + down * DILATION[0] + offset[image, 2 * place, row, column]
            x = column * STRIDE[1] - PADDING[1] + across * DILATION[1] + offset[image, 2 * place + 1, row, column]
            moved = sample(features[image, source], y, x)
            total += weight[channel, inner, down, across] * mask[image, place, row, column] * moved
        out[image, channel, row, column] = total
    return out


def deform_conv(features, weight, offset):
    output = features.new_full((len(features), len(weight), *offset.shape[2:]), 99.0)
    empty = torch.zeros(0)
    sizes = {"kW": 2, "kH": 3, "dW": STRIDE[1], "dH": STRIDE[0], "padW": PADDING[1], "padH": PADDING[0]}
    dilation = {"dilationW": DILATION[1], "dilationH": DILATION[0]}
    groups = {"group": GROUPS, "deformable_group": DEFORM_GROUPS, "im2col_step": 2}
    OPERATORS["deform_conv_forward"](features, weight, offset, output, empty, empty, **sizes, **dilation, **groups)
    return output


def modulated(features, weight, offset, mask, bias, *, with_bias=True, size=None):
    output = features.new_full((len(features), len(weight), *(size or offset.shape[2:])), 99.0)
    OPERATORS["modulated_deform_conv_forward"](
        features,
        weight,
        bias,
        torch.zeros(0),
        offset,
        mask,
        output,
        torch.zeros(0),
        kernel_h=3,
        kernel_w=2,
        stride_h=STRIDE[0],
        stride_w=STRIDE[1],
        pad_h=PADDING[0],
        pad_w=PADDING[1],
        dilation_h=DILATION[0],
        dilation_w=DILATION[1],
        group=GROUPS,
        deformable_group=DEFORM_GROUPS,
        with_bias=with_bias,
    )
    return output


def test_deformable_convolution(case):
    features, weight, offset, mask, bias = case
    expected = convolved(features, weight, offset, torch.ones_like(mask), torch.zeros_like(bias))
    np.testing.assert_allclose(deform_conv(features, weight, offset), expected, atol=1e-4)


def test_modulated_deformable_convolution(case):
    np.testing.assert_allclose(modulated(*case), convolved(*case), atol=1e-4)


def test_without_bias_what_stands_there_is_not_added(case):
    *parts, bias = case
    expected = convolved(*parts, torch.zeros_like(bias))
    np.testing.assert_allclose(modulated(*parts, torch.zeros(0), with_bias=False), expected, atol=1e-4)


def test_larger_offsets_are_read_as_memory(case):
    """As DyHead gives them to its higher level: the compiled operator takes their numbers one after another."""
    features, weight, offset, mask, bias = case
    size = (5, 10)
    assert offset.shape[2:].numel() < math.prod(size)
    larger = [torch.zeros(2, planes, *size) for planes in (offset.shape[1], mask.shape[1])]
    for memory, given in zip(larger, (offset, mask), strict=True):
        for image in range(2):
            memory[image].view(-1)[: given[image].numel()] = given[image].reshape(-1)
    expected = convolved(features, weight, offset, mask, bias)
    np.testing.assert_allclose(modulated(features, weight, *larger, bias, size=offset.shape[2:]), expected, atol=1e-4)


def test_a_place_that_is_no_number_gives_zero(case):
    features, weight, offset, mask, bias = case
    nowhere = torch.full_like(offset, float("nan"))
    assert (deform_conv(features, weight, nowhere) == 0).all()
    found = modulated(features, weight, nowhere, mask, bias)
    np.testing.assert_array_equal(found, bias.view(1, -1, 1, 1).expand_as(found))


def test_half_precision_is_convolved_in_float32(case):
    half = [part.half() for part in case]
    found = modulated(*half)
    assert found.dtype == torch.float16
    assert torch.equal(found, modulated(*(part.float() for part in half)).half())


SHAPES = [(5, 7), (3, 4)]


@pytest.fixture
def attention():
    """Two images, three heads, two levels, four points; some of them outside."""
    value = random_tensor(6, 2, 5 * 7 + 3 * 4, 3, 4)
    places = torch.from_numpy(np.random.default_rng(7).uniform(-0.2, 1.2, (2, 6, 3, 2, 4, 2)).astype(np.float32))
    weights = random_tensor(8, 2, 6, 3, 8).softmax(-1).view(2, 6, 3, 2, 4)
    return value, places, weights


def attend(value, places, weights):
    shapes, starts = torch.tensor(SHAPES), torch.tensor([0, 35])
    return OPERATORS["ms_deform_attn_forward"](
        value, shapes.to(value.device), starts.to(value.device), places, weights, im2col_step=64
    )


def test_multi_scale_deformable_attention(attention):
    """Zhu et al. 2021, eq. 3: the weighted sum over levels and points of samples at normalised places."""
    value, places, weights = (part.double().numpy() for part in attention)
    expected = np.zeros((2, 6, 3, 4))
    for image, query, head, level, point in np.ndindex(*weights.shape):
        high, wide = SHAPES[level]
        first = 0 if level == 0 else 35
        x, y = places[image, query, head, level, point]
        for channel in range(4):
            plane = value[image, first : first + high * wide, head, channel].reshape(high, wide)
            moved = sample(plane, y * high - 0.5, x * wide - 0.5)
            expected[image, query, head, channel] += weights[image, query, head, level, point] * moved
    np.testing.assert_allclose(attend(*attention), expected.reshape(2, 6, 12), atol=1e-5)


def test_attention_of_half_precision_is_computed_in_float32(attention):
    half = [part.half() for part in attention]
    assert torch.equal(attend(*half), attend(*(part.float() for part in half)).half())


@pytest.mark.parametrize("name", ["carafe_forward", "carafe_naive_forward"])
@pytest.mark.parametrize(("kernel", "groups", "scale"), [(3, 1, 2), (5, 2, 3)])
def test_carafe(name, kernel, groups, scale):
    """Wang et al. 2019, eq. 4: each output pixel is its source's neighbourhood, weighed by its own kernel."""
    features = random_tensor(9, 2, 4, 3, 5)
    kernels = random_tensor(10, 2, groups * kernel**2, 3 * scale, 5 * scale)
    expected = np.zeros((2, 4, 3 * scale, 5 * scale))
    for image, channel, row, column in np.ndindex(*expected.shape):
        group = channel // (4 // groups)
        for down, across in np.ndindex(kernel, kernel):
            y, x = row // scale + down - kernel // 2, column // scale + across - kernel // 2
            if 0 <= y < 3 and 0 <= x < 5:
                weight = kernels[image, group * kernel**2 + down * kernel + across, row, column]
                expected[image, channel, row, column] += float(weight * features[image, channel, y, x])
    output = torch.full(expected.shape, 99.0)
    buffers = [torch.zeros(0)] * (3 if name == "carafe_forward" else 0)
    sizes = {"kernel_size": kernel, "group_size": groups, "scale_factor": scale}
    OPERATORS[name](features, kernels, *buffers, output, **sizes)
    np.testing.assert_allclose(output, expected, atol=1e-5)


def test_masked_convolution_is_the_convolution_at_the_chosen_places():
    features, weight = random_tensor(11, 1, 3, 6, 8), random_tensor(12, 4, 3, 3, 5)
    whole = torch.nn.functional.conv2d(features, weight, padding=(1, 2))
    rows, columns = torch.tensor([0, 5, 2, 3]), torch.tensor([0, 7, 4, 1])
    neighbourhoods = torch.full((45, 4), 99.0)
    sizes = {"kernel_h": 3, "kernel_w": 5, "pad_h": 1, "pad_w": 2}
    OPERATORS["masked_im2col_forward"](features, rows, columns, neighbourhoods, **sizes)
    output = torch.zeros(1, 4, 6, 8)
    results = weight.view(4, -1) @ neighbourhoods
    OPERATORS["masked_col2im_forward"](results, rows, columns, output, height=6, width=8, channels=4)
    np.testing.assert_allclose(output[0, :, rows, columns], whole[0, :, rows, columns], atol=1e-4)
    assert (output != 0).any(dim=1).sum() == 4


@pytest.mark.parametrize("weighted", [False, True])
def test_sigmoid_focal_loss(weighted):
    """Lin et al. 2017, eq. 5: -alpha_t (1 - p_t)^gamma log(p_t), for each class on its own."""
    logits, target = random_tensor(13, 6, 3, scale=4.0), torch.tensor([0, 2, 1, 2, 0, 1])
    weight = torch.tensor([0.5, 2.0, 1.5]) if weighted else torch.zeros(0)
    output = torch.full((6, 3), 99.0)
    OPERATORS["sigmoid_focal_loss_forward"](logits, target, weight, output, gamma=2.0, alpha=0.25)
    for row, label in np.ndindex(6, 3):
        probability = 1 / (1 + math.exp(-float(logits[row, label])))
        positive = label == int(target[row])
        of_truth, alpha = (probability, 0.25) if positive else (1 - probability, 0.75)
        loss = -alpha * (1 - of_truth) ** 2 * math.log(of_truth) * (float(weight[target[row]]) if weighted else 1)
        assert float(output[row, label]) == pytest.approx(loss, rel=1e-4, abs=1e-7)


def test_sigmoid_focal_loss_of_background_is_that_of_negatives():
    output = torch.zeros(1, 2)
    arguments = torch.zeros(1, 2), torch.tensor([2]), torch.zeros(0), output
    OPERATORS["sigmoid_focal_loss_forward"](*arguments, gamma=2.0, alpha=0.25)
    assert output.tolist() == [pytest.approx([0.75 * 0.25 * math.log(2)] * 2)]


@pytest.mark.parametrize("weighted", [False, True])
def test_softmax_focal_loss(weighted):
    probabilities, target = random_tensor(14, 4, 3).softmax(-1), torch.tensor([0, 2, -1, 1])
    weight = torch.tensor([0.5, 2.0, 1.5]) if weighted else torch.zeros(0)
    output = torch.full((4,), 99.0)
    OPERATORS["softmax_focal_loss_forward"](probabilities, target, weight, output, gamma=2.0, alpha=0.25)
    for row, label in enumerate(target.tolist()):
        probability = float(probabilities[row, label])
        loss = 0.25 * (1 - probability) ** 2 * -math.log(probability) * (float(weight[label]) if weighted else 1)
        assert float(output[row]) == pytest.approx(0 if label < 0 else loss, rel=1e-5)


def test_autocast_changes_nothing(case, attention):
    """Heads run under autocast; these operators compute in float32 there as everywhere."""
    plain = modulated(*case), attend(*attention)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(modulated(*case), plain[0])
        assert torch.equal(attend(*attention), plain[1])


@pytest.mark.gpu
def test_the_gpu_computes_the_same(cuda, case, attention):
    found = modulated(*(part.to(cuda) for part in case))
    torch.testing.assert_close(found.cpu(), modulated(*case), atol=1e-4, rtol=1e-4)
    attended = attend(*(part.to(cuda) for part in attention))
    torch.testing.assert_close(attended.cpu(), attend(*attention), atol=1e-5, rtol=1e-5)
