"""On a CUDA device: fp32 equals eager on the CPU for every builder, half precision stays within its own bounds.

Run with `make gpu`; skipped where torch sees no CUDA device.
"""

import io

import numpy as np
import pytest
import torch
from dethandlers.detector import Detector, Request
from dethandlers.families import Batch, Limits
from dethandlers.images import decode_image, decode_jpeg_on_gpu, gpu_jpeg_available
from dethandlers.runtimes import choose_device
from detserve.eager import TorchvisionEager
from PIL import Image
from pycocotools import mask as coco_mask
from random_detectors import MAX_DETECTIONS, OPTIONS, random_images
from small_artefacts import (
    FASTER_RCNN,
    IMAGES,
    SSDLITE,
    artefact_of,
    assert_close,
    assert_same_bits,
    detector_of,
    options_of,
    pair,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword"),  # pycocotools
]

# fp32: the bound of the served builders. cuDNN sums in another order than oneDNN (TF32 is off); between two orders on
# the CPU these random weights, which exaggerate, gave 0.001 px and 1.5e-5: the bound leaves a factor of six.
BOX_PX, SCORE = 0.05, 1e-4
# Half precision against float32: 11 (fp16) or 8 (bf16) bits through some 60 layers of random weights move single
# detections anywhere, so the typical pair is bounded, and how many find none. Measured under autocast on the CPU, worst
# of these builders: fp16 0.58 px, 0.0054, 1.3 %; bf16 4.3 px, 0.040, 19 %. Others drown in it (FCOS: 41 % and 88 %
# without a partner): of them only the form of the answer is checked.
STABLE = [FASTER_RCNN, "fasterrcnn_mobilenet_v3_large_fpn", SSDLITE]
#             median px, median score, share without a partner
HALF_BOUNDS = {"fp16": (1.5, 1.5e-2, 0.10), "bf16": (10.0, 1e-1, 0.40)}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """All threads here, in place of the folder's one: the eager reference of the large builders runs on the CPU."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("weights")


@pytest.fixture
def load(cuda, folder):
    """Load a builder's random detector on the GPU."""
    opened = []

    def load(builder, **serving):
        opened.append(Detector(artefact_of(detector_of(builder), folder, **serving), torch.device(cuda)))
        return opened[-1]

    yield load
    for detector in opened:
        detector.close()
    torch.backends.cudnn.deterministic = False


def answers(detector, images, **changes):
    options = options_of(detector_of(detector.spec.builder), **changes)
    return detector.detect([Request(image, options) for image in images])


def eager_of(detector, images, *, masks=False, keypoints=False):
    model = detector_of(detector.spec.builder)
    eager = TorchvisionEager(detector.spec, model.state, source="test")
    return [
        eager.detect(image, model.score_threshold, MAX_DETECTIONS, masks=masks, keypoints=keypoints) for image in images
    ]


@pytest.mark.parametrize("builder", sorted(OPTIONS))
def test_fp32_on_the_gpu_equals_eager_on_the_cpu(load, builder):
    detector = load(builder)
    masks, keypoints = "maskrcnn" in builder, "keypointrcnn" in builder
    expected = eager_of(detector, IMAGES, masks=masks, keypoints=keypoints)
    together = answers(detector, IMAGES, masks=masks, keypoints=keypoints)
    assert max(answer.forward_size for answer in together) > 1
    for image, one, answer in zip(IMAGES, expected, together, strict=True):
        assert len(one) >= 20
        found = answer.detections
        assert_close(one, found, box_px=BOX_PX, score=SCORE)
        # Wider than DESIGN's 0.01 px and 1e-5: for another batch size cuDNN may choose another kernel.
        (alone,) = answers(detector, [image], masks=masks, keypoints=keypoints)
        assert_close(alone.detections, found, box_px=BOX_PX, score=SCORE)
        order = [_partner(one, place, found) for place in range(len(one))]
        if masks:
            assert found.masks is not None
            ious = [
                coco_mask.iou([mask], [found.masks[other]], [0]).item() if coco_mask.area(mask) else 1.0
                for mask, other in zip(one.masks, order, strict=True)
            ]
            assert min(ious) >= 0.99
        if keypoints:
            # A keypoint is the best cell of a heat map, up to half a cell beside its neighbour when two are equal.
            assert np.median(np.abs(found.keypoints[order] - one.keypoints)[..., :2]) <= BOX_PX


def _partner(detections, place, others):
    distance = np.abs(others.boxes_xyxy - detections.boxes_xyxy[place]).max(axis=1)
    return int(np.where(others.labels == detections.labels[place], distance, np.inf).argmin())


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("builder", sorted(OPTIONS))
def test_every_builder_answers_in_half_precision_with_float32_boxes(load, builder, precision):
    detector = load(builder, precision=precision)
    for answer, expected in zip(answers(detector, IMAGES), eager_of(detector, IMAGES), strict=True):
        found = answer.detections
        assert len(expected) / 3 <= len(found) <= 3 * len(expected)
        assert np.isfinite(found.boxes_xyxy).all()
        assert found.boxes_xyxy.min() >= 0
        assert np.all(np.diff(found.scores) <= 0)
    for name in ("boxes", "scores"):
        assert {one[name].dtype for one in raw_outputs(detector)} == {torch.float32}


def raw_outputs(detector):
    prepared = detector.family.prepare(
        decode_image(IMAGES[0], max_pixels=10**7, min_side=8).to(detector.runtime.device)
    )
    limits = Limits(detector.spec.serving.score_threshold, MAX_DETECTIONS)
    return detector.runtime.run(Batch(prepared.pixels[None], (prepared.resized_size,), limits))


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("builder", STABLE)
def test_half_precision_stays_near_eager(load, builder, precision):
    box_px, score, lost = HALF_BOUNDS[precision]
    detector = load(builder, precision=precision)
    expected = eager_of(detector, IMAGES)
    # Asked for below eager's threshold, so that nothing is lost at its edge.
    found = answers(detector, IMAGES, score_threshold=max(0.0, detector.spec.serving.score_threshold - 0.1))
    pairings = [pair(one, answer.detections) for one, answer in zip(expected, found, strict=True)]
    boxes = np.concatenate([pairing.box_px for pairing in pairings])
    scores = np.concatenate([pairing.score for pairing in pairings])
    share = 1 - len(boxes) / sum(len(one) for one in expected)
    report = f"median {np.median(boxes):.3f} px, {np.median(scores):.5f}; {share:.1%} without a partner"
    assert np.median(boxes) <= box_px, report
    assert np.median(scores) <= score, report
    assert share <= lost, report


def test_detections_come_in_float32_whatever_the_precision(load):
    for precision in ("fp16", "bf16"):
        (answer,) = answers(load(SSDLITE, precision=precision), IMAGES[:1])
        assert answer.detections.boxes_xyxy.dtype == np.float32
        assert answer.detections.scores.dtype == np.float32


def test_channels_last_changes_nothing_but_rounding(load):
    plain = answers(load(SSDLITE), IMAGES)
    other = answers(load(SSDLITE, channels_last=True), IMAGES)
    for one, two in zip(plain, other, strict=True):
        assert_close(one.detections, two.detections, box_px=BOX_PX, score=SCORE)


def test_deterministic_gives_the_same_bits_on_the_gpu(load):
    detector = load(SSDLITE, deterministic=True)
    together = answers(detector, IMAGES)
    for image, answer in zip(IMAGES, together, strict=True):
        (alone,) = answers(detector, [image])
        assert_same_bits(alone.detections, answer.detections)


def test_a_bad_image_fails_alone_on_the_gpu(load):
    detector = load(SSDLITE, jpeg_decoder="gpu")
    good, bad, cut = answers(detector, [IMAGES[0], b"text", IMAGES[1][:3000]])
    assert len(good.detections) >= 20
    assert (bad.type, cut.type) == ("not_an_image", "truncated_image")


# 2: halved in both directions, as most JPEGs are. 2.61 on an H200: why jpeg_decoder is the CPU unless asked.
_HALVED = pytest.param(
    2, marks=pytest.mark.xfail(strict=True, reason="nvJPEG's halved colours differ by 2.6 grey levels")
)


@pytest.mark.parametrize("subsampling", [0, 1, _HALVED])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpegs_decoded_on_the_gpu_are_within_two_grey_levels_of_pillow(cuda, subsampling, progressive):
    """nvJPEG has its own inverse transform and colour upsampling: rounding everywhere, more at coloured edges."""
    if not gpu_jpeg_available():
        pytest.skip("this torchvision has no JPEG decoder")
    for image in random_images():
        buffer = io.BytesIO()
        Image.open(io.BytesIO(image)).save(buffer, "JPEG", quality=90, subsampling=subsampling, progressive=progressive)
        data = buffer.getvalue()
        pixels = decode_jpeg_on_gpu(data, torch.device(cuda))
        assert pixels.device.type == torch.device(cuda).type
        assert pixels.dtype == torch.uint8
        reference = decode_image(data, max_pixels=10**7, min_side=8)
        assert pixels.shape == reference.shape
        assert (pixels.cpu().float() - reference.float()).abs().mean() <= 2


def test_the_jpeg_decoder_is_the_cpu_unless_the_gpu_is_asked_for(load):
    assert load(SSDLITE, precision="fp16").describe()["jpeg_decoder"] == "cpu"
    if gpu_jpeg_available():
        assert load(SSDLITE, jpeg_decoder="gpu").describe()["jpeg_decoder"] == "gpu"


def test_what_runs_is_described_on_the_gpu(load, cuda):
    described = load(SSDLITE, precision="bf16", tf32=True, channels_last=True).describe()
    assert described["device"] == cuda
    assert described["device_name"] == torch.cuda.get_device_name(torch.device(cuda))
    assert (described["precision"], described["tf32"], described["channels_last"]) == ("bf16", True, True)
    plain = load(SSDLITE).describe()
    assert (plain["precision"], plain["tf32"], plain["deterministic"]) == ("fp32", False, False)
    assert torch.backends.cuda.matmul.fp32_precision == "ieee"


def test_the_device_is_the_one_that_torchserve_assigned(cuda):
    assert choose_device("auto", 0) == torch.device(cuda)
    assert choose_device("gpu", None) == torch.device(cuda)
    assert choose_device("auto", None) == torch.device("cpu")
    assert choose_device("auto", -1) == torch.device("cpu")
    assert choose_device("cpu", 0) == torch.device("cpu")
