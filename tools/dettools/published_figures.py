"""The figure that the model's own log shows, where it is not the right one.

pycocotools, and MMDetection with it, counts an annotation whose id is 0 as never found, and the detection that found it
as a false positive (its array of matches holds the annotation's id, and 0 stands for none). The figure published with a
model is then too low. Someone who evaluates it again needs both: the right one, and the one to recognise it by.
"""

import copy
import io
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from typing import Any

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dettools.coco_metrics import Metrics, prepared_results
from dettools.ground_truth import GroundTruth


def published_figures(
    ground_truth: GroundTruth, results: Sequence[Mapping[str, Any]], metrics: Metrics
) -> dict[str, float | None] | None:
    """Return what pycocotools says on the annotation file as it is on disk, by the names of ``metrics.figures``.

    None where that is what ``metrics`` says too: no annotation has the id 0, or the parameters are not COCO's own.
    """
    if ground_truth.zero_id is None or not results or not metrics.is_standard:
        return None
    document = copy.deepcopy(dict(ground_truth.document))
    for one in document["annotations"]:
        if one["id"] == ground_truth.zero_id:
            one["id"] = 0
    with redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = document
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(prepared_results(results, metrics.iou_type)), metrics.iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    values = (None if value == -1 else float(value) for value in evaluation.stats)
    return dict(zip(metrics.figures, values, strict=True))
