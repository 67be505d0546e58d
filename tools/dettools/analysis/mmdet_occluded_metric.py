"""The recall of occluded and separated objects inside MMDetection's own evaluation.

In a config (``pip install detserve`` beside MMDetection):

    custom_imports = dict(imports=['dettools.analysis.mmdet_occluded_metric'], allow_failed_imports=False)
    val_evaluator = dict(
        type='CocoOccludedSeparatedMetric',
        ann_file='val.json',
        subsets='occlusion.json',       # of `detserve occluded-recall --make-subsets`; left out: made from ann_file
        metric=['bbox', 'segm'])

Importing this module puts the class in the place of MMDetection's own of that name, which fetches two pickles over the
network, and fails on every other data set than COCO val. Its arguments and the names of its figures are kept.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dethandlers.mmcv_operators import provide
from dethandlers.mmdet_model import quiet

from dettools.analysis.occluded_recall import OccludedRecall, RecallType
from dettools.analysis.occlusion import OcclusionError, load_subsets, make_subsets
from dettools.ground_truth import load_ground_truth

provide()
with quiet():
    from mmdet.evaluation import CocoMetric
    from mmdet.registry import METRICS
    from mmengine.logging import print_log


@METRICS.register_module(name="CocoOccludedSeparatedMetric", force=True)
class CocoOccludedSeparatedMetric(CocoMetric):  # type: ignore[misc]
    """COCO metrics, and the recall of occluded and separated objects.

    Args:
        args: as CocoMetric's.
        subsets: JSON of ``detserve occluded-recall --make-subsets``; made from ``ann_file`` if None.
        occluded_ann: the original's pickle: refused, say ``subsets``.
        separated_ann: the same.
        score_thr: detections below do not count.
        iou_thr: from which on a detection finds an object.
        metric: ``bbox``, ``segm``; the recall is that of ``segm`` if it is among them.
        kwargs: as CocoMetric's; ``ann_file`` is needed.

    Raises:
        OcclusionError: no ``ann_file``, a pickle, or subsets of other annotations.
    """

    default_prefix = "coco"

    def __init__(
        self,
        *args: Any,
        subsets: str | None = None,
        occluded_ann: str | None = None,
        separated_ann: str | None = None,
        score_thr: float = 0.3,
        iou_thr: float = 0.75,
        metric: str | Sequence[str] = ("bbox", "segm"),
        **kwargs: Any,
    ) -> None:
        named = [metric] if isinstance(metric, str) else list(metric)
        super().__init__(*args, metric=named, **kwargs)
        for key, value in (("occluded_ann", occluded_ann), ("separated_ann", separated_ann)):
            if value is not None:
                raise OcclusionError(
                    f"{key}={value!r}: the original's pickles run code when they are read. Say "
                    "subsets='occlusion.json', which `detserve occluded-recall --annotations val.json --make-subsets "
                    "occlusion.json` writes."
                )
        annotations = kwargs.get("ann_file") or (args[0] if args else None)
        if annotations is None:
            raise OcclusionError("got no ann_file, expected the COCO annotation file with the masks")
        types: list[RecallType] = [kind for kind in ("segm", "bbox") if kind in named]
        if not types:
            raise OcclusionError(f"got the metric {named}, expected bbox or segm among them")
        self._truth = load_ground_truth(Path(annotations))
        self._subsets = load_subsets(Path(subsets), self._truth) if subsets else make_subsets(self._truth)
        self._options: dict[str, Any] = {"score_threshold": score_thr, "iou_threshold": iou_thr, "iou_types": types}

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        """Compute the COCO metrics and the recalls, in percent, of the images that were given.

        Returns:
            CocoMetric's figures, ``occluded_recall`` and ``separated_recall``; with ``bbox`` beside ``segm`` also
            ``occluded_box_recall`` and ``separated_box_recall``. NaN where there is no such object.
        """
        figures: dict[str, float] = dict(super().compute_metrics(results))
        recall = OccludedRecall(self._truth, self._subsets, **self._options)
        category_ids = self.cat_ids
        for _, found in results:
            recall.update(
                int(found["img_id"]),
                category_ids=[category_ids[label] for label in found["labels"]],
                scores=found["scores"],
                boxes_xyxy=found["bboxes"],
                masks=found.get("masks"),
            )
        result = recall.result()
        first = self._options["iou_types"][0]
        for one in result.subsets:
            key = f"{one.subset}_recall" if one.iou_type == first else f"{one.subset}_box_recall"
            share = one.all
            if one.subset in ("occluded", "separated"):
                figures[key] = float("nan") if share.recall is None else share.recall * 100
                print_log(f"COCO {key}: {figures[key]:.2f}% ({share.found} of {share.total})", logger="current")
        return figures
