"""MMDetection's scripts from packing to the picture, on a real server: a trained detector, and masks."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from detserve.mmdet_config import read_config
from dettools.cli import main
from PIL import Image

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(importlib.util.find_spec("mmdet") is None, reason="MMDetection is not installed"),
    # MMDetection's imports and constructors warn of their own past.
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def masks(tmp_path_factory):
    """RTMDet-Ins with random weights and a small test scale: the folder with its config and checkpoint."""
    from dethandlers.mmdet_model import build_network

    folder = tmp_path_factory.mktemp("masks")
    package = Path(importlib.util.find_spec("mmdet").submodule_search_locations[0])
    values = read_config(package / ".mim/configs/rtmdet/rtmdet-ins_tiny_8xb32-300e_coco.py").values
    for step in values["test_dataloader"]["dataset"]["pipeline"]:
        step |= {"scale": (96, 96)} if step["type"] == "Resize" else {}
        step |= {"size": (96, 96)} if step["type"] == "Pad" else {}
    (folder / "ins.py").write_text("".join(f"{key} = {value!r}\n" for key, value in values.items()))
    torch.manual_seed(5)
    network = build_network(values)
    with torch.no_grad():
        for layer in network.bbox_head.rtm_cls:
            layer.weight.mul_(100)
    meta = {"dataset_meta": {"classes": tuple(f"thing {number}" for number in range(80))}}
    torch.save({"state_dict": network.state_dict(), "meta": meta}, folder / "ins.pth")
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randint(0, 256, (12, 16, 3), generator=generator, dtype=torch.uint8).numpy()
    Image.fromarray(pixels).resize((128, 96)).save(folder / "scene.png")
    return folder


def test_masks_are_compared_where_the_model_has_them(masks, serve, tmp_path, capsys):
    config, checkpoint = str(masks / "ins.py"), str(masks / "ins.pth")
    store = tmp_path / "store"
    assert main(["mmdet2torchserve", config, checkpoint, "--output-folder", str(store)]) == 0
    assert "detserve archive" in capsys.readouterr().err
    name = serve([store / "ins.mar"], "masks")
    command = ["compare", config, checkpoint, "--model", "ins", str(masks / "scene.png"), "--instance", name, "--json"]
    assert main(command) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["passed"]
    assert document["matched"] > 0
    assert document["min_mask_iou"] > 0.99
    assert "MMDetection" in document["eager_source"]
    assert main([*command, "--no-masks"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["min_mask_iou"] is None


@pytest.mark.shared_data
def test_the_document_s_two_commands_on_a_trained_detector(shared_data, serve, tmp_path, monkeypatch, capsys):
    model, photo = shared_data / "models" / "mmdet_yolox_nano", shared_data / "photos" / "dog.jpg"
    config, checkpoint = str(model / "yolox_nano_8xb8-300e_coco.py"), str(model / "yolox_nano_mmdet.pth")
    store, work = tmp_path / "store", tmp_path / "work"
    packing = ["mmdet2torchserve", config, checkpoint, "--output-folder", str(store), "--model-name", "nano"]
    assert main([*packing, "--model-version", "2.0"]) == 0
    assert main(packing) == 2
    assert "--force" in capsys.readouterr().err
    name = serve([store / "nano.mar"], "aliases")
    monkeypatch.setenv("DETSERVE_INSTANCE", name)
    testing = ["test-torchserver", str(photo), config, checkpoint, "nano", "--device", "cpu"]
    assert main([*testing, "--work-dir", str(work), "--score-thr", "0.3"]) == 0
    told = capsys.readouterr()
    assert "PASS 1 of 1 images" in told.out
    # Eager on the left, served on the right.
    with Image.open(work / "dog.png") as sheet:
        assert sheet.width > 1.5 * sheet.height
    assert json.loads((work / "comparison.json").read_text())["score_threshold"] == 0.3
    # Another model's weights are found out.
    other = tmp_path / "other.pth"
    content = torch.load(checkpoint, weights_only=True)
    for tensor in content["state_dict"].values():
        tensor.mul_(1.05) if tensor.is_floating_point() and tensor.ndim == 4 else None
    torch.save(content, other)
    testing[3] = str(other)
    assert main(testing) == 1
    shutil.rmtree(store)


@pytest.mark.shared_data
def test_eager_is_measured_on_a_config_and_its_checkpoint(shared_data, capsys):
    model, photo = shared_data / "models" / "mmdet_yolox_nano", shared_data / "photos" / "dog.jpg"
    config, checkpoint = str(model / "yolox_nano_8xb8-300e_coco.py"), str(model / "yolox_nano_mmdet.pth")
    options = ["--images", str(photo), "--min-time", "1s", "--repeat", "1", "--threads", "1"]
    assert main(["benchmark", "eager", config, checkpoint, *options, "--json"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["target"]["source"].startswith("MMDetection")
    # As the original's benchmark.py names the checkpoint.
    assert main(["benchmark", "eager", config, "--checkpoint", checkpoint, *options]) == 0
    capsys.readouterr()
    for wrong, words in (
        ([config], "expected its checkpoint too"),
        ([config, checkpoint, "--weights", checkpoint], "--weights"),
        (["spec.yaml", checkpoint], "expected CONFIG.py CHECKPOINT.pth"),
    ):
        assert main(["benchmark", "eager", *wrong, *options]) == 2
        assert words in capsys.readouterr().err
