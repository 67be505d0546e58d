"""coco-error-analysis beside the original algorithm, on a synthetic set of COCO val's size; writes its section.

    .venv/bin/python benchmarks/analysis/error_analysis.py            about 10 minutes; benchmarks/ANALYSIS.md
    .venv/bin/python benchmarks/analysis/error_analysis.py --quick    small, writes nothing: only to see that it runs

The original algorithm is that of the tests: one evaluation by pycocotools of everything, and two more for each class
with its annotations copied and relabelled. All 80 classes would take hours: it is measured on a sample of them, of a
frequent, a middling and a rare one. hotcoco's COCO metrics stand beside pycocotools', as `detserve eval-metric` has
them.
"""

import argparse
import contextlib
import io
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from dettools.analysis.error_stacks import ErrorStacks, error_overlaps, error_stacks
from dettools.analysis.overlaps import Overlaps
from dettools.analysis.tide_errors import tide_errors
from dettools.coco_metrics import evaluate_coco
from dettools.ground_truth import GroundTruth
from dettools.reports.error_pictures import save_area_pictures, save_stacks
from pycocotools.cocoeval import COCOeval
from section import machine, spread, write_section
from synthetic import synthetic_set

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "dettools" / "analysis"))
from original_error_analysis import detections, evaluated, indexed, one_class

SAMPLE, ROUNDS = (0, 19, 79), 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    truth, results = synthetic_set(60, 430, 2_400) if args.quick else synthetic_set()
    sample, rounds = (SAMPLE[:2], 1) if args.quick else (SAMPLE, ROUNDS)
    before, load = memory_gb(), os.getloadavg()[0]
    mine, overlaps, stacks = [], None, None
    for _ in range(rounds):
        seconds, (overlaps, stacks) = timed(lambda: ours(truth, results))
        mine.append(seconds)
    hot = [timed(lambda: evaluate_coco(truth, results)) for _ in range(rounds)]
    drawing, pictures = timed(lambda: draw(overlaps, stacks, truth))
    memory = memory_gb()
    with contextlib.redirect_stdout(io.StringIO()):
        document: Any = dict(truth.document)
        coco, found = indexed(document), detections(document, results, "bbox")
        cold = [timed(lambda: pycocotools_metrics(coco, found)) for _ in range(1 if args.quick else 2)]
        shared, evaluator = timed(lambda: evaluated(coco, found, "bbox", [0.75, 0.5, 0.1], None))
        each = []
        for place in sample:
            category = truth.categories[place].id
            seconds, curves = timed(lambda: one_class(coco, found, place, category, "bbox"))  # noqa: B023
            each.append(seconds)
            check(stacks.precision[3:5, :, place], np.stack(curves).transpose(0, 2, 1))
    check(stacks.precision[:3].transpose(0, 3, 2, 1), evaluator.eval["precision"][..., 0])
    assert abs(hot[0][1].figures["AP"] - cold[0][1][0]) < 1e-9
    classes = len(truth.categories)
    scaled = shared + classes * float(np.mean(each))
    ratio = scaled / float(np.median(mine))
    speed = [seconds for seconds, _ in hot], [seconds for seconds, _ in cold]
    about = (
        f"{len(truth.images):,} images, {len(truth.annotations):,} boxes of {classes} classes, {len(results):,} "
        f"detections (seeded). All curves of all classes and 4 areas; ours with TIDE besides. Medians of {rounds} "
        "turns with the smallest and largest. The original in one process, without drawing: one evaluation of all "
        f"({shared:.0f} s), and two for each of {len(sample)} classes, with all copies that it makes "
        f"({', '.join(f'{one:.0f}' for one in each)} s), scaled to {classes} classes. The curves of the sample are "
        "equal to 1e-9 (checked)."
    )
    rows = [
        "| what | ours | original |",
        "|---|---|---|",
        f"| stacks of {classes} classes (ours: and TIDE) | {spread(mine, ' s', 1)} | {scaled:,.0f} s (scaled) |",
        f"| COCO metrics (hotcoco, pycocotools) | {spread(speed[0], ' s', 1)} | {spread(speed[1], ' s', 1)} |",
        f"| {pictures} pictures: each stack, each `--extraplots` | {drawing:.0f} s | |",
    ]
    after = (
        f"Ratio **{ratio:.0f} ×** (goal: 50 ×); COCO metrics {np.median(speed[1]) / np.median(speed[0]):.0f} ×. All "
        f"pictures in {drawing:.0f} s (goal: 120 s). The process held at most {memory:.2f} GB up to there, data set "
        f"included ({before:.2f} GB; goal: below 2 GB)."
    )
    busy = f"Wall-clock times; load of the machine {load:.1f} at the start, {os.getloadavg()[0]:.1f} at the end."
    text = [about, "", *rows, "", after, "", busy, machine()]
    if args.quick:
        print("\n".join(text))
    else:
        write_section("coco-error-analysis", text)
    return 0


def ours(truth: GroundTruth, results: Sequence[dict[str, Any]]) -> tuple[Overlaps, ErrorStacks]:
    overlaps = error_overlaps(truth, results)
    stacks = error_stacks(truth, overlaps)
    tide_errors(overlaps).figures()
    return overlaps, stacks


def draw(overlaps: Overlaps, stacks: ErrorStacks, truth: GroundTruth) -> int:
    with tempfile.TemporaryDirectory() as folder:
        names = [one.name for one in truth.categories]
        save_stacks(Path(folder), stacks, overlaps, names, bars=True)
        save_area_pictures(Path(folder), overlaps, stacks.areas)
        return len(list(Path(folder).iterdir()))


def pycocotools_metrics(coco: Any, found: Any) -> Any:
    evaluator = COCOeval(coco, found, "bbox")
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    return evaluator.stats


def check(mine: Any, theirs: Any) -> None:
    """Stop where a curve differs; without objects the original has -1."""
    assert np.allclose(np.nan_to_num(mine, nan=-1), theirs, atol=1e-9, rtol=0), "the curves differ"


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    value = work()
    return time.perf_counter() - start, value


def memory_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    sys.exit(main())
