"""torchvision's detectors as graphs that can be exported: torchvision's own layers, and its post-processing rewritten.

    one stage   images (B, 3, h, w) ─► backbone, heads ─► best candidates of each level ─► NMS (in the graph or later)
    two stages  image (1, 3, h, w) ─► backbone, RPN ─► NMS ─► RoI heads ─► NMS ─► masks, keypoint heat maps

torchvision chooses by loops over images and classes and by boolean masks, which a trace freezes for one batch. Here the
same choice is made by sorting, with a fixed number of candidates: what eager inference drops by its threshold before
the sort is dropped here after it, which keeps the same candidates, since the sort goes by score.

Only the layers run in half precision; boxes, scores and NMS are float32, for half precision cannot hold a coordinate.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import maskrcnn_inference
from torchvision.models.detection.rpn import concat_box_prediction_layers
from torchvision.models.detection.ssd import SSD

from detserve.export.non_max_suppression import best_of, least_topk, suppress_blocks, suppress_planes

ONE_STAGE = (RetinaNet, FCOS, SSD)
Candidates = tuple[Tensor, Tensor, Tensor]
"""Boxes ``(B, K, 4)`` xyxy px clipped to the image, scores ``(B, K)``, labels ``(B, K)`` as the model counts them."""


class LevelCandidates(nn.Module):
    """RetinaNet and FCOS: the best of every feature level."""

    def __init__(self, module: RetinaNet | FCOS, dtype: torch.dtype) -> None:
        super().__init__()
        self.module = module
        self.classes = int(module.head.classification_head.num_classes)
        self.nms_iou = float(module.nms_thresh)
        module.backbone.to(dtype)
        module.head.to(dtype)
        self._dtype = dtype

    def forward(self, images: Tensor, image_sizes: Tensor) -> Candidates:
        """Take ``(B, 3, h, w)`` and ``(B, 2)`` int64 ``(h, w)`` px of the images inside."""
        module = self.module
        features = list(module.backbone(images.to(self._dtype)).values())
        outputs = {name: value.float() for name, value in module.head(features).items()}
        maps = [one.new_empty((1, 1, *one.shape[-2:]), dtype=torch.float32) for one in features]
        (anchors,) = module.anchor_generator(ImageList(images, [(0, 0)]), maps)
        per_cell = module.anchor_generator.num_anchors_per_location()
        counts = [one.shape[-2] * one.shape[-1] * count for one, count in zip(features, per_cell, strict=True)]
        parts = [
            self._level(level, anchors_of_level)
            for level, anchors_of_level in zip(
                zip(*(_split(value, counts) for value in _in_order(outputs)), strict=True),
                _split(anchors, counts, axis=0),
                strict=True,
            )
        ]
        boxes, scores, labels = (torch.cat(column, dim=1) for column in zip(*parts, strict=True))
        return _clip(boxes, image_sizes), scores, labels

    def _level(self, outputs: tuple[Tensor, ...], anchors: Tensor) -> Candidates:
        logits, deltas, *centredness = outputs
        scores = torch.sigmoid(logits)
        if centredness:
            scores = torch.sqrt(scores * torch.sigmoid(centredness[0]))
        best, places = least_topk(scores.flatten(1), self.module.topk_candidates, axis=1)
        rows = torch.div(places, self.classes, rounding_mode="floor")
        wanted = _rows(deltas, rows).reshape(-1, 4)
        at = anchors[rows.reshape(-1)]
        coder = self.module.box_coder
        boxes = coder.decode_single(wanted, at) if isinstance(self.module, RetinaNet) else coder.decode(wanted, at)
        return boxes.reshape(*_shape(best), 4), best, places % self.classes

    def keep(self, candidates: Candidates, threshold: Tensor, most: Tensor) -> Tensor:
        """Return the kept candidates' positions in the flattened ``(B * K,)``."""
        boxes, scores, labels = candidates
        return suppress_planes(
            boxes, scores, labels, scores >= threshold, classes=self.classes, most=most, iou=self.nms_iou
        )


class ClassCandidates(nn.Module):
    """SSD and SSDlite: the best of every class; the input has one size, so the anchors are constants."""

    anchors: Tensor

    def __init__(self, module: SSD, dtype: torch.dtype) -> None:
        super().__init__()
        self.module = module
        width, height = module.transform.fixed_size
        with torch.no_grad():
            images = torch.zeros(1, 3, height, width)
            features = list(module.backbone(images).values())
            (anchors,) = module.anchor_generator(ImageList(images, [(height, width)]), features)
        self.register_buffer("anchors", anchors)
        self.limit = (float(width), float(height))
        self.nms_iou = float(module.nms_thresh)
        module.backbone.to(dtype)
        module.head.to(dtype)
        self._dtype = dtype

    def forward(self, images: Tensor) -> Candidates:
        """Take ``(B, 3, h, w)`` of the model's fixed size."""
        module = self.module
        outputs = module.head(list(module.backbone(images.to(self._dtype)).values()))
        deltas, logits = outputs["bbox_regression"].float(), outputs["cls_logits"].float()
        probabilities = torch.softmax(logits, dim=-1)[..., 1:].transpose(1, 2)
        best, places = least_topk(probabilities, module.topk_candidates, axis=2)
        rows = places.flatten(1)
        boxes = module.box_coder.decode_single(_rows(deltas, rows).reshape(-1, 4), self.anchors[rows.reshape(-1)])
        width, height = self.limit
        x = boxes[:, 0::2].clamp(0, width)
        y = boxes[:, 1::2].clamp(0, height)
        boxes = torch.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], dim=-1).reshape(*_shape(rows), 4)
        self.classes = int(probabilities.shape[1])
        labels = (torch.arange(self.classes) + 1)[None, :, None].expand_as(places).flatten(1)
        return boxes, best.flatten(1), labels

    def keep(self, candidates: Candidates, threshold: Tensor, most: Tensor) -> Tensor:
        """Return the kept candidates' positions in the flattened ``(B * K,)``."""
        boxes, scores, _ = candidates
        # The input has one size, and so has every class.
        per_class = int(scores.shape[1]) // self.classes
        blocks = scores.reshape(-1, per_class)
        alive = blocks >= threshold
        return suppress_blocks(boxes.reshape(-1, per_class, 4), blocks, alive, most=most, iou=self.nms_iou)


class OneStage(nn.Module):
    """Candidates, or with NMS in the graph detections, of a batch.

    Without NMS: boxes ``(B, K, 4)``, scores ``(B, K)``, labels ``(B, K)``.
    With NMS: boxes ``(B, D, 4)``, scores ``(B, D)``, labels ``(B, D)``, ``num_detections (B,)``, beyond which all is 0.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype, *, nms: bool) -> None:
        super().__init__()
        self.candidates: Any = (
            ClassCandidates(module, dtype) if isinstance(module, SSD) else LevelCandidates(module, dtype)
        )
        self.takes_sizes = not isinstance(module, SSD)
        self._nms = nms

    def forward(self, images: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        """Take images, their sizes where they are free, and threshold and maximum where NMS is in the graph."""
        sizes = others[:1] if self.takes_sizes else ()
        candidates: Candidates = self.candidates(images, *sizes)
        if not self._nms:
            return candidates
        boxes, scores, labels = candidates
        threshold, most = others[len(sizes) :]
        best, places = best_of(self.candidates.keep(candidates, threshold, most), scores, most)
        there = best >= 0
        return (
            _rows(boxes, places) * there[..., None],
            best * there,
            torch.gather(labels, 1, places) * there,
            there.sum(dim=1),
        )


class TwoStage(nn.Module):
    """Detections of one image: boxes ``(1, n, 4)``, scores ``(1, n)``, labels ``(1, n)``.

    Mask R-CNN adds masks ``(1, n, 1, 28, 28)``, probabilities inside the boxes; Keypoint R-CNN adds heat maps
    ``(1, n, K, 56, 56)``, of which the detector reads the keypoints as torchvision does.
    """

    def __init__(self, module: FasterRCNN, dtype: torch.dtype) -> None:
        super().__init__()
        self.module = module
        heads = module.roi_heads
        self.has_masks, self.has_keypoints = heads.has_mask(), heads.has_keypoint()
        for part in (module.backbone, module.rpn.head, heads.box_head, heads.box_predictor):
            part.to(dtype)
        for name in ("mask_head", "mask_predictor", "keypoint_head", "keypoint_predictor"):
            if getattr(heads, name, None) is not None:
                getattr(heads, name).to(dtype)
        self._dtype = dtype

    def forward(self, images: Tensor, image_sizes: Tensor, threshold: Tensor, most: Tensor) -> tuple[Tensor, ...]:
        """Take ``(1, 3, h, w)``, ``(1, 2)`` int64 ``(h, w)`` px, ``()`` float32 and ``()`` int64."""
        features = self.module.backbone(images.to(self._dtype))
        proposals = self._proposals(images, features, image_sizes)
        maps = {name: value.float() for name, value in features.items()}
        # Only torchvision's inference of the pyramid's scales looks at this size, and they are powers of two.
        frame = [(int(images.shape[-2]), int(images.shape[-1]))]
        heads = self.module.roi_heads

        def pooled(pool: nn.Module, boxes: Tensor) -> Tensor:
            values: Tensor = pool(maps, [boxes], frame)
            return values.to(self._dtype)

        logits, deltas = heads.box_predictor(heads.box_head(pooled(heads.box_roi_pool, proposals)))
        boxes, scores, labels = self._choose(logits.float(), deltas.float(), proposals, image_sizes, threshold, most)
        found: list[Tensor] = [boxes, scores, labels]
        if self.has_masks:
            mask_logits = heads.mask_predictor(heads.mask_head(pooled(heads.mask_roi_pool, boxes))).float()
            found.append(maskrcnn_inference(mask_logits, [labels])[0])
        if self.has_keypoints:
            found.append(heads.keypoint_predictor(heads.keypoint_head(pooled(heads.keypoint_roi_pool, boxes))).float())
        return tuple(one[None] for one in found)

    def _proposals(self, images: Tensor, features: dict[str, Tensor], image_sizes: Tensor) -> Tensor:
        rpn = self.module.rpn
        maps = list(features.values())
        objectness, deltas = ([one.float() for one in part] for part in rpn.head(maps))
        empty = [one.new_empty((1, 1, *one.shape[-2:]), dtype=torch.float32) for one in maps]
        (anchors,) = rpn.anchor_generator(ImageList(images, [(0, 0)]), empty)
        counts = [one.shape[1] * one.shape[2] * one.shape[3] for one in objectness]
        logits, flat = concat_box_prediction_layers(objectness, deltas)
        boxes = rpn.box_coder.decode_single(flat, anchors)
        columns: list[tuple[Tensor, Tensor, Tensor]] = []
        for level, (level_logits, level_boxes) in enumerate(
            zip(_split(logits.reshape(-1), counts, axis=0), _split(boxes, counts, axis=0), strict=True)
        ):
            best, places = least_topk(level_logits, rpn._pre_nms_top_n["testing"], axis=0)
            columns.append((level_boxes[places], best, torch.full_like(places, level)))
        boxes, best, levels = (torch.cat(column)[None] for column in zip(*columns, strict=True))
        boxes, scores = _clip(boxes, image_sizes), torch.sigmoid(best)
        alive = _large(boxes, rpn.min_size) & (scores >= rpn.score_thresh)
        every = torch._shape_as_tensor(scores)[1]
        kept = suppress_planes(boxes, scores, levels, alive, classes=len(maps), most=every, iou=float(rpn.nms_thresh))
        _, order = least_topk(scores[0][kept], rpn._post_nms_top_n["testing"], axis=0)
        return boxes[0][kept[order]]

    def _choose(
        self, logits: Tensor, deltas: Tensor, proposals: Tensor, image_sizes: Tensor, threshold: Tensor, most: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        heads = self.module.roi_heads
        classes = logits.shape[1]
        boxes = heads.box_coder.decode_single(deltas, proposals).reshape(-1, classes, 4)[:, 1:].transpose(0, 1)
        boxes = _clip(boxes.reshape(1, -1, 4), image_sizes)
        scores = torch.softmax(logits, dim=-1)[:, 1:].transpose(0, 1)
        blocks = boxes.reshape(classes - 1, -1, 4)
        alive = (scores >= threshold) & _large(blocks, 1e-2)
        kept = suppress_blocks(blocks, scores, alive, most=most, iou=float(heads.nms_thresh))
        flat = scores.reshape(-1)
        best, order = least_topk(flat[kept], most, axis=0)
        chosen = kept[order]
        labels = torch.div(chosen, torch._shape_as_tensor(scores)[1], rounding_mode="floor") + 1
        return boxes[0][chosen], best, labels


def _in_order(outputs: dict[str, Tensor]) -> list[Tensor]:
    """Logits first, then box deltas, then FCOS's centredness: each ``(B, anchors, values)``."""
    return [outputs[name] for name in ("cls_logits", "bbox_regression", "bbox_ctrness") if name in outputs]


def _split(value: Tensor, counts: list[Any], *, axis: int = 1) -> list[Tensor]:
    """Split along an axis; by slices, since a traced split would freeze the counts."""
    parts, start = [], 0
    for count in counts:
        parts.append(value[start : start + count] if axis == 0 else value[:, start : start + count])
        start = start + count
    return parts


def _rows(values: Tensor, rows: Tensor) -> Tensor:
    """Gather ``(B, N, 4)`` at ``(B, K)``."""
    return torch.gather(values, 1, rows[..., None].expand(*_shape(rows), 4))


def _shape(values: Tensor) -> list[Any]:
    return [values.shape[axis] for axis in range(values.ndim)]


def _clip(boxes: Tensor, image_sizes: Tensor) -> Tensor:
    """Clip ``(B, K, 4)`` to the images' ``(B, 2)`` ``(h, w)``."""
    height, width = image_sizes.to(boxes.dtype)[:, None, 0], image_sizes.to(boxes.dtype)[:, None, 1]
    limit = torch.stack([width, height, width, height], dim=-1)
    return torch.minimum(boxes.clamp(min=0), limit)


def _large(boxes: Tensor, least: float) -> Tensor:
    return (boxes[..., 2] - boxes[..., 0] >= least) & (boxes[..., 3] - boxes[..., 1] >= least)
