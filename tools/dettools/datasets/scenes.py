"""Synthetic scenes with exact ground truth: a detection data set that anyone can make again from a seed.

The demo detector is trained and measured on these scenes, and every command that needs images with annotations
(compare, evaluate, the confusion matrix) can be tried on them without a download or a licence. One seed gives one
scene, pixel for pixel. Objects of six classes lie on textured backgrounds among clutter, cover each other up to a
stated share, and the picture goes through shadow, blur, sensor noise and JPEG like a photograph.

    seed ─► background ─► clutter ─► objects, back to front ─► blur, noise ─► Scene ─► images/*.jpg + annotations.json
                                     (alpha ► visible masks ► boxes)
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from detserve.errors import DetserveError
from PIL import Image, ImageFilter

from dettools.datasets.scene_drawing import SHAPES, box_of_mask, draw_background, draw_clutter, draw_objects

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

CATEGORIES = tuple({"id": index + 1, "name": name, "supercategory": "shape"} for index, name in enumerate(SHAPES))
MAX_SEED = 2**62


class SceneError(DetserveError):
    """Scenes cannot be made or written as asked."""


@dataclass(frozen=True)
class SceneParameters:
    """What a scene may hold. Pairs are (least, most), both included."""

    image_side_px: tuple[int, int] = (320, 800)
    max_aspect_ratio: float = 1.5
    object_count: tuple[int, int] = (2, 6)
    object_size: tuple[float, float] = (0.18, 0.50)  # longest side of the whole object / shorter side of the image
    object_stretch: float = 1.25
    max_occlusion: float = 0.33  # share of an object's own area that others may cover
    overlap_chance: float = 0.5  # how often an object is put beside another one on purpose
    min_contrast: float = 0.30  # RGB distance (0–1.73) between an object and what lies around it
    clutter_count: tuple[int, int] = (6, 24)
    background_texture: float = 0.10  # standard deviation of the background's large structures, 0–1
    max_blur_px: float = 1.0
    max_noise: float = 0.035  # standard deviation of the sensor noise, 0–1
    jpeg_quality: tuple[int, int] = (70, 95)

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, tuple) and not 0 < value[0] <= value[1]:
                raise SceneError(f"{name} is {value}; expected (least, most) with 0 < least ≤ most. Correct the pair.")


@dataclass(frozen=True)
class Scene:
    """One rendered scene of N objects, back to front.

    Attributes:
        image: RGB, H × W.
        boxes_xyxy: (N, 4) float32 px, the smallest boxes around the visible masks.
        masks: (N, H, W) bool, the visible part of each object.
        labels: (N,) int64, 0-based index into CATEGORIES.
        occlusions: (N,) float32, share of each object's own area that later objects cover.
        jpeg_quality: the quality this scene is saved with.
    """

    image: Image.Image
    boxes_xyxy: Floats
    masks: NDArray[np.bool_]
    labels: NDArray[np.int64]
    occlusions: Floats
    jpeg_quality: int


def render_scene(seed: int, parameters: SceneParameters | None = None) -> Scene:
    """Render the scene of one seed; the same seed and parameters give the same pixels."""
    _check_seed(seed)
    p = parameters or SceneParameters()
    rng = np.random.default_rng(seed)
    width, height = _image_size(rng, p)
    canvas = draw_background(rng, height, width, p)
    for _ in range(rng.integers(p.clutter_count[0], p.clutter_count[1] + 1)):
        draw_clutter(rng, canvas)
    visible, areas, labels = draw_objects(rng, canvas, p)

    masks = np.stack(visible)
    occlusions = 1.0 - masks.sum(axis=(1, 2)) / np.asarray(areas, np.float64)
    image = Image.fromarray(np.rint(np.clip(canvas, 0, 1) * 255).astype(np.uint8))
    image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0, p.max_blur_px))))
    noise = rng.normal(0, 255 * rng.uniform(0.2, 1) * p.max_noise, (height, width, 3)).astype(np.float32)
    pixels = np.rint(np.clip(np.asarray(image, np.float32) + noise, 0, 255)).astype(np.uint8)
    return Scene(
        image=Image.fromarray(pixels),
        boxes_xyxy=np.stack([box_of_mask(mask) for mask in masks]),
        masks=masks,
        labels=np.asarray(labels, np.int64),
        occlusions=occlusions.astype(np.float32),
        jpeg_quality=int(rng.integers(p.jpeg_quality[0], p.jpeg_quality[1] + 1)),
    )


def write_dataset(
    folder: str | Path,
    count: int,
    seed: int,
    parameters: SceneParameters | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write `count` scenes as JPEG files and COCO annotations; return the path of annotations.json.

    Image k (from 1) is the scene of seed `seed + k - 1`. annotations.json is written last, so a folder that has it is
    complete. `progress` is called with (images done, count).
    """
    from pycocotools import mask as coco_mask

    if count < 1:
        raise SceneError(f"The number of scenes is {count}; expected at least 1. Pass a larger count.")
    _check_seed(seed)
    p = parameters or SceneParameters()
    folder = Path(folder)
    if (folder / "annotations.json").exists():
        raise SceneError(f"{folder} already holds a data set; expected a new folder. Remove it or name another one.")
    try:
        (folder / "images").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SceneError(f"{folder} cannot be made: {error.strerror}. Name a folder that can be written to.") from error
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id in range(1, count + 1):
        scene = render_scene(seed + image_id - 1, p)
        file_name = f"images/{image_id:06d}.jpg"
        scene.image.save(folder / file_name, quality=scene.jpeg_quality)
        images.append(
            {"id": image_id, "file_name": file_name, "width": scene.image.width, "height": scene.image.height}
        )
        for box, mask, label in zip(scene.boxes_xyxy.tolist(), scene.masks, scene.labels.tolist(), strict=True):
            rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": CATEGORIES[label]["id"],
                    "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                    "segmentation": {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")},
                }
            )
        if progress:
            progress(image_id, count)
    info = {"description": "detserve scenes", "seed": seed, "parameters": asdict(p)}
    document = {
        "info": info,
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": list(CATEGORIES),
    }
    partial = folder / "annotations.json.partial"
    partial.write_text(json.dumps(document) + "\n", encoding="utf-8")
    return partial.replace(folder / "annotations.json")


def _check_seed(seed: int) -> None:
    if not 0 <= seed <= MAX_SEED:
        raise SceneError(f"The scene seed is {seed}; expected 0 to {MAX_SEED}. Pass such a seed.")


def _image_size(rng: np.random.Generator, p: SceneParameters) -> tuple[int, int]:
    """Width and height in px."""
    least, most = p.image_side_px
    aspect = math.exp(rng.uniform(0, math.log(min(p.max_aspect_ratio, most / least))))
    long_side = int(rng.integers(min(math.ceil(least * aspect), most), most + 1))
    short_side = max(least, round(long_side / aspect))
    return (long_side, short_side) if rng.random() < 0.6 else (short_side, long_side)
