"""`detserve flops` as it is called: specs without weights, archives, shapes, folders, the block of the original."""

import json

import pytest
from dettools.cli import main
from dettools.reports.flops_tables import amount, original_amount
from PIL import Image

SPEC = """
name: tiny
family: torchvision
builder: {builder}
categories: [{{id: 1, name: cat}}, {{id: 2, name: dog}}]
serving: {{max_detections: 20}}
"""


@pytest.fixture
def spec(tmp_path):
    def write(builder, more=""):
        path = tmp_path / f"{builder}.yaml"
        path.write_text(SPEC.format(builder=builder) + more)
        return str(path)

    return write


def document(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def refused(arguments, capsys):
    assert main(["flops", *arguments]) == 2
    return capsys.readouterr().err


def test_a_spec_needs_no_weights(spec, capsys):
    path = spec("fasterrcnn_mobilenet_v3_large_320_fpn", "weights: not_there.safetensors\n")
    assert main(["flops", path, "--shape", "96", "128", "--json"]) == 0
    found = document(capsys)
    assert found["input_size"] == [96, 128]
    assert found["flops"] == 2 * found["macs"]
    [proposal] = found["parts"]
    # The box head of 150 proposals, its last layers for two categories and the background.
    assert proposal["macs"] == 12544 * 1024 + 1024 * 1024 + 1024 * (3 + 12) + 256 * 49 * 4 * 4
    assert found["most_macs"] == found["macs"] + 150 * proposal["macs"]
    assert any("random ones and 3 classes" in note for note in found["notes"])


def test_focal_loss_detectors_have_no_background_class(spec, capsys):
    assert main(["flops", spec("fcos_resnet50_fpn"), "--shape", "32", "--json"]) == 0
    assert any("2 classes" in note for note in document(capsys)["notes"])


def test_the_demo_spec_and_its_archive_cost_the_same(tmp_path, capsys):
    from checkout import ROOT

    spec = ROOT / "model_store" / "shapes" / "shapes.yaml"
    assert main(["flops", str(spec), "--json"]) == 0
    of_spec = document(capsys)
    assert of_spec["input_size"] == [320, 320]
    assert of_spec["parameter_types"] == {"float16": of_spec["parameters"]}
    assert main(["archive", str(spec), "--out", str(tmp_path / "shapes.mar"), "--json"]) == 0
    capsys.readouterr()
    assert main(["flops", str(tmp_path / "shapes.mar"), "--json"]) == 0
    assert document(capsys)["macs"] == of_spec["macs"]
    assert main(["flops", "shapes", "--model-store", str(tmp_path), "--json"]) == 0
    assert document(capsys)["macs"] == of_spec["macs"]
    assert main(["flops", "shapes", "--model-store", str(ROOT / "model_store"), "--shape", "640", "--json"]) == 0
    found = document(capsys)
    assert found["macs"] == of_spec["macs"]
    assert "fixed size 320×320" in found["notes"][0]


def test_the_original_s_block_stands_last(spec, capsys):
    assert main(["flops", spec("ssdlite320_mobilenet_v3_large")]) == 0
    lines = capsys.readouterr().out.splitlines()
    label, *block = lines[-8:]
    assert "Flops below are multiply-accumulates" in label
    rule = "=" * 30
    assert [block[0], block[5]] == [rule, rule]
    assert block[1:3] == ["Compute type: direct: randomly generate a picture", "Input shape: (320, 320)"]
    assert block[3].startswith("Flops: 0.4")
    assert block[4].startswith("Params: 2.")
    assert block[6].startswith("!!!Please be cautious if you use the results in papers.")


@pytest.mark.parametrize(
    ("value", "printed"),
    [
        (208_000_000_000, "0.208T"),
        (41_750_000, "41.75M"),
        (415_300_000, "0.415G"),
        (98_000, "98K"),
        (99, "99"),
        (0, "0"),
    ],
)
def test_amounts_are_printed_as_the_original_does(value, printed):
    assert original_amount(value) == printed


def test_amounts_have_four_digits():
    assert [amount(value) for value in (0, 999, 1000, 4_089_184_256)] == ["0", "999", "1.000 k", "4.089 G"]


def test_the_mean_over_a_folder(tmp_path, spec, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    for number, size in enumerate([(200, 100), (200, 100), (100, 100)]):
        Image.new("RGB", size).save(folder / f"{number}.png")
    options = ["--cfg-options", "builder_options.min_size=64", "builder_options.max_size=128", "--images", str(folder)]
    path = spec("retinanet_resnet50_fpn")
    assert main(["flops", path, *options, "--json"]) == 0
    found = document(capsys)
    # Landscape images become 64×128 px, twice the pixels of the square one's 64×64.
    assert found["average"]["images"] == 3
    assert found["average"]["shapes"] == 2
    assert found["input_size"] == found["average"]["largest"]["input_size"] == [64, 128]
    small = found["average"]["smallest"]
    assert small["input_size"] == [64, 64]
    assert found["average"]["macs"] == pytest.approx((2 * found["macs"] + small["macs"]) / 3)
    assert main(["flops", path, *options, "--num-images", "2"]) == 0
    shown = capsys.readouterr().out
    assert "mean of 2 images in 1 input size:" in shown
    assert "Compute type: dataloader: load a picture from the dataset" in shown


def test_usage_errors_say_what_was_got_and_what_to_do(tmp_path, spec, capsys):
    path = spec("retinanet_resnet50_fpn")
    assert "got 1 2 3, expected a height and a width" in refused([path, "--shape", "1", "2", "3"], capsys)
    assert "got 0, expected at least 1" in refused([path, "--num-images", "0"], capsys)
    assert "got both --shape and --images" in refused([path, "--shape", "64", "--images", "x"], capsys)
    assert "expected KEY=VALUE" in refused([path, "--cfg-options", "min_size"], capsys)
    assert "builder_options: got 'nonsense'" in refused([path, "--cfg-options", "builder_options.nonsense=1"], capsys)
    assert "unknown key 'nonsense'" in refused([path, "--cfg-options", "nonsense=1"], capsys)
    assert "builder: got 'frcnn', expected one of" in refused([path, "--cfg-options", "builder=frcnn"], capsys)
    assert "which is no file, expected a checkpoint" in refused([path, "--weights", "none.pth"], capsys)
    assert "holds the archives: none" in refused(["nothing", "--model-store", str(tmp_path)], capsys)
    assert "expected the ONNX file that is to be counted" in refused([path, "--cfg-options", "runtime=onnx"], capsys)


@pytest.mark.shared_data
def test_an_onnx_spec_counts_its_file(shared_data, capsys):
    from checkout import ROOT

    weights = shared_data / "models" / "yolox_nano" / "yolox_nano.onnx"
    spec = ROOT / "model_store" / "yolox_nano" / "yolox_nano.yaml"
    assert main(["flops", str(spec), "--weights", str(weights), "--json"]) == 0
    assert document(capsys)["macs"] == 522_553_408
    assert "--weights: got" in refused([str(weights), "--weights", str(weights)], capsys)
