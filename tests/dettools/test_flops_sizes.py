"""The sizes at which `detserve flops` counts an ONNX file: what the file fixes, what it says of itself, what is asked.

The networks are one convolution of 3×3 from three channels to four: 108 MACs a pixel.
"""

import json

import numpy as np
import onnx
import pytest
from dethandlers.artefact import category_map_json
from dethandlers.detections import Category
from dethandlers.spec import Preprocessing, Spec
from dettools.cli import main
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from small_networks import write_graph

MACS_A_PIXEL = 3 * 4 * 9
SHORTER = Preprocessing(resize="shorter_side", shorter_side=60, longer_side=100, divisor=32)


def network(path, *, size=("height", "width"), batch="batch", settings=None):
    """Write a file, with a description where it has settings."""
    kernel = numpy_helper.from_array(np.zeros((4, 3, 3, 3), np.float32), "kernel")
    nodes = [helper.make_node("Conv", ["images", "kernel"], ["maps"], pads=[1, 1, 1, 1])]
    inputs = [("images", TensorProto.FLOAT, [batch, 3, *size])]
    write_graph(path, nodes, inputs, [("maps", TensorProto.FLOAT, [batch, 4, *size])], [kernel])
    if settings is not None:
        categories = (Category(1, "cat", 1),)
        spec = Spec("small", "torchvision", categories, runtime="onnx", builder="fcos_resnet50_fpn", num_classes=2)
        described = {**spec.to_json(), "preprocessing": vars(settings)}
        model = onnx.load(path)
        properties = {"detserve.spec": described, "detserve.category_map": category_map_json(categories)}
        helper.set_model_props(model, {key: json.dumps(value) for key, value in properties.items()})
        onnx.save(model, path)
    return path


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name, size in (("square", (50, 50)), ("wide", (200, 100)), ("wider", (202, 100)), ("tall", (100, 200))):
        Image.new("RGB", size).save(folder / f"{name}.png")
    return folder


def flops(capsys, *arguments):
    assert main(["flops", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def refusal(capsys, *arguments):
    assert main(["flops", *map(str, arguments)]) == 2
    return capsys.readouterr().err


def test_a_file_that_says_how_it_resizes_is_counted_at_its_largest_landscape_image(tmp_path, capsys):
    found = flops(capsys, network(tmp_path / "free.onnx", settings=SHORTER))
    assert found["input_size"] == [64, 128]
    assert found["macs"] == 64 * 128 * MACS_A_PIXEL
    assert found["notes"][0] == "padded from 60×100 to multiples of 32 px, as served"


def test_what_is_asked_is_padded_as_served(tmp_path, capsys):
    path = network(tmp_path / "free.onnx", settings=SHORTER)
    found = flops(capsys, path, "--shape", 33, 64)
    assert found["input_size"] == [64, 64]
    assert "padded from 33×64" in found["notes"][0]
    assert flops(capsys, path, "--shape", 64)["notes"] == []


def test_each_image_is_counted_at_its_own_size(tmp_path, images, capsys):
    """Of 50×50 px, 60×60 in 64×64; of 200×100 and 202×100, 50×100 and 49×100 in 64×128; of 100×200, 128×64."""
    found = flops(capsys, network(tmp_path / "free.onnx", settings=SHORTER), "--images", images)
    average = found["average"]
    assert (average["images"], average["shapes"]) == (4, 3)
    assert average["macs"] == pytest.approx((64 * 64 + 3 * 64 * 128) / 4 * MACS_A_PIXEL)
    assert average["smallest"]["input_size"] == [64, 64]


def test_a_file_that_stretches_is_counted_at_the_size_it_stretches_to(tmp_path, images, capsys):
    path = network(tmp_path / "stretch.onnx", settings=Preprocessing(resize="stretch", size=(48, 80)))
    assert flops(capsys, path)["input_size"] == [48, 80]
    assert flops(capsys, path, "--images", images)["average"]["macs"] == 48 * 80 * MACS_A_PIXEL


def test_what_a_file_fixes_is_what_every_image_costs(tmp_path, images, capsys):
    for settings in (None, SHORTER):
        path = network(tmp_path / "fixed.onnx", size=(40, 72), settings=settings)
        assert flops(capsys, path)["input_size"] == [40, 72]
        assert flops(capsys, path, "--images", images)["average"]["macs"] == 40 * 72 * MACS_A_PIXEL
        assert "expected what the file fixes" in refusal(capsys, path, "--shape", 64)


def test_a_foreign_file_of_open_size_needs_a_size(tmp_path, images, capsys):
    path = network(tmp_path / "foreign.onnx")
    assert "Give it with --shape HEIGHT WIDTH" in refusal(capsys, path)
    assert flops(capsys, path, "--shape", 33, 65)["macs"] == 33 * 65 * MACS_A_PIXEL
    told = refusal(capsys, path, "--images", images)
    assert "does not say how images are resized" in told
    assert "Give --shape HEIGHT WIDTH instead" in told


def test_a_fixed_batch_is_divided_where_an_image_is_meant(tmp_path, images, capsys):
    path = network(tmp_path / "batch.onnx", size=(100, 100), batch=3)
    found = flops(capsys, path, "--images", images)
    assert (found["batch"], found["macs"]) == (3, 3 * 100 * 100 * MACS_A_PIXEL)
    assert found["average"]["macs"] == found["average"]["most_macs"] == 100 * 100 * MACS_A_PIXEL
    assert found["average"]["largest"]["most_macs"] == 100 * 100 * MACS_A_PIXEL
    for more in ([], ["--images", images]):
        assert main(["flops", str(path), *map(str, more)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[-4] == "Flops: 1.08M"
        assert any("3.240 M, 1.080 M an image" in line for line in lines)
