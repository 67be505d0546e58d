"""Families of ONNX files stay on the device of what they are given: the outputs of a GPU run stay on the GPU.

Checked on torch's meta device, which no machine lacks: its tensors have no values, and mix with no other device's.
"""

import pytest
import torch
from dethandlers.detections import Category
from dethandlers.families import load_family
from dethandlers.preprocess import prepare_fixed
from dethandlers.spec import Decoding, Preprocessing, Spec

OUTPUTS = {
    "yolox": {"raw": (64 + 16 + 4, 5 + 3)},
    "fastestdet": {"raw": (5 + 3, 4, 4)},
    "ultraface": {"boxes": (50, 4), "scores": (50, 3)},
}
STRIDES = {"yolox": (8, 16, 32), "fastestdet": (16,)}


@pytest.mark.parametrize("family", OUTPUTS)
def test_candidates_are_where_the_outputs_are(family):
    categories = tuple(Category(label, f"class {label}", label) for label in (1, 2))
    spec = Spec(
        name="small",
        family=family,
        categories=categories,
        runtime="onnx",
        preprocessing=Preprocessing(size=(64, 64)),
        decoding=Decoding(strides=STRIDES.get(family, (8,))),
    )
    outputs = {name: torch.empty(shape, device="meta") for name, shape in OUTPUTS[family].items()}
    found = load_family(spec).candidates(outputs)
    assert {part.device.type for part in (found.boxes_xyxy, found.scores, found.model_labels)} == {"meta"}


@pytest.mark.parametrize("resize", ["letterbox", "stretch"])
def test_images_are_prepared_where_they_are(resize):
    image = torch.empty((3, 48, 80), dtype=torch.uint8, device="meta")
    settings = Preprocessing(size=(64, 64), resize=resize, scale=1 / 255, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
    assert prepare_fixed(image, settings).pixels.device.type == "meta"
