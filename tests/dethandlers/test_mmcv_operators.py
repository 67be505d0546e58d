"""What stands in for mmcv._ext: when it does, what it answers, and mmcv's own functions running on it."""

import subprocess
import sys
import textwrap

import pytest
from dethandlers.errors import DetectorError
from dethandlers.mmcv_operators import OPERATORS, MissingOperatorError, provide
from dethandlers.mmcv_operators.missing import missing
from torch import nn


def run(script):
    """Run a script in a process of its own: sys.modules is the process's."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def unprovided(monkeypatch, tmp_path):
    """A process that has seen no mmcv, and a folder in which one may be installed."""
    seen = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "mmcv"}
    for name in seen:
        del sys.modules[name]
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "mmcv"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('mmcv was imported')")
    yield package
    sys.modules.pop("mmcv._ext", None)
    sys.modules.update(seen)


def test_it_stands_in_where_nothing_is_compiled(unprovided):
    first, second = provide(), provide()
    assert first == second
    assert not first.compiled
    assert "without compiled operators" in first.reason
    module = sys.modules["mmcv._ext"]
    assert module.__spec__ is not None  # importlib.util.find_spec, by which mmcv asks, refuses a module without
    assert module.get_compiler_version() == module.get_compiling_cuda_version() == "not compiled"
    assert module.nms is OPERATORS["nms"]
    assert hasattr(module, "nms_rotated")
    assert not hasattr(module, "__path__")


def test_compiled_operators_are_used_when_they_are_there(unprovided):
    """A module of Python in the compiled one's place: what is found there is loaded, whatever it is made of."""
    (unprovided / "_ext.py").write_text("nms = 'compiled'")
    assert provide().compiled
    assert provide().compiled
    assert sys.modules["mmcv._ext"].nms == "compiled"


def test_compiled_operators_that_cannot_be_loaded_are_replaced(unprovided):
    (unprovided / "_ext.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    told = provide()
    assert not told.compiled
    assert "cannot be loaded (undefined symbol: _ZN3c10)" in told.reason
    assert sys.modules["mmcv._ext"].nms is OPERATORS["nms"]


class Head(nn.Module):
    def forward(self):
        return missing("border_align_forward")(1, two=2)


class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = Head()

    def forward(self):
        return self.head()


def test_a_missing_operator_is_named_with_who_asked_for_it():
    with pytest.raises(MissingOperatorError, match=r"border_align_forward.*Detector › Head.*Install an mmcv") as told:
        Detector()()
    assert isinstance(told.value, DetectorError)
    assert isinstance(told.value, NotImplementedError)
    assert told.value.to_json()["type"] == "missing_operator"


def test_training_is_refused_as_such():
    with pytest.raises(MissingOperatorError, match="inference alone"):
        missing("roi_align_backward")()


def test_mmcvs_own_functions_run_on_it():
    pytest.importorskip("mmcv", reason="MMDetection is not installed (the extra detserve[mmdet])")
    told = run(
        """
        import warnings
        from dethandlers.mmcv_operators import provide
        compiled = provide().compiled
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=ImportWarning)
        warnings.filterwarnings("ignore", "This overload of addmm is deprecated")  # mmcv's MaskedConv2d
        import torch
        from mmcv import ops

        boxes = torch.tensor([[0., 0., 10., 10.], [1., 1., 11., 11.], [20., 0., 30., 10.], [0., 0., 10., 10.]])
        scores, labels = torch.tensor([.9, .8, .7, .6]), torch.tensor([0, 0, 0, 1])
        dets, kept = ops.batched_nms(boxes, scores, labels, dict(type="nms", iou_threshold=.5))
        assert kept.tolist() == [0, 2, 3] and dets.shape == (3, 5)
        dets, kept = ops.batched_nms(boxes, scores, labels, dict(type="soft_nms", iou_threshold=.5, min_score=.05))
        assert kept.tolist() == [0, 2, 3, 1], kept
        overlap = 81 / 119
        assert abs(float(dets[3, 4]) - .8 * (1 - overlap)) < 1e-6
        x = torch.arange(2 * 4 * 8 * 8.).view(2, 4, 8, 8).sin()
        rois = torch.tensor([[0., 1., 1., 6., 6.], [1., 0., 0., 7., 7.]])
        assert torch.allclose(ops.roi_align(x, rois, 2, 1., 2, "avg", True), ops.DeformRoIPool(2, 1., 2)(x, rois),
                              atol=1e-5)
        assert (ops.roi_align(x, rois, 2, 1., 2, "max", True) >= ops.roi_align(x, rois, 2, 1., 2, "avg", True)).all()
        assert ops.roi_pool(x, rois, 1)[1, :, 0, 0].tolist() == x[1].amax((1, 2)).tolist()
        torch.manual_seed(0)
        plain = torch.nn.Conv2d(4, 6, 3, padding=1, bias=False)
        for kind in (ops.DeformConv2dPack, ops.ModulatedDeformConv2dPack):
            moved = kind(4, 6, 3, padding=1, bias=False).eval()
            moved.weight.data = plain.weight.data
            whole = 1 if kind is ops.DeformConv2dPack else 2   # a new mask is sigmoid(0)
            torch.testing.assert_close(whole * moved(x), plain(x), atol=1e-5, rtol=1e-5)
        masked = ops.MaskedConv2d(4, 6, 3, padding=1).eval()
        with torch.no_grad():
            torch.testing.assert_close(masked(x[:1], torch.ones(1, 8, 8)), masked(x[:1]), atol=1e-5, rtol=1e-5)
            assert ops.CARAFEPack(4, 2).eval()(x).shape == (2, 4, 16, 16)
        # Where mmcv has an attention of its own for the CPU, ours is the same.
        from mmcv.ops.multi_scale_deform_attn import (
            MultiScaleDeformableAttnFunction, multi_scale_deformable_attn_pytorch)
        value, shapes = torch.rand(2, 20, 2, 4), torch.tensor([[4, 4], [2, 2]])
        places, weights = torch.rand(2, 5, 2, 2, 3, 2) * 1.2 - .1, torch.rand(2, 5, 2, 2, 3)
        if not compiled:
            ours = MultiScaleDeformableAttnFunction.apply(value, shapes, None, places, weights, 64)
            theirs = multi_scale_deformable_attn_pytorch(value, shapes, places, weights)
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
        loss = ops.sigmoid_focal_loss(torch.zeros(3, 2), torch.tensor([0, 1, 2]), 2., .25, None, "sum")
        assert abs(float(loss) - (2 * .25 + 4 * .75) * .25 * .693147) < 1e-5
        if not compiled:
            try:
                ops.nms_rotated(torch.rand(2, 5), torch.rand(2), .5)
            except NotImplementedError as error:
                print(error)
        """
    )
    assert told == "" or "nms_rotated" in told


def test_every_operator_stands_under_the_name_that_mmcv_calls():
    assert all(function.__name__ == name for name, function in OPERATORS.items())
