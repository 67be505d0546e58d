"""``detserve scenes``: write a data set of synthetic scenes with COCO annotations."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's arguments."""
    parser = subparsers.add_parser(
        "scenes",
        help="write synthetic scenes with COCO annotations (boxes and masks)",
        description="Write synthetic scenes as JPEG files with a COCO annotations.json. The same seed gives the same "
        "scenes; the demo detector's validation set is --count 200 --seed 1.",
    )
    parser.add_argument("--out", type=Path, required=True, help="new folder for images/ and annotations.json")
    parser.add_argument("--count", type=int, default=200, help="number of images (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the first image (default: %(default)s)")
    parser.add_argument("--grid", type=Path, metavar="FILE", help="also draw the first 12 scenes with their boxes")
    parser.add_argument("--json", action="store_true", help="print one JSON document as the last line")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the scenes; return the exit code."""
    from dettools.datasets.scenes import render_scene, write_dataset
    from dettools.reports.scene_grid import draw_scene_grid

    def progress(done: int, count: int) -> None:
        if done % 50 == 0 or done == count:
            print(f"scenes: {done} of {count} images", file=sys.stderr, flush=True)

    annotations = write_dataset(args.out, args.count, args.seed, progress=progress)
    if args.grid:
        scenes = [render_scene(args.seed + index) for index in range(min(12, args.count))]
        args.grid.parent.mkdir(parents=True, exist_ok=True)
        draw_scene_grid(scenes).save(args.grid, quality=85)
    if args.json:
        grid = str(args.grid) if args.grid else None
        print(json.dumps({"annotations": str(annotations), "images": args.count, "seed": args.seed, "grid": grid}))
    else:
        print(f"{args.count} images and {annotations}")
    return 0
