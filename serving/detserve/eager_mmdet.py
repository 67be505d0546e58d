"""The reference for MMDetection's models: its own test pipeline, forward and `inference_detector`, one image at a time.

Differs from `init_detector` in what it does not do: the checkpoint never reaches a full unpickle, COCO's classes are
never assumed, and weights that do not fit are an error.

A request's limits are written into the heads' test settings, so one object serves one request at a time.
"""

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from dethandlers.detections import Category, Detections, Rle
from dethandlers.mmcv_operators import provide
from dethandlers.runtimes.torch_runtime import set_tf32

from detserve.errors import DetserveError
from detserve.mmdet_checkpoint import (
    MmdetCheckpoint,
    config_dataset_type,
    mmdet_categories,
    model_class_count,
    read_checkpoint,
    require_fit,
)
from detserve.mmdet_config import ConfigError, read_config, refuse_foreign_types

_BUILT = ("model", "test_dataloader", "test_pipeline")


@dataclass(frozen=True)
class _Limit:
    """Where a head's test settings cut detections.

    Attributes:
        settings: the head's ``test_cfg``.
        key: the name of the limit in it.
        most: the highest limit that the head can work with; 0 when there is none.
    """

    settings: Any
    key: str
    most: int


class MmdetEager:
    """MMDetection's model behind its own `inference_detector`, in float32.

    Args:
        config: flattened.
        checkpoint: its weights and class names.
        categories: instead of the checkpoint's or config's.
        source: what it runs, for people.
        device: where torch runs it.
        custom_imports: modules that the config names under ``custom_imports`` are imported; they run as code.

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
        custom_imports: bool = False,
    ) -> None:
        _require_mmdet()
        imports = _custom_imports(config)
        if imports and not custom_imports:
            raise ConfigError(
                f"config: got custom_imports {', '.join(imports)}, which run when the model is built. "
                "Allow them if you trust them, or take them out."
            )
        scopes = [name.partition(".")[0] for name in imports]
        refuse_foreign_types({key: config[key] for key in _BUILT if key in config}, scopes)
        scope = config.get("default_scope") or "mmdet"
        if scope not in ("mmdet", *scopes):
            raise ConfigError(f"config: got default_scope {scope!r}, expected mmdet, or a package of custom_imports.")
        operators = provide()
        set_tf32(allowed=False)
        # MMDetection prints where nobody has set up its logger.
        with _quiet(), contextlib.redirect_stdout(sys.stderr):
            import mmdet

            self._model = _build(config, checkpoint, device, source)
            self._pipeline = _test_pipeline(self._model.cfg)
        known = () if categories else _names_of_type(config_dataset_type(config))
        self.categories = mmdet_categories(config, checkpoint.class_names, of_dataset_type=known, given=categories)
        self._label_of = {category.model_label: label for label, category in enumerate(self.categories)}
        self._thresholds, self._limits = _cuts(self._model)
        kind = "compiled operators" if operators.compiled else "operators on torchvision"
        self.source = f"MMDetection {mmdet.__version__} ({kind}), {source}, on {device}"

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

        # Heads keep what is above their threshold, the contract what is not below it.
        above = float(np.nextafter(np.float32(score_threshold), np.float32(-1)))
        for settings in self._thresholds:
            settings["score_thr"] = above
        for limit in self._limits:
            limit.settings[limit.key] = min(max_detections, limit.most) if limit.most else max_detections
        with _quiet():
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
) -> MmdetEager:
    """Load the reference from a config and a checkpoint.

    Args:
        config: MMDetection's config file.
        checkpoint: ``.pth`` or ``.safetensors``.
        categories: instead of the checkpoint's or config's.
        device: where torch runs it.
        allow_code: a config that is not literal is run, and ``custom_imports`` are imported.

    Raises:
        DetserveError: as `read_config`, `read_checkpoint` and `MmdetEager`.
    """
    return MmdetEager(
        read_config(config, allow_code=allow_code).values,
        read_checkpoint(checkpoint),
        categories=categories,
        source=f"{checkpoint}",
        device=device,
        custom_imports=allow_code,
    )


def _custom_imports(config: Mapping[str, Any]) -> list[str]:
    """The modules that a config wants imported."""
    asked = config.get("custom_imports")
    named: Any = asked.get("imports", []) if isinstance(asked, Mapping) else asked or []
    return [named] if isinstance(named, str) else [str(name) for name in named]


def _require_mmdet() -> None:
    import importlib.util

    lacking = [name for name in ("mmengine", "mmcv", "mmdet") if importlib.util.find_spec(name) is None]
    if lacking:
        raise DetserveError(
            f"MMDetection: got no {', '.join(lacking)}, expected MMDetection 3. Install it with "
            "pip install 'detserve[mmdet]'; nothing has to be compiled."
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what MMDetection warns of and logs about itself from those who only asked for detections."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _build(config: Mapping[str, Any], checkpoint: MmdetCheckpoint, device: str, source: str) -> Any:
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules
    from mmengine.config import Config
    from mmengine.model.utils import revert_sync_batchnorm
    from mmengine.registry import init_default_scope
    from mmengine.utils import import_modules_from_strings

    logging.getLogger("mmengine").setLevel(logging.ERROR)
    settings = Config(dict(config))
    register_all_modules(init_default_scope=False)
    init_default_scope(settings.get("default_scope") or "mmdet")
    try:
        import_modules_from_strings(_custom_imports(config) or None)
        _forget_pretrained(settings.model)
        model = revert_sync_batchnorm(MODELS.build(settings.model))
    except Exception as error:  # a config's mistakes come as every kind
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"config: the model cannot be built ({type(error).__name__}: {reason[:300]}).") from error
    _load(model, checkpoint, source)
    for module in model.modules():
        # SSDHead never sets it, and the head's base asks for it at inference.
        if type(module).__name__ == "SSDHead" and not hasattr(module, "loss_cls"):
            module.loss_cls = None
    model.cfg = settings
    model.dataset_meta = {"classes": checkpoint.class_names, "palette": "random"}
    return model.to(device).eval()


def _forget_pretrained(model: Any) -> None:
    """The backbone's own weights would be fetched; the checkpoint's replace them anyway."""
    for part in (model, model.get("detector") or {}):
        backbone = part.get("backbone")
        if backbone and "init_cfg" in backbone:
            backbone["init_cfg"] = None


def _load(model: Any, checkpoint: MmdetCheckpoint, source: str) -> None:
    from collections import OrderedDict

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


def _test_pipeline(settings: Any) -> Any:
    """Build the test pipeline as `inference_detector` does on every call, for pixels instead of a path."""
    import copy

    from mmcv.transforms import Compose
    from mmdet.utils import get_test_pipeline_cfg

    try:
        pipeline = copy.deepcopy(get_test_pipeline_cfg(settings.copy()))
        pipeline[0]["type"] = "mmdet.LoadImageFromNDArray"
        # What it is told about reading files means nothing for pixels.
        for key in [key for key in pipeline[0] if key not in ("type", "to_float32", "color_type", "imdecode_backend")]:
            del pipeline[0][key]
        return Compose(pipeline)
    except Exception as error:
        raise ConfigError(f"config: the test pipeline cannot be built ({type(error).__name__}: {error}).") from error


def _names_of_type(kind: str) -> tuple[str, ...]:
    """The class names that MMDetection's data set class of that name has."""
    from mmdet.registry import DATASETS

    found = DATASETS.get(kind) if kind else None
    names = getattr(found, "METAINFO", {}).get("classes", ())
    return (names,) if isinstance(names, str) else tuple(names)


def _cuts(model: Any) -> tuple[list[Any], list[_Limit]]:
    """Find the test settings that cut detections by score and by number, the proposals' left out."""
    most = _most(model)
    thresholds: list[Any] = []
    limits: list[_Limit] = []
    seen: set[int] = set()
    for name, module in model.named_modules():
        settings = getattr(module, "test_cfg", None)
        if not isinstance(settings, dict) or "rpn" in name or id(settings) in seen:
            continue
        seen.add(id(settings))
        if "rpn" in settings or "rcnn" in settings:
            continue  # a two-stage detector's own; its RoI head has the inner one
        if "score_thr" in settings:
            thresholds.append(settings)
        if hasattr(getattr(model, "rpn_head", None), "num_proposals"):
            continue  # QueryInst pairs its detections with all of its proposals: what is more is cut afterwards
        limits += [_Limit(settings, key, most) for key in ("max_per_img", "max_per_image") if key in settings]
    return thresholds, limits


def _most(model: Any) -> int:
    """How many detections a model that takes the best of its queries can give; 0 for other models.

    Asked for more, torch's topk would fail.
    """
    parts = [getattr(model, name, None) for name in ("bbox_head", "panoptic_head", "rpn_head")]
    counts = [getattr(one, name, None) for one in (model, *parts) for name in ("num_queries", "num_proposals")]
    queries = next((count for count in counts if isinstance(count, int) and count > 0), 0)
    head = parts[0]
    if head is not None and not getattr(getattr(head, "loss_cls", None), "use_sigmoid", True):
        return queries  # DETR: the best class of each
    settings = model.cfg.model
    return queries * (model_class_count(settings) or 1)


def _rle(masks: npt.NDArray[np.uint8]) -> list[Rle]:
    """Encode ``(N, H, W)`` by pycocotools."""
    from pycocotools import mask as coco_mask

    encoded = [coco_mask.encode(np.asfortranarray(one)) for one in masks]
    return [{"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")} for rle in encoded]
