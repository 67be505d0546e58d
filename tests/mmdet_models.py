"""MMDetection's own configs with random weights whose answers are worth comparing, as the files that a training leaves.

    packaged config ─► flattened, small test scale ─► CONFIG.py
    random weights ─► norms take their statistics from images ─► last layers spread ─► CHECKPOINT.pth, a threshold

As in `random_detectors`: freshly initialised, a detector gives every place nearly the same score and box.
"""

import importlib.util
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from dethandlers.families import Limits
from dethandlers.mmdet_model import Cuts, MmdetModel
from detserve.mmdet_config import read_config
from PIL import Image
from random_detectors import random_images
from torch import nn

CONFIGS = {
    "faster_rcnn": "faster_rcnn/faster-rcnn_r18_fpn_8xb8-amp-lsj-200e_coco.py",
    "mask_rcnn": "mask_rcnn/mask-rcnn_r18_fpn_8xb8-amp-lsj-200e_coco.py",
    "cascade_rcnn": "cascade_rcnn/cascade-rcnn_r18_fpn_8xb8-amp-lsj-200e_coco.py",
    "retinanet": "retinanet/retinanet_r18_fpn_1x_coco.py",
    "fcos": "fcos/fcos_r18_fpn_gn-head-center-normbbox-centeronreg-giou_8xb8-amp-lsj-200e_coco.py",
    "atss": "atss/atss_r18_fpn_8xb8-amp-lsj-200e_coco.py",
    "yolov3": "yolo/yolov3_mobilenetv2_8xb24-320-300e_coco.py",
    "yolox": "yolox/yolox_nano_8xb8-300e_coco.py",
    "ssd": "ssd/ssd300_coco.py",
    "rtmdet": "rtmdet/rtmdet_tiny_8xb32-300e_coco.py",
    "rtmdet_ins": "rtmdet/rtmdet-ins_tiny_8xb32-300e_coco.py",
    "detr": "detr/detr_r18_8xb2-500e_coco.py",
    "deformable_detr": "deformable_detr/deformable-detr_r50_16xb2-50e_coco.py",
    "dino": "dino/dino-4scale_r50_8xb2-12e_coco.py",
    "tood": "tood/tood_r50_fpn_1x_coco.py",
    "vfnet": "vfnet/vfnet_r50_fpn_1x_coco.py",
    "gfl": "gfl/gfl_r50_fpn_1x_coco.py",
}
SIZE = (224, 224)
NAMES = tuple(f"thing {number}" for number in range(80))
MAX_DETECTIONS = 1000
MOST = 900
"""No image has as many detections above the model's threshold."""
IMAGES = [*random_images(3)[:5], *random_images(4)[:3]]
"""Of five sizes: three share theirs with another one, so that every model sees them in one forward pass."""

needs_mmdet = pytest.mark.skipif(
    importlib.util.find_spec("mmdet") is None, reason="MMDetection is not installed (the extra detserve[mmdet])"
)
# MMDetection's imports and constructors warn of their own past.
mmdet_warnings = [
    pytest.mark.filterwarnings(
        "ignore::ImportWarning", "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"
    ),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword"),
]

_KEPT = -1000.0
# (its name ends with this, wanted spread of each channel of its output, wanted mean; _KEPT: as it is)
_LAYERS: list[tuple[str, float, float]] = [
    (r"rpn_cls", 1.0, 0.0),
    (r"rpn_reg", 0.2, 0.0),
    (r"fc_cls", 1.0, 0.0),
    (r"roi_head\.bbox_head(\.\d)?\.fc_reg", 0.5, 0.0),
    (r"bbox_head\.fc_reg", 1.0, 0.0),
    (r"mask_head\.conv_logits", 2.0, 0.0),
    (r"retina_cls", 0.8, -2.0),
    (r"(atss|gfl|vfnet|tood|conv)_cls|rtm_cls\.\d|multi_level_conv_cls\.\d", 1.5, -3.0),
    (r"(conv|atss)_centerness|multi_level_conv_obj\.\d|rtm_obj\.\d|cls_prob_module\.2", 1.0, 0.0),
    (r"(retina|atss)_reg", 0.3, 0.0),
    (r"gfl_reg", 2.0, 0.0),
    (r"multi_level_conv_reg\.\d", 0.4, 0.5),
    (r"bbox_head\.conv_reg|rtm_reg\.\d", 0.7, 2.0),
    (r"vfnet_reg", 0.4, -0.7),
    (r"vfnet_reg_refine", 0.2, 0.0),
    (r"tood_reg", 0.4, 0.7),
    (r"reg_offset_module\.2", 0.5, 0.0),
    (r"convs_pred\.\d", 1.0, 0.0),
    (r"cls_convs\.\d\.0", 2.0, 0.0),  # SSD's alone: elsewhere these are modules of mmcv
    (r"reg_convs\.\d\.0", 0.4, 0.0),
    (r"rtm_kernel\.\d", 0.3, 0.0),
    (r"mask_head\.projection", 1.0, 0.0),
    (r"sampling_offsets", 1.0, _KEPT),
    (r"attention_weights", 1.0, _KEPT),
    (r"cls_branches\.\d", 1.5, -3.0),
    (r"reg_branches\.\d\.4", 0.5, 0.0),
]


@dataclass(frozen=True)
class RandomModel:
    """What MMDetection's training would leave, and a threshold that cuts between scores, not at one."""

    config: Path
    checkpoint: Path
    score_threshold: float


def packaged(name: str, size: tuple[int, int] = SIZE) -> dict:
    """A config of MMDetection's own by its path, flattened, its test scale made small; SSD300 knows one size."""
    folder = Path(importlib.util.find_spec("mmdet").submodule_search_locations[0])
    values = read_config(folder / ".mim" / "configs" / name).values
    if "ssd300" in name:
        return values
    for step in values["test_dataloader"]["dataset"]["pipeline"]:
        if step["type"] == "Resize":
            step["scale"] = size
        if step["type"] == "Pad" and "size" in step:
            step["size"] = size
    return values


def random_model(
    name: str,
    folder: Path,
    *,
    size: tuple[int, int] = SIZE,
    change: Callable[[dict], None] = lambda _: None,
    images: Sequence[bytes] = IMAGES,
) -> RandomModel:
    """Write NAME.py and NAME.pth for one of CONFIGS: at least 22 detections in each image, no two of equal score.

    Args:
        name: a key of CONFIGS.
        folder: where the files go.
        size: ``(w, h)`` of the test pipeline, px.
        change: what else shall differ in the config's values.
        images: what it shall find something in.
    """
    values = packaged(CONFIGS[name], size)
    proposals = values["model"].get("test_cfg", {}).get("rpn")
    if proposals:
        proposals.update(nms_pre=300, max_per_img=150)
    if name == "dino":
        values["model"]["num_queries"] = (
            300  # it takes the best of its places, of which a small image has fewer than 900
        )
    change(values)
    problem = ""
    for seed in range(7, 12):
        state, threshold, problem = _spread_model(values, seed, images)
        if not problem:
            return write_files(values, state, folder, name, threshold)
    raise AssertionError(f"{name}: {problem}")


def write_files(
    values: dict, state: dict, folder: Path, name: str, score_threshold: float = 0.3, names: Sequence[str] = NAMES
) -> RandomModel:
    """Write a config and a checkpoint as MMDetection's training leaves them."""
    config, checkpoint = folder / f"{name}.py", folder / f"{name}.pth"
    config.write_text("".join(f"{key} = {value!r}\n" for key, value in values.items()), "utf-8")
    meta = {"dataset_meta": {"classes": tuple(names)}, "epoch": 12, "iter": 1000}
    torch.save({"meta": meta, "state_dict": state}, checkpoint)
    return RandomModel(config, checkpoint, score_threshold)


def untrained(values: dict, seed: int = 3) -> MmdetModel:
    """A config's model as torch initialises it, without a look at what the model puts out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        return MmdetModel(values)


def _spread_model(values: dict, seed: int, images: Sequence[bytes]) -> tuple[dict, float, str]:
    model = untrained(values, seed)
    network = model.network
    for convolution in (module for module in network.modules() if isinstance(module, nn.Conv2d)):
        # As torch initialises them, what they put out shrinks from layer to layer where no norm follows.
        nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
        if convolution.bias is not None:
            nn.init.zeros_(convolution.bias)
    for name, weights in network.named_parameters():
        if name.endswith("cross_attn.attn.in_proj_weight"):
            # DETR's queries look at the whole image evenly, and see all the same, until training sharpens them.
            weights.data.mul_(4)
    prepared = [model.prepared(_bgr(image)) for image in images]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Cuts(network).set(0.3, 5)
        _calibrate_norms(network, prepared)
        _spread(network, prepared)
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    return state, *_cut(model, prepared)


def _bgr(image: bytes) -> np.ndarray:
    return np.array(Image.open(BytesIO(image)))[..., ::-1].copy()


def _predict(network: nn.Module, prepared: list) -> None:
    """One forward pass of images padded to the largest."""
    height, width = (max(pixels.shape[axis] for pixels, _ in prepared) for axis in (1, 2))
    batch = torch.zeros(len(prepared), 3, height, width)
    for place, (pixels, _) in enumerate(prepared):
        batch[place, :, : pixels.shape[1], : pixels.shape[2]] = pixels
    samples = [sample.clone() for _, sample in prepared]
    for sample in samples:
        sample.set_metainfo({"batch_input_shape": (height, width)})
    network.predict(batch, samples, rescale=True)


def _calibrate_norms(network: nn.Module, prepared: list) -> None:
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        # Where half of the units are off, each layer enlarges the rounding of the one before it, unlike after training.
        nn.init.ones_(norm.bias)
        norm.momentum = None
        norm.train()
    _predict(network, prepared)
    for norm in norms:
        norm.eval()


def _spread(network: nn.Module, prepared: list) -> None:
    """Rescale each of the layers when it is called, so that those behind it see what it will put out."""
    handles = []
    for name, layer in network.named_modules():
        found = next((one for one in _LAYERS if re.search(rf"(^|\.)({one[0]})$", name)), None)
        if found and isinstance(layer, nn.Conv2d | nn.Linear):
            handles.append(layer.register_forward_hook(_rescaling(*found[1:], always="branches" in name)))
    assert handles
    _predict(network, prepared)
    for handle in handles:
        handle.remove()


def _rescaling(spread: float, mean: float, *, always: bool) -> Callable[..., torch.Tensor | None]:
    """A hook that brings a layer's output to the wanted statistics: the first time, when it serves several levels.

    With ``always``, each time: DETR's decoders share it, and the last one's output counts.
    """
    done = False

    def hook(layer: nn.Conv2d | nn.Linear, inputs: tuple, output: torch.Tensor) -> torch.Tensor | None:
        nonlocal done
        if done and not always:
            # A level with more spread than the first would give all detections.
            layer.weight.mul_((spread / _channels(layer, output).std(dim=0).mean()).clamp(max=1.0))
            return None
        done = True
        nn.init.normal_(layer.weight)
        if layer.bias is not None and mean != _KEPT:
            layer.bias.zero_()
        output = layer.forward(*inputs)
        values = _channels(layer, output)
        scale = spread / values.std(dim=0).clamp(min=1e-9)
        layer.weight.mul_(scale.view(-1, *[1] * (layer.weight.ndim - 1)))
        if layer.bias is not None and mean != _KEPT:
            layer.bias.copy_(mean - values.mean(dim=0) * scale)
        return layer.forward(*inputs)

    return hook


def _channels(layer: nn.Conv2d | nn.Linear, output: torch.Tensor) -> torch.Tensor:
    """A layer's output as ``(n, channels)``."""
    if isinstance(layer, nn.Conv2d):
        return output.transpose(0, 1).flatten(1).T
    # DETR's last layers get all of its decoders' outputs at once.
    return (output[-1] if output.ndim == 4 else output).flatten(0, -2)


def _cut(model: MmdetModel, prepared: list) -> tuple[float, str]:
    """A threshold that leaves at least 22 detections in every image, in the widest gap between two scores there.

    With it, what makes this model unfit; empty when nothing does.
    """
    roi_head = getattr(model.network, "roi_head", None)
    mask_head = getattr(roi_head, "mask_head", None)
    if mask_head is not None:
        roi_head.mask_head = None  # masks cost most and change no score
    with torch.inference_mode():
        found = [model.predict(pixels[None], [sample], Limits(0.02, MOST))[0] for pixels, sample in prepared]
    if mask_head is not None:
        roi_head.mask_head = mask_head
    scores = [one["scores"].sort(descending=True).values for one in found]
    if min(len(one) for one in scores) < 23:
        return 0.0, f"too few detections: {[len(one) for one in scores]}"
    wanted = min(float(one[22]) for one in scores)
    every = torch.cat(scores).sort().values
    below = every[every <= wanted][-20:]
    if len(below) < 2:
        return 0.0, f"no gap between two scores at or below {wanted:.3f}: nothing to cut in"
    place = int((below[1:] - below[:-1]).argmax())
    threshold = float((below[place] + below[place + 1]) / 2)
    if max(int((one >= threshold).sum()) for one in scores) == MOST:
        return threshold, f"more than {MOST} detections in an image"
    ties = sum(len(kept) - len(kept.unique()) for one in scores if len(kept := one[one >= threshold]))
    return threshold, f"{ties} equal scores" if ties else ""
