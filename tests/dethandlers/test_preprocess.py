"""Preprocessing equals torchvision's own transform bit for bit, and the letterbox equals a definition in NumPy."""

import numpy as np
import pytest
import torch
from dethandlers.preprocess import letterbox, normalise, pad_to_multiple, resize, shorter_side_size
from dethandlers.spec import Preprocessing
from detserve.eager_image import bilinear
from torchvision.models.detection.transform import GeneralizedRCNNTransform

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RNG = np.random.default_rng(5)
SIZES = [(int(h), int(w)) for h, w in RNG.integers(8, 260, (34, 2))] + [
    (8, 8),
    (8, 250),
    (250, 8),
    (96, 160),
    (160, 96),
    (97, 161),
]


def image_of(height, width, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (3, height, width), dtype=np.uint8))


def prepared(image, size, divisor=32):
    return pad_to_multiple(resize(normalise(image.float() / 255.0, MEAN, STD), size), divisor)


@pytest.mark.parametrize(("min_size", "max_size"), [(96, 160), (120, 200), (75, 1333)])
def test_resize_normalise_and_pad_equal_torchvision_s_transform(min_size, max_size):
    transform = GeneralizedRCNNTransform(min_size, max_size, list(MEAN), list(STD)).eval()
    for seed, (height, width) in enumerate(SIZES):
        image = image_of(height, width, seed)
        reference, _ = transform([image.float() / 255])
        size = shorter_side_size((height, width), min_size, max_size)
        assert reference.image_sizes == [size], (height, width)
        assert torch.equal(prepared(image, size), reference.tensors[0]), (height, width)


def test_a_fixed_size_equals_torchvision_s_transform():
    transform = GeneralizedRCNNTransform(96, 96, list(MEAN), list(STD), size_divisible=1, fixed_size=(120, 96)).eval()
    for seed, (height, width) in enumerate(SIZES):
        image = image_of(height, width, seed)
        reference, _ = transform([image.float() / 255])
        assert torch.equal(prepared(image, (96, 120), divisor=1), reference.tensors[0]), (height, width)


def test_the_size_is_torchvision_s_for_a_thousand_sizes():
    transform = GeneralizedRCNNTransform(32, 53, [0.0], [1.0]).eval()
    for height, width in np.random.default_rng(6).integers(8, 700, (1000, 2)).tolist():
        resized, _ = transform.resize(torch.zeros(1, height, width))
        assert shorter_side_size((height, width), 32, 53) == tuple(resized.shape[-2:]), (height, width)


def test_an_extreme_aspect_ratio_keeps_at_least_one_pixel():
    assert shorter_side_size((1, 100_000), 800, 1333) == (1, 1333)
    settings = Preprocessing(size=(64, 64))
    assert letterbox(image_of(2, 1000), settings).resized_size == (1, 64)


def test_padding_fills_the_right_and_the_bottom_with_zeros():
    padded = pad_to_multiple(torch.ones(3, 33, 64), 32)
    assert padded.shape == (3, 64, 64)
    assert padded[:, :33].min() == 1
    assert padded[:, 33:].max() == 0
    assert pad_to_multiple(torch.ones(3, 32, 64), 32).shape == (3, 32, 64)


def numpy_letterbox(image, settings):
    """Draw the letterbox by its definition, in float64."""
    height, width = image.shape[-2:]
    input_height, input_width = settings.size
    ratio = min(input_height / height, input_width / width)
    new_height, new_width = round(height * ratio), round(width * ratio)
    canvas = np.full((input_height, input_width, 3), settings.pad_value)
    pixels = bilinear(image.permute(1, 2, 0).numpy(), new_height, new_width)
    canvas[:new_height, :new_width] = pixels[:, :, ::-1] if settings.channel_order == "bgr" else pixels
    return ((canvas * settings.scale - settings.mean) / settings.std).transpose(2, 0, 1), (new_height, new_width)


@pytest.mark.parametrize(
    "settings",
    [
        Preprocessing(size=(96, 96)),
        Preprocessing(size=(64, 128), channel_order="rgb", pad_value=0.0),
        Preprocessing(size=(96, 64), pad_value=114.0, scale=1 / 255, mean=MEAN, std=STD),
    ],
    ids=["yolox", "wide rgb", "normalised"],
)
def test_the_letterbox_equals_its_definition(settings):
    for seed, (height, width) in enumerate(SIZES):
        image = image_of(height, width, seed)
        got = letterbox(image, settings)
        expected, resized_size = numpy_letterbox(image, settings)
        assert got.resized_size == resized_size, (height, width)
        assert got.shape == (3, *settings.size)
        assert got.pixels.dtype == torch.float32
        # 0.005 grey levels: a float32 coordinate near 260 px is off by 1e-5, between neighbours up to 255 apart.
        tolerance = 0.005 * settings.scale / min(settings.std)
        assert np.abs(got.pixels.numpy() - expected).max() <= tolerance, (height, width)


def test_the_letterbox_s_padding_is_the_pad_value():
    got = letterbox(image_of(50, 100), Preprocessing(size=(96, 96), pad_value=114.0))
    assert got.resized_size == (48, 96)
    assert torch.all(got.pixels[:, 48:] == 114)


def test_the_letterbox_swaps_red_and_blue_for_bgr_only():
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    image[0] = 200
    assert letterbox(image, Preprocessing(size=(64, 64))).pixels[:, 0, 0].tolist() == [0, 0, 200]
    assert letterbox(image, Preprocessing(size=(64, 64), channel_order="rgb")).pixels[:, 0, 0].tolist() == [200, 0, 0]


def test_the_scale_leads_from_network_pixels_back_to_the_original():
    got = letterbox(image_of(50, 101), Preprocessing(size=(96, 96)))
    height, width = got.resized_size
    assert (height, width) == (48, 96)
    assert got.original_size == (50, 101)
    assert got.scale_xy == (101 / 96, 50 / 48)


def test_an_image_of_the_wanted_size_is_not_touched():
    image = image_of(64, 48).float()
    assert resize(image, (64, 48)) is image
