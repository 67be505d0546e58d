"""A built head of MMDetection as ``decoding.head``: the settings with which the worker decodes its maps.

What a head does after its maps is told by the functions that it has, not by its name: any head, of MMDetection or the
user's own, that leaves the base class's decoding as it is can be exported; one that replaces it is refused by name.
"""

from typing import Any

from detserve.errors import ExportError

REMEDY = "Serve the model as it is: detserve archive CONFIG.py CHECKPOINT.pth"
MAPS = {
    "dense": ("scores", "boxes", "factors"),
    "yolox": ("scores", "boxes", "factors"),
    "yolov3": ("maps",),
    "queries": ("scores", "boxes"),
}
"""Per kind, what a head's maps are called, in its order."""


def describe_head(network: Any) -> dict[str, Any]:
    """Describe the head of a built detector, for `dethandlers.mmdet_decoding`; ``factors`` is left to the caller.

    Raises:
        ExportError: the model is not of one stage, or its head decodes in a way that is not known here.
    """
    from mmdet.models import DetectionTransformer, SingleStageDetector
    from mmdet.models.dense_heads import DETRHead, YOLOV3Head, YOLOXHead
    from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
    from mmdet.models.dense_heads.deformable_detr_head import DeformableDETRHead

    _refuse_other_detectors(network)
    head = network.bbox_head
    kind = type(head)
    if isinstance(network, DetectionTransformer):
        known = (DETRHead.predict_by_feat, DeformableDETRHead.predict_by_feat)
        if (
            _same(network, DetectionTransformer, "predict")
            and getattr(kind, "predict_by_feat", None) in known
            and _same(head, DETRHead, "_predict_by_feat_single")
            and kind.predict in (DETRHead.predict, DeformableDETRHead.predict)
        ):
            return {"kind": "queries", "scores": "sigmoid" if head.loss_cls.use_sigmoid else "softmax"}
        raise _unknown(head)
    if not _same(network, SingleStageDetector, "predict") or not _same(head, BaseDenseHead, "predict"):
        raise _unknown(head)
    if _same(head, YOLOXHead, "predict_by_feat") and _same(head, YOLOXHead, "_bbox_post_process"):
        return {"kind": "yolox", **_priors(head), **_selection(head), "nms_pre": -1, "least_side": -1.0}
    if not _same(head, BaseDenseHead, "_bbox_post_process"):
        raise _unknown(head)
    if _same(head, YOLOV3Head, "predict_by_feat"):
        least = float(head.test_cfg.get("conf_thr", -1))
        return {"kind": "yolov3", **_priors(head), **_selection(head), "least_objectness": least}
    if not _same(head, BaseDenseHead, "predict_by_feat"):
        raise _unknown(head)
    return {"kind": "dense", **_dense(head), **_selection(head)}


def _refuse_other_detectors(network: Any) -> None:
    from mmdet.models import DetectionTransformer, SingleStageDetector

    name = type(network).__name__
    if getattr(network, "roi_head", None) is not None:
        raise ExportError(
            f"model: got {name}, which has two stages: the number of its proposals and their RoIAlign depend on the "
            f"image, and a traced graph would keep those of one image. {REMEDY}"
        )
    if getattr(network, "mask_head", None) is not None:
        raise ExportError(f"model: got {name}, whose masks are not exported. {REMEDY}")
    if not isinstance(network, SingleStageDetector | DetectionTransformer):
        raise ExportError(f"model: got {name}, expected a detector of one stage or of the DETR family. {REMEDY}")


def _dense(head: Any) -> dict[str, Any]:
    from mmdet.models.dense_heads import GFLHead, TOODHead
    from mmdet.models.dense_heads.base_dense_head import BaseDenseHead

    single = type(head)._predict_by_feat_single
    if single not in (
        BaseDenseHead._predict_by_feat_single,
        GFLHead._predict_by_feat_single,
        TOODHead._predict_by_feat_single,
    ) or getattr(head.loss_cls, "custom_cls_channels", False):
        raise _unknown(head)
    settings = _priors(head)
    if single is TOODHead._predict_by_feat_single:
        return {**settings, "scores": "none", "boxes": {"kind": "corners", "clip": False}}
    settings["scores"] = "sigmoid" if head.use_sigmoid_cls else "softmax"
    boxes = _coding(head)
    if single is GFLHead._predict_by_feat_single:
        settings["priors"] = [[_centre(row) for row in level] for level in settings["priors"]]
        boxes |= {"kind": "distribution", "bins": int(head.reg_max) + 1}
    return {**settings, "boxes": boxes}


def _coding(head: Any) -> dict[str, Any]:
    coder = head.bbox_coder
    name = type(coder).__name__
    if name == "DistancePointBBoxCoder":
        return {"kind": "distance", "clip": bool(coder.clip_border)}
    if name == "DeltaXYWHBBoxCoder":
        return {
            "kind": "delta",
            "means": [float(value) for value in coder.means],
            "stds": [float(value) for value in coder.stds],
            "wh_ratio_clip": 16 / 1000,  # what `delta2bbox` takes; the coder does not hand on another
            "ctr_clamp": float(coder.ctr_clamp) if coder.add_ctr_clamp else None,
            "clip": bool(coder.clip_border),
        }
    raise ExportError(f"head: got boxes coded by {name}, which cannot be exported. {REMEDY}")


def _priors(head: Any) -> dict[str, Any]:
    generator = head.prior_generator
    strides = [[float(x), float(y)] for x, y in generator.strides]
    if hasattr(generator, "base_anchors"):
        first = [anchors.tolist() for anchors in generator.base_anchors]
    else:
        first = [[[x * generator.offset, y * generator.offset]] for x, y in strides]
    return {"strides": strides, "priors": first}


def _selection(head: Any) -> dict[str, Any]:
    settings = head.test_cfg
    nms = settings.get("nms")
    chosen: dict[str, Any] = {
        "nms_pre": int(settings.get("nms_pre", -1)),
        "least_side": float(settings.get("min_bbox_size", -1)),
        "nms": None,
    }
    if nms is None:
        return chosen
    given = dict(nms)
    if given.pop("type", "nms") != "nms" or given.pop("offset", 0) != 0:
        raise ExportError(f"test_cfg.nms: got {dict(nms)}, expected type nms. {REMEDY}")
    given["iou_threshold"] = float(given.pop("iou_thr", given.get("iou_threshold", 0.5)))
    unknown = given.keys() - {"iou_threshold", "class_agnostic", "split_thr", "max_num", "score_threshold"}
    if unknown:
        raise ExportError(f"test_cfg.nms: got {unknown.pop()}, which cannot be exported. {REMEDY}")
    return {**chosen, "nms": given}


def _same(one: Any, base: Any, name: str) -> bool:
    return getattr(type(one), name, None) is getattr(base, name)


def _centre(anchor: list[float]) -> list[float]:
    left, top, right, bottom = anchor
    return [(left + right) / 2, (top + bottom) / 2]


def _unknown(head: Any) -> ExportError:
    return ExportError(f"head: got {type(head).__name__}, whose decoding is its own and cannot be exported. {REMEDY}")
