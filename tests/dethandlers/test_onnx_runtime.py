"""The onnx runtime: what goes in and comes out by address, the file's own precision, one run a batch."""

import gc
import sys

import numpy as np
import pytest
import torch
from dethandlers.bound_session import DTYPES, BoundSession
from dethandlers.detections import Category
from dethandlers.errors import ArtefactError
from dethandlers.families import Batch, Limits, load_family
from dethandlers.runtimes.onnx_runtime import OnnxRuntime
from dethandlers.spec import Serving, Spec
from onnx import TensorProto, helper, numpy_helper
from small_networks import witness, write_graph

CPU = torch.device("cpu")


def runtime_of(weights, device=CPU, **serving):
    spec = Spec("small", "yolox", (Category(1, "one", 0),), runtime="onnx", serving=Serving(**serving))
    return OnnxRuntime(spec, load_family(spec), weights, device)


def batch_of(pixels, limits=Limits(0.25, 7)):  # noqa: B008 - frozen
    return Batch(pixels, tuple((10 + place, 20) for place in range(len(pixels))), limits)


def random_pixels(count, seed=0):
    return torch.rand((count, 3, 8, 12), generator=torch.Generator().manual_seed(seed))


# One run


def test_a_dynamic_batch_is_one_run(tmp_path):
    pixels = random_pixels(3)
    found = runtime_of(witness(tmp_path / "model.onnx")).run(batch_of(pixels))
    assert [one["together"].item() for one in found] == [3, 3, 3]
    for image, one in zip(pixels, found, strict=True):
        assert one["means"].item() == pytest.approx(image.mean().item(), abs=1e-6)


def test_a_fixed_batch_is_fed_in_its_size_and_the_last_is_filled_up(tmp_path):
    pixels = random_pixels(5)
    found = runtime_of(witness(tmp_path / "model.onnx", batch=2)).run(batch_of(pixels))
    assert [one["together"].item() for one in found] == [2] * 5
    for image, one in zip(pixels, found, strict=True):
        assert one["means"].item() == pytest.approx(image.mean().item(), abs=1e-6)


def test_sizes_threshold_and_maximum_reach_a_file_that_takes_them(tmp_path):
    nodes = [
        helper.make_node("Shape", ["images"], ["count"], start=0, end=1),
        helper.make_node("Identity", ["image_sizes"], ["sizes"]),
        helper.make_node("Expand", ["score_threshold", "count"], ["thresholds"]),
        helper.make_node("Expand", ["max_detections", "count"], ["maxima"]),
    ]
    inputs = [
        ("images", TensorProto.FLOAT, ["batch", 3, "height", "width"]),
        ("image_sizes", TensorProto.INT64, ["batch", 2]),
        ("score_threshold", TensorProto.FLOAT, []),
        ("max_detections", TensorProto.INT64, []),
    ]
    outputs = [
        ("sizes", TensorProto.INT64, ["batch", 2]),
        ("thresholds", TensorProto.FLOAT, ["batch"]),
        ("maxima", TensorProto.INT64, ["batch"]),
    ]
    defaults = [
        numpy_helper.from_array(np.array(0.05, np.float32), "score_threshold"),
        numpy_helper.from_array(np.array(100, np.int64), "max_detections"),
    ]
    weights = write_graph(tmp_path / "model.onnx", nodes, inputs, outputs, defaults=defaults)
    for _ in ("fresh", "cached"):
        first, second = runtime_of(weights).run(batch_of(random_pixels(2), Limits(0.375, 9)))
        assert (first["sizes"].tolist(), second["sizes"].tolist()) == ([10, 20], [11, 20])
        assert second["thresholds"].item() == 0.375
        assert second["maxima"].item() == 9


# Memory


@pytest.fixture
def casting(tmp_path):
    """A network whose outputs are its input in every type there is."""
    types = {name: getattr(TensorProto, name.upper()) for name in ("float", "float16", "bfloat16", "double", "bool")}
    types |= {name: getattr(TensorProto, name.upper()) for name in ("int64", "int32", "int16", "int8", "uint8")}
    assert {f"tensor({name})" for name in types} == set(DTYPES)
    nodes = [helper.make_node("Cast", ["images"], [f"as {name}"], to=to) for name, to in types.items()]
    outputs = [(f"as {name}", to, ["batch", 3]) for name, to in types.items()]
    path = write_graph(tmp_path / "types.onnx", nodes, [("images", TensorProto.FLOAT, ["batch", 3])], outputs)
    return bound(path)


def bound(path, device=CPU):
    import onnxruntime

    provider = "CUDAExecutionProvider" if device.type == "cuda" else "CPUExecutionProvider"
    return BoundSession(onnxruntime.InferenceSession(str(path), providers=[provider]), device)


def test_outputs_of_every_type_come_as_they_are_and_half_precision_as_float32(casting):
    values = torch.tensor([[0.0, 1.0, 3.0], [100.0, 7.0, 0.0]])
    found = casting.run({"images": values})
    for name, tensor in found.items():
        kept = DTYPES[f"tensor({name.removeprefix('as ')})"]
        assert tensor.dtype == (torch.float32 if kept in (torch.float16, torch.bfloat16) else kept), name
        assert torch.equal(tensor, values.to(kept).to(tensor.dtype)), name


def test_an_output_without_elements_keeps_its_shape(casting):
    found = casting.run({"images": torch.zeros(0, 3)})
    assert {tuple(tensor.shape) for tensor in found.values()} == {(0, 3)}
    assert found["as int64"].dtype == torch.int64
    assert found["as float16"].dtype == torch.float32


def test_inputs_that_are_not_contiguous_are_read_in_their_order(casting):
    values = torch.arange(6.0).reshape(3, 2).T
    assert not values.is_contiguous()
    assert torch.equal(casting.run({"images": values})["as float"], values)


def test_outputs_outlive_later_runs_and_the_session(tmp_path):
    weights = witness(tmp_path / "model.onnx")
    runtime, pixels = runtime_of(weights), random_pixels(4)
    first = runtime.run(batch_of(pixels))
    for seed in range(20):
        runtime.run(batch_of(random_pixels(4, seed + 1)))
    del runtime
    gc.collect()
    assert torch.allclose(torch.stack([one["means"] for one in first]), pixels.mean(dim=(1, 2, 3)))


def test_an_output_that_is_no_tensor_of_numbers_is_refused(tmp_path):
    nodes = [helper.make_node("Cast", ["images"], ["words"], to=TensorProto.STRING)]
    four = ["batch", 3, 8, 12]
    weights = write_graph(
        tmp_path / "model.onnx", nodes, [("images", TensorProto.FLOAT, four)], [("words", TensorProto.STRING, four)]
    )
    with pytest.raises(ArtefactError, match=r"network output words: got tensor\(string\), expected one of"):
        runtime_of(weights)


# Precision


def halving(path, *, element=TensorProto.FLOAT16, metadata=None):
    """Write a network that divides by three in half precision; ``element`` is the type of its input and output."""
    nodes = [
        helper.make_node("Cast", ["images"], ["half"], to=TensorProto.FLOAT16),
        helper.make_node("Div", ["half", "three"], ["third"]),
        helper.make_node("Cast", ["third"], ["thirds"], to=element),
    ]
    shape = ["batch", 3, "height", "width"]
    constants = [numpy_helper.from_array(np.array(3, np.float16), "three")]
    return write_graph(
        path, nodes, [("images", element, shape)], [("thirds", element, shape)], constants, metadata=metadata
    )


@pytest.mark.parametrize(
    ("element", "metadata"),
    [
        (TensorProto.FLOAT16, None),
        (TensorProto.FLOAT16, {"precision": "fp16"}),
        (TensorProto.FLOAT, {"precision": "fp16"}),
    ],
    ids=["by its input", "half input", "float input"],
)
def test_a_half_precision_file_is_fed_in_its_type_and_answers_in_float32(tmp_path, element, metadata):
    weights = halving(tmp_path / "model.onnx", element=element, metadata=metadata)
    pixels = random_pixels(2)
    for expected in ("fresh", "cached"):
        runtime = runtime_of(weights, precision="fp16")
        described = runtime.describe()
        assert (described["precision"], described["optimisation"]) == ("fp16", expected)
        found = torch.stack([one["thirds"] for one in runtime.run(batch_of(pixels))])
        assert found.dtype == torch.float32
        # Not to the bit: onnxruntime leaves out a cast to half precision that is taken back at once.
        assert torch.allclose(found, pixels / 3, rtol=0, atol=5e-4)


@pytest.mark.parametrize(
    ("metadata", "named", "own"),
    [
        (None, "fp32", "fp16"),
        ({"precision": "fp16"}, "fp32", "fp16"),
        ({"precision": "fp16"}, "bf16", "fp16"),
        ({"precision": "fp32"}, "fp16", "fp32"),
    ],
)
def test_a_spec_that_names_another_precision_than_the_file_s_is_refused(tmp_path, metadata, named, own):
    weights = halving(tmp_path / "model.onnx", metadata=metadata)
    with pytest.raises(ArtefactError) as caught:
        runtime_of(weights, precision=named)
    assert caught.value.message.startswith(f"precision: got '{named}' with runtime 'onnx', expected '{own}'")
    assert f"Set precision: {own}" in caught.value.message


@pytest.mark.parametrize("metadata", ["no json", "[]", '{"opset": 17}'])
def test_metadata_that_does_not_say_the_precision_is_refused(tmp_path, metadata):
    with pytest.raises(ArtefactError, match=r"model\.onnx: got metadata 'detserve\.export' that is not read"):
        runtime_of(witness(tmp_path / "model.onnx", metadata=metadata))


def test_an_input_of_another_type_is_refused_before_the_first_image(tmp_path):
    nodes = [helper.make_node("Identity", ["images"], ["same"])]
    four = ["batch", 3, 8, 12]
    weights = write_graph(
        tmp_path / "model.onnx", nodes, [("images", TensorProto.UINT8, four)], [("same", TensorProto.UINT8, four)]
    )
    with pytest.raises(ArtefactError, match=r"got an input images of tensor\(uint8\), expected one of tensor\(float\)"):
        runtime_of(weights)


# What runs


def test_threads_are_the_spec_s_then_the_environment_s(tmp_path, monkeypatch):
    weights = witness(tmp_path / "model.onnx")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert runtime_of(weights).describe()["threads"] == 3
    assert runtime_of(weights, threads=2).describe()["threads"] == 2
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert runtime_of(weights).describe()["threads"] is None


def test_provider_and_options_are_described(tmp_path):
    described = runtime_of(witness(tmp_path / "model.onnx"), tf32=True, deterministic=True).describe()
    assert (described["runtime"], described["provider"]) == ("onnx", "CPUExecutionProvider")
    assert (described["device"], described["precision"]) == ("cpu", "fp32")
    assert described["deterministic"] is True
    assert described["tf32"] is False  # there is none on a CPU


@pytest.mark.parametrize(
    ("content", "said"),
    [("", "an onnxruntime without its content"), ("raise ImportError('libx.so is missing')", "libx.so is missing")],
)
def test_an_onnxruntime_that_is_broken_is_told_from_one_that_refuses_the_file(tmp_path, monkeypatch, content, said):
    weights = witness(tmp_path / "model.onnx")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "onnxruntime.py").write_text(content)
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    monkeypatch.syspath_prepend(tmp_path / "broken")
    with pytest.raises(ArtefactError, match=said) as caught:
        runtime_of(weights)
    assert "detserve[onnx-gpu]" in caught.value.message


# On the GPU


@pytest.fixture
def gpu(cuda):
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has no CUDA provider")
    return torch.device(cuda)


@pytest.mark.gpu
def test_the_batch_is_read_from_the_gpu_and_answered_there(gpu, tmp_path):
    weights = halving(tmp_path / "model.onnx")
    runtime = runtime_of(weights, gpu, precision="fp16")
    assert (runtime.device, runtime.describe()["provider"]) == (gpu, "CUDAExecutionProvider")
    pixels = random_pixels(3)
    found = runtime.run(batch_of(pixels.to(gpu)))
    assert {one["thirds"].device for one in found} == {gpu}
    assert torch.allclose(torch.stack([one["thirds"] for one in found]).cpu(), (pixels.half() / 3).float(), atol=1e-3)


@pytest.mark.gpu
def test_an_output_of_a_node_on_the_cpu_is_right_on_the_gpu(gpu, tmp_path):
    pixels = random_pixels(3)
    found = runtime_of(witness(tmp_path / "model.onnx"), gpu).run(batch_of(pixels.to(gpu)))
    assert {output.device for one in found for output in one.values()} == {gpu}
    assert [one["together"].item() for one in found] == [3, 3, 3]
    assert torch.allclose(torch.stack([one["means"].cpu() for one in found]), pixels.mean(dim=(1, 2, 3)), atol=1e-5)


@pytest.mark.gpu
def test_outputs_without_elements_are_on_the_gpu_too(gpu, tmp_path):
    nodes = [helper.make_node("Identity", ["images"], ["same"])]
    types = [("images", TensorProto.FLOAT, ["batch", 3])], [("same", TensorProto.FLOAT, ["batch", 3])]
    session = bound(write_graph(tmp_path / "model.onnx", nodes, *types), gpu)
    assert session.run({"images": torch.zeros(0, 3, device=gpu)})["same"].shape == (0, 3)


@pytest.mark.gpu
def test_neither_stream_overtakes_the_other(gpu, tmp_path):
    """Inputs still being written, and outputs still being read, while the next run is asked for."""
    nodes = [helper.make_node("Add", ["images", "images"], ["twice"])]
    types = [("images", TensorProto.FLOAT, ["n"])], [("twice", TensorProto.FLOAT, ["n"])]
    session = bound(write_graph(tmp_path / "model.onnx", nodes, *types), gpu)
    busy, sums = torch.rand(2048, 2048, device=gpu), []
    for number in range(50):
        slow = (busy @ busy).sum() * 0
        doubled = session.run({"images": torch.full((1 << 20,), float(number), device=gpu) + slow})["twice"]
        slow = (busy @ busy).sum() * 0
        sums.append((doubled + slow).double().mean())
        del doubled
    assert [one.item() for one in sums] == [2.0 * number for number in range(50)]


@pytest.mark.gpu
def test_tf32_is_off_unless_the_spec_allows_it(gpu, tmp_path):
    weights = witness(tmp_path / "model.onnx")
    assert runtime_of(weights, gpu).describe()["tf32"] is False
    assert runtime_of(weights, gpu, tf32=True).describe()["tf32"] is True
