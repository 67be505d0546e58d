"""The cost of MMDetection's detectors, from a config alone: weights change nothing.

    config ─► model with random weights ─► forward in MMDetection's "tensor" mode, as its own get_flops counts it
                                           two stages: RPN with one proposal, heads × proposals, mask head × detections

The mode leaves post-processing out, and with it masks that are made there (RTMDet-Ins, SOLOv2, CondInst): told.
"""

import ast
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from dethandlers.errors import ArtefactError
from dethandlers.mmcv_operators import provide
from dethandlers.mmdet_model import build_network, quiet
from detserve.mmdet_config import ConfigError

from dettools.flops.cost import Cost, FlopsError
from dettools.flops.torch_count import TorchCount, count_call
from dettools.flops.torch_detector import InputSize, below, cost_of, difference

Size = tuple[int, int]
_MOST_PROPOSALS, _MOST_DETECTIONS = 1000, 100


class MmdetSubject:
    """A config of MMDetection.

    Args:
        config: flattened.
        name: for people.
        changes: ``--cfg-options``: dotted keys to values.
        max_proposals: instead of the config's.
        max_detections: instead of the config's.
        modules: folders where the modules that the config imports are looked for first.
        allow_code: those are imported; they run as code.

    Raises:
        DetserveError: MMDetection is not installed, or the config does not build.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        name: str,
        *,
        changes: Mapping[str, Any] | None = None,
        max_proposals: int | None = None,
        max_detections: int | None = None,
        modules: Sequence[Path] = (),
        allow_code: bool = False,
    ) -> None:
        self._config = changed(config, changes or {})
        self._limits = max_proposals, max_detections
        try:
            self._network = build_network(self._config, modules=modules, allow_code=allow_code)
        except ArtefactError as error:
            raise ConfigError(str(error)) from error
        # Parameters that are handed on as inputs (queries) would make the counter look for their gradients.
        self._network.requires_grad_(False)
        self.name = f"{name} ({self._config['model'].get('type')})"
        self._notes = tuple(_notes(self._network))

    def count(self, size: Size | None) -> Cost:
        """Count one image; ``(H, W)`` px after resizing, None takes the largest landscape image."""
        network, limits = self._network, self._limits
        wanted = input_size(self._config, size, _divisor(network))
        pixels = torch.rand((1, 3, *wanted.padded), generator=torch.Generator().manual_seed(0))
        try:
            with quiet(), _called(network):
                if not _has_stages(network):
                    # The plain forward of Sparse R-CNN matches its boxes to objects, which inference does not.
                    mode = "predict" if hasattr(network, "roi_head") else "tensor"
                    whole = count_call(network, pixels, [_sample(wanted)], mode)
                    cost = cost_of(network, wanted, whole, (), subject=self.name)
                else:
                    fixed, proposal, detection = _by_stage(network, pixels, wanted)
                    most = limits[0] or _setting(network, "rpn", _MOST_PROPOSALS)
                    found = limits[1] or _setting(network, "rcnn", _MOST_DETECTIONS)
                    items = ("proposal", proposal, most), ("detection", detection, found)
                    cost = cost_of(network, wanted, fixed, items, subject=self.name)
        except Exception as error:  # whatever a model fails with on an input that it was not made for
            reason = str(error).strip().partition("\n")[0][:200]
            raise FlopsError(
                f"{self.name}: the forward pass fails at {wanted.padded[0]}×{wanted.padded[1]} px "
                f"({type(error).__name__}: {reason}). Give another --shape."
            ) from error
        return replace(cost, notes=(*cost.notes, *self._notes))

    def size_of(self, original: Size) -> Size | None:
        """Return the ``(H, W)`` px to which the test pipeline resizes an image of that size."""
        return resized(self._config, original)


def changed(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with values replaced, as MMEngine's ``--cfg-options`` does.

    Args:
        config: flattened.
        changes: outer key to value, or to ``{rest of the dotted key: value}``; numbers lead into lists.

    Raises:
        FlopsError: a key leads nowhere.
    """
    values = _copied(config)
    for outer, value in changes.items():
        inner = value.items() if isinstance(value, Mapping) else [("", value)]
        for rest, new in inner:
            _set(values, [outer, *(rest.split(".") if rest else [])], _plain(new))
    return dict(values)


def input_size(config: Mapping[str, Any], asked: Size | None, divisor: int) -> InputSize:
    """Return the network's input: what is asked, or the test pipeline's largest landscape image, with its padding.

    Args:
        config: flattened.
        asked: ``(H, W)`` px after resizing.
        divisor: of the padded sides, as the model's preprocessor has it.

    Raises:
        FlopsError: the pipeline does not say it, and nothing is asked.
    """
    size = asked
    if size is None:
        width, height = _scale(config)
        keeps = _step(config, "Resize").get("keep_ratio", False)
        size = (min(width, height), max(width, height)) if keeps else (height, width)
    pad = _step(config, "Pad")
    padded = size
    if pad.get("pad_to_square"):
        padded = (max(size), max(size))
    if pad.get("size") and asked is None:
        padded = (max(padded[0], int(pad["size"][1])), max(padded[1], int(pad["size"][0])))
    for by in (int(pad.get("size_divisor") or 1), divisor):
        padded = (-(-padded[0] // by) * by, -(-padded[1] // by) * by)
    note = "" if padded == size else f"padded from {size[0]}×{size[1]} px as the test pipeline and the model do"
    return InputSize(size, padded, note)


def resized(config: Mapping[str, Any], original: Size) -> Size:
    """Return the ``(H, W)`` px that an image of that size is resized to (mmcv's ``rescale_size``).

    Raises:
        FlopsError: the pipeline does not say it.
    """
    width, height = _scale(config)
    if not _step(config, "Resize").get("keep_ratio", False):
        return height, width
    factor = min(max(width, height) / max(original), min(width, height) / min(original))
    return int(original[0] * factor + 0.5), int(original[1] * factor + 0.5)


def _scale(config: Mapping[str, Any]) -> tuple[int, int]:
    """The test pipeline's ``(width, height)``, whichever is which when the ratio is kept."""
    scale = _step(config, "Resize").get("scale")
    if isinstance(scale, int):
        return scale, scale
    if isinstance(scale, list | tuple) and len(scale) == 2 and all(isinstance(side, int) for side in scale):
        return int(scale[0]), int(scale[1])
    raise FlopsError(
        f"config: got a test pipeline that resizes to {scale}, expected a width and a height. Give --shape HEIGHT "
        "WIDTH."
    )


def _step(config: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    """The test pipeline's step of that kind; empty when it has none."""
    loader = config.get("test_dataloader")
    dataset: Any = loader.get("dataset") if isinstance(loader, Mapping) else None
    while isinstance(dataset, Mapping) and "pipeline" not in dataset:
        inner = dataset.get("dataset") or dataset.get("datasets")
        dataset = inner[0] if isinstance(inner, Sequence) and inner else inner
    steps = dataset["pipeline"] if isinstance(dataset, Mapping) else config.get("test_pipeline") or []
    found = (step for step in steps if isinstance(step, Mapping) and str(step.get("type", "")).endswith(kind))
    return next(found, {})


def _divisor(network: Any) -> int:
    return int(getattr(network.data_preprocessor, "pad_size_divisor", 1) or 1)


def _sample(size: InputSize) -> Any:
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    meta = {
        "img_shape": size.resized,
        "ori_shape": size.resized,
        "pad_shape": size.padded,
        "batch_input_shape": size.padded,
        "scale_factor": (1.0, 1.0),
    }
    # Sparse R-CNN asks for objects though it trains on none here.
    nothing = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))
    return DetDataSample(metainfo=meta, gt_instances=nothing)


def _has_stages(network: Any) -> bool:
    """Whether heads run on as many proposals as the image gives; Sparse R-CNN's number is fixed."""
    rpn = getattr(network, "rpn_head", None)
    return rpn is not None and hasattr(network, "roi_head") and not hasattr(rpn, "num_proposals")


def _by_stage(network: Any, pixels: torch.Tensor, size: InputSize) -> tuple[TorchCount, TorchCount, TorchCount]:
    """Return the network without any proposal, one proposal's share, and one detection's (its mask)."""
    heads = network.roi_head
    seen: list[tuple[Any, ...]] = []
    handle = heads.register_forward_pre_hook(lambda _heads, inputs: seen.append(inputs))
    try:
        with _one_proposal(network.rpn_head, pixels), _no_masks(heads):
            whole = count_call(network, pixels, [_sample(size)])
    finally:
        handle.remove()
    features = seen[0][0]

    def alone(count: int) -> TorchCount:
        return below("roi_head", count_call(heads, features, [_proposals(count, pixels)], [_sample(size)]))

    with _no_masks(heads):
        proposal = difference(alone(2), alone(1))
    both = difference(alone(2), alone(1))
    return difference(whole, proposal), proposal, difference(both, proposal)


@contextmanager
def _called(network: Any) -> Iterator[None]:
    """Turn direct calls of a part's ``forward``, as MMDetection does them, into calls that hooks and counters see."""
    parts = [part for part in network.children() if "forward" not in vars(part)]
    for part in parts:
        part.forward = _Called(part)
    try:
        yield
    finally:
        for part in parts:
            del part.forward


class _Called:
    def __init__(self, part: Any) -> None:
        self._part, self._forward, self._inside = part, part.forward, False

    def __call__(self, *args: Any, **options: Any) -> Any:
        if self._inside:
            return self._forward(*args, **options)
        self._inside = True
        try:
            return self._part(*args, **options)
        finally:
            self._inside = False


@contextmanager
def _one_proposal(rpn: Any, like: torch.Tensor) -> Iterator[None]:
    """Let the RPN work as ever, and go on with one proposal."""
    predict = rpn.predict

    def chosen(*args: Any, **options: Any) -> list[Any]:
        predict(*args, **options)
        return [_proposals(1, like)]

    rpn.predict = chosen
    try:
        yield
    finally:
        del rpn.predict


@contextmanager
def _no_masks(heads: Any) -> Iterator[None]:
    mask = getattr(heads, "mask_head", None)
    if mask is None:
        yield
        return
    heads.mask_head = None
    try:
        yield
    finally:
        heads.mask_head = mask


def _proposals(count: int, like: torch.Tensor) -> Any:
    from mmengine.structures import InstanceData

    boxes = like.new_tensor([[0.0, 0.0, 16.0, 16.0]]).expand(count, 4).contiguous()
    return InstanceData(bboxes=boxes, scores=like.new_ones(count), labels=like.new_zeros(count, dtype=torch.int64))


def _setting(network: Any, stage: str, fallback: int) -> int:
    settings = (getattr(network, "test_cfg", None) or {}).get(stage) or {}
    return int(settings.get("max_per_img") or fallback)


def _notes(network: Any) -> Iterator[str]:
    yield "weights are random: they do not change the cost"
    if provide().compiled:
        yield "mmcv's compiled operators are installed, which the counter cannot see into: their cost is not in it"
    names = {type(module).__name__ for module in network.modules()}
    if hasattr(network, "mask_head") or any("Ins" in name for name in names):
        yield "masks that are made in post-processing are not in it"
    if hasattr(getattr(network, "roi_head", None), "grid_head"):
        yield "the grid head runs for detections alone, but stands in the cost of a proposal"
    if "MultiScaleDeformableAttention" in names:
        yield "deformable attention: its samples are counted; weighing them is listed as arithmetic"


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copied(inner) for key, inner in value.items()}
    return type(value)(_copied(inner) for inner in value) if isinstance(value, list | tuple) else value


def _set(values: Any, path: Sequence[str], new: Any) -> None:
    place = values
    for depth, key in enumerate(path):
        at: Any = int(key) if isinstance(place, list) and key.lstrip("-").isdigit() else key
        last = depth == len(path) - 1
        if not isinstance(place, dict | list) or (isinstance(place, list) and not _is_place(at, place)):
            where = ".".join(path[:depth])
            raise FlopsError(f"--cfg-options {'.'.join(path)}: got {where}, which has no {key!r}. Correct the key.")
        if last:
            place[at] = new
        else:
            if isinstance(place, dict):
                place.setdefault(at, {})
            # A tuple cannot be changed in its place.
            place[at] = list(place[at]) if isinstance(place[at], tuple) else place[at]
            place = place[at]


def _is_place(at: Any, rows: list[Any]) -> bool:
    return isinstance(at, int) and -len(rows) <= at < len(rows)


def _plain(value: Any) -> Any:
    """Read what YAML takes for text as MMEngine does: ``(1333,800)``, ``1e-3``, ``a,b``."""
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, RecursionError):
        return [_plain(part.strip()) for part in value.split(",")] if "," in value else value
