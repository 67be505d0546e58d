"""Detectors with random weights whose answers are worth comparing: many detections, spread scores, no ties.

A freshly initialised detector gives every anchor nearly the same score, so that a comparison proves nothing. Here batch
norms take their statistics from images, and the last layers are rescaled until scores and boxes spread.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn
from torchvision.models import get_model

NUM_CLASSES = 5
MAX_DETECTIONS = 1000
# Small inputs: the proof is in the shapes, not in their size.
SMALL = {"min_size": 192, "max_size": 320}
FEW_PROPOSALS = {**SMALL, "rpn_pre_nms_top_n_test": 300, "rpn_post_nms_top_n_test": 150}
OPTIONS: dict[str, dict[str, object]] = {
    "fasterrcnn_mobilenet_v3_large_320_fpn": SMALL,
    "fasterrcnn_mobilenet_v3_large_fpn": FEW_PROPOSALS,
    "fasterrcnn_resnet50_fpn": FEW_PROPOSALS,
    "fasterrcnn_resnet50_fpn_v2": FEW_PROPOSALS,
    "fcos_resnet50_fpn": SMALL,
    "keypointrcnn_resnet50_fpn": {**FEW_PROPOSALS, "num_keypoints": 5},
    "maskrcnn_resnet50_fpn": FEW_PROPOSALS,
    "maskrcnn_resnet50_fpn_v2": FEW_PROPOSALS,
    "retinanet_resnet50_fpn": SMALL,
    "retinanet_resnet50_fpn_v2": SMALL,
    "ssd300_vgg16": {},
    "ssdlite320_mobilenet_v3_large": {},
}
# (name of the layer, wanted spread of its output, wanted mean or None)
_LAYERS: list[tuple[str, float, float | None]] = [
    ("rpn.head.cls_logits", 1.0, 0.0),
    ("rpn.head.bbox_pred", 0.2, 0.0),
    ("roi_heads.box_predictor.cls_score", 2.0, 0.0),
    ("roi_heads.box_predictor.bbox_pred", 0.5, 0.0),
    ("roi_heads.mask_predictor.mask_fcn_logits", 2.0, 0.0),
    ("roi_heads.keypoint_predictor.kps_score_lowres", 2.0, 0.0),
    ("head.classification_head.cls_logits", 1.5, -3.0),
    ("head.regression_head.bbox_reg", 0.3, None),
    ("head.regression_head.bbox_ctrness", 1.0, 0.0),
]


@dataclass(frozen=True)
class RandomDetector:
    """A state dict, the builder's options, and a threshold that cuts between scores, not at one."""

    builder: str
    options: dict[str, object]
    state: dict[str, torch.Tensor]
    score_threshold: float


# (width, height): eight sizes, of which some have the same padded shape and so share a forward pass.
SIZES = [(320, 256), (300, 236), (290, 230), (236, 300), (230, 290), (240, 240), (201, 199), (330, 210)]


def random_images(seed: int = 3) -> list[bytes]:
    """JPEG images of eight different sizes, alike in their statistics."""
    rng = np.random.default_rng(seed)
    images = []
    for width, height in SIZES:
        noise = rng.integers(0, 255, (height // 24, width // 24, 3), dtype=np.uint8)
        image = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
        draw = ImageDraw.Draw(image)
        for _ in range(width * height // 2500):
            x, y = int(rng.integers(0, width - 20)), int(rng.integers(0, height - 20))
            w, h = int(rng.integers(12, 60)), int(rng.integers(12, 60))
            colour = tuple(int(value) for value in rng.integers(0, 255, 3))
            (draw.ellipse if rng.random() < 0.5 else draw.rectangle)((x, y, x + w, y + h), fill=colour)
        buffer = BytesIO()
        image.save(buffer, "JPEG", quality=92)
        images.append(buffer.getvalue())
    return images


def random_detector(builder: str, images: list[bytes]) -> RandomDetector:
    """Make a detector of one of torchvision's builders that finds at least 22 objects in each image.

    No two scores of an image are equal. The first seed that gives this is taken: now and then two proposals are clipped
    to the same box.
    """
    problem = ""
    for seed in range(7, 12):
        torch.manual_seed(seed)
        model = get_model(
            builder, weights=None, weights_backbone=None, num_classes=class_count(builder), **OPTIONS[builder]
        ).eval()
        pixels = [_pixels(image) for image in images]
        _calibrate_norms(model, pixels)
        _spread(model, pixels[::3])
        threshold, problem = _cut(model, pixels)
        if not problem:
            return RandomDetector(builder, OPTIONS[builder], model.state_dict(), threshold)
    raise AssertionError(f"{builder}: {problem}")


def class_count(builder: str) -> int:
    """The builder's num_classes: a Keypoint R-CNN has two, as torchvision's."""
    return 2 if builder.startswith("keypoint") else NUM_CLASSES


def model_labels(builder: str) -> list[int]:
    """The labels that the model puts out: the focal-loss families have no background."""
    return list(range(0 if builder.startswith(("retinanet", "fcos")) else 1, class_count(builder)))


def _pixels(image: bytes) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(BytesIO(image)))).permute(2, 0, 1).float() / 255


def _calibrate_norms(model: nn.Module, pixels: list[torch.Tensor]) -> None:
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        model.backbone(model.transform(pixels)[0].tensors)
    for norm in norms:
        norm.eval()


def _spread(model: nn.Module, pixels: list[torch.Tensor]) -> None:
    modules = dict(model.named_modules())
    targets = [(name, modules[name], std, mean) for name, std, mean in _LAYERS if name in modules]
    for part, std, mean in (("classification_head", 2.0, 0.0), ("regression_head", 0.4, 0.0)):
        for index, layer in enumerate(getattr(getattr(model.head, part), "module_list", [])) if _is_ssd(model) else []:
            last = layer if isinstance(layer, nn.Conv2d) else layer[-1]
            targets.append((f"head.{part}.{index}", last, std, mean))
    if hasattr(model, "roi_heads"):
        model.roi_heads.detections_per_img = 5  # of which each goes through the mask or keypoint head
    else:
        model.score_thresh = 1.0  # so that no time goes into the NMS of thousands of equal boxes
    # In order, for a layer's input depends on those before it.
    for _, layer, std, mean in targets:
        with _captured(layer) as seen, torch.no_grad():
            model(pixels)
        values = torch.cat([value.flatten() for value in seen])
        with torch.no_grad():
            layer.weight.mul_(std / values.std().clamp(min=1e-9))
            if mean is not None and layer.bias is not None:
                layer.bias.fill_(mean)


def _is_ssd(model: nn.Module) -> bool:
    return type(model).__name__ == "SSD"


@contextmanager
def _captured(layer: nn.Module) -> Iterator[list[torch.Tensor]]:
    seen: list[torch.Tensor] = []
    handle = layer.register_forward_hook(lambda _module, _inputs, output: seen.append(output.detach()))
    try:
        yield seen
    finally:
        handle.remove()


def _cut(model: nn.Module, pixels: list[torch.Tensor]) -> tuple[float, str]:
    """A threshold that leaves at least 22 detections in every image, in the widest gap between two scores there.

    With it, what makes this detector unfit; empty when nothing does.
    """
    heads = getattr(model, "roi_heads", model)
    heads.score_thresh, heads.detections_per_img = 0.02, 60
    # Masks and keypoints cost most and change no score.
    pools = {name: getattr(heads, name) for name in ("mask_roi_pool", "keypoint_roi_pool") if hasattr(heads, name)}
    for name in pools:
        setattr(heads, name, None)
    with torch.no_grad():
        scores = [model([one])[0]["scores"].sort(descending=True).values for one in pixels]
    for name, pool in pools.items():
        setattr(heads, name, pool)
    if min(len(one) for one in scores) < 23:
        return 0.0, f"too few detections: {[len(one) for one in scores]}"
    wanted = min(float(one[22]) for one in scores)
    every = torch.cat(scores).sort().values
    below = every[every <= wanted][-20:]
    place = int((below[1:] - below[:-1]).argmax())
    threshold = float((below[place] + below[place + 1]) / 2)
    ties = sum(len(kept) - len(kept.unique()) for one in scores if len(kept := one[one >= threshold]))
    return threshold, f"{ties} equal scores" if ties else ""
