"""The reference for torchvision's models: torchvision's own transform, forward and post-processing."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torchvision
from dethandlers.detections import Detections
from dethandlers.errors import ArtefactError
from dethandlers.families.torchvision_detection import build_module
from dethandlers.runtimes.torch_runtime import set_tf32
from dethandlers.spec import Spec

from detserve.eager_image import decode_rgb
from detserve.errors import CheckpointError


class TorchvisionEager:
    """torchvision's model, its own transform and its own forward, one image at a time in float32.

    Raises:
        CheckpointError: the weights do not fit.
    """

    def __init__(self, spec: Spec, state: dict[str, torch.Tensor], *, source: str, device: str = "cpu") -> None:
        self.categories = spec.categories
        self.source = f"torchvision {torchvision.__version__} {spec.builder}, {source}, on {device}"
        self._label_of = {category.model_label: label for label, category in enumerate(spec.categories)}
        self._device = torch.device(device)
        set_tf32(allowed=False)
        try:
            self._module = build_module(spec, state).to(self._device)
        except ArtefactError as error:
            raise CheckpointError(str(error)) from error

    def detect(
        self, image: bytes, score_threshold: float, max_detections: int, *, masks: bool = False, keypoints: bool = False
    ) -> Detections:
        """Find objects in one encoded image.

        Raises:
            DetserveError: it is no image.
        """
        heads: Any = getattr(self._module, "roi_heads", self._module)
        heads.score_thresh = score_threshold
        heads.detections_per_img = max_detections
        pixels = torch.from_numpy(decode_rgb(image)).permute(2, 0, 1).float() / 255.0
        with torch.inference_mode():
            (found,) = self._module([pixels.to(self._device)])
        found = {name: tensor.cpu() for name, tensor in found.items()}
        return as_detections(found, self._label_of, masks=masks, keypoints=keypoints)


def as_detections(
    found: Mapping[str, torch.Tensor], label_of: Mapping[int, int], *, masks: bool, keypoints: bool
) -> Detections:
    """Turn torchvision's detections of one image into ours; classes that the category map does not know are dropped.

    Args:
        found: ``boxes``, ``scores``, ``labels`` and what else the model has, in pixels of the original image.
        label_of: the model's label to ours.
        masks: whether masks are wanted.
        keypoints: whether keypoints are wanted.
    """
    known = [place for place, label in enumerate(found["labels"].tolist()) if label in label_of]
    labels = [label_of[int(found["labels"][place])] for place in known]
    return Detections(
        found["boxes"][known].numpy(),
        found["scores"][known].numpy(),
        np.asarray(labels, dtype=np.int64),
        masks=_rle(found["masks"][known]) if masks and "masks" in found else None,
        keypoints=_keypoints(found, known) if keypoints and "keypoints" in found else None,
    )


def _rle(masks: torch.Tensor) -> list[dict[str, Any]]:
    """Encode ``(N, 1, H, W)`` probabilities by pycocotools."""
    from pycocotools import mask as coco_mask

    encoded = [coco_mask.encode(np.asfortranarray((one[0] > 0.5).numpy().astype(np.uint8))) for one in masks]
    return [{"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")} for rle in encoded]


def _keypoints(found: Mapping[str, torch.Tensor], known: list[int]) -> npt.NDArray[np.float32]:
    points = found["keypoints"][known].clone()
    points[..., 2] = found["keypoints_scores"][known]
    return np.asarray(points.numpy(), dtype=np.float32)
