"""A real `detserve view` in a process of its own, and data sets for it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import requests
from PIL import Image

DETSERVE = Path(sys.executable).parent / "detserve"
WORDS = ("cat", "dog", "bird")


@dataclass(frozen=True)
class Viewed:
    """The page of a running process."""

    url: str
    process: subprocess.Popen

    def get(self, path: str, **how) -> requests.Response:
        return requests.get(f"{self.url}{path.removeprefix('/')}", timeout=30, **how)


@contextmanager
def viewing(
    *arguments: object, env: dict[str, str] | None = None, end: signal.Signals = signal.SIGINT
) -> Iterator[Viewed]:
    """Start the command; end it as Ctrl-C does, which must say nothing but that."""
    process = subprocess.Popen(
        [str(one) for one in (DETSERVE, "view", *arguments, "--no-browser", "--json")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
    )
    try:
        line = process.stdout.readline()
        if not line:
            raise AssertionError(process.communicate(timeout=30)[1])
        yield Viewed(json.loads(line)["url"], process)
        assert process.poll() is None
    finally:
        process.send_signal(end)
        rest, told = process.communicate(timeout=30)
    assert process.returncode == 0, told
    assert rest == ""
    assert told.endswith("the page is closed\n")
    assert "Traceback" not in told


def data_set(folder: Path, count: int, *, seed: int = 0, masks: bool = False) -> tuple[Path, Path]:
    """Write small pictures, annotations and results; return the paths of the last two.

    In each image four objects; the detector finds some, some twice, some as another class, and sees some that are not.
    """
    random = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    images, annotations, results = [], [], []
    for image in range(count):
        name = f"{image:05}.png"
        Image.new("RGB", (160, 120), tuple(random.integers(0, 200, 3).tolist())).save(folder / "images" / name)
        images.append({"id": image + 1, "file_name": name, "width": 160, "height": 120})
        for place in range(int(random.integers(0, 5))):
            box = [place * 38 + 2.0, float(random.integers(0, 80)), 32.0, 32.0]
            category = int(random.integers(1, 4))
            one = {"image_id": image + 1, "category_id": category, "bbox": box}
            annotations.append(
                {**one, "id": len(annotations) + 1, "area": 1024.0, "iscrowd": int(random.random() < 0.1)}
            )
            for _ in range(int(random.integers(0, 3))):
                moved = [box[0] + float(random.normal(0, 4)), box[1] + float(random.normal(0, 4)), 32.0, 32.0]
                other = category if random.random() < 0.8 else category % 3 + 1
                results.append({**one, "category_id": other, "bbox": moved, "score": float(random.random())})
        if random.random() < 0.3:
            results.append({"image_id": image + 1, "category_id": 1, "bbox": [60.0, 50.0, 9.0, 60.0], "score": 0.35})
    if masks:
        for one in (*annotations, *results):
            one["segmentation"] = disc(one["bbox"])
    categories = [{"id": place, "name": name} for place, name in enumerate(WORDS, start=1)]
    document = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(document))
    (folder / "results.json").write_text(json.dumps(results))
    return folder / "annotations.json", folder / "results.json"


def disc(box: list[float]) -> dict:
    """Return the ellipse in a box as COCO's packed RLE."""
    from pycocotools import mask

    y, x = np.mgrid[:120, :160]
    inside = ((x - box[0] - box[2] / 2) / (box[2] / 2)) ** 2 + ((y - box[1] - box[3] / 2) / (box[3] / 2)) ** 2 <= 1
    rle = mask.encode(np.asfortranarray(inside, np.uint8))
    return {"size": rle["size"], "counts": rle["counts"].decode()}
