"""The reference for torchvision's models: torchvision's own transform, forward and post-processing."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torchvision
from dethandlers.detections import Detections
from dethandlers.errors import ArtefactError
from dethandlers.families.torchvision_detection import build_module
from dethandlers.options import MAX_DETECTIONS_LIMIT
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
        pixels = torch.from_numpy(decode_rgb(image)).permute(2, 0, 1).float() / 255.0

        def run(most: int) -> dict[str, torch.Tensor]:
            heads.detections_per_img = most
            with torch.inference_mode():
                (found,) = self._module([pixels.to(self._device)])
            return {name: tensor.cpu() for name, tensor in found.items()}

        found = best_known(run, self._label_of, max_detections)
        return as_detections(found, self._label_of, masks=masks, keypoints=keypoints)


def best_known(
    run: Callable[[int], dict[str, torch.Tensor]], label_of: Mapping[int, int], most: int
) -> dict[str, torch.Tensor]:
    """Return the best detections of the classes that the category map knows.

    A model takes its best of all classes. Where some of those are of unknown ones, it is asked for more, until the
    known are as many as wanted or nothing was cut off. At most `MAX_DETECTIONS_LIMIT` are asked for, as when serving.

    Args:
        run: finds at most so many detections in one image, best score first: ``boxes``, ``scores``, ``labels`` and
            what else the model has, one row a detection.
        label_of: the model's label to ours.
        most: how many are wanted.
    """
    asked = most
    while True:
        found = run(asked)
        known = [place for place, label in enumerate(found["labels"].tolist()) if label in label_of]
        if len(known) >= most or len(found["labels"]) < asked or asked >= MAX_DETECTIONS_LIMIT:
            return {name: values[known[:most]] for name, values in found.items()}
        asked = min(4 * asked, MAX_DETECTIONS_LIMIT)


def as_detections(
    found: Mapping[str, torch.Tensor], label_of: Mapping[int, int], *, masks: bool, keypoints: bool
) -> Detections:
    """Turn torchvision's detections of one image into ours.

    Args:
        found: ``boxes``, ``scores``, ``labels`` and what else the model has, in pixels of the original image; of
            known classes (`best_known`).
        label_of: the model's label to ours.
        masks: whether masks are wanted.
        keypoints: whether keypoints are wanted.
    """
    return Detections(
        found["boxes"].numpy(),
        found["scores"].numpy(),
        np.asarray([label_of[label] for label in found["labels"].tolist()], dtype=np.int64),
        masks=_rle(found["masks"]) if masks and "masks" in found else None,
        keypoints=_keypoints(found) if keypoints and "keypoints" in found else None,
    )


def _rle(masks: torch.Tensor) -> list[dict[str, Any]]:
    """Encode ``(N, 1, H, W)`` probabilities by pycocotools."""
    from pycocotools import mask as coco_mask

    encoded = [coco_mask.encode(np.asfortranarray((one[0] > 0.5).numpy().astype(np.uint8))) for one in masks]
    return [{"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")} for rle in encoded]


def _keypoints(found: Mapping[str, torch.Tensor]) -> npt.NDArray[np.float32]:
    points = found["keypoints"].clone()
    points[..., 2] = found["keypoints_scores"]
    return np.asarray(points.numpy(), dtype=np.float32)
