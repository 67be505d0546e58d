"""MMDetection's detectors, served as they are: their own test pipeline and forward, in batches that change nothing.

    image ─► the config's test pipeline, built once ─► data preprocessor, alone (normalise, pad) ─┐
                                                            images of one padded shape ─► predict ┴─► boxes, masks

MMDetection pads a batch to its largest image, so an image's detections would depend on its neighbours; here every image
is padded as if it were alone, and only images of one padded shape share a forward pass.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from dethandlers.detections import Detections
from dethandlers.errors import ArtefactError, ImageError
from dethandlers.families import Batch, Limits
from dethandlers.mmdet_model import MmdetModel
from dethandlers.postprocess import encode_rle
from dethandlers.preprocess import Prepared
from dethandlers.spec import Spec

_NARROW = 100
"""Ratio of the sides."""


class MmdetFamily:
    """Every detector that MMDetection builds from a config, run by torch.

    Raises:
        ArtefactError: the spec names another runtime.
    """

    drops_classes = False  # the map has as many classes as the model

    def __init__(self, spec: Spec) -> None:
        if spec.runtime != "torch":
            raise ArtefactError(
                f"runtime: got {spec.runtime!r} with family 'mmdet', expected 'torch'. An exported model has "
                "the family mmdet_onnx; `detserve export` writes it so."
            )
        self.spec = spec
        self.capabilities: frozenset[str] = frozenset()
        lookup = np.full(max(category.model_label for category in spec.categories) + 2, -1, dtype=np.int64)
        for label, category in enumerate(spec.categories):
            lookup[category.model_label] = label
        self._label_of_model_label = lookup
        self._model: MmdetModel | None = None

    def build(self, weights: Path) -> nn.Module:
        """Build the model from the archive's config and safetensors.

        Raises:
            ArtefactError: MMDetection is missing, the config does not build, or the weights do not fit.
        """
        model = MmdetModel.read(weights.parent / self.spec.config)
        model.load(load_file(weights))
        if model.has_masks():
            self.capabilities = frozenset({"masks"})
        self._model = model
        return _Core(model)

    def prepare(self, image: torch.Tensor) -> Prepared:
        """Run the test pipeline and the data preprocessor on one image.

        Raises:
            ImageError: it is so narrow that nothing is left of it.
            RuntimeError: the pipeline fails on it.
        """
        if self._model is None:
            raise ArtefactError("family 'mmdet': the model was not built.")
        bgr = np.ascontiguousarray(image.permute(1, 2, 0).flip(-1).cpu().numpy())
        try:
            pixels, sample = self._model.prepared(bgr)
        except RuntimeError as error:
            raise _too_narrow(image) or error from error
        height, width = (int(side) for side in sample.metainfo["img_shape"][:2])
        return Prepared(pixels, (int(image.shape[-2]), int(image.shape[-1])), (height, width), sample)

    def decode(self, outputs: Any, prepared: Sequence[Prepared], limits: Limits) -> list[Detections]:
        """Name the classes, best score first."""
        return [self._decode_one(found, limits) for found, _ in zip(outputs, prepared, strict=True)]

    def _decode_one(self, found: dict[str, torch.Tensor], limits: Limits) -> Detections:
        model_labels = found["labels"].cpu().numpy()
        labels = self._label_of_model_label[np.minimum(model_labels, len(self._label_of_model_label) - 1)]
        known = labels >= 0
        masks = None
        if limits.masks and "masks" in found:
            masks = [encode_rle(one.cpu().numpy()) for one in found["masks"][torch.from_numpy(known)]]
        return Detections(
            found["boxes"].float().cpu().numpy().reshape(-1, 4)[known],
            found["scores"].float().cpu().numpy()[known],
            labels[known],
            masks=masks,
        ).filtered(0.0, limits.max_detections)


def _too_narrow(image: torch.Tensor) -> ImageError | None:
    """What to say of an image that a pipeline may have resized to no height or no width; None of other images."""
    height, width = (int(side) for side in image.shape[-2:])
    if max(height, width) < _NARROW * min(height, width):
        return None
    return ImageError(
        f"got an image of {width}×{height} pixels, which this model's test pipeline resizes to nothing; expected sides "
        f"of a ratio below {_NARROW}. Send a part of it.",
        type="image_too_small",
    )


class _Core(nn.Module):
    """The model behind the batch that the torch runtime gives."""

    def __init__(self, model: MmdetModel) -> None:
        super().__init__()
        self.network = model.network
        self._model = model

    def forward(self, batch: Batch) -> list[dict[str, torch.Tensor]]:
        """Return per image ``boxes`` xyxy in original pixels, ``scores``, ``labels``, and ``masks`` where there are."""
        return self._model.predict(batch.pixels, batch.samples, batch.limits)
