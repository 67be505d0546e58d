"""MMDetection's networks as they serve: float32 after the heads, and masks only where they are wanted."""

import pytest
import torch
from dethandlers.families import Limits
from dethandlers.images import decode_image
from dethandlers.mmdet_model import MmdetModel
from detserve.checkpoint import load_state_dict
from detserve.mmdet_config import read_config
from mmdet_models import IMAGES, mmdet_warnings, needs_mmdet, random_model

pytestmark = [needs_mmdet, *mmdet_warnings]


def loaded(name, folder):
    """A random model and its input for two images of one padded shape."""
    made = random_model(name, folder)
    model = MmdetModel(read_config(made.config).values)
    model.load(load_state_dict(made.checkpoint))
    image = decode_image(IMAGES[0], max_pixels=10**7, min_side=8).permute(1, 2, 0).flip(-1).numpy().copy()
    prepared = [model.prepared(image), model.prepared(image[:, ::-1].copy())]
    pixels = torch.stack([pixels for pixels, _ in prepared])
    return model, pixels, [sample for _, sample in prepared], made.score_threshold


@torch.inference_mode()
def test_under_autocast_boxes_are_decoded_in_float32(tmp_path):
    model, pixels, samples, threshold = loaded("yolox", tmp_path)
    with torch.autocast("cpu", torch.bfloat16):
        found = model.predict(pixels, samples, Limits(threshold, 100))
        maps = model.network.bbox_head(model.network.extract_feat(pixels))
    assert maps[0][0].dtype == torch.bfloat16
    assert {one[key].dtype for one in found for key in ("boxes", "scores")} == {torch.float32}

    # As if the maps had been written down and decoded by somebody who knows nothing of half precision.
    wide = [[level.float() for level in levels] for levels in maps]
    metas = [sample.metainfo for sample in samples]
    expected = model.network.bbox_head.predict_by_feat(*wide, batch_img_metas=metas, rescale=True)
    for one, other in zip(found, expected, strict=True):
        assert len(one["boxes"]) >= 10
        assert torch.equal(one["boxes"], other.bboxes)
        assert torch.equal(one["scores"], other.scores)


@torch.inference_mode()
@pytest.mark.parametrize("name", ["mask_rcnn"])
def test_boxes_are_the_same_whether_masks_are_wanted_or_not(name, tmp_path):
    model, pixels, samples, threshold = loaded(name, tmp_path)
    with_masks = model.predict(pixels, samples, Limits(threshold, 100, masks=True))
    without = model.predict(pixels, samples, Limits(threshold, 100, masks=False))
    assert model.has_masks()
    for one, other in zip(with_masks, without, strict=True):
        assert len(one["boxes"]) >= 10
        assert len(one["masks"]) == len(one["boxes"])
        assert "masks" not in other
        for key in ("boxes", "scores", "labels"):
            assert torch.equal(one[key], other[key])


def test_with_no_masks_wanted_the_mask_head_does_not_run(tmp_path):
    model, pixels, samples, threshold = loaded("mask_rcnn", tmp_path)
    ran = []
    model.network.roi_head.mask_head.register_forward_hook(lambda *_: ran.append(1))
    with torch.inference_mode():
        model.predict(pixels, samples, Limits(threshold, 100, masks=False))
        assert ran == []
        model.predict(pixels, samples, Limits(threshold, 100, masks=True))
        assert ran == [1]
