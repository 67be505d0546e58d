"""MACs of ONNX files against figures worked out by hand, against PyTorch, and of real files against their papers."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from dettools.flops.cost import FlopsError
from dettools.flops.onnx_count import count_onnx
from dettools.flops.onnx_stages import find_stages
from dettools.flops.torch_detector import count_detector, input_size
from dettools.onnx_graph.inputs import make_feed
from dettools.onnx_graph.model_file import OnnxFileError, read_onnx
from dettools.onnx_graph.shapes import infer_shapes, run_shapes
from random_detectors import random_detector, random_images
from torchvision.models import get_model

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

FLOAT, INT = TensorProto.FLOAT, TensorProto.INT64


def weight(name, *shape):
    return numpy_helper.from_array(np.ones(shape, np.float32), name)


def indices(name, *values):
    return numpy_helper.from_array(np.array(values, np.int64), name)


def write(path: Path, nodes, image, initializers=(), *, more_inputs=(), outputs=("y",), opset=17):
    """Write a model whose first input is ``image``; the outputs' shapes are left open."""
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", FLOAT, image), *more_inputs],
        [helper.make_tensor_value_info(name, FLOAT, None) for name in outputs],
        list(initializers),
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = 10
    onnx.save(model, path)
    return read_onnx(path)


def node(kind, inputs, outputs="y", **attributes):
    return helper.make_node(kind, inputs.split(), outputs.split(), **attributes)


IMAGE = (1, 4, 10, 12)
LAYERS = [
    ("Conv", [weight("w", 8, 4, 3, 3), weight("b", 8)], {}, 8 * 8 * 10 * 4 * 9),
    ("Conv", [weight("w", 8, 4, 3, 3)], {"strides": [2, 2], "pads": [1, 1, 1, 1]}, 8 * 5 * 6 * 4 * 9),
    ("Conv", [weight("w", 8, 4, 3, 3)], {"dilations": [2, 2]}, 8 * 6 * 8 * 4 * 9),
    ("Conv", [weight("w", 8, 1, 3, 3)], {"group": 4}, 8 * 8 * 10 * 1 * 9),
    ("ConvTranspose", [weight("w", 4, 6, 2, 2)], {"strides": [2, 2]}, 4 * 120 * 6 * 4),
    ("ConvTranspose", [weight("w", 4, 3, 3, 3)], {"group": 2}, 4 * 120 * 3 * 9),
    ("MatMul", [weight("w", 12, 7)], {}, 4 * 10 * 7 * 12),
    ("Einsum", [weight("w", 4, 5)], {"equation": "bchw,cd->bdhw"}, 1 * 4 * 10 * 12 * 5),
    ("Einsum", [weight("w", 12, 5)], {"equation": "...w,wd->...d"}, 1 * 4 * 10 * 12 * 5),
]


@pytest.mark.parametrize(("kind", "weights", "attributes", "by_hand"), LAYERS)
def test_layers_cost_what_they_cost_by_hand(tmp_path, kind, weights, attributes, by_hand):
    names = " ".join(["x", *(one.name for one in weights)])
    file = write(tmp_path / "a.onnx", [node(kind, names, **attributes)], IMAGE, weights)
    assert count_onnx(file, None).macs == by_hand
    # What a run tells is the same.
    feed = make_feed(file, None)
    static, ran = infer_shapes(file, feed), run_shapes(file, feed)
    assert static.unknown == ran.skipped == 0
    assert [one.outputs for one in static.nodes] == [one.outputs for one in ran.nodes]


def test_a_fully_connected_layer(tmp_path):
    nodes = [node("Flatten", "x", "f"), node("Gemm", "f w b", transB=1)]
    file = write(tmp_path / "a.onnx", nodes, IMAGE, [weight("w", 7, 480), weight("b", 7)])
    assert count_onnx(file, None).macs == 7 * 480


def test_attention_is_two_matrix_products(tmp_path):
    attention = node("Attention", "x k v")
    initializers = [weight("k", 1, 4, 7, 12), weight("v", 1, 4, 7, 5)]
    file = write(tmp_path / "a.onnx", [attention], IMAGE, initializers, opset=23)
    assert count_onnx(file, None).macs == 4 * 10 * 7 * (12 + 5)


@pytest.mark.parametrize(("mode", "taps"), [("nearest", 0), ("linear", 4)])
def test_resizing_weighs_neighbours(tmp_path, mode, taps):
    scales = numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "scales")
    file = write(
        tmp_path / "a.onnx", [helper.make_node("Resize", ["x", "", "scales"], ["y"], mode=mode)], IMAGE, [scales]
    )
    assert count_onnx(file, None).macs == 4 * 20 * 24 * taps


def test_a_deformable_convolution_is_the_convolution_and_its_samples(tmp_path):
    initializers = [weight("w", 6, 4, 3, 3), weight("offset", 1, 18, 8, 10)]
    file = write(tmp_path / "a.onnx", [node("DeformConv", "x w offset")], IMAGE, initializers, opset=19)
    assert count_onnx(file, None).macs == 6 * 80 * 4 * 9 + 4 * (80 * 4 * 9)


def test_grid_sampling_weighs_four_pixels(tmp_path):
    file = write(tmp_path / "a.onnx", [node("GridSample", "x grid")], IMAGE, [weight("grid", 1, 5, 6, 2)])
    assert count_onnx(file, None).macs == 4 * 5 * 6 * 4


def test_quantised_convolutions_cost_what_the_others_do(tmp_path):
    scale = numpy_helper.from_array(np.float32(0.1), "s")
    zero = numpy_helper.from_array(np.uint8(0), "z")
    kernel = numpy_helper.from_array(np.ones((8, 4, 3, 3), np.uint8), "w")
    nodes = [
        node("QuantizeLinear", "x s z", "q"),
        node("QLinearConv", "q s z w s z s z", "r"),
        node("DequantizeLinear", "r s z"),
    ]
    cost = count_onnx(write(tmp_path / "a.onnx", nodes, IMAGE, [scale, zero, kernel]), None)
    assert cost.macs == 8 * 8 * 10 * 4 * 9
    assert cost.parameter_types["uint8"] == 8 * 4 * 9 + 1


def align(features, rois, output, ratio=2):
    return node("RoiAlign", f"{features} {rois} batch", output, output_height=7, output_width=7, sampling_ratio=ratio)


def two_stage(path, rois=5):
    """A backbone, a box head over ``rois`` proposals, and a mask head over the two boxes that NMS keeps."""
    nodes = [
        node("Conv", "x w", "f"),
        align("f", "rois", "a"),
        node("Flatten", "a", "flat"),
        node("Gemm", "flat w2", "boxes", transB=1),
        node("Unsqueeze", "boxes zero", "boxes3"),
        node("ReduceSum", "boxes one", "s", keepdims=1),
        node("Transpose", "s", "st", perm=[1, 0]),
        node("Unsqueeze", "st zero", "scores"),
        node("NonMaxSuppression", "boxes3 scores most", "kept"),
        node("Gather", "kept two", "index", axis=1),
        node("Gather", "boxes index", "chosen", axis=0),
        node("ConstantOfShape", "chosen_count", "batch2", value=helper.make_tensor("v", INT, [1], [0])),
        node("RoiAlign", "f chosen batch2", "m", output_height=14, output_width=14, sampling_ratio=2),
        node("Conv", "m w3", "y"),
    ]
    nodes.insert(11, node("Shape", "index", "chosen_count"))
    initializers = [
        weight("w", 8, 4, 1, 1),
        numpy_helper.from_array(np.tile(np.array([0, 0, 4, 4], np.float32), (rois, 1)), "rois"),
        indices("batch", *[0] * rois),
        weight("w2", 4, 8 * 49),
        numpy_helper.from_array(np.int64([0]), "zero"),
        numpy_helper.from_array(np.int64([1]), "one"),
        numpy_helper.from_array(np.int64(2), "two"),
        numpy_helper.from_array(np.int64([2]), "most"),
        weight("w3", 3, 8, 1, 1),
    ]
    return write(path, nodes, IMAGE, initializers)


def test_heads_behind_roi_align_cost_per_proposal_and_per_detection(tmp_path):
    file = two_stage(tmp_path / "a.onnx")
    cost = count_onnx(file, None, max_proposals=300, max_detections=20)
    proposal, detection = cost.parts
    assert cost.macs == 8 * 120 * 4
    assert (proposal.item, proposal.seen, proposal.most) == ("proposal", 5, 300)
    assert proposal.macs == 8 * 49 * 4 * 4 + 4 * 8 * 49
    assert (detection.item, detection.seen, detection.most) == ("detection", 2, 20)
    assert detection.macs == 8 * 196 * 4 * 4 + 3 * 196 * 8
    assert cost.most_macs == cost.macs + 300 * proposal.macs + 20 * detection.macs
    assert "onnxruntime" in cost.measured_by


def test_a_run_without_proposals_still_tells_what_one_costs(tmp_path):
    nodes = [node("Conv", "x w", "f"), align("f", "rois", "a"), node("Conv", "a w3", "y")]
    empty = numpy_helper.from_array(np.zeros((0, 4), np.float32), "rois")
    initializers = [weight("w", 8, 4, 1, 1), weight("w3", 3, 8, 1, 1), empty, indices("batch")]
    cost = count_onnx(write(tmp_path / "a.onnx", nodes, IMAGE, initializers), None)
    assert [(part.seen, part.macs) for part in cost.parts] == [(0, 8 * 49 * 16 + 3 * 49 * 8)]


def test_a_file_that_detserve_exported_says_how_many_there_can_be(tmp_path):
    path = tmp_path / "a.onnx"
    file = two_stage(path)
    spec = {"builder": "maskrcnn_resnet50_fpn", "builder_options": {"rpn_post_nms_top_n_test": 40}}
    helper.set_model_props(file.proto, {"detserve.spec": json.dumps({**spec, "serving": {"max_detections": 30}})})
    assert [part.most for part in count_onnx(file, None).parts] == [40, 30]
    helper.set_model_props(file.proto, {"detserve.spec": "no JSON"})
    assert [part.most for part in count_onnx(file, None).parts] == [1000, 100]
    assert [part.most for part in count_onnx(file, None, max_proposals=8, max_detections=3).parts] == [8, 3]


def test_stages_follow_the_data(tmp_path):
    file = two_stage(tmp_path / "a.onnx")
    stages = find_stages(file.proto.graph)
    assert stages.items == ("proposal", "detection")
    heads = [
        stages.of_node[place] for place, one in enumerate(file.proto.graph.node) if one.op_type in ("Conv", "Gemm")
    ]
    assert heads == [0, 1, 2]


def test_a_loop_costs_as_often_as_it_runs(tmp_path):
    body = helper.make_graph(
        [node("Identity", "cond", "again"), node("Conv", "state w", "next")],
        "body",
        [
            helper.make_tensor_value_info("round", INT, []),
            helper.make_tensor_value_info("cond", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("again", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", FLOAT, None),
        ],
    )
    nodes = [helper.make_node("Loop", ["rounds", "", "x"], ["y"], body=body)]
    initializers = [numpy_helper.from_array(np.int64(3), "rounds"), weight("w", 4, 4, 1, 1)]
    cost = count_onnx(write(tmp_path / "a.onnx", nodes, IMAGE, initializers), None)
    assert cost.macs == 3 * (4 * 120 * 4)
    assert cost.operators[0].calls == 3


def test_a_function_of_the_file_costs_what_is_in_it(tmp_path):
    """torch's newer exporter may keep modules as functions."""
    block = helper.make_function(
        "mine",
        "Block",
        ["a", "b"],
        ["d"],
        [node("Conv", "a b", "c"), node("Relu", "c", "d")],
        [helper.make_opsetid("", 17)],
    )
    graph = helper.make_graph(
        [
            helper.make_node("Block", ["x", "w"], ["m"], domain="mine"),
            helper.make_node("Block", ["m", "w"], ["y"], domain="mine"),
        ],
        "small",
        [helper.make_tensor_value_info("x", FLOAT, IMAGE)],
        [helper.make_tensor_value_info("y", FLOAT, None)],
        [weight("w", 4, 4, 1, 1)],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("mine", 1)]
    model = helper.make_model(graph, opset_imports=opsets, functions=[block])
    model.ir_version = 10
    onnx.save(model, tmp_path / "a.onnx")
    cost = count_onnx(read_onnx(tmp_path / "a.onnx"), None)
    assert cost.macs == 2 * 4 * 120 * 4
    assert [one.operator for one in cost.uncounted] == ["Relu"]


def test_what_has_no_formula_is_listed_and_reshaping_is_not(tmp_path):
    nodes = [
        node("Conv", "x w", "c"),
        node("Sigmoid", "c", "s"),
        node("MaxPool", "s", "p", kernel_shape=[2, 2], strides=[2, 2]),
        node("Flatten", "p"),
    ]
    cost = count_onnx(write(tmp_path / "a.onnx", nodes, IMAGE, [weight("w", 8, 4, 1, 1)]), None)
    assert [(one.operator, one.kind, one.elements) for one in cost.uncounted] == [
        ("Sigmoid", "arithmetic", 960),
        ("MaxPool", "comparisons", 240),
    ]
    assert cost.uncounted_share == pytest.approx(1200 / 2160)
    assert cost.parameters == 32


def test_an_open_size_must_be_given_and_a_fixed_one_wins(tmp_path):
    conv = [node("Conv", "x w")]
    dynamic = write(tmp_path / "a.onnx", conv, ("batch", 4, "height", "width"), [weight("w", 8, 4, 1, 1)])
    with pytest.raises(OnnxFileError, match=r"x is \[batch, 4, height, width\]: got no size .* --shape HEIGHT WIDTH"):
        count_onnx(dynamic, None)
    assert count_onnx(dynamic, (10, 12)).macs == count_onnx(dynamic, (20, 6)).macs == 8 * 120 * 4
    fixed = write(tmp_path / "b.onnx", conv, IMAGE, [weight("w", 8, 4, 1, 1)])
    assert count_onnx(fixed, (10, 12)).input_size == (10, 12)
    with pytest.raises(OnnxFileError, match=r"got --shape 20 20, expected what the file fixes: x is \[1, 4, 10, 12\]"):
        count_onnx(fixed, (20, 20))
    assert issubclass(FlopsError, Exception)


def test_the_other_inputs_of_an_exported_detector_are_fed(tmp_path):
    nodes = [
        node("Conv", "x w", "c"),
        node("Cast", "image_sizes", "sizes", to=FLOAT),
        node("ReduceSum", "sizes", "sum", keepdims=0),
        node("Add", "c sum", "d"),
        node("Add", "d score_threshold", "y"),
    ]
    threshold = numpy_helper.from_array(np.float32(0.3), "score_threshold")
    file = write(
        tmp_path / "a.onnx",
        nodes,
        ("batch", 4, "height", "width"),
        [weight("w", 8, 4, 1, 1), threshold],
        more_inputs=[
            helper.make_tensor_value_info("image_sizes", INT, ["batch", 2]),
            helper.make_tensor_value_info("score_threshold", FLOAT, []),
        ],
    )
    feed = make_feed(file, (10, 12))
    assert feed.arrays["image_sizes"].tolist() == [[10, 12]]
    assert "score_threshold" not in feed.arrays
    assert run_shapes(file, feed).nodes[-1].outputs == ((1, 8, 10, 12),)


def test_a_batch_that_the_file_fixes_is_counted_whole(tmp_path):
    file = write(tmp_path / "a.onnx", [node("Conv", "x w")], (3, 4, 10, 12), [weight("w", 8, 4, 1, 1)])
    cost = count_onnx(file, None)
    assert (cost.batch, cost.macs) == (3, 3 * 8 * 120 * 4)


def export(model, image, path):
    """By torch's tracing exporter, which needs nothing but onnx."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, ([image],), path, dynamo=False, opset_version=16)
    return read_onnx(path)


@pytest.mark.slow
@pytest.mark.parametrize("builder", ["ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn"])
def test_a_file_costs_what_the_model_costs_that_it_was_exported_from(tmp_path, builder):
    found = random_detector(builder, random_images())
    model = get_model(builder, weights=None, weights_backbone=None, num_classes=5, **found.options).eval()
    model.load_state_dict(found.state)
    size = input_size(model, None if "ssd" in builder else (192, 256))
    eager = count_detector(model, size, subject="", max_detections=100)
    file = export(model, torch.rand(3, *size.resized), tmp_path / "a.onnx")
    exported = count_onnx(file, None)
    assert exported.macs == eager.macs
    assert [(part.item, part.macs) for part in exported.parts] == [(part.item, part.macs) for part in eager.parts]


@pytest.mark.shared_data
def test_yolox_nano_costs_what_its_paper_says_once_the_conventions_agree(shared_data):
    """The paper's 1.08 GFLOPs at 416 px are twice what `thop` counts, and thop counts two per batch-normed value.

    In the file the batch norms are folded into the convolutions: 0.523 G MACs are left.
    """
    file = read_onnx(shared_data / "models" / "yolox_nano" / "yolox_nano.onnx")
    cost = count_onnx(file, None)
    assert cost.macs == 522_553_408
    # Every convolution that an activation follows had a batch norm: each is one Sigmoid (SiLU) in the file.
    feed = make_feed(file, None)
    convolved = {
        one.node.output[0]: one.outputs[0] for one in infer_shapes(file, feed).nodes if one.node.op_type == "Conv"
    }
    normed = sum(
        int(np.prod(convolved[one.input[0]]))
        for one in file.proto.graph.node
        if one.op_type == "Sigmoid" and one.input[0] in convolved and convolved[one.input[0]][1] not in (1, 80)
    )
    assert 2 * (cost.macs + 2 * normed) / 1e9 == pytest.approx(1.08, abs=0.005)


@pytest.mark.shared_data
def test_real_files_are_counted(shared_data):
    models = shared_data / "models"
    assert count_onnx(read_onnx(models / "fastestdet" / "FastestDet.onnx"), None).macs == 121_491_744
    assert count_onnx(read_onnx(models / "ultraface" / "version-RFB-320.onnx"), None).macs == 100_418_560
