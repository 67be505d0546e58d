"""Small data sets of every format on disk, two shapes a photograph."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

EXIF_ORIENTATION = 0x0112


def photograph(path: Path, size=(64, 48), orientation: int | None = None) -> Path:
    """Write a photograph of ``size`` stored pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.random.default_rng(len(path.name)).integers(0, 255, (size[1], size[0], 3), np.uint8))
    exif = Image.Exif()
    if orientation:
        exif[EXIF_ORIENTATION] = orientation
    image.save(path, exif=exif)
    return path


def annotation(number: int, image: int, box, category: int = 1, **more) -> dict:
    entry = {"id": number, "image_id": image, "category_id": category, "bbox": list(box), "iscrowd": 0}
    return {**entry, "area": box[2] * box[3], **more}


def coco_document(annotations=(), images: int = 1, size=(64, 48), **more) -> dict:
    entries = [
        {"id": one, "file_name": f"{one}.jpg", "width": size[0], "height": size[1]} for one in range(1, images + 1)
    ]
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    return {"images": entries, "annotations": list(annotations), "categories": categories, **more}


def coco_tree(root: Path, document: dict) -> Path:
    """Write a COCO file and a photograph of the annotated size for each image; return the file."""
    for image in document["images"]:
        photograph(root / "val" / image["file_name"], (image["width"], image["height"]))
    path = root / "instances_val.json"
    path.write_text(json.dumps(document))
    return path


def voc_xml(
    objects: str, *, name: str = "a.jpg", size: str = "<size><width>64</width><height>48</height></size>"
) -> str:
    return f"<annotation><filename>{name}</filename>{size}{objects}</annotation>"


def voc_object(name: str, xmin, ymin, xmax, ymax, more: str = "") -> str:
    box = f"<xmin>{xmin}</xmin><ymin>{ymin}</ymin><xmax>{xmax}</xmax><ymax>{ymax}</ymax>"
    return f"<object><name>{name}</name>{more}<bndbox>{box}</bndbox></object>"


def voc_tree(root: Path, **files: str) -> Path:
    """Write XML files by stem, with a photograph each; return the folder."""
    (root / "Annotations").mkdir(parents=True, exist_ok=True)
    for stem, text in files.items():
        (root / "Annotations" / f"{stem}.xml").write_text(text)
        photograph(root / "JPEGImages" / f"{stem}.jpg")
    return root


def yolo_tree(root: Path, labels: dict[str, str], names: str = "[cat, dog]", more: str = "") -> Path:
    """Write labels by split/stem, with a photograph each of 64 × 48, and data.yaml; return the folder."""
    for stem, text in labels.items():
        photograph(root / "images" / f"{stem}.jpg")
        label = root / "labels" / f"{stem}.txt"
        label.parent.mkdir(parents=True, exist_ok=True)
        label.write_text(text)
    splits = sorted({stem.split("/")[0] for stem in labels})
    lines = [f"{split}: images/{split}" for split in splits]
    (root / "data.yaml").write_text("\n".join(["path: .", *lines, f"names: {names}", more]))
    return root


def cityscapes_tree(root: Path, numbers: dict[str, np.ndarray]) -> Path:
    """Write instance numbers by split/city/stem, with a photograph each; return the folder."""
    for stem, values in numbers.items():
        path = root / "gtFine" / f"{stem}_gtFine_instanceIds.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values.astype(np.uint16)).save(path)
        photograph(root / "leftImg8bit" / f"{stem}_leftImg8bit.png", values.shape[::-1])
    return root
