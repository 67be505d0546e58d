"""The cost of MMDetection's configs: sizes and options as MMDetection takes them, figures by hand and as published."""

import importlib.util
import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from dethandlers.mmdet_model import build_network
from detserve.archive import build_archive
from detserve.mmdet_config import read_config
from detserve.spec import parse_spec
from dettools.cli import main
from dettools.flops.cost import FlopsError
from dettools.flops.mmdet_detector import MmdetSubject, changed, input_size, resized
from PIL import Image

MMDET = importlib.util.find_spec("mmdet")
needs_mmdet = [
    pytest.mark.skipif(MMDET is None, reason="MMDetection is not installed (the extra detserve[mmdet])"),
    # MMDetection's imports and constructors warn of their own past.
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pipeline(*steps):
    return {"test_dataloader": {"dataset": {"dataset": {"pipeline": [{"type": "LoadImageFromFile"}, *steps]}}}}


KEPT = pipeline({"type": "Resize", "scale": (1333, 800), "keep_ratio": True})
SQUARE = pipeline(
    {"type": "mmdet.Resize", "scale": (640, 640), "keep_ratio": True}, {"type": "Pad", "size": (640, 640)}
)


@pytest.mark.parametrize(
    ("config", "asked", "divisor", "padded"),
    [
        (KEPT, None, 32, (800, 1344)),
        (KEPT, (800, 1333), 1, (800, 1333)),
        (KEPT, (1280, 800), 32, (1280, 800)),
        (SQUARE, None, 1, (640, 640)),
        # What is asked for replaces the fixed size that is padded to.
        (SQUARE, (320, 480), 32, (320, 480)),
        (pipeline({"type": "Resize", "scale": (512, 300)}), None, 1, (300, 512)),
        (
            pipeline({"type": "Resize", "scale": (512, 300)}, {"type": "Pad", "pad_to_square": True}),
            None,
            1,
            (512, 512),
        ),
        (pipeline({"type": "Resize", "scale": (300, 300)}, {"type": "Pad", "size_divisor": 128}), None, 1, (384, 384)),
    ],
)
def test_the_input_is_what_the_test_pipeline_and_the_model_make_of_it(config, asked, divisor, padded):
    found = input_size(config, asked, divisor)
    assert found.padded == padded
    assert bool(found.note) == (found.padded != found.resized)


def test_a_pipeline_that_does_not_tell_needs_a_shape():
    with pytest.raises(FlopsError, match="Give --shape HEIGHT WIDTH"):
        input_size(pipeline({"type": "RandomChoiceResize", "scales": []}), None, 1)
    assert input_size({}, (64, 96), 32).padded == (64, 96)


@pytest.mark.parametrize(
    ("config", "original", "expected"),
    [
        (KEPT, (480, 640), (800, 1067)),
        (KEPT, (640, 480), (1067, 800)),
        (KEPT, (500, 2000), (333, 1333)),
        (SQUARE, (375, 500), (480, 640)),
        (pipeline({"type": "Resize", "scale": (512, 300)}), (10, 10), (300, 512)),
    ],
)
def test_images_are_resized_as_mmcv_does(config, original, expected):
    assert resized(config, original) == expected


def test_options_are_set_as_mmengine_sets_them():
    config = {"model": {"heads": [{"n": 1}, {"n": 2}], "sizes": (1, (2, 3)), "name": "a"}}
    options = {
        "model": {"heads.1.n": 5, "sizes.1": "(7,8)", "rate": "1e-3", "list": "a,2", "flag": True, "new.deep": None},
        "top": [1, 2],
    }
    assert changed(config, options) == {
        "model": {
            "heads": [{"n": 1}, {"n": 5}],
            "sizes": [1, (7, 8)],
            "name": "a",
            "rate": 1e-3,
            "list": ["a", 2],
            "flag": True,
            "new": {"deep": None},
        },
        "top": [1, 2],
    }
    assert config["model"]["heads"][1] == {"n": 2}
    for key in ("heads.2.n", "heads.x", "name.n"):
        with pytest.raises(FlopsError, match="Correct the key"):
            changed(config, {"model": {key: 1}})


def packaged(name):
    return Path(MMDET.submodule_search_locations[0]) / ".mim" / "configs" / name


def counted(capsys, *arguments):
    assert main(["flops", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


class TestWithMmdetection:
    pytestmark = needs_mmdet

    def test_two_stages_cost_what_their_layers_say(self, capsys):
        found = counted(capsys, packaged("mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py"), "--shape", "64", "96")
        assert found["input_size"] == [64, 96]
        proposal, detection = found["parts"]
        # RoIAlign takes one sample a bin here (sampling_ratio 0, boxes of 16 px on stride 4: 4 / 7 → 1).
        box_head = 256 * 49 * 1024 + 1024 * 1024 + 1024 * (81 + 4 * 80) + 4 * 256 * 49
        assert (proposal["item"], proposal["macs"], proposal["most"]) == ("proposal", box_head, 1000)
        convolutions = 4 * 256 * 256 * 9 * 14**2
        upsampling, logits = 256 * 256 * 4 * 14**2, 256 * 80 * 28**2
        mask_head = convolutions + upsampling + logits + 4 * 256 * 14**2
        assert (detection["item"], detection["macs"], detection["most"]) == ("detection", mask_head, 100)
        assert found["most_macs"] == found["macs"] + 1000 * box_head + 100 * mask_head
        modules = {one["name"]: one for one in found["modules"]}
        assert modules["roi_head"]["per_item"] == [box_head, mask_head]
        assert sum(modules[name]["macs"] for name in ("backbone", "neck", "rpn_head", "roi_head")) == found["macs"]
        assert {one["name"] for one in found["operators"]} >= {"torchvision.roi_align", "aten.convolution"}

    @pytest.mark.parametrize(
        ("name", "shape", "published_gmacs", "published_mparams"),
        [
            # MMDetection's model zoo and YOLOX's paper (which tells 2 × MACs); parameters that are trained.
            ("rtmdet/rtmdet_tiny_8xb32-300e_coco.py", (), 8.1, 4.9),
            ("yolox/yolox_s_8xb8-300e_coco.py", (), 26.8 / 2, 9.0),
        ],
    )
    def test_published_figures(self, capsys, name, shape, published_gmacs, published_mparams):
        found = counted(capsys, packaged(name), *shape)
        assert found["input_size"] == [640, 640]
        assert found["macs"] / 1e9 == pytest.approx(published_gmacs, rel=0.01)
        assert found["parameters"] / 1e6 == pytest.approx(published_mparams, rel=0.01)

    @pytest.mark.slow
    def test_the_document_s_retinanet(self, capsys):
        found = counted(capsys, packaged("retinanet/retinanet_r50_fpn_1x_coco.py"), "--shape", "1280", "800")
        # The document: 239.32 "GFLOPs" (multiply-accumulates, with norms and biases), 37.74 M (without the frozen).
        assert found["macs"] / 1e9 == pytest.approx(239.32, rel=0.005)
        assert found["parameters"] == pytest.approx(37.74e6 + 225_344, rel=1e-3)

    @pytest.mark.shared_data
    def test_the_same_weights_as_an_onnx_file_cost_the_same(self, shared_data, capsys):
        models = shared_data / "models"
        config = counted(capsys, models / "mmdet_yolox_nano" / "yolox_nano_8xb8-300e_coco.py", "--shape", "416")
        file = counted(capsys, models / "yolox_nano" / "yolox_nano.onnx")
        assert config["macs"] == file["macs"] == 522_553_408

    def test_deformable_convolution_is_counted_and_attention_is_told(self):
        def cost(name):
            return MmdetSubject(read_config(packaged(name)).values, name).count((64, 64))

        plain = cost("faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py")
        moved = cost("dcnv2/faster-rcnn_r50-mdconv-c3-c5_fpn_1x_coco.py")
        calls = {one.name: one.calls for one in moved.operators}
        assert calls["torchvision.deform_conv2d"] == 4 + 6 + 3
        assert moved.macs > plain.macs
        attention = cost("deformable_detr/deformable-detr_r50_16xb2-50e_coco.py")
        assert "aten.grid_sampler_2d" in {one.name for one in attention.operators}
        assert any("weighing them is listed as arithmetic" in note for note in attention.notes)
        assert "aten.mul" in {one.operator for one in attention.uncounted}

    @pytest.mark.parametrize(
        "name", ["retinanet/retinanet_r50_fpn_1x_coco.py", "deformable_detr/deformable-detr_r50_16xb2-50e_coco.py"]
    )
    def test_operator_by_operator_it_is_what_the_original_s_counter_finds(self, name):
        from mmengine.analysis import FlopAnalyzer

        subject = MmdetSubject(read_config(packaged(name)).values, name)
        ours = {one.name: one.macs for one in subject.count((64, 64)).operators}
        network = subject._network
        meta = dict.fromkeys(("img_shape", "ori_shape", "pad_shape", "batch_input_shape"), (64, 64))
        from mmdet.structures import DetDataSample

        samples = [DetDataSample(metainfo=meta)]
        network.forward = partial(network.forward, data_samples=samples)
        counter = FlopAnalyzer(network, (torch.rand(1, 3, 64, 64),))
        theirs = counter.unsupported_ops_warnings(enabled=False).uncalled_modules_warnings(enabled=False).by_operator()
        assert ours["aten.convolution"] == theirs["conv"]
        assert ours.get("aten.addmm", 0) + ours.get("aten.mm", 0) == theirs["linear"]
        assert ours.get("aten.bmm", 0) == theirs["bmm"]
        assert ours.get("aten.grid_sampler_2d", 0) == theirs["grid_sampler"]
        # It counts norms and resizing too, which are small.
        assert sum(theirs.values()) == pytest.approx(sum(ours.values()), rel=0.01)

    def test_a_fixed_number_of_proposals_is_no_range(self):
        name = "sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco.py"
        cost = MmdetSubject(read_config(packaged(name)).values, name).count((64, 64))
        assert cost.parts == ()
        # 100 proposals through 6 stages: at least the layers that make each one's own weights, and the last.
        assert cost.macs > 600 * (256 * 2 * 256 * 64 + 256 * 49 * 256)

    def test_the_original_s_flags(self, tmp_path, capsys):
        config = packaged("faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py")
        options = ["--cfg-options", "model.roi_head.bbox_head.num_classes=3", "model.test_cfg.rpn.max_per_img=10"]
        assert main(["flops", str(config), "--shape", "64", *options]) == 0
        shown = capsys.readouterr().out
        assert "Input shape: (64, 64)" in shown
        assert "Flops below are multiply-accumulates" in shown
        found = counted(capsys, config, "--shape", "64", *options)
        [proposal] = found["parts"]
        assert (proposal["most"], proposal["macs"]) == (
            10,
            256 * 49 * 1024 + 1024 * 1024 + 1024 * (4 + 4 * 3) + 4 * 256 * 49,
        )

    def test_num_images_takes_the_validation_set(self, tmp_path, capsys):
        images = []
        (tmp_path / "data" / "val").mkdir(parents=True)
        for number, size in enumerate([(64, 48), (64, 48), (48, 64)], start=1):
            Image.new("RGB", size).save(tmp_path / "data" / "val" / f"{number}.png")
            images.append({"id": number, "file_name": f"{number}.png", "width": size[0], "height": size[1]})
        document = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "cat"}]}
        (tmp_path / "data" / "val.json").write_text(json.dumps(document))
        (tmp_path / "config.py").write_text(
            f"_base_ = [{str(packaged('retinanet/retinanet_r50_fpn_1x_coco.py'))!r}]\n"
            "test_pipeline = [dict(type='Resize', scale=(128, 96), keep_ratio=True)]\n"
            "val_dataloader = dict(dataset=dict(_delete_=True, type='CocoDataset', data_root='data', "
            "ann_file='val.json', data_prefix=dict(img='val/'), pipeline=test_pipeline))\n"
            "test_dataloader = val_dataloader\n"
        )
        found = counted(capsys, tmp_path / "config.py", "--num-images", "2")
        assert (found["average"]["images"], found["average"]["shapes"]) == (2, 1)
        assert found["input_size"] == [96, 128]
        found = counted(capsys, tmp_path / "config.py", "--num-images", "9")
        assert (found["average"]["images"], found["average"]["shapes"]) == (3, 2)

    def test_an_archive_s_own_modules_are_imported_when_that_is_allowed(self, tmp_path, monkeypatch, capsys):
        (tmp_path / "own_flops_neck.py").write_text(
            "from mmdet.models.necks import FPN\nfrom mmdet.registry import MODELS\n\n\n"
            "@MODELS.register_module(force=True)\nclass OwnNeck(FPN):\n    pass\n"
        )
        (tmp_path / "config.py").write_text(
            f"_base_ = [{str(packaged('retinanet/retinanet_r18_fpn_1x_coco.py'))!r}]\n"
            "custom_imports = dict(imports=['own_flops_neck'])\nmodel = dict(neck=dict(type='OwnNeck'))\n"
        )
        config = read_config(tmp_path / "config.py").values
        state = build_network(config, modules=[tmp_path], allow_code=True).state_dict()
        torch.save({"state_dict": state, "meta": {"dataset_meta": {"classes": ["a"] * 80}}}, tmp_path / "w.pth")
        described = {"name": "own", "family": "mmdet", "config": "config.py", "modules": ["own_flops_neck.py"]}
        described["categories"] = [{"id": number, "name": f"thing {number}"} for number in range(1, 81)]
        spec = parse_spec(described, where="test", folder=tmp_path)
        archive = tmp_path / "store" / "own.mar"
        archive.parent.mkdir()
        build_archive(spec, folder=tmp_path, out=archive, weights=tmp_path / "w.pth", allow_code=True)
        # From here on the module lies in the archive only.
        (tmp_path / "own_flops_neck.py").unlink()
        monkeypatch.delitem(sys.modules, "own_flops_neck")
        monkeypatch.setattr(sys, "path", [one for one in sys.path if str(tmp_path) not in one])
        monkeypatch.setattr(sys, "path_importer_cache", {})
        assert main(["flops", str(archive), "--shape", "64"]) == 2
        assert "Allow them with --allow-code" in capsys.readouterr().err
        found = counted(capsys, archive, "--shape", "64", "--allow-code")
        plain = counted(capsys, packaged("retinanet/retinanet_r18_fpn_1x_coco.py"), "--shape", "64")
        assert found["macs"] == plain["macs"] > 0

    def test_what_cannot_be_counted_is_told(self, tmp_path, capsys):
        def refused(*arguments):
            assert main(["flops", *map(str, arguments)]) == 2
            return capsys.readouterr().err

        config = packaged("retinanet/retinanet_r50_fpn_1x_coco.py")
        assert "weights change no cost" in refused(config, "--weights", "a.pth")
        assert "'FasterRCNNN', which is in none of MMDetection's registries" in refused(
            config, "--cfg-options", "model.type=FasterRCNNN"
        )
        (tmp_path / "code.py").write_text("import os\nmodel = dict(type='RetinaNet')\n")
        assert "more than an assignment of data" in refused(tmp_path / "code.py")


def test_a_config_that_is_not_there(capsys):
    assert main(["flops", "config.py"]) == 2
    assert "got config.py, which is no file, expected one of a spec" in capsys.readouterr().err
