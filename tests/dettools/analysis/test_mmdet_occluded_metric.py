"""The recall of occluded objects as MMDetection's Evaluator runs it, by the name that configs give it."""

import importlib.util
import json

import numpy as np
import pytest
from dettools.analysis.occlusion import OcclusionError, make_subsets
from dettools.ground_truth import load_ground_truth
from hotcoco import mask as rle_masks

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("mmdet") is None, reason="MMDetection is not installed"),
    pytest.mark.filterwarnings("ignore"),
]

HEIGHT, WIDTH = 100, 160


def drawn(left, top, right, bottom):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[top:bottom, left:right] = 1
    return mask


POST = drawn(70, 5, 90, 95)
DOG = drawn(20, 30, 140, 70) * (1 - POST)
CAT = drawn(5, 5, 30, 20)


@pytest.fixture
def annotations(tmp_path):
    """Category ids that are not the labels; a dog that a post cuts, and a free cat in a second image."""
    objects = [(1, 7, DOG), (1, 9, POST), (2, 7, CAT)]
    document = {
        "images": [{"id": one, "file_name": f"{one}.jpg", "width": WIDTH, "height": HEIGHT} for one in (1, 2)],
        "categories": [{"id": 7, "name": "dog"}, {"id": 9, "name": "post"}],
        "annotations": [
            {
                "id": number,
                "image_id": image,
                "category_id": category,
                "bbox": np.asarray(rle_masks.to_bbox(rle_masks.encode(mask))).tolist(),
                "area": int(mask.sum()),
                "iscrowd": 0,
                "segmentation": rle(mask),
            }
            for number, (image, category, mask) in enumerate(objects, start=1)
        ],
    }
    path = tmp_path / "val.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def rle(mask):
    encoded = rle_masks.encode(mask)
    return {"size": [HEIGHT, WIDTH], "counts": encoded["counts"].decode()}


def sample(image_id, *found):
    """What a detector of MMDetection leaves for one image: label, score and mask of each detection."""
    import torch

    boxes = [np.asarray(rle_masks.to_bbox(rle_masks.encode(mask))) for _, _, mask in found]
    corners = torch.tensor(np.array([[x, y, x + w, y + h] for x, y, w, h in boxes]).reshape(-1, 4))
    return {
        "img_id": image_id,
        "ori_shape": (HEIGHT, WIDTH),
        "pred_instances": {
            "bboxes": corners,
            "scores": torch.tensor([score for _, score, _ in found]),
            "labels": torch.tensor([label for label, _, _ in found], dtype=torch.long),
            "masks": torch.tensor(np.array([mask for *_, mask in found]).reshape(-1, HEIGHT, WIDTH).astype(bool)),
        },
    }


def evaluated(annotations, samples, **options):
    import dettools.analysis.mmdet_occluded_metric  # noqa: F401
    from mmengine.evaluator import Evaluator
    from mmengine.registry import DefaultScope

    if not DefaultScope.check_instance_created("mmdet"):
        DefaultScope.get_instance("mmdet", scope_name="mmdet")
    metric = {"type": "mmdet.CocoOccludedSeparatedMetric", "ann_file": str(annotations), **options}
    evaluator = Evaluator([metric])
    evaluator.dataset_meta = {"classes": ("dog", "post")}
    for one in samples:
        evaluator.process(data_samples=[one])
    return evaluator.evaluate(size=len(samples))


def test_the_evaluators_figures(annotations):
    figures = evaluated(annotations, [sample(1, (0, 0.9, DOG), (1, 0.8, POST)), sample(2, (0, 0.7, CAT))])
    assert figures["coco/separated_recall"] == 100.0
    assert figures["coco/separated_box_recall"] == 100.0
    assert figures["coco/bbox_mAP"] == figures["coco/segm_mAP"] == 1.0
    # No object of this data set is occluded but whole.
    assert np.isnan(figures["coco/occluded_recall"])


def test_thresholds_and_a_part_of_the_images(annotations):
    whole = drawn(20, 30, 140, 70)
    figures = evaluated(annotations, [sample(1, (0, 0.9, whole)), sample(2)], iou_thr=0.9)
    assert (figures["coco/separated_recall"], figures["coco/separated_box_recall"]) == (0.0, 100.0)
    figures = evaluated(annotations, [sample(1, (0, 0.9, whole)), sample(2)], iou_thr=0.8)
    assert figures["coco/separated_recall"] == 100.0
    only_first = evaluated(annotations, [sample(1, (0, 0.2, DOG))], metric="segm")
    assert only_first["coco/separated_recall"] == 0.0


def test_subsets_of_a_file_and_no_pickles(annotations, tmp_path):
    truth = load_ground_truth(annotations)
    file = tmp_path / "occlusion.json"
    document = make_subsets(truth).to_json()
    document["occluded"], document["separated"] = document["separated"], []
    file.write_text(json.dumps(document), encoding="utf-8")
    figures = evaluated(annotations, [sample(1, (0, 0.9, DOG)), sample(2)], subsets=str(file), metric=["segm"])
    assert figures["coco/occluded_recall"] == 100.0
    with pytest.raises(OcclusionError, match="pickles run code when they are read"):
        evaluated(annotations, [], occluded_ann="occluded_coco.pkl")


def test_a_config_imports_it_by_name(annotations, tmp_path):
    """As a runner does: custom_imports, then the evaluator is built from the config."""
    from mmengine.config import Config

    config = tmp_path / "config.py"
    config.write_text(
        "custom_imports = dict(imports=['dettools.analysis.mmdet_occluded_metric'], allow_failed_imports=False)\n"
        f"val_evaluator = dict(type='CocoOccludedSeparatedMetric', ann_file={str(annotations)!r}, metric='segm')\n",
        encoding="utf-8",
    )
    values = Config.fromfile(config)
    from mmdet.registry import METRICS

    assert METRICS.build(values.val_evaluator).__class__.__module__ == "dettools.analysis.mmdet_occluded_metric"
