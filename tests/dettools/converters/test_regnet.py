"""regnet2mmdet: what pycls, timm, torchvision and MMDetection call a RegNet's parts, proven by its outputs."""

import dataclasses
import importlib.util
import itertools
import json
from pathlib import Path

import pytest
import torch
from dettools.cli import main
from dettools.converters import regnet_names
from dettools.converters.conversion import ConversionError
from dettools.converters.regnet import convert_regnet
from torch import nn
from torchvision.models.regnet import BlockParams, RegNet

needs_mmdet = [
    pytest.mark.skipif(importlib.util.find_spec("mmdet") is None, reason="MMDetection is not installed"),
    pytest.mark.filterwarnings("ignore"),  # MMDetection's imports and constructors warn of their own past
]
WIDTHS, DEPTHS, GROUP, STEM = (16, 24, 32, 40), (1, 2, 1, 2), 8, 8


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class PyclsTransform(nn.Module):
    """pycls' bottleneck transform, by its attributes."""

    def __init__(self, inputs, width, stride, squeeze):
        super().__init__()
        self.a = nn.Conv2d(inputs, width, 1, bias=False)
        self.a_bn = nn.BatchNorm2d(width)
        self.b = nn.Conv2d(width, width, 3, stride, 1, groups=width // GROUP, bias=False)
        self.b_bn = nn.BatchNorm2d(width)
        if squeeze:
            self.se = nn.Module()
            hidden = round(inputs * squeeze)
            self.se.f_ex = nn.Sequential(
                nn.Conv2d(width, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, width, 1), nn.Sigmoid()
            )
        self.c = nn.Conv2d(width, width, 1, bias=False)
        self.c_bn = nn.BatchNorm2d(width)

    def forward(self, pixels):
        pixels = self.b_bn(self.b(self.a_bn(self.a(pixels)).relu())).relu()
        if hasattr(self, "se"):
            pixels = pixels * self.se.f_ex(pixels.mean((2, 3), keepdim=True))
        return self.c_bn(self.c(pixels))


class PyclsBlock(nn.Module):
    def __init__(self, inputs, width, stride, squeeze):
        super().__init__()
        self.projects = inputs != width or stride != 1
        if self.projects:
            self.proj = nn.Conv2d(inputs, width, 1, stride, bias=False)
            self.bn = nn.BatchNorm2d(width)
        self.f = PyclsTransform(inputs, width, stride, squeeze)

    def forward(self, pixels):
        return ((self.bn(self.proj(pixels)) if self.projects else pixels) + self.f(pixels)).relu()


class ConvNorm(nn.Module):
    def __init__(self, inputs, width, size, stride=1, groups=1):
        super().__init__()
        self.conv = nn.Conv2d(inputs, width, size, stride, size // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(width)

    def forward(self, pixels):
        return self.bn(self.conv(pixels))


class TimmSqueeze(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1 = nn.Conv2d(width, hidden, 1)
        self.fc2 = nn.Conv2d(hidden, width, 1)

    def forward(self, pixels):
        return pixels * self.fc2(self.fc1(pixels.mean((2, 3), keepdim=True)).relu()).sigmoid()


class TimmBlock(nn.Module):
    def __init__(self, inputs, width, stride, squeeze):
        super().__init__()
        self.conv1 = ConvNorm(inputs, width, 1)
        self.conv2 = ConvNorm(width, width, 3, stride, width // GROUP)
        self.se = TimmSqueeze(width, round(inputs * squeeze)) if squeeze else nn.Identity()
        self.conv3 = ConvNorm(width, width, 1)
        self.downsample = ConvNorm(inputs, width, 1, stride) if inputs != width or stride != 1 else nn.Identity()

    def forward(self, pixels):
        inner = self.se(self.conv2(self.conv1(pixels).relu()).relu())
        return (self.conv3(inner) + self.downsample(pixels)).relu()


class Named(nn.Module):
    """A RegNet as pycls and timm put it together: stem, s1 … s4 with b1 …, head."""

    def __init__(self, block, squeeze):
        super().__init__()
        self.stem = ConvNorm(3, STEM, 3, 2)
        for stage, (inputs, width) in enumerate(itertools.pairwise((STEM, *WIDTHS)), 1):
            blocks = nn.Sequential()
            for one in range(DEPTHS[stage - 1]):
                blocks.add_module(f"b{one + 1}", block(width if one else inputs, width, 1 if one else 2, squeeze))
            self.add_module(f"s{stage}", blocks)
        self.head = nn.Module()
        self.head.fc = nn.Linear(WIDTHS[-1], 5)

    def forward(self, pixels):
        pixels = self.stem(pixels).relu()
        for stage in (self.s1, self.s2, self.s3, self.s4):
            pixels = stage(pixels)
        return self.head.fc(pixels.mean((2, 3)))


def torchvision_regnet(squeeze):
    stages = len(WIDTHS)
    blocks = BlockParams(list(DEPTHS), list(WIDTHS), [GROUP] * stages, [1.0] * stages, [2] * stages, squeeze or None)
    return RegNet(blocks, num_classes=5, stem_width=STEM)


MAKERS = {
    "pycls": lambda squeeze: Named(PyclsBlock, squeeze),
    "timm": lambda squeeze: Named(TimmBlock, squeeze),
    "torchvision": torchvision_regnet,
}


def network(library, squeeze=0.0):
    """A network with no constants among its weights."""
    torch.manual_seed(7)
    made = MAKERS[library](squeeze)
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight)
    return made.eval()


def saved(folder: Path, state, key: str | None = None) -> Path:
    path = folder / "source.pth"
    torch.save({key: state, "epoch": 1, "cfg": "text"} if key else state, path)
    return path


LIBRARIES = ("pycls", "timm", "torchvision")


@pytest.mark.parametrize("squeeze", [0.0, 0.25], ids=["X", "Y"])
@pytest.mark.parametrize(("source", "to"), list(itertools.permutations(LIBRARIES, 2)))
def test_a_converted_network_gives_the_outputs_of_its_source(source, to, squeeze, tmp_path):
    made, target = network(source, squeeze), network(to, squeeze)
    path, out = saved(tmp_path, made.state_dict(), "model_state" if source == "pycls" else None), tmp_path / "out.pth"
    assert main(["regnet2mmdet", str(path), str(out), "--to", to]) == 0
    target.load_state_dict(torch.load(out, weights_only=True)["state_dict"], strict=True)
    image = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected, found = made(image), target(image)
    assert expected.abs().max() > 0.1
    assert (expected - found).abs().max() <= 1e-5
    certificate = json.loads((tmp_path / "out.pth.certificate.json").read_text())
    assert certificate["facts"]["names"] == source
    assert certificate["facts"]["architecture"] == ("RegNetY" if squeeze else "RegNetX")
    assert all(proof["passed"] and proof["max_delta"] <= proof["tolerance"] for proof in certificate["proofs"])
    assert certificate["unused"] == certificate["missing"] == []
    # Neither pycls nor timm is asked: the certificate does not claim it.
    own = {name for name, code in certificate["facts"]["forward_passes"].items() if code == "the library's own"}
    assert own == {"torchvision"}


class TestWithMMDetection:
    pytestmark = needs_mmdet

    def test_mmdetections_own_backbone_gives_the_stages_of_pycls(self, tmp_path, capsys):
        made, out = network("pycls"), tmp_path / "out.safetensors"
        path = saved(tmp_path, made.state_dict(), "model_state")
        assert main(["regnet2mmdet", str(path), str(out), "--explain"]) == 0
        printed = capsys.readouterr().out
        for line in (
            "Convert stem.conv.weight to conv1.weight",
            "Convert s1.b1.proj.weight to layer1.0.downsample.0.weight",
            "Convert s1.b1.bn.bias to layer1.0.downsample.1.bias",
            "Convert s2.b2.f.c_bn.running_var to layer2.1.bn3.running_var",
            "Convert head.fc.weight to fc.weight",
        ):
            assert line in printed.splitlines()
        certificate = json.loads((tmp_path / "out.safetensors.certificate.json").read_text())
        assert [proof["name"] for proof in certificate["proofs"]] == [
            "pycls and mmdet, 4 outputs",
            "pycls and torchvision, 5 outputs",
        ]
        back = convert_regnet(out, to="pycls")
        assert back.proven
        assert all(torch.equal(one, back.state[key]) for key, one in made.state_dict().items())

    def test_a_detectors_backbone_is_taken_out_of_it(self, tmp_path):
        state = convert_regnet(saved(tmp_path, network("timm").state_dict())).state
        detector = {f"backbone.{key}": one for key, one in state.items() if not key.startswith("fc.")}
        found = convert_regnet(saved(tmp_path, detector | {"neck.fpn.weight": torch.ones(1)}), to="torchvision")
        assert found.proven
        assert found.unused == ("neck.fpn.weight",)


def test_without_mmdetection_torchvision_stands_in_and_that_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for source in ("torchvision", "pycls"):
        found = convert_regnet(saved(tmp_path, network(source).state_dict()))
        assert found.proven
        assert found.proofs[0].compared > 0
        assert any("MMDetection is not installed" in note for note in found.notes)


def test_halves_stay_halves(tmp_path):
    state = {key: one.half() if one.is_floating_point() else one for key, one in network("timm").state_dict().items()}
    found = convert_regnet(saved(tmp_path, state), to="torchvision")
    assert found.proven
    assert found.state["fc.weight"].dtype == torch.float16


def original_convert(key: str) -> str:
    """regnet2mmdet.py, the parts that matter here."""
    if "stem" in key:
        return key.replace("stem.conv", "conv1").replace("stem.bn", "bn1")
    if "head" in key:
        return key.replace("head.fc", "fc")
    layer, block, module, *rest = key.split(".")
    if module == "f":
        if rest[0] in ("a", "b", "c"):
            module_name = f"conv{'abc'.index(rest[0]) + 1}"
        if rest[0] in ("a_bn", "b_bn", "c_bn"):
            module_name = f"bn{'abc'.index(rest[0][0]) + 1}"
        return f"layer{layer[1:]}.{int(block[1:]) - 1}.{module_name}.{rest[-1]}"
    return key


def test_the_original_stops_at_a_regnety(tmp_path):
    state = network("pycls", 0.25).state_dict()
    with pytest.raises(UnboundLocalError):
        [original_convert(key) for key in state]
    path = saved(tmp_path, state)
    assert convert_regnet(path, to="timm").proven
    with pytest.raises(ConversionError, match="MMDetection's RegNet has no squeeze-excite"):
        convert_regnet(path, to="mmdet")


def test_the_original_takes_any_key_with_the_word_in_it(tmp_path):
    """A projection head of self-supervised training is no classifier, and no stem is inside a teacher."""
    state = network("pycls").state_dict()
    others = {"projection_head.fc.weight": torch.ones(2), "teacher.stem.conv.weight": torch.ones(2)}
    assert [original_convert(key) for key in others] == ["projection_fc.weight", "teacher.conv1.weight"]
    found = convert_regnet(saved(tmp_path, state | others), to="torchvision")
    assert found.unused == tuple(others)
    assert found.proven


def test_colours_can_be_swapped_and_are_recorded(tmp_path):
    made, target = network("pycls"), network("torchvision")
    found = convert_regnet(saved(tmp_path, made.state_dict()), to="torchvision", swap_colours=True)
    target.load_state_dict(found.state)
    image = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        assert (made(image) - target(image.flip(1))).abs().max() <= 1e-5
        assert (made(image) - target(image)).abs().max() > 1e-3
    assert found.proven
    assert found.facts["preprocessing"]["colours"] == "RGB"
    kept = convert_regnet(saved(tmp_path, made.state_dict()), to="torchvision")
    assert kept.facts["preprocessing"]["mean"] == [103.53, 116.28, 123.675]
    assert kept.notes == (
        "pycls's published weights are for BGR images, torchvision's for RGB: feed BGR, or use --swap-colours",
    )


@pytest.mark.parametrize(("source", "to"), [("pycls", "torchvision"), ("torchvision", "timm")])
def test_with_two_names_exchanged_the_proof_fails_and_nothing_is_written(source, to, tmp_path, monkeypatch, capsys):
    """The exchanged tensors have one shape: nothing but the outputs tells."""
    path, out = saved(tmp_path, network(source).state_dict()), tmp_path / "out.pth"
    library = source if source != "torchvision" else to
    naming = regnet_names.NAMINGS[library]
    wrong = {**naming.parts, "a_bn": naming.parts["b_bn"], "b_bn": naming.parts["a_bn"]}
    monkeypatch.setitem(regnet_names.NAMINGS, library, dataclasses.replace(naming, parts=wrong))
    assert main(["regnet2mmdet", str(path), str(out), "--from", source, "--to", to]) == 1
    assert "FAIL the outputs differ" in capsys.readouterr().out
    assert not out.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("s2.b2.f.b_bn.bias"), "got no s2.b2.f.b_bn.bias, expected all tensors of a RegNetX"),
        (lambda state: state.update({"s1.b1.f.c_bn.weight": torch.ones(3)}), r"got the shape \(3,\), expected \(16,\)"),
        (lambda state: state.update({"s1.b999999999.f.a.weight": torch.ones(1)}), "gaps between their blocks"),
        (lambda state: state.update({"s1.b1.f.c.weight": torch.ones(0, 1, 1, 1)}), "got no convolution c in block 1"),
        (lambda state: state.pop("stem.conv.weight"), "got no convolution stem in the stem"),
        (lambda state: state.update({"s2.b2.proj.weight": torch.ones(1)}), "s2.b2.proj.weight: got a tensor that a"),
    ],
)
def test_weights_that_make_no_regnet_are_refused(change, message, tmp_path):
    state = network("pycls").state_dict()
    change(state)
    with pytest.raises(ConversionError, match=message):
        convert_regnet(saved(tmp_path, state), to="torchvision")


def test_other_networks_are_refused(tmp_path):
    with pytest.raises(ConversionError, match="expected a RegNet of pycls, timm, torchvision, mmdet"):
        convert_regnet(saved(tmp_path, {"encoder.weight": torch.ones(1)}))


def test_the_proof_notices_every_tensor(tmp_path, monkeypatch):
    """Each converted tensor, changed by itself, changes the outputs that are compared; one stage shows it."""
    from dettools.converters import regnet

    state = network("pycls", 0.25).state_dict()
    path = saved(tmp_path, {key: one for key, one in state.items() if key.startswith(("stem.", "s1."))})
    apply = regnet.converted
    names = [row.target for row in convert_regnet(path, to="torchvision").rows if not row.target.endswith("tracked")]
    assert len(names) == 29
    for name in names:

        def changed(rows, state, name=name):
            result = apply(rows, state)
            result[name] = result[name] * 1.5 + 0.1
            return result

        monkeypatch.setattr(regnet, "converted", changed)
        assert not convert_regnet(path, to="torchvision").proven, name


@pytest.mark.parametrize("key", ["s1.b1.attn.fc1.weight", "s1.b1.f.d.weight"])
def test_another_network_with_parts_of_a_regnet_is_refused(key, tmp_path):
    """Without its further parts it computes something else, and the forward passes would agree about that."""
    state = network("pycls").state_dict() | {key: torch.ones(1)}
    with pytest.raises(ConversionError, match=f"got {key} in its blocks"):
        convert_regnet(saved(tmp_path, state), to="torchvision")


def test_a_classifiers_bias_cannot_hide_behind_large_features(tmp_path, monkeypatch):
    from dettools.converters import regnet

    state = network("pycls").state_dict()
    last = "s4.b2.f.c_bn"
    state |= {f"{last}.weight": state[f"{last}.weight"] * 1e4, "head.fc.weight": state["head.fc.weight"] * 1e-4}
    path, apply = saved(tmp_path, state), regnet.converted
    found = convert_regnet(path, to="torchvision")
    assert found.proven
    assert found.proofs[0].largest > 1e3

    def off_by_one_class(rows, state):
        result = apply(rows, state)
        return result | {"fc.bias": result["fc.bias"].roll(1)}

    monkeypatch.setattr(regnet, "converted", off_by_one_class)
    assert not convert_regnet(path, to="torchvision").proven


def test_the_certificate_tells_that_a_backbone_has_no_classifier_to_prove(tmp_path):
    path = saved(tmp_path, network("torchvision").state_dict())
    proven = convert_regnet(path, to="timm").coverage
    assert proven["copied_under_another_name"] == sum("tracked" in key for key in network("torchvision").state_dict())
