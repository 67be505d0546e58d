"""The reference for MMDetection's models: its own test pipeline, forward and `inference_detector`, one image at a time.

Differs from `init_detector` in what it does not do: the checkpoint never reaches a full unpickle, COCO's classes are
never assumed, and weights that do not fit are an error.

A request's limits are written into the heads' test settings, so one object serves one request at a time.
"""

import contextlib
import importlib.metadata
import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from dethandlers.detections import Category, Detections, Rle
from dethandlers.errors import ArtefactError
from dethandlers.mmcv_operators import provide
from dethandlers.mmdet_model import Cuts, build_network, build_pipeline, quiet
from dethandlers.runtimes.torch_runtime import set_tf32

from detserve.errors import DetserveError
from detserve.mmdet_checkpoint import (
    MmdetCheckpoint,
    config_dataset_type,
    mmdet_categories,
    read_checkpoint,
    require_fit,
)
from detserve.mmdet_config import ConfigError, read_config


class MmdetEager:
    """MMDetection's model behind its own `inference_detector`, in float32.

    Args:
        config: flattened.
        checkpoint: its weights and class names.
        categories: instead of the checkpoint's or config's.
        source: what it runs, for people.
        device: where torch runs it.
        allow_code: modules that the config names under ``custom_imports`` are imported; they run as code.
        modules: folders where those are looked for first.

    Raises:
        DetserveError: MMDetection is not installed, the config does not build, or the weights do not fit.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        checkpoint: MmdetCheckpoint,
        *,
        categories: Sequence[Category] | None = None,
        source: str,
        device: str = "cpu",
        allow_code: bool = False,
        modules: Sequence[Path] = (),
    ) -> None:
        set_tf32(allowed=False)
        # MMDetection prints where nobody has set up its logger.
        with contextlib.redirect_stdout(sys.stderr):
            try:
                self._model = build_network(config, modules=modules, allow_code=allow_code)
                load_weights(self._model, checkpoint, source)
                self._pipeline = build_pipeline(self._model.cfg)
            except ArtefactError as error:
                raise ConfigError(str(error)) from error
        self._model.dataset_meta = {"classes": checkpoint.class_names, "palette": "random"}
        self._model.to(device)
        known = () if categories else names_of_dataset(config_dataset_type(config))
        self.categories = mmdet_categories(config, checkpoint.class_names, of_dataset_type=known, given=categories)
        self._label_of = {category.model_label: label for label, category in enumerate(self.categories)}
        self._cuts = Cuts(self._model)
        kind = "compiled operators" if provide().compiled else "operators on torchvision"
        self.source = f"MMDetection {importlib.metadata.version('mmdet')} ({kind}), {source}, on {device}"

    def detect(
        self,
        image: bytes,
        score_threshold: float,
        max_detections: int,
        *,
        masks: bool = False,
        keypoints: bool = False,  # noqa: ARG002 - MMDetection's detectors have none
    ) -> Detections:
        """Find objects in one encoded image: decoded by OpenCV with its EXIF orientation applied, as mmcv does.

        Raises:
            DetserveError: it is no image that OpenCV reads, or the model fails on it.
        """
        import mmcv
        from mmdet.apis import inference_detector

        self._cuts.set(score_threshold, max_detections)
        with quiet():
            try:
                pixels = mmcv.imfrombytes(image) if image else None
            except Exception as error:  # OpenCV's own kinds
                raise DetserveError(f"got {len(image)} bytes that MMDetection cannot decode ({error}).") from error
            if pixels is None:
                raise DetserveError(f"got {len(image)} bytes that MMDetection cannot decode, expected an image.")
            try:
                sample = inference_detector(self._model, pixels, test_pipeline=self._pipeline)
            except Exception as error:  # its assertions, torch's errors, operators that are missing
                raise DetserveError(f"MMDetection fails on this image ({type(error).__name__}: {error}).") from error
        found = sample.get("pred_instances")
        if found is None or "bboxes" not in found:
            raise DetserveError(
                f"MMDetection: got {', '.join(sample.keys()) or 'nothing'}, expected detections. "
                "Only configs of detection and instance segmentation are served."
            )
        return self._as_detections(found, masks=masks).filtered(score_threshold, max_detections)

    def _as_detections(self, found: Any, *, masks: bool) -> Detections:
        labels = found.labels.cpu().numpy()
        known = np.array([int(label) in self._label_of for label in labels], dtype=bool)
        rles = None
        if masks and "masks" in found:
            kept = found.masks[torch.from_numpy(known).to(found.masks.device)] if len(known) else found.masks
            rles = _rle(np.asarray(kept.cpu()).astype(np.uint8))
        return Detections(
            found.bboxes.detach().cpu().float().numpy().reshape(-1, 4)[known],
            found.scores.detach().cpu().float().numpy()[known],
            np.array([self._label_of[int(label)] for label in labels[known]], dtype=np.int64),
            masks=rles,
        )


def load_mmdet(
    config: Path,
    checkpoint: Path,
    *,
    categories: Sequence[Category] | None = None,
    device: str = "cpu",
    allow_code: bool = False,
    modules: Sequence[Path] = (),
) -> MmdetEager:
    """Load the reference from a config and a checkpoint.

    Args:
        config: MMDetection's config file.
        checkpoint: ``.pth`` or ``.safetensors``.
        categories: instead of the checkpoint's or config's.
        device: where torch runs it.
        allow_code: a config that is not literal is run, and ``custom_imports`` are imported.
        modules: folders where those are looked for first.

    Raises:
        DetserveError: as `read_config`, `read_checkpoint` and `MmdetEager`.
    """
    return MmdetEager(
        read_config(config, allow_code=allow_code).values,
        read_checkpoint(checkpoint),
        categories=categories,
        source=f"{checkpoint}",
        device=device,
        allow_code=allow_code,
        modules=modules,
    )


def load_weights(model: Any, checkpoint: MmdetCheckpoint, source: str) -> None:
    """Load a checkpoint into its config's model, all of it.

    Raises:
        CheckpointError: something is missing, left over, or of another shape.
    """
    state = OrderedDict(checkpoint.state)
    state._metadata = OrderedDict(checkpoint.versions)  # type: ignore[attr-defined]
    own = model.state_dict()
    wrong = [name for name in state if name in own and own[name].shape != state[name].shape]
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError:
        missing, unexpected = [], []
        if not wrong:
            raise
    require_fit(missing, unexpected, wrong, source)


def names_of_dataset(kind: str) -> tuple[str, ...]:
    """The class names that MMDetection's data set class of that name has."""
    from mmdet.registry import DATASETS

    # Not `get`, which imports what it does not find.
    found = DATASETS.module_dict.get(kind.removeprefix("mmdet.datasets.").removeprefix("mmdet."))
    names = getattr(found, "METAINFO", {}).get("classes", ())
    return (names,) if isinstance(names, str) else tuple(names)


def _rle(masks: npt.NDArray[np.uint8]) -> list[Rle]:
    """Encode ``(N, H, W)`` by pycocotools."""
    from pycocotools import mask as coco_mask

    encoded = [coco_mask.encode(np.asfortranarray(one)) for one in masks]
    return [{"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")} for rle in encoded]
