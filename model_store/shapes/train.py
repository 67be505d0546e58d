"""Train the demo detector "shapes" from scratch on generated scenes, and measure it with a COCO evaluator.

    scenes, seeds 1000000… ─► 320 × 320 pixels in memory ─► SSDlite320, two image sizes ─► EMA weights
                                                                                              │
    scenes, seeds 1…200 ─► JPEG files + COCO annotations ─► eager model, float32 ◄── shapes.safetensors (float16)
                                                                │
                                                          training.json: AP, AP50

    python model_store/shapes/train.py --work-dir out/shapes

The committed weights reach AP 0.837, AP50 0.978 and AP75 0.939 on the 200 validation scenes, after 1250 steps and 33
minutes on two busy CPU cores; rendering the scenes takes 6 more. They come from three sittings joined by --resume, at
the epochs where the recipe's stages change. The recipe is that of the last sitting; the first two ran with a longer
schedule, whose learning rates differ from the recipe's by at most 10 %, and with an EMA decay of 0.998, of which
the last stage's 0.98 leaves less than 1 %. training.json lists the sittings. One run of the whole recipe is expected to
come out about the same; it was not tried.

The last line of stdout is JSON. With glibc, keeping large blocks instead of returning them to the system makes a step
up to 1.7 times as fast: MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_TOP_PAD_=268435456
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import math
import multiprocessing
import platform
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
import torchvision
from dettools.datasets.scenes import CATEGORIES, SceneParameters, render_scene, write_dataset
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou, generalized_box_iou_loss

HERE = Path(__file__).resolve().parent
SIDE = 320  # px, the input of SSDlite320
VALIDATION = {"seed": 1, "count": 200}


@dataclass(frozen=True)
class Stage:
    """Some epochs at one image size; small images first, for they teach the early layers at a quarter of the cost.

    The learning rate falls along half a cosine between `rates`. The first `frozen_blocks` blocks of the backbone, whose
    large activations cost most of a step, stay as they are.
    """

    side_px: int
    epochs: int
    batch_size: int
    rates: tuple[float, float]
    frozen_blocks: int = 0


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights."""

    image_count: int = 4000
    image_seed: int = 1_000_000
    torch_seed: int = 0
    stages: tuple[Stage, ...] = (
        Stage(160, epochs=3, batch_size=16, rates=(1.5e-3, 1.2e-3)),
        Stage(320, epochs=1, batch_size=16, rates=(1.2e-3, 9e-4), frozen_blocks=4),
        Stage(320, epochs=1, batch_size=16, rates=(9e-4, 1e-5), frozen_blocks=4),
    )
    weight_decay: float = 0.02
    warmup_steps: int = 150
    ema_decay: float = 0.98
    crop_chance: float = 0.5


def build_model() -> nn.Module:
    """The detector with fresh weights: label 0 is the background, 1–6 are the category ids of the scenes."""
    return torchvision.models.detection.ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=len(CATEGORIES) + 1
    )


# ---------------------------------------------------------------------------------------------------- training scenes


def render_example(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One scene as the model sees it, through JPEG and resized as torchvision's transform resizes.

    Returns:
        pixels (3, SIDE, SIDE) uint8, boxes (N, 4) float32 xyxy px of the resized image, labels (N,) int64 from 1.
    """
    torch.set_num_threads(1)
    scene = render_scene(seed, SceneParameters())
    file = io.BytesIO()
    scene.image.save(file, "JPEG", quality=scene.jpeg_quality)
    pixels = torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1)[None].float()
    resized = F.interpolate(pixels, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    scale = np.array([SIDE / scene.image.width, SIDE / scene.image.height] * 2, np.float32)
    return resized[0].round().byte().numpy(), scene.boxes_xyxy * scale, scene.labels + 1


@dataclass
class Examples:
    """Rendered scenes: pixels (M, 3, SIDE, SIDE) uint8, and per scene boxes (N, 4) float32 px and labels (N,) int64."""

    pixels: Tensor
    boxes: list[Tensor]
    labels: list[Tensor]


def render_examples(count: int, seed: int, processes: int = 2, cache: Path | None = None) -> Examples:
    """Render scenes `seed` … `seed + count - 1`; `cache` keeps them between runs."""
    if cache and cache.exists():
        return Examples(**torch.load(cache, weights_only=True))
    pixels = torch.empty((count, 3, SIDE, SIDE), dtype=torch.uint8)
    boxes, labels = [], []
    # spawn: a forked child of a process that has used torch's threads can hang
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for index, example in enumerate(pool.imap(render_example, range(seed, seed + count), chunksize=16)):
            pixels[index] = torch.from_numpy(example[0])
            boxes.append(torch.from_numpy(example[1]))
            labels.append(torch.from_numpy(example[2]))
            if (index + 1) % 500 == 0:
                print(f"rendered {index + 1} of {count} training scenes", file=sys.stderr, flush=True)
    examples = Examples(pixels, boxes, labels)
    if cache:
        torch.save(vars(examples), cache)
    return examples


def augment(
    pixels: Tensor, boxes: Tensor, side_px: int, crop_chance: float, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """A crop that cuts no object, one of the 8 symmetries of the square, other colors; resized to `side_px`.

    Args:
        pixels: (3, SIDE, SIDE) uint8.
        boxes: (N, 4) float32 xyxy px.

    Returns:
        pixels (3, side_px, side_px) float32 in 0–1 and boxes in px of the new image.
    """
    left, top, right, bottom = 0, 0, SIDE, SIDE
    if rng.random() < crop_chance:
        reach = 0.3 * SIDE
        left, top = (int(rng.uniform(0, min(reach, float(boxes[:, k].min())))) for k in (0, 1))
        right, bottom = (SIDE - int(rng.uniform(0, min(reach, SIDE - float(boxes[:, k].max())))) for k in (2, 3))
    image = pixels[:, top:bottom, left:right].float() / 255
    size = torch.tensor([right - left, bottom - top] * 2)
    boxes = (boxes - torch.tensor([left, top, left, top])) * side_px / size
    if image.shape[1:] != (side_px, side_px):
        image = F.interpolate(image[None], size=(side_px, side_px), mode="bilinear", antialias=side_px < SIDE)[0]
    if rng.random() < 0.5:
        image, boxes = image.transpose(1, 2), boxes[:, [1, 0, 3, 2]]
    left, top, right, bottom = boxes.unbind(dim=1)
    if rng.random() < 0.5:
        image, left, right = image.flip(2), side_px - right, side_px - left
    if rng.random() < 0.5:
        image, top, bottom = image.flip(1), side_px - bottom, side_px - top
    boxes = torch.stack([left, top, right, bottom], dim=1)
    if rng.random() < 0.5:
        image = image[torch.from_numpy(rng.permutation(3))]
    if rng.random() < 0.5:
        gain = torch.from_numpy(rng.uniform(0.75, 1.25, (3, 1, 1)).astype(np.float32))
        image = ((image - 0.5) * gain + 0.5 + float(rng.uniform(-0.12, 0.12))).clamp(0, 1)
    return image, boxes


# --------------------------------------------------------------------------------------------------------------- loss


def match(boxes: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
    """Assign anchors (A, 4) to objects (N, 4): those with IoU ≥ 0.5 and each object's best six.

    A fixed number of anchors per object lets small objects, which few default boxes fit, learn as fast as large ones.

    Returns:
        Object index per anchor (A,), -1 where there is none; and a mask (A,) of those too close to call background.
    """
    iou = box_iou(boxes, anchors)
    score = torch.where(iou >= 0.5, iou, 0.0)
    best, best_index = iou.topk(6, dim=1)
    score.scatter_(1, best_index, torch.where(best > 0.2, best, 0.0))
    value, owner = score.max(dim=0)
    owner[value == 0] = -1
    return owner, (owner < 0) & (iou.max(dim=0).values > 0.4)


def detection_loss(model: nn.Module, images: Tensor, boxes: list[Tensor], labels: list[Tensor]) -> Tensor:
    """Box loss (smooth L1 + GIoU) and classification loss with hard negatives, per assigned anchor.

    The class target is the quality of the predicted box (0.3 + 0.7 IoU), the rest background: scores then rank boxes
    by how well they fit, which is what AP over IoU 0.5–0.95 rewards.
    """
    features = list(model.backbone((images - 0.5) / 0.5).values())
    outputs = model.head(features)
    sizes = [tuple(images.shape[-2:])] * len(images)
    anchors = model.anchor_generator(ImageList(images, sizes), features)[0]
    log_odds = outputs["cls_logits"].log_softmax(dim=-1)
    total, positives = images.new_zeros(()), 0
    per_image = zip(outputs["bbox_regression"], log_odds, boxes, labels, strict=True)
    for deltas, logs, image_boxes, image_labels in per_image:
        owner, unclear = match(image_boxes, anchors)
        found = torch.where(owner >= 0)[0]
        targets, target_labels = image_boxes[owner[found]], image_labels[owner[found]]
        wanted = model.box_coder.encode_single(targets, anchors[found])
        predicted = model.box_coder.decode_single(deltas[found], anchors[found])
        box_loss = F.smooth_l1_loss(deltas[found], wanted, beta=0.5, reduction="sum")
        box_loss = box_loss + 2 * generalized_box_iou_loss(predicted, targets, reduction="sum")

        fit = torch.diagonal(box_iou(predicted.detach(), targets))
        quality = 0.3 + 0.7 * fit
        object_loss = -(quality * logs[found, target_labels] + (1 - quality) * logs[found, 0]).sum()
        background = -logs[:, 0][(owner < 0) & ~unclear]
        background_loss = background.topk(min(len(background), 3 * len(found))).values.sum()
        total = total + box_loss + object_loss + background_loss
        positives += len(found)
    return total / positives


# ----------------------------------------------------------------------------------------------------------- training


def learning_rates(recipe: Recipe, image_count: int) -> list[float]:
    """The rate of every step: a linear warm-up, then each stage's half cosine."""
    rates: list[float] = []
    for stage in recipe.stages:
        first, last = stage.rates
        steps = stage.epochs * (image_count // stage.batch_size)
        rates += [last + (first - last) * 0.5 * (1 + math.cos(math.pi * step / steps)) for step in range(steps)]
    return [rate * min(1.0, (step + 1) / recipe.warmup_steps) for step, rate in enumerate(rates)]


def freeze(model: nn.Module, blocks: int) -> None:
    """Keep the weights and the statistics of the first blocks of the backbone as they are."""
    for index, block in enumerate(model.backbone.features[0]):
        block.requires_grad_(index >= blocks)
        block.train(index >= blocks)


def update_ema(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the average towards the model; integer buffers are copied."""
    with torch.no_grad():
        for mean, value in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
            if mean.is_floating_point():
                mean.lerp_(value, 1 - decay)
            else:
                mean.copy_(value)


def train(
    examples: Examples, recipe: Recipe, checkpoint: Path | None = None, resume: bool = False
) -> tuple[nn.Module, list[float]]:
    """Run the recipe; return the averaged model and the loss of every step. Every epoch ends with a `checkpoint`."""
    torch.manual_seed(recipe.torch_seed)
    model = build_model().to(memory_format=torch.channels_last).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1  # the builder's 0.03 is meant for far longer runs
    average = copy.deepcopy(model).eval()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, fused=True)

    count = len(examples.boxes)
    epochs = [stage for stage in recipe.stages for _ in range(stage.epochs)]
    rates = learning_rates(recipe, count)
    step, first_epoch, losses, minutes = 0, 0, [], 0.0
    if resume and checkpoint and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step, first_epoch, losses = state["step"], state["epoch"], state["losses"]
        minutes = state["minutes"]

    started = time.monotonic() - 60 * minutes
    for epoch, stage in enumerate(epochs[first_epoch:], start=first_epoch):
        rng = np.random.default_rng((recipe.torch_seed, epoch))
        order = rng.permutation(count)
        freeze(model, stage.frozen_blocks)
        for first in range(0, count - stage.batch_size + 1, stage.batch_size):
            chosen = order[first : first + stage.batch_size]
            batch = [
                augment(examples.pixels[k], examples.boxes[k], stage.side_px, recipe.crop_chance, rng) for k in chosen
            ]
            images = torch.stack([image for image, _ in batch]).contiguous(memory_format=torch.channels_last)
            for group in optimizer.param_groups:
                group["lr"] = rates[step]
            loss = detection_loss(model, images, [boxes for _, boxes in batch], [examples.labels[k] for k in chosen])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            optimizer.step()
            step += 1
            update_ema(average, model, min(recipe.ema_decay, step / (step + 10)))
            losses.append(float(loss.detach()))
            if step % 50 == 0:
                print(
                    f"epoch {epoch + 1}/{len(epochs)} side {stage.side_px} step {step}/{len(rates)} "
                    f"loss {np.mean(losses[-50:]):.3f} {(time.monotonic() - started) / 60:.1f} min",
                    file=sys.stderr,
                    flush=True,
                )
        if checkpoint:
            state = {"model": model.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
            partial = checkpoint.with_suffix(".partial")
            minutes = (time.monotonic() - started) / 60
            torch.save({**state, "step": step, "epoch": epoch + 1, "losses": losses, "minutes": minutes}, partial)
            partial.replace(checkpoint)
    return average, losses


# --------------------------------------------------------------------------------------------- weights and measurement


def save_weights(model: nn.Module, path: Path) -> None:
    """Write the weights: floats as float16, integer buffers as they are."""
    state = {
        name: (value.half() if value.is_floating_point() else value).contiguous().clone()
        for name, value in model.state_dict().items()
    }
    save_file(state, path, metadata={"format": "pt"})


def load_model(path: Path) -> nn.Module:
    """A float32 model in eval mode with the weights of a file."""
    model = build_model()
    model.load_state_dict(load_file(path))
    return model.eval()


def evaluate(model: nn.Module, annotations: Path) -> dict[str, float]:
    """COCO AP of the model's own forward over the images beside a COCO file; score ≥ 0.001, 100 detections an image."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(sys.stderr):
        truth = COCO(str(annotations))
        results = []
        for image in truth.dataset["images"]:
            pixels = np.array(Image.open(annotations.parent / image["file_name"]).convert("RGB"))
            with torch.inference_mode():
                found = model([torch.from_numpy(pixels).permute(2, 0, 1).float() / 255])[0]
            boxes = found["boxes"].clone()
            boxes[:, 2:] -= boxes[:, :2]
            for box, score, label in zip(
                boxes.tolist(), found["scores"].tolist(), found["labels"].tolist(), strict=True
            ):
                results.append({"image_id": image["id"], "category_id": label, "bbox": box, "score": score})
        evaluator = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return {"AP": float(evaluator.stats[0]), "AP50": float(evaluator.stats[1]), "AP75": float(evaluator.stats[2])}


def main() -> int:
    """Render, train, write the weights, and measure the file that was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, required=True, help="checkpoints, rendered scenes, validation images")
    parser.add_argument("--out", type=Path, default=HERE, help="where shapes.safetensors and training.json go")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--resume", action="store_true", help="go on after the last epoch that the work folder holds")
    parser.add_argument("--render-only", action="store_true", help="fill the work folder with scenes and stop")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    work, recipe = arguments.work_dir, Recipe()
    work.mkdir(parents=True, exist_ok=True)
    annotations = work / "validation" / "annotations.json"
    if not annotations.exists():
        write_dataset(annotations.parent, VALIDATION["count"], VALIDATION["seed"])
    cache = work / f"scenes-{recipe.image_seed}-{recipe.image_count}.pt"
    examples = render_examples(recipe.image_count, recipe.image_seed, arguments.threads, cache)
    if arguments.render_only:
        return 0

    checkpoint = work / "checkpoint.pt"
    average, _ = train(examples, recipe, checkpoint, arguments.resume)
    minutes = torch.load(checkpoint, weights_only=True)["minutes"]
    weights = arguments.out / "shapes.safetensors"
    save_weights(average, weights)
    numbers = evaluate(load_model(weights), annotations)
    report = {
        **numbers,
        "validation": VALIDATION,
        "recipe": asdict(recipe),
        "scenes": asdict(SceneParameters()),
        "training_minutes": round(minutes, 1),
        "threads": arguments.threads,
        "bytes": weights.stat().st_size,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
        },
    }
    (arguments.out / "training.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
