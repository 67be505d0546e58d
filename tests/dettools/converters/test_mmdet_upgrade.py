"""upgrade-checkpoint: every class keeps its channels, beside what the original made of them."""

import importlib.util
import json
import pickle
from pathlib import Path

import pytest
import torch
from dethandlers.artefact import digest_file
from detserve.errors import CheckpointError
from dettools.cli import main
from dettools.converters.conversion import ConversionError, MoveBackground
from dettools.converters.mmdet_changes import Change
from dettools.converters.mmdet_upgrade import upgrade_checkpoint
from old_detectors import (
    ANCHORS,
    CLASSES,
    WITH_BACKGROUND,
    numbered,
    original_reorder,
    original_truncate,
    retinanet,
    ssd,
    two_stage,
)

needs_mmdet = [
    pytest.mark.skipif(importlib.util.find_spec("mmdet") is None, reason="MMDetection is not installed"),
    pytest.mark.filterwarnings("ignore"),  # MMDetection's imports and constructors warn of their own past
]


def saved(folder: Path, state: dict[str, torch.Tensor], version: str | None = "1.2.0", **meta: object) -> Path:
    path = folder / "old.pth"
    told = {} if version is None else {"mmdet_version": version}
    torch.save({"meta": told | meta, "state_dict": state, "optimizer": {"lr": 0.1}}, path)
    return path


def classes_of(tensor: torch.Tensor) -> list[int]:
    """Which old channel each channel is: `numbered` writes it into the numbers."""
    return [int(one) for one in tensor.reshape(len(tensor), -1)[:, 0]]


def test_the_background_moves_last_in_weights_and_biases(tmp_path):
    found = upgrade_checkpoint(saved(tmp_path, two_stage(), CLASSES=CLASSES))
    for leaf in ("weight", "bias"):
        assert classes_of(found.state[f"roi_head.bbox_head.fc_cls.{leaf}"]) == [1, 2, 3, 4, 0]
        assert classes_of(found.state[f"roi_head.bbox_head.fc_reg.{leaf}"]) == list(range(4, 20))
        assert classes_of(found.state[f"roi_head.mask_head.conv_logits.{leaf}"]) == [1, 2, 3, 4]
        # Sigmoid scores of an RPN have no background, in no version.
        assert torch.equal(found.state[f"rpn_head.rpn_cls.{leaf}"], two_stage()[f"rpn_head.rpn_cls.{leaf}"])
    assert found.proven
    assert {proof.name for proof in found.proofs} == {
        "roi_head.bbox_head.fc_cls",
        "roi_head.bbox_head.fc_reg",
        "roi_head.mask_head.conv_logits",
    }
    assert max(proof.max_delta for proof in found.proofs) <= 1e-5


def test_the_original_drops_the_last_class_of_a_bias(tmp_path):
    """Its weights and biases are of different classes: each class is shifted by its neighbour's bias."""
    old = two_stage()
    assert classes_of(original_truncate(old["bbox_head.fc_reg.weight"], WITH_BACKGROUND)) == list(range(4, 20))
    assert classes_of(original_truncate(old["bbox_head.fc_reg.bias"], WITH_BACKGROUND)) == list(range(16))
    assert classes_of(original_truncate(old["mask_head.conv_logits.bias"], WITH_BACKGROUND)) == [0, 1, 2, 3]
    found = upgrade_checkpoint(saved(tmp_path, old))
    assert classes_of(found.state["roi_head.bbox_head.fc_reg.bias"]) == list(range(4, 20))
    assert classes_of(found.state["roi_head.mask_head.conv_logits.bias"]) == [1, 2, 3, 4]


def test_the_original_rolls_biases_that_have_no_background(tmp_path):
    """RetinaNet with sigmoid: weights stay, the bias moves by one class, across the borders of anchors."""
    old = retinanet()
    assert torch.equal(
        original_reorder(old["bbox_head.retina_cls.weight"], WITH_BACKGROUND), old["bbox_head.retina_cls.weight"]
    )
    assert classes_of(original_reorder(old["bbox_head.retina_cls.bias"], WITH_BACKGROUND)) == [*range(1, 12), 0]
    found = upgrade_checkpoint(saved(tmp_path, old, CLASSES=CLASSES))
    assert classes_of(found.state["bbox_head.retina_cls.bias"]) == list(range(12))
    assert not found.facts["needed"]


def test_softmax_scores_move_in_each_anchor(tmp_path):
    old = retinanet(WITH_BACKGROUND)
    expected = [1, 2, 3, 4, 0, 6, 7, 8, 9, 5, 11, 12, 13, 14, 10]
    found = upgrade_checkpoint(saved(tmp_path, old), classes=WITH_BACKGROUND)
    for leaf in ("weight", "bias"):
        assert classes_of(found.state[f"bbox_head.retina_cls.{leaf}"]) == expected
    # The original's bias: every background is the next anchor's.
    assert classes_of(original_reorder(old["bbox_head.retina_cls.bias"], WITH_BACKGROUND)) == [*range(1, 15), 0]
    assert found.proven


def original_bias(move: MoveBackground, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dim() > 1 or move.kept:
        return original_apply(move, tensor)
    return original_truncate(tensor, move.classes)


original_apply = MoveBackground.apply


def test_with_the_originals_bias_the_certificate_fails_and_nothing_is_written(tmp_path, monkeypatch, capsys):
    path, out = saved(tmp_path, two_stage()), tmp_path / "new.pth"
    monkeypatch.setattr(MoveBackground, "apply", original_bias)
    found = upgrade_checkpoint(path)
    failed = {proof.name: proof.max_delta for proof in found.proofs if not proof.passed}
    assert set(failed) == {"roi_head.bbox_head.fc_reg", "roi_head.mask_head.conv_logits"}
    assert min(failed.values()) > 0.5
    assert main(["upgrade-checkpoint", str(path), str(out)]) == 1
    assert "was not written" in capsys.readouterr().out
    assert sorted(one.name for one in tmp_path.iterdir()) == ["old.pth"]
    monkeypatch.undo()
    assert main(["upgrade-checkpoint", str(path), str(out)]) == 0


def test_a_bias_that_moves_without_its_weight_is_not_proven(tmp_path, capsys):
    state = {key: one for key, one in two_stage().items() if key != "mask_head.conv_logits.weight"}
    assert main(["upgrade-checkpoint", str(saved(tmp_path, state)), str(tmp_path / "new.pth")]) == 1
    assert "1 changed tensors are in no comparison" in capsys.readouterr().out


def test_a_small_bias_cannot_hide_behind_large_weights(tmp_path, monkeypatch):
    heads = two_stage()
    path = saved(tmp_path, heads | {key: heads[key] * 1e-4 for key in heads if key.endswith("fc_reg.bias")})
    monkeypatch.setattr(MoveBackground, "apply", original_bias)
    (boxes,) = (proof for proof in upgrade_checkpoint(path).proofs if proof.name.endswith("fc_reg"))
    assert boxes.largest > 10
    assert boxes.max_delta == pytest.approx(4e-4, rel=0.5)
    assert not boxes.passed


def softmax_rpn(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return state | {
        "rpn_head.rpn_cls.weight": numbered(2 * ANCHORS, 2, 1, 1),
        "rpn_head.rpn_cls.bias": numbered(2 * ANCHORS),
    }


def new_heads(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    heads = ("bbox_head", "mask_head")
    return {f"roi_head.{key}" if key.startswith(heads) else key: one for key, one in state.items()}


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("2.4.0", [1, 0, 3, 2, 5, 4]),
        ("2.5.0", list(range(6))),
        ("2.10.0", list(range(6))),
        ("2.4.9rc1", [1, 0, 3, 2, 5, 4]),
    ],
)
def test_the_rpn_changes_before_2_5_and_versions_are_no_texts(version, expected, tmp_path):
    found = upgrade_checkpoint(saved(tmp_path, new_heads(softmax_rpn(two_stage())), version))
    for leaf in ("weight", "bias"):
        assert classes_of(found.state[f"rpn_head.rpn_cls.{leaf}"]) == expected
        # The heads' background moved in 2.0, and does not move again.
        assert classes_of(found.state[f"roi_head.bbox_head.fc_cls.{leaf}"]) == [0, 1, 2, 3, 4]
    assert found.proven


def test_compared_as_texts_2_10_to_2_28_lose_their_rpn(tmp_path, monkeypatch):
    """The original's comparison: an RPN that was right takes objects for background."""
    path = saved(tmp_path, new_heads(softmax_rpn(two_stage())), "2.10.0")
    assert classes_of(upgrade_checkpoint(path).state["rpn_head.rpn_cls.bias"]) == [0, 1, 2, 3, 4, 5]
    monkeypatch.setattr(Change, "applies", lambda change, old, _: str(old) < change.since)
    assert classes_of(upgrade_checkpoint(path).state["rpn_head.rpn_cls.bias"]) == [1, 0, 3, 2, 5, 4]


def test_every_stage_of_a_cascade_is_read_from_its_own_shape(tmp_path):
    """The original takes any list of heads for class-agnostic."""
    state = two_stage()
    stages = {
        key.replace("bbox_head", f"bbox_head.{stage}"): one
        for stage, agnostic in enumerate((True, False))
        for key, one in two_stage(agnostic=agnostic).items()
        if key.startswith("bbox_head")
    }
    shared = {key: one for key, one in state.items() if not key.startswith("bbox_head")}
    extra = {"shared_head.layer4.0.conv1.weight": numbered(2, 2, 1, 1), "mask_iou_head.fc_mask_iou.bias": numbered(5)}
    extra |= {"mask_iou_head.fc_mask_iou.weight": numbered(5, 3), "semantic_head.conv_logits.bias": numbered(10)}
    found = upgrade_checkpoint(saved(tmp_path, shared | stages | extra))
    assert classes_of(found.state["roi_head.bbox_head.0.fc_reg.bias"]) == [0, 1, 2, 3]
    assert classes_of(found.state["roi_head.bbox_head.1.fc_reg.bias"]) == list(range(4, 20))
    assert classes_of(found.state["roi_head.mask_iou_head.fc_mask_iou.bias"]) == [1, 2, 3, 4]
    # Semantic classes never had a background in front, though their number is a multiple of the others'.
    assert classes_of(found.state["roi_head.semantic_head.conv_logits.bias"]) == list(range(10))
    assert "roi_head.shared_head.layer4.0.conv1.weight" in found.state


def test_a_detector_with_given_proposals_has_roi_heads(tmp_path):
    state = {key: one for key, one in two_stage().items() if not key.startswith("rpn_head")}
    assert "roi_head.bbox_head.fc_cls.weight" in upgrade_checkpoint(saved(tmp_path, state)).state


@pytest.mark.parametrize(("version", "conv"), [("0.5.3", "conv."), ("0.5.3+abc1234", "conv."), ("0.5.4", "")])
def test_retinanets_convolutions_became_modules_after_0_5_3(version, conv, tmp_path):
    found = upgrade_checkpoint(saved(tmp_path, retinanet(modules=False), version), classes=WITH_BACKGROUND)
    assert {f"bbox_head.cls_convs.0.{conv}weight", f"bbox_head.reg_convs.0.{conv}bias"} <= found.state.keys()


def test_ssd_moves_its_background_and_to_its_neck(tmp_path):
    path = saved(tmp_path, ssd(), CLASSES=CLASSES)
    found = upgrade_checkpoint(path)
    assert classes_of(found.state["bbox_head.cls_convs.0.0.bias"])[:10] == [1, 2, 3, 4, 0, 6, 7, 8, 9, 5]
    assert {"neck.extra_layers.0.0.conv.weight", "neck.extra_layers.1.1.conv.weight", "neck.l2_norm.weight"} <= set(
        found.state
    )
    assert found.proven
    # For a version before 2.14 the names stay.
    older = upgrade_checkpoint(path, wanted="2.13.0").state
    assert "backbone.extra.3.weight" in older
    assert classes_of(older["bbox_head.cls_convs.1.weight"])[:5] == [1, 2, 3, 4, 0]


def test_from_2_5_on_nothing_is_needed_and_that_is_told(tmp_path, capsys):
    path, out = saved(tmp_path, new_heads(two_stage()), "2.25.0"), tmp_path / "new.pth"
    assert main(["upgrade-checkpoint", str(path), str(out)]) == 0
    assert "nothing is needed: MMDetection 3.3.0 loads weights of 2.25.0 as they are" in capsys.readouterr().err
    state = torch.load(out, weights_only=True)["state_dict"]
    assert all(torch.equal(one, state[key]) for key, one in new_heads(two_stage()).items())


def test_no_background_moves_twice(tmp_path):
    path, once, twice = saved(tmp_path, two_stage()), tmp_path / "once.pth", tmp_path / "twice.safetensors"
    assert main(["upgrade-checkpoint", str(path), str(once)]) == 0
    assert main(["upgrade-checkpoint", str(once), str(twice)]) == 0
    assert classes_of(upgrade_checkpoint(twice).state["roi_head.bbox_head.fc_cls.bias"]) == [1, 2, 3, 4, 0]


def test_no_background_moves_twice_where_only_the_version_was_kept(tmp_path):
    """A published checkpoint keeps mmdet_version, and a RetinaNet's names do not tell that it was upgraded."""
    once = upgrade_checkpoint(saved(tmp_path, retinanet(WITH_BACKGROUND)), classes=WITH_BACKGROUND)
    assert classes_of(once.state["bbox_head.retina_cls.bias"])[:5] == [1, 2, 3, 4, 0]
    torch.save({"state_dict": once.state, "meta": {"mmdet_version": once.meta["mmdet_version"]}}, tmp_path / "once.pth")
    twice = upgrade_checkpoint(tmp_path / "once.pth", classes=WITH_BACKGROUND)
    assert torch.equal(twice.state["bbox_head.retina_cls.bias"], once.state["bbox_head.retina_cls.bias"])
    assert once.meta["upgraded"]["from"] == "1.2.0"


@pytest.mark.parametrize(
    ("state", "version", "options", "message"),
    [
        (two_stage(), None, {}, "expected the version of MMDetection that made the weights"),
        (two_stage(), "newest", {}, "got the version 'newest'"),
        (two_stage(), "3.1.0", {"wanted": "2.5.0"}, "expected an older version than --to"),
        (two_stage(), "1.0", {"wanted": "4.0"}, "at most 3.3.0"),
        (two_stage(), "1.0", {"classes": 81}, "Give --num-classes 5, or leave it out"),
        (retinanet(20), "1.0", {}, "expected 243 or 240 for 81 classes"),
        ({"bbox_head.transformer.x": numbered(1)}, "2.25.0", {}, "of DETR and its kin"),
        (two_stage() | {"bbox_head.fc_reg.bias": numbered(7)}, "1.0", {}, "got 7 outputs, expected 20 for 5 classes"),
        ({"bbox_head.fcos_cls.bias": numbered(80)}, "1.0", {}, "got no bbox_head.fcos_reg.bias beside it"),
        ({"bbox_head.fc_cls.bias": torch.tensor(1.0)}, "1.0", {}, r"got the shape \(\), expected a linear layer's"),
        ({"bbox_head.fc_cls.weight": torch.tensor(1.0)}, "1.0", {}, r"got the shape \(\), expected a linear layer's"),
    ],
)
def test_what_cannot_be_right_is_refused(state, version, options, message, tmp_path):
    with pytest.raises(ConversionError, match=message):
        upgrade_checkpoint(saved(tmp_path, state, version), **options)


def test_names_that_contradict_the_version_are_refused(tmp_path):
    """The original script leaves 1.x beside what it upgraded: upgraded again, each class would be its neighbour's."""
    agnostic = {key: one for key, one in two_stage(agnostic=True).items() if not key.startswith("mask_head")}
    upgraded = saved(tmp_path, new_heads(agnostic), "1.0.0")
    with pytest.raises(ConversionError, match=r"named roi_head.*said to be of 1\.0\.0.*--from 2\.0\.0"):
        upgrade_checkpoint(upgraded)
    found = upgrade_checkpoint(upgraded, made_by="2.0.0").state
    assert classes_of(found["roi_head.bbox_head.fc_cls.bias"]) == [0, 1, 2, 3, 4]
    with pytest.raises(ConversionError, match=r"named bbox_head.*said to be of 2\.28\.0.*--from 1\.2\.0"):
        upgrade_checkpoint(saved(tmp_path, two_stage(), "2.28.0"))
    # DETR's head has an fc_cls under bbox_head in all versions.
    detr = {"backbone.conv1.weight": numbered(2), "bbox_head.fc_cls.weight": numbered(5, 3)}
    assert not upgrade_checkpoint(saved(tmp_path, detr, "2.28.0")).facts["needed"]


def test_what_weights_cannot_tell_is_told(tmp_path):
    notes = upgrade_checkpoint(saved(tmp_path, two_stage())).notes
    assert any("LegacyAnchorGenerator" in note for note in notes)
    assert not any("Legacy" in note for note in upgrade_checkpoint(saved(tmp_path, retinanet(), "2.1.0")).notes)


def test_the_certificate_does_not_call_a_renamed_tensor_proven(tmp_path):
    found = upgrade_checkpoint(saved(tmp_path, two_stage()))
    assert found.coverage == {
        "by_outputs": 6,
        "copied_under_their_name": 6,
        "copied_under_another_name": 0,
        "changed_without_proof": 0,
    }
    # No output is compared where only names change.
    renamed = upgrade_checkpoint(saved(tmp_path, retinanet(modules=False), "0.5.3"), classes=WITH_BACKGROUND)
    assert (renamed.coverage["by_outputs"], renamed.coverage["copied_under_another_name"]) == (0, 2)


def test_a_version_can_be_given(tmp_path):
    path = saved(tmp_path, two_stage(), None)
    assert classes_of(upgrade_checkpoint(path, made_by="1.2.0").state["roi_head.bbox_head.fc_cls.bias"])[-1] == 0


def test_a_malicious_checkpoint_is_refused(tmp_path):
    touched, path = tmp_path / "touched", tmp_path / "bad.pth"

    class Malicious:
        def __reduce__(self):
            return (exec, (f"open({str(touched)!r}, 'w').close()",))

    torch.save({"state_dict": two_stage(), "meta": {"mmdet_version": "1.0", "env": Malicious()}}, path)
    with pytest.raises(CheckpointError, match=r"nothing was executed: unpickling it would call .*exec"):
        upgrade_checkpoint(path)
    path.write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(CheckpointError, match="refused"):
        upgrade_checkpoint(path)
    assert not touched.exists()


def test_the_certificate_tells_both_files_and_every_row(tmp_path, capsys):
    path, out = saved(tmp_path, two_stage(), CLASSES=CLASSES, config="model = dict()"), tmp_path / "new.pth"
    assert main(["upgrade-checkpoint", str(path), str(out), "--num-classes", "5", "--explain", "--json"]) == 0
    printed = capsys.readouterr()
    document = json.loads(printed.out.splitlines()[-1])
    certificate = json.loads((tmp_path / "new.pth.certificate.json").read_text())
    assert certificate["source"]["sha256"] == digest_file(path)
    assert certificate["target"]["sha256"] == digest_file(out) == document["written"]["sha256"]
    assert certificate["proven"]
    assert {
        "source": "bbox_head.fc_reg.bias",
        "transform": "background (channel 0 of 5) left out",
        "target": "roi_head.bbox_head.fc_reg.bias",
        "shape": [16],
    } in certificate["rows"]
    for line in (
        "reorder cls channels of roi_head.bbox_head.fc_cls.bias",
        "truncate regression channels of roi_head.bbox_head.fc_reg.weight",
        "truncate mask prediction channels of roi_head.mask_head.conv_logits.bias",
        "rename the name of bbox_head.fc_cls.weight to roi_head.bbox_head.fc_cls.weight",
    ):
        assert line in printed.err
    (hen,) = (line for line in printed.err.splitlines() if line.strip().startswith("hen"))
    assert " ".join(hen.split()) == "hen 4 → 3 16–19 → 12–15 4 → 3"
    (background,) = (line for line in printed.err.splitlines() if line.strip().startswith("background "))
    assert " ".join(background.split()) == "background 0 → 4 0–3 → left out 0 → left out"
    written = torch.load(out, weights_only=True)
    assert written["meta"]["config"] == "model = dict()"
    assert "optimizer" not in written
    assert "left out: optimizer" in printed.err


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    path = saved(tmp_path, two_stage())
    assert main(["upgrade-checkpoint", str(path), str(tmp_path / "new.pth"), "--dry-run"]) == 0
    assert "would be written (dry run)" in capsys.readouterr().out
    assert [one.name for one in tmp_path.iterdir()] == ["old.pth"]


CONFIG = """
model = dict(
    type="MaskRCNN",
    data_preprocessor=dict(type="DetDataPreprocessor"),
    backbone=dict(type="ResNet", depth=18, base_channels=8, num_stages=4, out_indices=(0, 1, 2, 3)),
    neck=dict(type="FPN", in_channels=[8, 16, 32, 64], out_channels=8, num_outs=5),
    rpn_head=dict(
        type="RPNHead", in_channels=8, feat_channels=8,
        anchor_generator=dict(type="AnchorGenerator", scales=[8], ratios=[0.5, 1.0, 2.0], strides=[4, 8, 16, 32, 64]),
        bbox_coder=dict(type="DeltaXYWHBBoxCoder"),
    ),
    roi_head=dict(
        type="StandardRoIHead",
        bbox_roi_extractor=dict(
            type="SingleRoIExtractor", roi_layer=dict(type="RoIAlign", output_size=7, sampling_ratio=0),
            out_channels=8, featmap_strides=[4, 8, 16, 32],
        ),
        bbox_head=dict(
            type="Shared2FCBBoxHead", in_channels=8, fc_out_channels=16, roi_feat_size=7, num_classes=4,
            bbox_coder=dict(type="DeltaXYWHBBoxCoder"), reg_class_agnostic=False,
        ),
        mask_roi_extractor=dict(
            type="SingleRoIExtractor", roi_layer=dict(type="RoIAlign", output_size=14, sampling_ratio=0),
            out_channels=8, featmap_strides=[4, 8, 16, 32],
        ),
        mask_head=dict(type="FCNMaskHead", num_convs=1, in_channels=8, conv_out_channels=8, num_classes=4),
    ),
    train_cfg=None,
    test_cfg=dict(
        rpn=dict(nms_pre=50, max_per_img=20, nms=dict(type="nms", iou_threshold=0.7), min_bbox_size=0),
        rcnn=dict(score_thr=0.0, nms=dict(type="nms", iou_threshold=0.5), max_per_img=20, mask_thr_binary=0.5),
    ),
)
"""


def with_background_first(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A detector of MMDetection 3 as 1.x would have stored it; the background's boxes and masks are noise."""
    old = {}
    for key, one in state.items():
        name = key.removeprefix("roi_head.")
        if ".fc_cls." in key:
            one = torch.cat([one[-1:], one[:-1]])
        elif ".fc_reg." in key:
            one = torch.cat([torch.randn(4, *one.shape[1:]), one])
        elif ".conv_logits." in key:
            one = torch.cat([torch.randn(1, *one.shape[1:]), one])
        old[name] = one
    return old


class TestWithMMDetection:
    pytestmark = needs_mmdet

    @pytest.mark.shared_data
    def test_a_trained_detector_of_mmdetection_3_needs_nothing(self, shared_data, tmp_path, capsys):
        folder, out = shared_data / "models/mmdet_yolox_nano", tmp_path / "new.pth"
        (checkpoint,), (config,) = folder.glob("*.pth"), folder.glob("*.py")
        assert main(["upgrade-checkpoint", str(checkpoint), str(out), "--config", str(config), "--json"]) == 0
        printed = capsys.readouterr()
        assert "nothing is needed" in printed.err
        document = json.loads(printed.out.splitlines()[-1])
        assert document["missing"] == document["unexpected"] == []

    def test_an_upgraded_detector_gives_the_outputs_it_was_made_from(self, tmp_path):
        from dethandlers.mmdet_model import build_network
        from detserve.mmdet_config import read_config

        config = tmp_path / "mask_rcnn.py"
        config.write_text(CONFIG)
        torch.manual_seed(0)
        network = build_network(read_config(config).values)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, 0, 0.2)
        state = {key: one.clone() for key, one in network.state_dict().items()}
        path, out = saved(tmp_path, with_background_first(state)), tmp_path / "new.pth"
        assert main(["upgrade-checkpoint", str(path), str(out), "--config", str(config)]) == 0

        features = torch.randn(6, 8, 7, 7)
        masks = torch.randn(6, 8, 14, 14)
        with torch.inference_mode():
            scores, boxes = network.roi_head.bbox_head(features)
            shapes = network.roi_head.mask_head(masks)
            network.load_state_dict(torch.load(out, weights_only=True)["state_dict"])
            new_scores, new_boxes = network.roi_head.bbox_head(features)
            new_shapes = network.roi_head.mask_head(masks)
        assert (scores - new_scores).abs().max() <= 1e-5
        assert (boxes - new_boxes).abs().max() <= 1e-5
        assert (shapes - new_shapes).abs().max() <= 1e-5

    def test_weights_that_do_not_fill_the_configs_model_are_not_proven(self, tmp_path, capsys):
        config = tmp_path / "mask_rcnn.py"
        config.write_text(CONFIG)
        path, out = saved(tmp_path, {"backbone.bn1.bias": torch.zeros(8), "more": numbered(1)}), tmp_path / "new.pth"
        assert main(["upgrade-checkpoint", str(path), str(out), "--config", str(config)]) == 1
        printed = capsys.readouterr().out
        assert "missing: backbone.conv1.weight" in printed
        assert "not in the config's model: more" in printed
        assert not out.exists()
