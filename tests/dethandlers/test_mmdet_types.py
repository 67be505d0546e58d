"""What a config of MMDetection may have built: its own detectors, and nothing that runs, fetches or unpickles."""

import copy

import pytest
import torch
from dethandlers.errors import ArtefactError
from dethandlers.mmdet_model import build_network, build_pipeline
from dethandlers.mmdet_types import for_inference, refused_type
from mmdet_models import CONFIGS, mmdet_warnings, needs_mmdet, packaged

pytestmark = [needs_mmdet, *mmdet_warnings]


@pytest.fixture(scope="module")
def fcos():
    return packaged(CONFIGS["fcos"])


@pytest.fixture(scope="module", autouse=True)
def registries():
    pytest.importorskip("mmdet")
    from dethandlers.mmcv_operators import provide
    from dethandlers.mmdet_model import quiet

    provide()
    with quiet():
        from mmdet.utils import register_all_modules

        register_all_modules(init_default_scope=False)


def built(values):
    with torch.device("meta"):
        return build_network(values)


@pytest.mark.parametrize(
    "kind",
    [
        *("FasterRCNN", "mmdet.RTMDet", "BN", "BN2d", "nms", "soft_nms", "RoIAlign", "AnchorGenerator"),
        *("torch.nn.Conv2d", "mmdet.models.detectors.FasterRCNN", "mmdet.models.detectors.fcos.FCOS"),
    ],
)
def test_registered_classes_and_torch_s_layers_are_built(kind):
    assert refused_type({"a": [{"type": kind}]}, "model") == ""


@pytest.mark.parametrize(
    "kind",
    [
        *("os.system", "os.path.join", "subprocess.Popen.run", "torch.serialization.load", "nms if 1 else 2", ""),
        *("torch.utils.model_zoo.os.system", "__import__('os').system('true')", None, ["a"], "this", "antigravity"),
        "torch.distributed.elastic.multiprocessing.subprocess_handler.SubprocessHandler",
        *("torch.nn.parallel.DistributedDataParallel", "torch.nn.Parameter", "torch.nn.functional.relu"),
        *("mmengine.config.Config.fromfile", "mmengine.runner.Runner", "mmengine.load", "Runner", "CocoDataset"),
        *("CameraMotionCompensation", "AppearanceFreeLink", "mmdet.SORTTracker", "DetLocalVisualizer", "LoadProposals"),
        *("mmdet.models.task_modules.CameraMotionCompensation", "BertModel", "ATSSVLFusionHead", "Detectron2Wrapper"),
        *("KnowledgeDistillationSingleStageDetector", "LAD", "mmdet.LAD", "mmdet.nothing", "json.decoder.JSONDecoder"),
    ],
)
def test_everything_else_is_refused(kind):
    told = refused_type({"test_cfg": {"nms": [{"type": kind}]}}, "model")
    assert told.startswith(f"model.test_cfg.nms[0].type: got type {kind!r}, which ")


@pytest.mark.parametrize("kind", ["RandomSamplingNegPos", "Albu", "InstaBoost", "FasterRCNN", "os.system"])
def test_a_pipeline_is_of_transforms(kind, fcos):
    values = copy.deepcopy(fcos)
    steps = values["test_dataloader"]["dataset"]["pipeline"]
    assert refused_type(steps, "pipeline") == ""
    network = built(values)
    steps.insert(1, {"type": kind})
    with pytest.raises(ArtefactError, match=r"pipeline\[1\]\.type"):
        built(values)
    network.cfg.test_dataloader.dataset.pipeline.insert(1, {"type": kind})
    with pytest.raises(ArtefactError, match=r"pipeline\[1\]\.type"):
        build_pipeline(network.cfg)


def test_a_scope_is_not_imported():
    assert "_scope_" in refused_type({"type": "FCOS", "_scope_": "os"}, "model")
    assert refused_type({"type": "FCOS", "_scope_": "mmdet"}, "model") == ""


def test_what_only_training_needs_is_left_out():
    values = {"train_cfg": {"a": 1}, "neck": [{"init_cfg": {"type": "Pretrained"}, "pretrained": "x", "b": (1,)}]}
    expected = {"train_cfg": None, "neck": [{"init_cfg": None, "pretrained": None, "b": (1,)}]}
    assert for_inference(values) == expected
    assert values["train_cfg"] == {"a": 1}


def test_training_s_settings_are_not_built(fcos, tmp_path):
    """An assigner that evaluates its setting, weights that would be fetched."""
    values = copy.deepcopy(fcos)
    evil = {"type": "CameraMotionCompensation", "warp_mode": f"open({str(tmp_path / 'ran')!r}, 'w')"}
    values["model"]["train_cfg"] = {"assigner": evil}
    values["model"]["neck"]["init_cfg"] = {"type": "Pretrained", "checkpoint": "http://localhost:1/a.pth"}
    assert type(built(values)).__name__ == "FCOS"
    values["model"]["bbox_head"]["bbox_coder"] = evil
    with pytest.raises(ArtefactError, match=r"bbox_head\.bbox_coder\.type"):
        built(values)
    assert not list(tmp_path.iterdir())


def test_code_is_imported_only_when_that_is_allowed(fcos, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_scope.py").write_text("def call(**_):\n    raise SystemExit\n")
    values = copy.deepcopy(fcos) | {"custom_imports": {"imports": ["own_scope"]}}
    with pytest.raises(ArtefactError, match="Allow them with --allow-code"):
        built(values)
    values["model"] = {"type": "own_scope.call"}
    with pytest.raises(ArtefactError, match=r"model\.type: got type 'own_scope\.call'.*in none of"):
        build_network(values, allow_code=True)
    values["custom_imports"]["imports"] = ["own_absent"]
    with pytest.raises(ArtefactError, match="No module named 'own_absent'"):
        build_network(values, allow_code=True)
    values |= {"custom_imports": {"imports": ["os"]}, "default_scope": "os"}
    with pytest.raises(ArtefactError, match="default_scope 'os'"):
        build_network(values, allow_code=True)


# Families of configs beside those that other tests build.
FOLDERS = [
    "cascade_rpn/cascade-rpn_faster-rcnn_r50-caffe_fpn_1x_coco.py",
    "centernet/centernet_r18_8xb16-crop512-140e_coco.py",
    "detectors/detectors_htc-r50_1x_coco.py",
    "dcnv2/faster-rcnn_r50_fpn_mdpool_1x_coco.py",
    "fpg/retinanet_r50_fpg_crop640_50e_coco.py",
    "guided_anchoring/ga-retinanet_r50_fpn_1x_coco.py",
    "point_rend/point-rend_r50-caffe_fpn_ms-1x_coco.py",
    "queryinst/queryinst_r50_fpn_1x_coco.py",
    "reppoints/reppoints-moment_r50_fpn_1x_coco.py",
    "soft_teacher/soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco.py",
    "solov2/solov2_r50_fpn_1x_coco.py",
    "yolact/yolact_r50_8xb8-55e_coco.py",
]


@pytest.mark.parametrize("name", FOLDERS)
def test_packaged_detectors_are_built(name):
    assert built(packaged(name)).parameters()
