"""torchvision's detectors as exported to ONNX: what is left to do when the graph is done.

    NMS in the graph    boxes (D, 4), scores (D,), labels (D,), num_detections ─► the first num_detections
    NMS on the host     candidates: boxes (K, 4), scores (K,), labels (K,) ─► threshold ─► NMS per class ─► best first
    two stages          detections as they are, masks, heat maps ─► keypoints

The boxes are xyxy in the network's frame, clipped to the image; what comes out has the form of torchvision's own
detections, so that one decoding serves both runtimes.
"""

import numpy as np
import torch
from torchvision.models.detection.roi_heads import heatmaps_to_keypoints
from torchvision.ops import batched_nms

from dethandlers.errors import ArtefactError
from dethandlers.families import Limits


def detections_of(
    output: dict[str, torch.Tensor], *, nms: str, nms_iou: float, limits: Limits
) -> dict[str, torch.Tensor]:
    """Turn one image's outputs into ``boxes``, ``scores``, ``labels`` and what else the model has.

    Args:
        output: the file's outputs by name.
        nms: the spec's ``decoding.nms``.
        nms_iou: for NMS on the host.
        limits: what is wanted.

    Raises:
        ArtefactError: the file's outputs are not those of an exported torchvision detector.
    """
    missing = [name for name in ("boxes", "scores", "labels") if name not in output]
    if missing:
        raise ArtefactError(
            f"network outputs: got {', '.join(output)}, expected boxes, scores and labels as `detserve export` writes "
            "them. Export the model again."
        )
    boxes, scores, labels = output["boxes"], output["scores"], output["labels"]
    if "num_detections" in output:
        count = int(output["num_detections"])
        boxes, scores, labels = boxes[:count], scores[:count], labels[:count]
    elif nms == "host":
        wanted = scores >= float(np.float32(limits.score_threshold))
        boxes, scores, labels = boxes[wanted], scores[wanted], labels[wanted]
        # The very candidates of eager inference through the very function: the same ones are kept.
        kept = batched_nms(boxes, scores, labels, nms_iou)[: limits.max_detections]
        boxes, scores, labels = boxes[kept], scores[kept], labels[kept]
    found = {"boxes": boxes, "scores": scores, "labels": labels}
    if "masks" in output and limits.masks:
        found["masks"] = output["masks"]
    if "keypoint_maps" in output and limits.keypoints:
        found |= _keypoints(output["keypoint_maps"], boxes)
    return found


def _keypoints(maps: torch.Tensor, boxes: torch.Tensor) -> dict[str, torch.Tensor]:
    if not len(boxes):
        return {
            "keypoints": boxes.new_zeros((0, maps.shape[1], 3)),
            "keypoints_scores": boxes.new_zeros((0, maps.shape[1])),
        }
    points, scores = heatmaps_to_keypoints(maps, boxes)
    return {"keypoints": points, "keypoints_scores": scores}
