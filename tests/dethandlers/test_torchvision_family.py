"""The torchvision family: weights that fit or are refused by name, norms as trained, limits that only cut."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from dethandlers.detector import Detector, Request
from dethandlers.errors import ArtefactError
from dethandlers.families import Batch, Limits
from dethandlers.families.torchvision_detection import (
    REQUEST_ARGUMENTS,
    TorchvisionFamily,
    build_module,
    builders,
    describe_misfit,
)
from dethandlers.spec import Spec
from detserve.eager import decode_rgb
from random_detectors import NUM_CLASSES, OPTIONS
from small_artefacts import (
    FASTER_RCNN,
    IMAGES,
    SSDLITE,
    artefact_of,
    assert_same_bits,
    categories_of,
    detector_of,
    options_of,
)
from torch import nn
from torchvision.models import get_model
from torchvision.ops import FrozenBatchNorm2d

CPU = torch.device("cpu")


def spec_of(builder=FASTER_RCNN, **changes):
    defaults = {"builder_options": OPTIONS[builder], "num_classes": NUM_CLASSES}
    return Spec(
        name="x",
        family="torchvision",
        categories=categories_of(list(range(1, NUM_CLASSES))),
        builder=builder,
        **(defaults | changes),
    )


@pytest.fixture(scope="module")
def images():
    return IMAGES


@pytest.fixture(scope="module", params=[FASTER_RCNN, SSDLITE])
def random_model(request):
    return detector_of(request.param)


@pytest.fixture(scope="module")
def faster_rcnn():
    return detector_of(FASTER_RCNN)


@pytest.fixture(scope="module")
def detector(random_model, tmp_path_factory):
    detector = Detector(artefact_of(random_model, tmp_path_factory.mktemp("family")), CPU)
    yield detector
    detector.close()


def answers(detector, images, options):
    found = detector.detect([Request(image, options) for image in images])
    return [answer.detections for answer in found]


# what fits


def test_a_misfit_names_shapes_missing_and_foreign_weights():
    expected = {"a": torch.zeros(2, 3), "b": torch.zeros(4), "c": torch.zeros(1)}
    assert describe_misfit(expected, expected) == ""
    got = {"a": torch.zeros(3, 2), "c": torch.zeros(1), "d": torch.zeros(1)}
    assert describe_misfit(expected, got) == (
        "wrong shape: a is (3, 2), expected (2, 3) | missing: b | not of this model: d"
    )


def test_a_misfit_names_three_of_each_and_counts_the_rest():
    expected = {f"w{number}": torch.zeros(1) for number in range(7)}
    assert describe_misfit(expected, {}) == "missing: w0; w1; w2 and 4 more"


def test_weights_for_another_number_of_classes_are_refused_with_the_layers(faster_rcnn):
    with pytest.raises(ArtefactError) as caught:
        build_module(spec_of(num_classes=NUM_CLASSES + 1), faster_rcnn.state)
    assert f"weights do not fit {FASTER_RCNN} with 6 classes: wrong shape: " in caught.value.message
    assert "roi_heads.box_predictor.cls_score.weight is (5, 1024), expected (6, 1024)" in caught.value.message


def test_weights_of_another_builder_are_refused(faster_rcnn):
    with pytest.raises(ArtefactError, match=r"missing: .* more \| not of this model: "):
        build_module(spec_of(SSDLITE), faster_rcnn.state)


def test_an_unknown_builder_is_refused_with_those_there_are():
    with pytest.raises(ArtefactError, match="builder: got 'yolov8', expected one of torchvision's: fasterrcnn_"):
        build_module(replace(spec_of(), builder="yolov8"), {})
    assert set(OPTIONS) == set(builders())


@pytest.mark.parametrize("name", REQUEST_ARGUMENTS)
def test_what_every_request_sets_is_refused_as_a_builder_option(name):
    with pytest.raises(ArtefactError, match=f"builder_options: got '{name}', which every request sets"):
        build_module(spec_of(builder_options={name: 1}), {})


def test_an_option_that_the_builder_does_not_take_is_refused():
    # torchvision itself would swallow both in silence.
    with pytest.raises(ArtefactError, match=r"builder_options: got 'min_sise', expected one of .* min_size"):
        build_module(spec_of(builder_options={"min_size": 192, "min_sise": 192}), {})
    with pytest.raises(ArtefactError, match="builder_options: got 'colour'"):
        build_module(spec_of(SSDLITE, builder_options={"colour": "red"}), {})
    with pytest.raises(ArtefactError, match=r"does not take builder_options \{'num_classes': 3\}"):
        build_module(spec_of(builder_options={"num_classes": 3}), {})


def test_a_missing_number_of_classes_is_refused():
    with pytest.raises(ArtefactError, match="num_classes: got none"):
        build_module(spec_of(num_classes=None), {})


@pytest.mark.parametrize(
    ("builder", "expected"),
    [("maskrcnn_resnet50_fpn", {"masks"}), ("keypointrcnn_resnet50_fpn", {"keypoints"}), (SSDLITE, set())],
)
def test_the_builder_says_what_may_be_asked_for(builder, expected):
    assert TorchvisionFamily(spec_of(builder)).capabilities == expected


def test_half_precision_storage_is_widened(faster_rcnn):
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in faster_rcnn.state.items()}
    module = build_module(spec_of(), half)
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    name = "roi_heads.box_predictor.cls_score.weight"
    assert torch.equal(module.state_dict()[name], half[name].float())


# frozen batch norms


def frozen_model(state, eps):
    """Make the model as fine-tuning from pretrained weights leaves it: frozen norms of that epsilon."""
    model = get_model(FASTER_RCNN, weights=None, weights_backbone=None, num_classes=NUM_CLASSES, **OPTIONS[FASTER_RCNN])
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, FrozenBatchNorm2d(child.num_features, eps=eps))
    model.load_state_dict(state)
    return model.eval()


@pytest.fixture(scope="module")
def frozen_state(faster_rcnn):
    """Frozen norms keep no count; some of their variances are tiny, as in torchvision's COCO_V1 weights."""
    state = {
        name: tensor.clone() for name, tensor in faster_rcnn.state.items() if not name.endswith("num_batches_tracked")
    }
    for name in state:
        if name.endswith("running_var"):
            weight = state[name.replace("running_var", "weight")]
            state[name][::4] *= 1e-5
            weight[::4] *= 1e-5**0.5
    return state


def outputs(module, images):
    pixels = [torch.from_numpy(decode_rgb(image)).permute(2, 0, 1) / 255 for image in images[:1]]
    with torch.inference_mode():
        return [module([one])[0] for one in pixels]


@pytest.mark.parametrize("eps", [0.0, 1e-5, 1e-3])
def test_frozen_norms_are_put_back_with_the_epsilon_of_the_spec(frozen_state, images, eps):
    expected = outputs(frozen_model(frozen_state, eps), images)
    got = outputs(build_module(spec_of(norm_eps=eps), frozen_state), images)
    for one, other in zip(expected, got, strict=True):
        for name, tensor in one.items():
            assert len(tensor) > 5
            assert torch.equal(tensor, other[name]), name


def test_another_epsilon_gives_other_detections(frozen_state, images):
    """Trained with 0.0 and served with torchvision's 1e-5: a score among the first twenty moves by 0.6."""
    expected = outputs(build_module(spec_of(norm_eps=0.0), frozen_state), images)
    wrong = outputs(build_module(spec_of(norm_eps=None), frozen_state), images)
    drift = max(
        float((one["scores"][:20] - other["scores"][:20]).abs().max())
        for one, other in zip(expected, wrong, strict=True)
    )
    assert drift > 0.3


def test_ordinary_norms_stay_ordinary(faster_rcnn):
    module = build_module(spec_of(norm_eps=0.0), faster_rcnn.state)
    kinds = {type(part) for part in module.modules() if "BatchNorm" in type(part).__name__}
    assert kinds == {nn.BatchNorm2d}


def test_frozen_norms_without_an_epsilon_keep_the_builder_s(frozen_state):
    module = build_module(spec_of(), frozen_state)
    norms = [part for part in module.modules() if isinstance(part, FrozenBatchNorm2d)]
    assert {norm.eps for norm in norms} == {1e-5}
    assert not any(isinstance(part, nn.BatchNorm2d) for part in module.modules())


# half precision


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_boxes_are_decoded_in_float32_in_half_precision_too(random_model, detector, precision):
    """Left alone under autocast, torchvision decodes them in half: multiples of 8 px beyond 1024 px in bf16."""
    artefact = detector.artefact
    serving = replace(artefact.spec.serving, precision=precision)
    half = Detector(replace(artefact, spec=replace(artefact.spec, serving=serving)), CPU)
    try:
        image = torch.from_numpy(decode_rgb(IMAGES[0])).permute(2, 0, 1)
        prepared = half.family.prepare(image)
        limits = Limits(random_model.score_threshold, 100)
        (output,) = half.runtime.run(Batch(prepared.pixels[None], (prepared.resized_size,), limits))
    finally:
        half.close()
    assert len(output["boxes"]) > 10
    for name in ("boxes", "scores"):
        assert output[name].dtype == torch.float32
        coarse = output[name].to(torch.float16 if precision == "fp16" else torch.bfloat16).float()
        assert (coarse != output[name]).float().mean() > 0.5, name


# labels and limits


def test_labels_that_the_map_does_not_know_are_dropped(random_model, detector, images, tmp_path):
    gapped = replace(
        artefact_of(random_model, tmp_path, categories=categories_of([3, 1])), weights=detector.artefact.weights
    )
    partial = Detector(gapped, CPU)
    try:
        options = options_of(random_model)
        everything = answers(detector, images[:3], options)
        some = answers(partial, images[:3], options)
    finally:
        partial.close()
    for full, cut in zip(everything, some, strict=True):
        model_labels = full.labels + 1
        known = full.take(np.isin(model_labels, [1, 3]))
        assert 0 < len(known) < len(full)
        assert np.array_equal(np.array([3, 1])[cut.labels], known.labels + 1)
        assert np.array_equal(cut.scores, known.scores)
        assert np.array_equal(cut.boxes_xyxy, known.boxes_xyxy)


def test_a_higher_threshold_only_cuts(random_model, detector, images):
    low = answers(detector, images[:3], options_of(random_model))
    for place in (0.3, 0.7):
        threshold = float(np.quantile(np.concatenate([one.scores for one in low]), place)) + 1e-6
        high = answers(detector, images[:3], options_of(random_model, score_threshold=threshold))
        for one, other in zip(low, high, strict=True):
            assert_same_bits(one.take(one.scores >= np.float32(threshold)), other)


def test_a_smaller_maximum_only_cuts(random_model, detector, images):
    everything = answers(detector, images[:3], options_of(random_model))
    for maximum in (1, 7):
        few = answers(detector, images[:3], options_of(random_model, max_detections=maximum))
        for one, other in zip(everything, few, strict=True):
            assert_same_bits(one.take(np.arange(maximum)), other)


def test_a_score_equal_to_the_threshold_is_answered(random_model, detector, images):
    (everything,) = answers(detector, images[:1], options_of(random_model))
    for place in (3, 8, 15):
        # As a client would: the score of an answer, sent back as the next threshold.
        threshold = float(f"{float(everything.scores[place]):.9g}")
        (found,) = answers(detector, images[:1], options_of(random_model, score_threshold=threshold))
        assert len(found) == place + 1


def test_detections_come_best_first(random_model, detector, images):
    for found in answers(detector, images[:3], options_of(random_model)):
        assert np.all(np.diff(found.scores) <= 0)
        assert np.all(found.boxes_xyxy >= 0)
        assert re.fullmatch(
            "float32 float32 int64", f"{found.boxes_xyxy.dtype} {found.scores.dtype} {found.labels.dtype}"
        )
