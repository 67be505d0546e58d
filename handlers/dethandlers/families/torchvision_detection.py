"""Every builder of torchvision.models.detection, served without torchvision's own transform.

    image ─► resize, normalise, pad (ours) ─► backbone, heads, NMS (torchvision) ─► boxes and masks back (ours)

torchvision pads a batch to its largest image, so an image's detections depend on its neighbours. Here the transform is
replaced: every image is resized and padded as if it were alone, and only images of one padded shape share a forward
pass.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from torch import nn
from torchvision.models import detection as detection_models
from torchvision.models import get_model, get_model_builder, list_models
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FrozenBatchNorm2d

from dethandlers.detections import Detections
from dethandlers.errors import ArtefactError
from dethandlers.exported_detections import detections_of
from dethandlers.families import Batch, Limits
from dethandlers.options import MAX_DETECTIONS_LIMIT
from dethandlers.postprocess import encode_masks, scale_boxes
from dethandlers.preprocess import Prepared, normalise, pad_to_multiple, resize, shorter_side_size
from dethandlers.spec import Preprocessing, Spec

# Arguments of the builders that the request's options set.
REQUEST_ARGUMENTS = ("box_score_thresh", "score_thresh", "box_detections_per_img", "detections_per_img")

_Known = Callable[[npt.NDArray[np.int64]], npt.NDArray[np.bool_]]


def builders() -> list[str]:
    """Return the names of torchvision's detection builders."""
    return sorted(list_models(module=detection_models))


def build_module(spec: Spec, state: Mapping[str, torch.Tensor]) -> nn.Module:
    """Build torchvision's model and load its weights, all of them.

    A builder called without pretrained weights makes ordinary batch norms, while a model that was fine-tuned from
    pretrained ones has frozen batch norms, which keep no ``num_batches_tracked``. Those are put back, with the spec's
    ``norm_eps``.

    Args:
        spec: builder, options, number of classes.
        state: the state dict; half precision is widened to the model's float32.

    Raises:
        ArtefactError: unknown builder or option, or weights that do not fit.
    """
    if spec.builder not in builders():
        raise ArtefactError(
            f"builder: got {spec.builder!r}, expected one of torchvision's: {', '.join(builders())}. Correct the spec."
        )
    forbidden = [name for name in REQUEST_ARGUMENTS if name in spec.builder_options]
    if forbidden:
        raise ArtefactError(
            f"builder_options: got {forbidden[0]!r}, which every request sets. "
            "Use serving.score_threshold and serving.max_detections instead."
        )
    if spec.num_classes is None:
        raise ArtefactError("num_classes: got none, expected the builder's number of classes. Rebuild the archive.")
    try:
        module: nn.Module = get_model(
            spec.builder, weights=None, weights_backbone=None, num_classes=spec.num_classes, **spec.builder_options
        )
    except (TypeError, ValueError) as error:
        raise ArtefactError(
            f"builder {spec.builder} does not take builder_options {spec.builder_options}: {error}. Correct the spec."
        ) from error
    unknown = sorted(spec.builder_options.keys() - _arguments(spec.builder, module))
    if unknown:
        raise ArtefactError(
            f"builder_options: got {unknown[0]!r}, expected one of "
            f"{', '.join(sorted(_arguments(spec.builder, module)))}. "
            "Correct the spec."
        )
    _restore_frozen_norms(module, state, spec.norm_eps)
    misfit = describe_misfit(module.state_dict(), state)
    if misfit:
        raise ArtefactError(f"weights do not fit {spec.builder} with {spec.num_classes} classes: {misfit}")
    module.load_state_dict(state)
    return module.eval()


def transform_settings(module: nn.Module) -> Preprocessing:
    """Return what a model's own transform does, in the spec's words."""
    transform: Any = module.transform
    size = transform.fixed_size
    return Preprocessing(
        resize="shorter_side" if size is None else "stretch",
        size=Preprocessing.size if size is None else (int(size[1]), int(size[0])),
        shorter_side=int(transform.min_size[-1]),
        longer_side=int(transform.max_size),
        divisor=int(transform.size_divisible),
        channel_order="rgb",
        pad_value=0.0,
        scale=1 / 255,
        mean=tuple(float(value) for value in transform.image_mean),  # type: ignore[arg-type]
        std=tuple(float(value) for value in transform.image_std),  # type: ignore[arg-type]
    )


def _arguments(builder: str, module: nn.Module) -> set[str]:
    """Return what a builder and its model take by name: torchvision's models swallow any other keyword in silence."""
    makers: list[Any] = [get_model_builder(builder), *type(module).__mro__[:-1]]
    parameters = [parameter for maker in makers for parameter in inspect.signature(maker).parameters.values()]
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    names = {parameter.name for parameter in parameters if parameter.kind in by_name}
    made = {"weights", "weights_backbone", "num_classes", "backbone", "rpn", "roi_heads", "transform"}
    return names - made - set(REQUEST_ARGUMENTS)


def describe_misfit(expected: Mapping[str, torch.Tensor], got: Mapping[str, torch.Tensor]) -> str:
    """Return what keeps a state dict from fitting, with the first names and shapes; empty when it fits."""
    shapes = [
        f"{name} is {tuple(got[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in got and got[name].shape != tensor.shape
    ]
    missing = [name for name in expected if name not in got]
    unexpected = [name for name in got if name not in expected]
    parts = []
    for title, names in (("wrong shape", shapes), ("missing", missing), ("not of this model", unexpected)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            parts.append(f"{title}: {'; '.join(names[:3])}{more}")
    return " | ".join(parts)


class TorchvisionFamily:
    """Faster R-CNN, Mask R-CNN, Keypoint R-CNN, RetinaNet, FCOS, SSD, SSDlite; by torch, or as exported to ONNX."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.capabilities = frozenset(
            name for name, word in (("masks", "maskrcnn"), ("keypoints", "keypointrcnn")) if word in spec.builder
        )
        lookup = np.full(max(category.model_label for category in spec.categories) + 2, -1, dtype=np.int64)
        for label, category in enumerate(spec.categories):
            lookup[category.model_label] = label
        self._label_of_model_label = lookup
        self.drops_classes = bool(_unknown_labels(spec))
        self._settings = spec.preprocessing

    def build(self, weights: Path) -> nn.Module:
        """Build the model from the archive's safetensors; its transform's settings are kept and taken over."""
        module = build_module(self.spec, load_file(weights))
        self._settings = transform_settings(module)
        return _Core(module, self._known if self.drops_classes else None)

    def prepare(self, image: torch.Tensor) -> Prepared:
        """Normalise, resize and pad one image as torchvision does for that image alone."""
        settings = self._settings
        original = (int(image.shape[-2]), int(image.shape[-1]))
        size = (
            settings.size
            if settings.resize == "stretch"
            else shorter_side_size(original, settings.shorter_side, settings.longer_side)
        )
        if self.spec.runtime == "onnx" and size[0] * size[1] < original[0] * original[1]:
            # Both are linear, and fewer pixels are to be normalised this way: a third of the time, 1e-7 beside it.
            pixels = normalise(resize(image.float(), size) / 255.0, settings.mean, settings.std)
        else:
            pixels = resize(normalise(image.float() / 255.0, settings.mean, settings.std), size)
        return Prepared(pad_to_multiple(pixels, settings.divisor), original, size)

    def decode(self, outputs: Any, prepared: Sequence[Prepared], limits: Limits) -> list[Detections]:
        """Scale boxes, masks and keypoints to the original images; drop what the category map does not know."""
        if self.spec.runtime == "onnx":
            decoding = self.spec.decoding
            wanted = replace(limits, max_detections=MAX_DETECTIONS_LIMIT) if self.drops_classes else limits
            outputs = [
                detections_of(output, nms=decoding.nms, nms_iou=decoding.nms_iou, limits=wanted) for output in outputs
            ]
        return [self._decode_one(output, source, limits) for output, source in zip(outputs, prepared, strict=True)]

    def _decode_one(self, output: dict[str, torch.Tensor], source: Prepared, limits: Limits) -> Detections:
        model_labels = output["labels"].cpu().numpy()
        known = np.flatnonzero(self._known(model_labels))[: limits.max_detections]
        labels = self._label_of_model_label[model_labels[known]]
        kept = torch.from_numpy(known)
        boxes = scale_boxes(output["boxes"], source.scale_xy).cpu()[kept]
        masks = None
        if limits.masks and "masks" in output:
            masks = encode_masks(output["masks"].cpu()[kept], boxes, source.original_size)
        keypoints = None
        if limits.keypoints and "keypoints" in output:
            keypoints = self._keypoints(output, source)[known]
        return Detections(
            boxes.numpy(),
            output["scores"].float().cpu().numpy()[known],
            labels,
            masks=masks,
            keypoints=keypoints,
        )

    def _known(self, model_labels: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Return which of the model's labels the category map knows."""
        places = np.minimum(model_labels, len(self._label_of_model_label) - 1)
        return np.asarray(self._label_of_model_label[places] >= 0)

    @staticmethod
    def _keypoints(output: dict[str, torch.Tensor], source: Prepared) -> Any:
        points = output["keypoints"].float().cpu().clone()
        points[..., 0] *= source.scale_xy[0]
        points[..., 1] *= source.scale_xy[1]
        points[..., 2] = output["keypoints_scores"].float().cpu()
        return points.numpy()


def _unknown_labels(spec: Spec) -> set[int]:
    """Return what the model may put out and the category map lacks; of the focal-loss models 0 is no background."""
    first = 0 if spec.builder.startswith(("retinanet", "fcos")) else 1
    return set(range(first, spec.num_classes or 0)) - {category.model_label for category in spec.categories}


# The parts whose outputs are decoded: `rpn.head`, `head`, and those of the RoI heads.
_TO_FLOAT32 = ("head", "box_predictor", "mask_predictor", "keypoint_predictor")


def _widened(_part: nn.Module, _inputs: Any, output: Any) -> Any:
    """Bring a head's output to float32: under autocast torchvision would decode boxes in half precision.

    There the coordinates of an image of 1024 px and more are multiples of 1 px (fp16) or 8 px (bf16).
    """
    if isinstance(output, torch.Tensor):
        return output.float()
    if isinstance(output, dict):
        return {name: _widened(_part, _inputs, value) for name, value in output.items()}
    return type(output)(_widened(_part, _inputs, value) for value in output)


def _with_float32_maps(_part: nn.Module, inputs: tuple[ImageList, list[torch.Tensor]]) -> Any:
    """Show the anchor generator feature maps of float32: it takes their sizes and, for its anchors, their type."""
    images, maps = inputs
    return images, [one.new_empty((1, 1, *one.shape[-2:]), dtype=torch.float32) for one in maps]


class _Core(nn.Module):
    """torchvision's model behind a transform that does nothing: the batch comes prepared and stays in its frame.

    Args:
        module: the model.
        known: tells which of the model's labels are wanted, where not all are. torchvision takes the best ``N`` of
            all; here they are the best of the wanted, so that an answer does not depend on how many its neighbours get.
    """

    def __init__(self, module: nn.Module, known: _Known | None = None) -> None:
        super().__init__()
        module.transform = _Identity()
        self.module = module
        heads: Any = getattr(module, "roi_heads", module)
        self._heads = heads
        self._every_class = known is None
        self._most = MAX_DETECTIONS_LIMIT
        if known is not None and hasattr(module, "roi_heads"):
            # Before its masks and keypoints: those of up to 1000 detections would cost ten times what 100 do.
            heads.postprocess_detections = self._choosing(heads.postprocess_detections, known)
        for name, part in module.named_modules():
            if name.rpartition(".")[2] in _TO_FLOAT32:
                part.register_forward_hook(_widened)
            elif name.rpartition(".")[2] == "anchor_generator":
                part.register_forward_pre_hook(_with_float32_maps)

    def _choosing(self, choose: Callable[..., Any], known: _Known) -> Callable[..., Any]:
        """Return what stands for `RoIHeads.postprocess_detections`: boxes, scores, labels of each image, best first."""

        def choose_known(*outputs: Any) -> Any:
            every = choose(*outputs)
            masks = [known(labels.cpu().numpy()) for labels in every[2]]
            places = [torch.from_numpy(np.flatnonzero(mask)[: self._most]) for mask in masks]
            return tuple([one[at.to(one.device)] for one, at in zip(values, places, strict=True)] for values in every)

        return choose_known

    def forward(self, batch: Batch) -> list[dict[str, torch.Tensor]]:
        """Return per image ``boxes`` xyxy in the prepared frame, ``scores``, ``labels`` and what else the model has."""
        # torchvision keeps score > threshold, compared in float32; the contract is score >= threshold.
        self._heads.score_thresh = float(np.nextafter(np.float32(batch.limits.score_threshold), np.float32(-1.0)))
        self._most = batch.limits.max_detections
        self._heads.detections_per_img = self._most if self._every_class else MAX_DETECTIONS_LIMIT
        self.module.transform.sizes = list(batch.sizes)  # type: ignore[union-attr]
        detections: list[dict[str, torch.Tensor]] = self.module(batch.pixels)
        return detections


class _Identity(nn.Module):
    """Stands where torchvision's GeneralizedRCNNTransform stood."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[int, int]] = []

    def forward(self, images: torch.Tensor, targets: None = None) -> tuple[ImageList, None]:
        return ImageList(images, self.sizes), targets

    def postprocess(self, result: list[dict[str, torch.Tensor]], *_sizes: object) -> list[dict[str, torch.Tensor]]:
        return result


def _restore_frozen_norms(module: nn.Module, state: Mapping[str, torch.Tensor], norm_eps: float | None) -> None:
    for name, norm in list(module.named_modules()):
        if not isinstance(norm, nn.BatchNorm2d) or f"{name}.num_batches_tracked" in state:
            continue
        parent, _, child = name.rpartition(".")
        frozen = FrozenBatchNorm2d(norm.num_features, eps=norm.eps if norm_eps is None else norm_eps)
        setattr(module.get_submodule(parent), child, frozen)
