"""A model of MMDetection as its config describes it: built without running the config and without compiled operators.

    config (a literal) ─► mmcv's operators ─► refuse what inference needs not ─► MODELS.build, isolated ─► weights, all

The worker and the eager reference build their model here; what either does with an image is its own.
"""

import ast
import contextlib
import copy
import importlib.util
import logging
import sys
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from dethandlers.build_isolation import isolated
from dethandlers.errors import ArtefactError
from dethandlers.families import Limits
from dethandlers.mmcv_operators import provide
from dethandlers.mmdet_fusion import fuse
from dethandlers.mmdet_inference import MaskSwitch, decode_in_float32
from dethandlers.mmdet_types import Part, for_inference, known_scopes, refused_type

MODULES_FOLDER = "modules"
"""Beside an archive's config: the user's own modules that its ``custom_imports`` name."""


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


class Cuts:
    """Where a model's heads cut detections by score and by number; the proposals' settings are left alone."""

    def __init__(self, network: Any) -> None:
        most = _most(network)
        self._thresholds: list[Any] = []
        self._limits: list[_Limit] = []
        seen: set[int] = set()
        for name, module in network.named_modules():
            settings = getattr(module, "test_cfg", None)
            if not isinstance(settings, dict) or "rpn" in name or id(settings) in seen:
                continue
            seen.add(id(settings))
            if "rpn" in settings or "rcnn" in settings:
                continue  # a two-stage detector's own; its RoI head has the inner one
            if "score_thr" in settings:
                self._thresholds.append(settings)
            if hasattr(getattr(network, "rpn_head", None), "num_proposals"):
                continue  # QueryInst pairs its detections with all of its proposals: what is more is cut afterwards
            self._limits += [_Limit(settings, key, most) for key in ("max_per_img", "max_per_image") if key in settings]

    def set(self, score_threshold: float, max_detections: int) -> None:
        """Let the heads keep what has ``score >= score_threshold``, at most ``max_detections``."""
        # Heads keep what is above their threshold.
        above = float(np.nextafter(np.float32(score_threshold), np.float32(-1)))
        for settings in self._thresholds:
            settings["score_thr"] = above
        for limit in self._limits:
            limit.settings[limit.key] = min(max_detections, limit.most) if limit.most else max_detections


class MmdetModel:
    """A built model with its test pipeline, as the worker uses it.

    Args:
        config: flattened.
        modules: folders where the modules that the config imports are looked for first; they run.

    Raises:
        ArtefactError: MMDetection is not installed, or the config does not build.
    """

    def __init__(self, config: Mapping[str, Any], *, modules: Sequence[Path] = ()) -> None:
        # MMDetection prints where nobody has set up its logger, and the worker's first line is read by its server.
        with contextlib.redirect_stdout(sys.stderr):
            self.network: nn.Module = build_network(config, modules=modules, allow_code=True)
            self._pipeline = build_pipeline(self.network.cfg)
        decode_in_float32(self.network)
        self._cuts = Cuts(self.network)
        self._masks = MaskSwitch(self.network)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Build from a config's file: a Python literal, which is read and not run.

        Raises:
            ArtefactError: no literal, or as above.
        """
        try:
            config = ast.literal_eval(path.read_text("utf-8"))
        except (OSError, ValueError, SyntaxError, RecursionError, MemoryError) as error:
            raise ArtefactError(f"{path.name}: no flattened config ({error}). Build the archive again.") from error
        if not isinstance(config, dict):
            raise ArtefactError(
                f"{path.name}: got a {type(config).__name__}, expected a dict. Build the archive again."
            )
        return cls(config, modules=[path.parent / MODULES_FOLDER])

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Load the weights, all of them, and make the network ready for nothing but inference.

        Raises:
            ArtefactError: they do not fit.
        """
        own = OrderedDict(state)
        # They were saved from this very model: without its modules' versions some would rename what they find.
        own._metadata = self.network.state_dict()._metadata  # type: ignore[attr-defined]
        try:
            self.network.load_state_dict(own)
        except RuntimeError as error:
            raise ArtefactError(f"weights do not fit the config: {str(error)[:400]}") from error
        self.network.eval()
        fuse(self.network)

    def prepared(self, image_bgr: npt.NDArray[np.uint8]) -> tuple[torch.Tensor, Any]:
        """Return one image's input ``(3, h, w)`` float32, padded as if it were alone, and its data sample.

        Args:
            image_bgr: ``(H, W, 3)``.

        Raises:
            RuntimeError: the pipeline fails on this image.
        """
        # Several threads prepare images at once, and filters for warnings are the process's: none is changed here.
        with _as_runtime_errors("the test pipeline"):
            made = self._pipeline({"img": image_bgr, "img_id": 0})
            data = {"inputs": [made["inputs"]], "data_samples": [made["data_samples"]]}
            data = self.network.data_preprocessor(data, False)  # type: ignore[operator]
        return data["inputs"][0], data["data_samples"][0]

    def predict(self, pixels: torch.Tensor, samples: Sequence[Any], limits: Limits) -> list[dict[str, torch.Tensor]]:
        """Run the model's own prediction on images of one padded shape.

        Args:
            pixels: ``(B, 3, h, w)``.
            samples: as ``prepared`` gave them.
            limits: what is wanted.

        Returns:
            Per image ``boxes`` ``(n, 4)`` xyxy px of the original, ``scores``, ``labels``, and ``masks`` ``(n, H, W)``
            bool where the model has them.

        Raises:
            ArtefactError: the model puts out no detections.
            RuntimeError: the model fails on these images.
        """
        self._cuts.set(limits.score_threshold, limits.max_detections)
        self._masks.wanted = limits.masks
        with quiet(), _as_runtime_errors("the model"):
            # The heads write into the samples they are given.
            copies = [one.clone() for one in samples]
            found = self.network.predict(pixels, copies, rescale=True)  # type: ignore[operator]
        return [_as_tensors(one) for one in found]

    def has_masks(self) -> bool:
        """Whether the model puts out masks; found out on a blank image."""
        with torch.inference_mode():
            pixels, sample = self.prepared(np.zeros((64, 64, 3), np.uint8))
            (found,) = self.predict(pixels[None], [sample], Limits(0.99, 1, masks=True))
        return "masks" in found


def require_mmdet() -> None:
    """Refuse to go on without MMDetection.

    Raises:
        ArtefactError: names what is missing, and the remedy.
    """
    lacking = [name for name in ("mmengine", "mmcv", "mmdet") if importlib.util.find_spec(name) is None]
    if lacking:
        raise ArtefactError(
            f"MMDetection: got no {', '.join(lacking)}, expected MMDetection 3. Install it with pip install "
            "'detserve[mmdet]'; nothing has to be compiled."
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what MMDetection warns of about itself from those who only asked for detections."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _as_runtime_errors(what: str) -> Iterator[None]:
    """Turn the assertions, key errors and OpenCV's own kinds into the one kind that costs an image, not the worker."""
    try:
        yield
    except (RuntimeError, MemoryError):
        raise
    except Exception as error:
        raise RuntimeError(f"{what}: {type(error).__name__}: {error}") from error


def custom_imports(config: Mapping[str, Any]) -> list[str]:
    """Return the modules that a config wants imported."""
    asked = config.get("custom_imports")
    named: Any = asked.get("imports", []) if isinstance(asked, Mapping) else asked or []
    return [named] if isinstance(named, str) else [str(name) for name in named]


def build_network(config: Mapping[str, Any], *, modules: Sequence[Path] = (), allow_code: bool = False) -> Any:
    """Build a config's model, without weights; its ``cfg`` is the config, without what only training needs.

    Args:
        config: flattened.
        modules: folders where the modules that it imports are looked for first, from then on.
        allow_code: modules that the config names under ``custom_imports`` are imported; they run as code.

    Raises:
        ArtefactError: MMDetection is not installed, code is wanted and not allowed, a class must not be built, or the
            model does not build.
    """
    require_mmdet()
    imports = custom_imports(config)
    if imports and not allow_code:
        raise ArtefactError(
            f"config: got custom_imports {', '.join(imports)}, which run when the model is built. "
            "Allow them with --allow-code if you trust them, or take them out."
        )
    provide()
    with quiet():
        from mmdet.registry import MODELS
        from mmdet.utils import register_all_modules
        from mmengine.config import Config
        from mmengine.model.utils import revert_sync_batchnorm
        from mmengine.registry import init_default_scope
        from mmengine.utils import import_modules_from_strings

        logging.getLogger("mmengine").setLevel(logging.ERROR)
        settings = Config(copy.deepcopy(dict(config)) | {"model": for_inference(config.get("model"))})
        register_all_modules(init_default_scope=False)
        try:
            # They stay there: a module may import another only when it runs.
            sys.path[:0] = [str(one) for one in modules if imports and one.is_dir() and str(one) not in sys.path]
            import_modules_from_strings(imports or None)
        except Exception as error:  # the user's code may raise any
            raise ArtefactError(f"config: custom_imports cannot be imported ({_told(error)}).") from error
        scope = config.get("default_scope") or "mmdet"
        if scope not in known_scopes():
            raise ArtefactError(f"config: got default_scope {scope!r}, expected one of {', '.join(known_scopes())}.")
        init_default_scope(scope)
        _refuse(settings.model, "model")
        _refuse(_test_steps(settings), "pipeline")
        try:
            with isolated():
                network = revert_sync_batchnorm(MODELS.build(settings.model))
        except Exception as error:  # a config's mistakes come as every kind
            raise ArtefactError(f"config: the model cannot be built ({_told(error)}).") from error
    for module in network.modules():
        # SSDHead never sets it, and the head's base asks for it at inference.
        if type(module).__name__ == "SSDHead" and not hasattr(module, "loss_cls"):
            module.loss_cls = None
    network.cfg = settings
    return network.eval()


def build_pipeline(settings: Any) -> Any:
    """Build the test pipeline as `inference_detector` does on every call, for pixels instead of a path.

    Args:
        settings: the built model's ``cfg``.

    Raises:
        ArtefactError: it cannot be built.
    """
    with quiet():
        from mmcv.transforms import Compose

        try:
            steps = copy.deepcopy(_test_steps(settings))
            steps[0]["type"] = "mmdet.LoadImageFromNDArray"
            # What it is told about reading files means nothing for pixels.
            kept = ("type", "to_float32", "color_type", "imdecode_backend")
            for key in [key for key in steps[0] if key not in kept]:
                del steps[0][key]
            _refuse(steps, "pipeline")
            with isolated():
                return Compose(steps)
        except ArtefactError:
            raise
        except Exception as error:
            raise ArtefactError(f"config: the test pipeline cannot be built ({_told(error)}).") from error


def _test_steps(settings: Any) -> Any:
    """The steps of the test pipeline as MMDetection finds them; none in a config that tests on nothing."""
    from mmdet.utils import get_test_pipeline_cfg

    try:
        return get_test_pipeline_cfg(settings.copy())
    except (AttributeError, LookupError, RuntimeError, TypeError):
        return []


def _refuse(values: Any, part: Part) -> None:
    refused = refused_type(values, part)
    if refused:
        raise ArtefactError(f"config: {refused} Correct the config.")


def _told(error: BaseException) -> str:
    """An error in one line, with what caused it, which MMEngine leaves out."""
    reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"
    cause = error.__cause__ or error.__context__
    return f"{reason}; {_told(cause)}" if cause and str(cause) not in str(error) else reason


def _as_tensors(sample: Any) -> dict[str, torch.Tensor]:
    found = sample.get("pred_instances")
    if found is None or "bboxes" not in found:
        raise ArtefactError(
            f"MMDetection: got {', '.join(sample.keys()) or 'nothing'}, expected detections. "
            "Only configs of detection and instance segmentation are served."
        )
    tensors = {
        "boxes": found.bboxes.detach().float(),
        "scores": found.scores.detach().float(),
        "labels": found.labels.detach(),
    }
    if "masks" in found:
        tensors["masks"] = torch.as_tensor(found.masks).detach()
    return tensors


def _most(network: Any) -> int:
    """How many detections a model that takes the best of its queries can give; 0 for other models.

    Asked for more, torch's topk would fail.
    """
    parts = [getattr(network, name, None) for name in ("bbox_head", "panoptic_head", "rpn_head")]
    counts = [getattr(one, name, None) for one in (network, *parts) for name in ("num_queries", "num_proposals")]
    queries = next((count for count in counts if isinstance(count, int) and count > 0), 0)
    head = parts[0]
    if head is not None and not getattr(getattr(head, "loss_cls", None), "use_sigmoid", True):
        return queries  # DETR: the best class of each
    classes = (getattr(one, "num_classes", None) for one in (head, *_box_heads(network)))
    return queries * next((count for count in classes if isinstance(count, int)), 1)


def _box_heads(network: Any) -> list[Any]:
    heads = getattr(getattr(network, "roi_head", None), "bbox_head", None)
    return list(heads) if isinstance(heads, nn.ModuleList) else [heads]
