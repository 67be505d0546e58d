"""Which classes a config of MMDetection may have built, and what of it inference needs.

MMEngine takes any importable name for a ``type`` and calls it, mmcv evaluates the ``type`` of an NMS, and some of the
registered classes themselves evaluate, fetch or unpickle what their config says. Allowed is what inference needs:
registered networks, their prior generators, coders, assigners and samplers, and transforms.
"""

import sys
from collections.abc import Iterator, Mapping
from typing import Any, Literal

Part = Literal["model", "pipeline"]
_FOR_TRAINING = ("train_cfg", "init_cfg", "pretrained")
_NMS = {"nms", "soft_nms", "nms_match", "nms_rotated", "nms_quadri"}
# Of AdaptiveConv's `adapt_cfg` and of FPG's transitions: compared, never looked up.
_WORDS = {"dilation", "offset", "conv", "interpolation_conv", "last_conv"}
_FRAMEWORKS = {"mmdet", "mmcv", "mmengine", "mmpretrain", "mmcls", "torch"}
# Packages of registries, which MMEngine imports when they are named.
_SCOPES = {"mmdet", "mmcv", "mmengine", "mmpretrain", "mmcls"}
_TASK_UTILS = "mmdet.models.task_modules."
_TRACKING = ("mmdet.models.task_modules.tracking.", "mmdet.models.trackers.", "mmdet.models.mot.", "mmdet.models.reid.")
_TRANSFORMS = ("mmcv.transforms.", "mmdet.datasets.transforms.")
_REFUSED = {
    "mmdet.models.detectors.kd_one_stage": "runs its teacher's config and unpickles its teacher's checkpoint",
    "mmdet.models.detectors.lad": "runs its teacher's config and unpickles its teacher's checkpoint",
    "mmdet.models.language_models.bert": "fetches a language model",
    "mmdet.models.detectors.d2_wrapper": "builds a model of another framework, whose config is not checked",
    "mmdet.models.dense_heads.atss_vlfusion_head": "fetches a language model's config",
    "mmdet.datasets.transforms.text_transformers": "fetches a tokenizer and reads files",
    "mmdet.datasets.transforms.instaboost": "only augments training's images",
}
_REFUSED_NAMES = {"Albu": "calls whatever name of another package it is given"}


def for_inference(values: Any) -> Any:
    """Return a copy of a model's config without what only training needs.

    That is assigners' and samplers' settings (``train_cfg``), and weights to start from (``init_cfg``, ``pretrained``),
    which would be fetched and which the checkpoint replaces.
    """
    if isinstance(values, Mapping):
        return {key: None if key in _FOR_TRAINING and inner else for_inference(inner) for key, inner in values.items()}
    if isinstance(values, list | tuple):
        return type(values)(for_inference(inner) for inner in values)
    return values


def refused_type(values: Any, part: Part) -> str:
    """Return the first ``type`` that must not be built, as a sentence that says why; empty without one.

    MMDetection's modules and the user's own have to be imported already: only what is registered is known.

    Args:
        values: the model's config, or the list of the test pipeline's steps.
        part: which of the two; each has its own registries.
    """
    for place, key, kind in _types(values, part):
        reason = _scope_refusal(kind) if key == "_scope_" else _refusal(kind, part)
        if reason:
            return f"{place}: got {key} {kind!r}, {reason}."
    return ""


def known_scopes() -> set[str]:
    """Return the scopes in which models are registered so far."""
    from mmengine.registry import MODELS

    return {str(registry.scope) for registry in _tree(MODELS)}


def _types(value: Any, place: str) -> Iterator[tuple[str, str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key in ("type", "_scope_"):
                yield f"{place}.{key}", key, inner
            else:
                yield from _types(inner, f"{place}.{key}")
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from _types(inner, f"{place}[{number}]")


def _scope_refusal(scope: Any) -> str:
    if scope is None or (isinstance(scope, str) and scope in _SCOPES | known_scopes()):
        return ""
    return "which MMEngine would import; expected the scope of a registry"


def _refusal(kind: Any, part: Part) -> str:
    if not isinstance(kind, str) or not all(one.isidentifier() for one in kind.split(".")):
        return "which MMEngine would call as code; expected the name of a registered class"
    if part == "model" and kind in _NMS | _WORDS:
        return ""
    found = _registered(kind, part) or _named_in_full(kind, part) or _operator(kind, part)
    if not found:
        return "which is in none of MMDetection's registries for it; expected the name of a registered class"
    return next((reason for one in found if (reason := _class_refusal(one, part))), "")


def _class_refusal(kind: Any, part: Part) -> str:
    from torch import nn

    module = str(getattr(kind, "__module__", ""))
    name = str(getattr(kind, "__name__", ""))
    if module.partition(".")[0] not in _FRAMEWORKS:
        return ""  # the user's own, imported because the caller allows its code
    told = _REFUSED.get(module, "" if module.partition(".")[0] == "torch" else _REFUSED_NAMES.get(name, ""))
    if told:
        return f"which {told}; it is not served"
    if module.startswith(_TRACKING):
        return "which is for tracking; only detectors are served"
    if part == "pipeline":
        allowed = module.startswith(_TRANSFORMS)
    elif isinstance(kind, type) and issubclass(kind, nn.Module):
        allowed = not module.startswith("torch.") or module.startswith("torch.nn.modules.")
    else:
        allowed = module.startswith(_TASK_UTILS)
    return "" if allowed else "which inference does not need; expected a network's part, a box coder or a transform"


def _registered(kind: str, part: Part) -> list[Any]:
    """What MMEngine may find under a name, or under ``scope.Name``."""
    scope, _, name = kind.rpartition(".")
    return [
        registry.module_dict[name]
        for root in _roots(part)
        for registry in _tree(root)
        if scope in ("", registry.scope) and name in registry.module_dict
    ]


def _named_in_full(kind: str, part: Part) -> list[Any]:
    """The class of a dotted name, if it is registered or one of torch's layers; nothing is imported for it."""
    from mmengine.utils import get_object_from_string

    if kind.rpartition(".")[0] not in sys.modules:
        return []
    found = get_object_from_string(kind)
    registered = any(found is one for root in _roots(part) for tree in _tree(root) for one in tree.module_dict.values())
    layer = part == "model" and isinstance(found, type) and found.__module__.startswith("torch.nn.modules.")
    return [found] if registered or layer else []


def _operator(kind: str, part: Part) -> list[Any]:
    """Layers of mmcv that RoI extractors take by their names."""
    from torch import nn

    found = getattr(sys.modules.get("mmcv.ops"), kind, None)
    return [found] if part == "model" and isinstance(found, type) and issubclass(found, nn.Module) else []


def _roots(part: Part) -> tuple[Any, ...]:
    from mmengine.registry import MODELS, TASK_UTILS, TRANSFORMS

    return (TRANSFORMS,) if part == "pipeline" else (MODELS, TASK_UTILS)


def _tree(registry: Any) -> Iterator[Any]:
    yield registry
    for child in registry.children.values():
        yield from _tree(child)
