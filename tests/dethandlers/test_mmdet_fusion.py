"""Folding batch norms into convolutions: the same results, and hands off what is shared or no plain pair."""

import importlib.util

import pytest
import torch
from dethandlers.mmcv_operators import provide
from torch import nn

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("mmcv") is None, reason="MMDetection is not installed (the extra detserve[mmdet])"
    ),
    pytest.mark.filterwarnings("ignore::ImportWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
]


def block(kind="BN", act="Swish", **settings):
    """A ConvModule whose norm has seen something."""
    provide()
    from mmcv.cnn import ConvModule

    settings = {"act_cfg": {"type": act}, **settings}
    if kind == "GN":
        return ConvModule(4, 4, 3, norm_cfg={"type": "GN", "num_groups": 2}, **settings).eval()
    made = ConvModule(4, 4, 3, padding=1, norm_cfg={"type": kind}, **settings)
    with torch.no_grad():
        made.norm.weight.uniform_(0.5, 2)
        made.norm.bias.normal_()
        made.norm.running_mean.normal_()
        made.norm.running_var.uniform_(0.5, 2)
    return made.eval()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pixels():
    return torch.randn(2, 4, 9, 7)


@torch.no_grad()
def test_a_norm_is_folded_and_nothing_changes():
    from dethandlers.mmdet_fusion import fuse

    network = nn.Sequential(block(), block(act="ReLU"), block(bias=True))
    x = pixels()
    expected = network(x.clone())
    assert fuse(network) == 3
    assert not [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    torch.testing.assert_close(network(x.clone()), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_input_is_not_written_into():
    from dethandlers.mmdet_fusion import fuse

    network = nn.Sequential(block())
    fuse(network)
    x = pixels()
    kept = x.clone()
    network(x)
    assert torch.equal(x, kept)


@torch.no_grad()
def test_a_convolution_with_a_norm_for_each_level_is_left_alone():
    from dethandlers.mmdet_fusion import fuse

    levels = nn.ModuleList([block(), block()])
    levels[1].conv = levels[0].conv  # as RTMDet's head shares it
    x = pixels()
    expected = [level(x.clone()) for level in levels]
    assert fuse(levels) == 0
    for level, wanted in zip(levels, expected, strict=True):
        torch.testing.assert_close(level(x.clone()), wanted, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "made", [lambda: block("GN"), lambda: block(order=("conv", "act", "norm")), lambda: block().train()]
)
def test_what_is_no_pair_is_left_alone(made):
    from dethandlers.mmdet_fusion import fuse

    assert fuse(nn.Sequential(made())) == 0


def test_a_norm_before_the_convolution_is_left_alone():
    from dethandlers.mmdet_fusion import fuse

    assert fuse(nn.Sequential(block(order=("norm", "conv", "act")))) == 0


@torch.no_grad()
def test_where_the_activation_comes_first_the_input_is_not_written_into():
    from dethandlers.mmdet_fusion import fuse

    network = nn.Sequential(block(order=("act", "conv", "norm")))
    x = pixels()
    kept, expected = x.clone(), network(x.clone())
    assert fuse(network) == 1
    torch.testing.assert_close(network(x), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(x, kept)


@torch.no_grad()
@pytest.mark.parametrize("settings", [{"with_spectral_norm": True}, {"with_spectral_norm": True, "act": "ReLU"}])
def test_a_weight_that_is_made_anew_before_each_call_is_left_alone(settings):
    from dethandlers.mmdet_fusion import fuse

    network = nn.Sequential(block(**settings))
    expected = network(pixels())
    torch.manual_seed(0)
    assert fuse(network) == 0
    assert expected.shape == (2, 4, 9, 7)


@torch.no_grad()
def test_a_block_whose_parts_its_owner_uses_is_left_alone():
    provide()
    from dethandlers.mmdet_fusion import fuse
    from mmdet.models.dense_heads.tood_head import TaskDecomposition

    decomposition = TaskDecomposition(8, 2, 2, norm_cfg={"type": "BN"}).eval()
    with torch.no_grad():
        decomposition.reduction_conv.norm.bias.normal_()
    x = torch.randn(1, 16, 5, 5)
    expected = decomposition(x)
    assert fuse(nn.Sequential(decomposition)) == 0
    assert torch.equal(decomposition(x), expected)
