"""detectron2pytorch: backbones of Caffe2 and Detectron2 compute the same under torchvision's names."""

import copy
import functools
import importlib.util
import json
import pickle
import struct
from io import BytesIO
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from dettools.cli import main
from dettools.converters.conversion import ConversionError
from dettools.converters.detectron import convert_detectron
from dettools.restricted_pickle import RestrictedPickleError, load_restricted
from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet

needs_mmdet = [
    pytest.mark.skipif(importlib.util.find_spec("mmdet") is None, reason="MMDetection is not installed"),
    pytest.mark.filterwarnings("ignore"),  # MMDetection's imports and constructors warn of their own past
]
BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
EPSILON = 1e-5
SIDE = 64


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def network(depth=50, *, groups=1, width=64, caffe=True, frozen=True) -> ResNet:
    """A ResNet with numbers in every tensor: ``frozen`` has an affine map where torchvision normalises."""
    torch.manual_seed(3)
    made = ResNet(Bottleneck, list(BLOCKS[depth]), num_classes=2, groups=groups, width_per_group=width).eval()
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.3, 0.9)
            nn.init.normal_(module.bias, 0, 0.1)
            if frozen:
                module.running_var.fill_(1 - EPSILON)
            else:
                nn.init.normal_(module.running_mean, 0, 0.1)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
    if caffe:
        for stage in (made.layer2, made.layer3, made.layer4):
            stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
    return made


def parts(made: ResNet):
    """Every convolution with its normalisation: stage (0 is the stem), block, branch."""
    yield 0, 0, "stem", made.conv1, made.bn1
    for stage in range(1, 5):
        for block, module in enumerate(getattr(made, f"layer{stage}")):
            if module.downsample is not None:
                yield stage, block, "shortcut", *module.downsample
            for number, letter in enumerate("abc", 1):
                yield stage, block, letter, getattr(module, f"conv{number}"), getattr(module, f"bn{number}")


def array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().numpy()


def caffe2(made: ResNet) -> dict[str, np.ndarray]:
    """Detectron's blobs."""
    branches = {"a": "branch2a", "b": "branch2b", "c": "branch2c", "shortcut": "branch1"}
    blobs = {"fc1000_w": array(made.fc.weight), "fc1000_b": array(made.fc.bias)}
    for stage, block, part, conv, norm in parts(made):
        name = f"res{stage + 1}_{block}_{branches[part]}" if stage else "conv1"
        affine = f"{name}_bn" if stage else "res_conv1_bn"
        blobs |= {
            f"{name}_w": array(conv.weight),
            f"{affine}_s": array(norm.weight),
            f"{affine}_b": array(norm.bias),
        }
    return blobs


def detectron2(made: ResNet, prefix: str = "") -> dict[str, np.ndarray]:
    """Detectron2's state."""
    layers = {"a": "conv1", "b": "conv2", "c": "conv3", "shortcut": "shortcut"}
    state = {}
    for stage, block, part, conv, norm in parts(made):
        name = prefix + (f"res{stage + 1}.{block}.{layers[part]}" if stage else "stem.conv1")
        state[f"{name}.weight"] = array(conv.weight)
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            state[f"{name}.norm.{leaf}"] = array(getattr(norm, leaf))
    return state


class Python2Pickler(pickle._Pickler):
    """Writes texts and bytes alike as Python 2's str, as Detectron's files have them."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_bytes(self, value):
        self.write(b"T" + struct.pack("<i", len(value)) + value)
        self.memoize(value)

    def save_text(self, value):
        self.save_bytes(value.encode("latin1"))

    dispatch[bytes] = save_bytes
    dispatch[str] = save_text


def python2(content: object) -> bytes:
    written = BytesIO()
    Python2Pickler(written, 2).dump(content)
    return written.getvalue()


def saved(folder: Path, content: bytes) -> Path:
    path = folder / "backbone.pkl"
    path.write_bytes(content)
    return path


def stages(made: ResNet, image: torch.Tensor) -> list[torch.Tensor]:
    pixels = made.maxpool(made.bn1(made.conv1(image)).relu())
    found = []
    for stage in (made.layer1, made.layer2, made.layer3, made.layer4):
        pixels = stage(pixels)
        found.append(pixels)
    return found


def test_caffe2s_affine_maps_become_normalisation_that_computes_the_same(tmp_path, capsys):
    made = network()
    blobs = caffe2(made) | {"conv1_w_momentum": np.zeros(3, np.float32), "lr": np.float32(0.1)}
    path, out = saved(tmp_path, python2({"blobs": blobs, "cfg": "MODEL: \xe9"})), tmp_path / "out.pth"
    assert main(["detectron2pytorch", str(path), str(out), "50"]) == 0
    printed = capsys.readouterr().out
    assert "Not Convert: conv1_w_momentum" in printed.splitlines()
    assert "images: BGR 0 to 255, mean 102.98, 115.947, 122.772, std 1, 1, 1" in printed
    certificate = json.loads((tmp_path / "out.pth.certificate.json").read_text())
    (proof,) = certificate["proofs"]
    assert proof["max_delta"] <= proof["tolerance"] <= 1e-4
    assert certificate["facts"]["architecture"] == "ResNet-50"
    written = torch.load(out, weights_only=True)
    preprocessing = written["meta"]["preprocessing"]
    assert preprocessing == certificate["facts"]["preprocessing"]
    assert preprocessing["style"] == "caffe"
    assert preprocessing["data_preprocessor"] == {
        "mean": [102.9801, 115.9465, 122.7717],
        "std": [1.0, 1.0, 1.0],
        "bgr_to_rgb": False,
    }
    loaded = copy.deepcopy(made)
    loaded.load_state_dict(written["state_dict"], strict=False)
    image = torch.randn(1, 3, SIDE, SIDE)
    with torch.inference_mode():
        for expected, found in zip(stages(made, image), stages(loaded, image), strict=True):
            assert (expected - found).abs().max() <= 1e-5
        # The original's variance of 1 makes every scale 5e-6 too small; the error grows from layer to layer.
        for module in loaded.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.fill_(1.0)
        expected, found = stages(made, image)[-1], stages(loaded, image)[-1]
        assert (expected - found).abs().max() > 1e-5 * expected.abs().max()


class TestWithMMDetection:
    pytestmark = needs_mmdet

    def test_mmdetections_caffe_resnet_loads_it(self, tmp_path):
        from dethandlers.mmcv_operators import provide

        provide()
        from mmdet.models.backbones import ResNet as MmdetResNet

        made = network()
        found = convert_detectron(saved(tmp_path, pickle.dumps(caffe2(made))))
        backbone = MmdetResNet(50, style="caffe")
        backbone.eval()
        state = {key: one for key, one in found.state.items() if not key.startswith("fc.")}
        missing = backbone.load_state_dict(state, strict=False).missing_keys
        assert all(key.endswith("num_batches_tracked") for key in missing)
        image = torch.randn(1, 3, SIDE, SIDE)
        with torch.inference_mode():
            for expected, stage in zip(stages(made, image), backbone(image), strict=True):
                assert (expected - stage).abs().max() <= 1e-5


def test_a_convolutions_bias_moves_into_the_normalisation(tmp_path):
    """torchvision's convolutions have none: the original writes conv1.bias, which nothing loads."""
    made = network()
    bias = torch.randn(64)
    found = convert_detectron(saved(tmp_path, pickle.dumps(caffe2(made) | {"conv1_b": bias.numpy()})))
    assert found.proven
    assert torch.equal(found.state["bn1.running_mean"], -bias)
    assert "conv1.bias" not in found.state


@pytest.mark.parametrize(
    ("author", "prefix", "frozen", "colours", "style"),
    [
        ("torchvision", "", False, "RGB", "pytorch"),
        ("Detectron2 Model Zoo", "backbone.bottom_up.", True, "BGR", "caffe"),
    ],
)
def test_detectron2(author, prefix, frozen, colours, style, tmp_path):
    made = network(frozen=frozen, caffe=style == "caffe")
    head = {"roi_heads.box_head.fc1.weight": np.zeros((2, 2), np.float32)}
    content = {"model": detectron2(made, prefix) | head, "__author__": author, "matching_heuristics": True}
    found = convert_detectron(saved(tmp_path, pickle.dumps(content)), depth=50)
    assert found.proven
    assert found.unused == tuple(head)
    assert found.facts["format"] == "Detectron2"
    assert (found.facts["preprocessing"]["colours"], found.facts["preprocessing"]["style"]) == (colours, style)
    assert found.rows[0].source == f"{prefix}stem.conv1.weight"
    state = made.state_dict()
    assert all(torch.equal(one, state[key]) for key, one in found.state.items())


@pytest.mark.parametrize(
    ("depth", "groups", "width", "name"),
    [(101, 32, 4, "ResNeXt-101 32x4d"), (152, 1, 64, "ResNet-152")],
)
def test_depth_and_groups_are_found_out(depth, groups, width, name, tmp_path):
    made = network(depth, groups=groups, width=width, caffe=groups == 1)
    found = convert_detectron(saved(tmp_path, pickle.dumps(caffe2(made))))
    assert found.proven
    assert found.facts["architecture"] == name
    assert found.facts["preprocessing"]["style"] == ("caffe" if groups == 1 else "pytorch")


def small(blocks: tuple[int, ...]) -> dict[str, np.ndarray]:
    one = np.zeros((1, 1, 1, 1), np.float32)
    return {f"res{stage}_{block}_branch2b_w": one for stage, count in enumerate(blocks, 2) for block in range(count)}


@pytest.mark.parametrize(
    ("content", "depth", "message"),
    [
        (small(BLOCKS[101]), 50, r"got 50, but backbone.pkl has 3 \+ 4 \+ 23 \+ 3 blocks, which is 101"),
        (small(BLOCKS[50]), 34, "got 34, expected one of 50, 101, 152"),
        (small((2, 2, 2, 2)), None, r"got 2 \+ 2 \+ 2 \+ 2 blocks, expected 3 \+ 4 \+ 6 \+ 3 \(50\)"),
        (small(BLOCKS[50]), None, "got no conv1_w, expected it for conv1.weight"),
        ({"encoder": np.zeros(2, np.float32)}, None, "got keys such as encoder, expected a ResNet of Detectron"),
        ({"blobs": {}}, None, "expected a pickle with arrays by name"),
        ({}, None, "got nothing, expected a pickle with arrays by name"),
    ],
)
def test_what_is_no_such_backbone_is_refused(content, depth, message, tmp_path):
    with pytest.raises(ConversionError, match=message):
        convert_detectron(saved(tmp_path, pickle.dumps(content)), depth=depth)


def test_a_malicious_pickle_is_refused_with_the_reason(tmp_path, capsys):
    touched = tmp_path / "touched"

    class Malicious:
        def __reduce__(self):
            return (exec, (f"open({str(touched)!r}, 'w').close()",))

    path = saved(tmp_path, pickle.dumps({"blobs": {"conv1_w": Malicious()}}))
    with pytest.raises(RestrictedPickleError, match=r"names builtins\.exec"):
        convert_detectron(path)
    assert main(["detectron2pytorch", str(path), str(tmp_path / "out.pth"), "50"]) == 2
    assert "nothing of it was run" in " ".join(capsys.readouterr().err.split())
    assert not touched.exists()


def test_arrays_of_python_2_are_read_only_where_their_encoding_is_told(tmp_path):
    path = saved(tmp_path, python2({"w": np.array([-1.5, 2.0], np.float32)}))
    assert load_restricted(path, encoding="latin1")["w"].tolist() == [-1.5, 2.0]
    with pytest.raises(RestrictedPickleError):
        load_restricted(path)


@pytest.mark.parametrize("key", ["res3_0_branch2b_offset_w", "res2_0_branch2a_gn_s"])
def test_a_resnet_with_other_parts_is_refused(key, tmp_path):
    """Both passes would leave a deformable convolution's offsets out, and agree."""
    blobs = caffe2(network()) | {key: np.zeros(2, np.float32)}
    with pytest.raises(ConversionError, match=f"got {key} in its blocks"):
        convert_detectron(saved(tmp_path, pickle.dumps(blobs)))
    momentum = caffe2(network()) | {"res3_0_branch2b_w_momentum": np.zeros(2, np.float32)}
    assert convert_detectron(saved(tmp_path, pickle.dumps(momentum))).unused == ("res3_0_branch2b_w_momentum",)


def test_half_of_the_statistics_is_no_statistics(tmp_path):
    blobs = caffe2(network()) | {"res_conv1_bn_rm": np.zeros(64, np.float32)}
    with pytest.raises(ConversionError, match="got one of res_conv1_bn_rm and res_conv1_bn_riv, expected both"):
        convert_detectron(saved(tmp_path, pickle.dumps(blobs)))
