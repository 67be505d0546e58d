"""What the rehearsal of an export sees beside boxes: masks and keypoints that are not eager's."""

import numpy as np
import pytest
from dethandlers.detections import Category, Detections
from dethandlers.golden import TOLERANCES
from dethandlers.postprocess import encode_rle
from dethandlers.spec import Spec
from detserve.errors import ExportError
from detserve.export import torchvision_graphs
from detserve.export.exporters import ExportOptions
from detserve.export.model import export_model
from detserve.export.rehearsal import _partners, _shape_drift

SPEC = Spec(name="tiny", family="torchvision", categories=(Category(1, "ring", 1),))
COUNT = 20


def detections(*, masks=None, keypoints=None):
    corners = np.arange(COUNT, dtype=np.float32)[:, None] * 10 + np.array([0, 0, 8, 8], np.float32)
    scores = np.linspace(0.9, 0.5, COUNT).astype(np.float32)
    return Detections(corners, scores, np.zeros(COUNT, np.int64), masks=masks, keypoints=keypoints)


def squares(*, shifted=0, by=4):
    masks = []
    for place in range(COUNT):
        mask = np.zeros((220, 220), bool)
        start = place * 10 + (by if place < shifted else 0)
        mask[start : start + 8, start : start + 8] = True
        masks.append(encode_rle(mask))
    return masks


def drift(eager, found):
    return _shape_drift(eager, found, _partners(eager, found, TOLERANCES["fp32"]), SPEC)


def test_equal_masks_and_keypoints_are_no_drift():
    points = np.ones((COUNT, 5, 3), np.float32)
    assert drift(detections(masks=squares()), detections(masks=squares())) == ""
    assert drift(detections(keypoints=points), detections(keypoints=points)) == ""


@pytest.mark.parametrize(("shifted", "said"), [(1, ""), (3, "only 85 % of the masks overlap eager's by 0.99")])
def test_a_mask_that_rounding_moves_is_borne_and_more_are_not(shifted, said):
    assert drift(detections(masks=squares()), detections(masks=squares(shifted=shifted))).startswith(said)


def test_two_empty_masks_are_equal():
    empty = [encode_rle(np.zeros((8, 8), bool))] * COUNT
    assert drift(detections(masks=empty), detections(masks=empty)) == ""


def test_masks_on_one_side_only_are_told():
    assert drift(detections(masks=squares()), detections()) == "masks are on one side only"


def test_keypoints_elsewhere_are_told():
    points = np.ones((COUNT, 5, 3), np.float32)
    moved = points.copy()
    moved[: COUNT // 2, :, 0] += 3.0
    assert drift(detections(keypoints=points), detections(keypoints=moved)).startswith("only 50 % of the keypoints")


@pytest.mark.slow
def test_an_export_with_inverted_masks_is_refused(shelf, tmp_path, monkeypatch):
    from builder_parity import spec_of

    builder = "maskrcnn_resnet50_fpn"
    spec = spec_of(shelf.detector(builder), builder, tmp_path)
    image = tmp_path / "golden.jpg"
    image.write_bytes(shelf.images[0])
    honest = torchvision_graphs.maskrcnn_inference
    monkeypatch.setattr(torchvision_graphs, "maskrcnn_inference", lambda *given: [1 - honest(*given)[0]])
    with pytest.raises(ExportError, match=r"not exported: only \d+ % of the masks overlap eager's"):
        export_model(spec, folder=tmp_path, out=tmp_path / "m.onnx", golden_image=image, options=ExportOptions())
    assert not (tmp_path / "m.onnx").exists()
