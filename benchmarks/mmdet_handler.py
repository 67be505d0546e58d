"""A batch of MMDetection's through our worker beside the logic of its own handler: ``make mmdet-handler``.

    8 JPEGs of different sizes ─┬► ours: decode, one pipeline, one forward for one padded shape, JSON ────┐
                                └► theirs: decode, `inference_detector` on the list: a pipeline built, a ─┴► A B B A …
                                   loop of forwards; score ≥ 0.5, JSON                         ratio pair by pair

Both run in this process on the same model, images and threads, without a server around them, and have to answer alike.
What theirs does is written down from its description: decode by mmcv, `init_detector`, `inference_detector`, drop what
scores below 0.5, boxes as lists.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ceiling import ROOT, spread

THRESHOLD = 0.5
BATCH = 8


class Context:
    """What TorchServe tells a handler of a request without headers."""

    def __init__(self, folder: Path) -> None:
        self.system_properties = {"model_dir": str(folder), "gpu_id": None}

    def get_request_header(self, index: int, name: str) -> None:
        """None: the request has no such header."""

    def get_all_request_header(self, _: int) -> dict[str, str]:
        """The options of every request."""
        return {"X-Detserve-Options": f"score_threshold={THRESHOLD}"}

    def set_response_content_type(self, index: int, value: str) -> None:
        """Nothing is answered over a wire."""

    def set_response_status(self, **status: Any) -> None:
        """A request failed, which would make the comparison worthless."""
        raise RuntimeError(f"a request failed: {status}")


class Theirs:
    """The original handler's logic."""

    def __init__(self, config: Path, checkpoint: Path) -> None:
        from mmdet.apis import init_detector

        self._model = init_detector(str(config), str(checkpoint), device="cpu")
        self._names = self._model.dataset_meta["classes"]

    def __call__(self, images: list[bytes]) -> list[str]:
        """Answer a batch."""
        import mmcv
        from mmdet.apis import inference_detector

        samples = inference_detector(self._model, [mmcv.imfrombytes(image) for image in images])
        return [json.dumps(self._rows(sample.pred_instances)) for sample in samples]

    def _rows(self, found: Any) -> list[dict[str, Any]]:
        boxes, labels = found.bboxes.cpu().numpy().tolist(), found.labels.cpu().numpy().tolist()
        rows = zip(boxes, labels, found.scores.cpu().numpy().tolist(), strict=True)
        return [
            {"class_label": label, "class_name": self._names[label], "bbox": box, "score": score}
            for box, label, score in rows
            if score >= THRESHOLD
        ]


class Ours:
    """The worker's handler on an archive that was packed from the same files."""

    def __init__(self, config: Path, checkpoint: Path, folder: Path, threads: int) -> None:
        from dethandlers.entry import DetectionHandler
        from detserve.archive import build_archive
        from detserve.spec import parse_spec

        value = {
            "name": "benchmarked",
            "family": "mmdet",
            "config": str(config),
            "weights": str(checkpoint),
            "serving": {"threads": threads, "channels_last": True},  # as `archive CONFIG CHECKPOINT` sets it
        }
        out = folder / f"threads{threads}.mar"
        build_archive(parse_spec(value, where="benchmark", folder=Path()), folder=Path(), out=out)
        with zipfile.ZipFile(out) as archive:
            archive.extractall(folder / out.stem)
        self._context = Context(folder / out.stem)
        self._handler = DetectionHandler()
        self._handler.initialize(self._context)

    def __call__(self, images: list[bytes]) -> list[str]:
        """Answer a batch."""
        return self._handler.handle([{"body": bytearray(image)} for image in images], self._context)


def main() -> int:
    """Measure and write the report."""
    arguments = parser().parse_args()
    paths = sorted(path for path in arguments.images.iterdir() if path.suffix in (".jpg", ".jpeg"))[:BATCH]
    if len(paths) < BATCH:
        sys.exit(f"--images: got {len(paths)} JPEGs in {arguments.images}, expected {BATCH} or more.")
    images = [path.read_bytes() for path in paths]
    warnings.simplefilter("ignore")
    from dethandlers.mmcv_operators import provide

    provide()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for threads in dict.fromkeys((1, os.cpu_count() or 1)):
            theirs = Theirs(arguments.config, arguments.checkpoint)
            ours = Ours(arguments.config, arguments.checkpoint, Path(folder), threads)
            torch.set_num_threads(threads)
            require_alike(theirs(images), ours(images))
            results[threads] = pairs(theirs, ours, images, arguments.pairs)
    text = report(results, images, arguments)
    print(text)
    arguments.out.write_text(text, "utf-8")
    return 0


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    made = argparse.ArgumentParser(description="Batches of 8 through our worker beside MMDetection's handler's logic.")
    made.add_argument("config", type=Path, help="MMDetection's config")
    made.add_argument("checkpoint", type=Path, help="its checkpoint, which MMEngine unpickles: one that you trust")
    made.add_argument("--images", type=Path, required=True, help=f"folder with {BATCH} or more JPEGs")
    made.add_argument("--pairs", type=int, default=12, help="measured pairs of batches (default: 12)")
    made.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "MMDET_HANDLER.md")
    return made


def require_alike(theirs: list[str], ours: list[str]) -> None:
    """Stop unless both find the same: classes and their number, boxes to 0.1 px, scores to 1e-3."""
    for number, (their, our) in enumerate(zip(theirs, ours, strict=True)):
        expected, got = json.loads(their), json.loads(our)
        same = len(expected) == len(got) and all(
            one["class_label"] == other["class_label"]
            and abs(one["score"] - other["score"]) <= 1e-3
            and max(abs(a - b) for a, b in zip(one["bbox"], other["bbox"], strict=True)) <= 0.1
            for one, other in zip(sorted(expected, key=order), sorted(got, key=order), strict=True)
        )
        if not same:
            sys.exit(f"image {number}: the answers differ, so there is nothing to compare:\n{their}\n{our}")


def order(row: dict[str, Any]) -> tuple[int, float]:
    """By class, then score."""
    return row["class_label"], -row["score"]


def pairs(
    theirs: Callable[[list[str]], Any], ours: Callable[[list[str]], Any], images: list[bytes], count: int
) -> list[tuple[float, float]]:
    """Seconds a batch, theirs and ours, in the order A B B A …, after one warm-up each."""
    measured = []
    for number in range(count + 1):
        took = {}
        for run in (theirs, ours) if number % 2 else (ours, theirs):
            begun = time.perf_counter()
            run(images)
            took[run] = time.perf_counter() - begun
        measured.append((took[theirs], took[ours]))
    return measured[1:]


def report(results: dict[int, list[tuple[float, float]]], images: list[bytes], arguments: argparse.Namespace) -> str:
    """The page."""
    import mmdet
    from dettools.environment import describe_environment

    machine = describe_environment()
    about = (
        f"{machine['date'][:10]}, {machine['cpu']['model']}, {machine['cpu']['usable_cores']} cores, "
        f"torch {machine['packages'].get('torch')}, MMDetection {mmdet.__version__} on torchvision's operators"
    )
    lines = [
        "# A batch of 8 through the worker, beside the logic of MMDetection's own handler",
        "",
        "Written by `make mmdet-handler` (benchmarks/mmdet_handler.py), both in one process, in the order A B B A …;",
        "median (least–greatest). The answers of both are the same: classes, number, boxes to 0.1 px, scores to 1e-3.",
        "",
        f"- {about}",
        f"- {arguments.config.stem}, {len(images)} JPEGs of different sizes, {len(next(iter(results.values())))} pairs",
        "",
        "| threads | theirs ms | ours ms | throughput, ours ÷ theirs |",
        "|---|---|---|---|",
    ]
    for threads, rows in results.items():
        ratios = [their / our for their, our in rows]
        lines.append(
            f"| {threads} | {spread([their * 1e3 for their, _ in rows])} | {spread([our * 1e3 for _, our in rows])} "
            f"| **{statistics.median(ratios):.2f}** ({min(ratios):.2f}–{max(ratios):.2f}) |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
