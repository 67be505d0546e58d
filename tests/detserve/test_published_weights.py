"""Which weights are published, and how they are stored."""

from collections import OrderedDict

import pytest
import torch
from detserve.checkpoint import load_state_dict
from detserve.errors import CheckpointError
from detserve.publish import publish
from torch.optim.swa_utils import AveragedModel
from training_checkpoints import network, read, same, saved, trained


@pytest.fixture
def net():
    return network(1)


class TestAveragedWeights:
    """The original kept both sets, or only the one that was not evaluated."""

    def averaged(self, net):
        model = AveragedModel(network(2))
        assert not torch.equal(model.module[0].weight, net[0].weight)
        return model

    @pytest.mark.parametrize(("ema", "averaged"), [("auto", True), ("use", True), ("drop", False)])
    def test_torchvision(self, tmp_path, net, ema, averaged):
        model = self.averaged(net)
        source = saved(tmp_path / "w.pth", {"model": net.state_dict(), "model_ema": model.state_dict(), "epoch": 3})
        found = publish(source, tmp_path / "released.pth", ema=ema)
        same(read(found.path)["state_dict"], (model.module if averaged else net).state_dict())
        assert (found.averaged, found.weights) == (averaged, "model_ema" if averaged else "model")
        assert [one.key for one in found.dropped] == ["model" if averaged else "model_ema", "epoch"]
        if ema == "auto":
            same(load_state_dict(source), load_state_dict(found.path))

    @pytest.mark.parametrize(("ema", "averaged"), [("auto", True), ("use", True), ("drop", False)])
    def test_mmengine_saves_the_average_as_state_dict_and_the_last_step_as_ema_state_dict(
        self, tmp_path, net, ema, averaged
    ):
        mean = network(2).state_dict()
        last = OrderedDict((f"module.{name}", tensor) for name, tensor in net.state_dict().items())
        last["steps"] = torch.tensor(7)
        source = saved(tmp_path / "w.pth", {"meta": {}, "state_dict": mean, "ema_state_dict": last})
        found = publish(source, tmp_path / "released.pth", ema=ema)
        same(read(found.path)["state_dict"], mean if averaged else net.state_dict())
        assert found.averaged is averaged

    @pytest.mark.parametrize(("ema", "averaged"), [("auto", True), ("use", True), ("drop", False)])
    def test_mmcv_holds_each_parameter_twice_in_one_state_dict(self, tmp_path, net, ema, averaged):
        mean = network(2).state_dict()
        last = {name: parameter.detach() for name, parameter in net.named_parameters()}
        both = {**mean, **{f"ema_{name.replace('.', '_')}": tensor for name, tensor in last.items()}}
        found = publish(saved(tmp_path / "w.pth", {"state_dict": both}), tmp_path / "released.pth", ema=ema)
        same(read(found.path)["state_dict"], mean if averaged else mean | last)
        assert found.averaged is averaged
        assert "4 tensors of state_dict" in found.notes[0]

    def test_a_module_with_an_ema_of_its_own_is_left_alone(self, tmp_path):
        state = {name: torch.rand(2) for name in ("a.weight", "a.bias", "b.weight", "w", "ema_w")}
        found = publish(saved(tmp_path / "w.pth", state), tmp_path / "released.pth")
        same(read(found.path), state)

    def test_an_average_that_archive_would_not_take_is_told_and_taken_on_demand(self, tmp_path, net):
        mean = network(2).state_dict()
        content = {"model": net.state_dict(), "ema": {"module": mean, "updates": 5}}
        source = saved(tmp_path / "w.pth", content)
        found = publish(source, tmp_path / "released.pth")
        same(read(found.path)["state_dict"], load_state_dict(source))
        assert "--ema use" in found.notes[0]
        same(read(publish(source, tmp_path / "r.pth", ema="use").path)["state_dict"], mean)

    def test_an_average_without_buffers_is_told(self, tmp_path, net):
        mean = {name: parameter.detach() for name, parameter in network(2).named_parameters()}
        source = saved(tmp_path / "w.pth", {"model": net.state_dict(), "model_ema": mean})
        found = publish(source, tmp_path / "released.pth")
        assert "lacks 3 of" in found.notes[0]
        assert "1.running_mean" in found.notes[0]

    def test_what_is_not_there_cannot_be_chosen(self, tmp_path, net):
        source = saved(tmp_path / "w.pth", {"model_ema": net.state_dict()})
        with pytest.raises(CheckpointError, match="only averaged weights"):
            publish(source, tmp_path / "released.pth", ema="drop")
        source = saved(tmp_path / "w.pth", net.state_dict())
        with pytest.raises(CheckpointError, match="no averaged weights"):
            publish(source, tmp_path / "released.pth", ema="use")

    def test_a_wrappers_prefix_goes_from_names_and_versions(self, tmp_path, net):
        wrapped = torch.nn.DataParallel(net).state_dict()
        found = publish(saved(tmp_path / "w.pth", {"state_dict": wrapped}), tmp_path / "released.pth")
        state = read(found.path)["state_dict"]
        same(state, net.state_dict())
        assert state._metadata == net.state_dict()._metadata
        assert "'module.'" in found.notes[0]


class TestPrecision:
    def test_half_stores_floats_as_float16_and_leaves_integers(self, tmp_path, net):
        found = publish(saved(tmp_path / "w.pth", trained(net)), tmp_path / "released.pth", half=True)
        state = read(found.path)["state_dict"]
        same(state, {k: t.half() if t.is_floating_point() else t for k, t in net.state_dict().items()})
        assert state["1.num_batches_tracked"].dtype == torch.int64
        assert read(found.path)["meta"]["published"]["precision"] == "fp16"

    def test_what_does_not_fit_is_refused(self, tmp_path):
        source = saved(tmp_path / "w.pth", {"fine": torch.tensor([65504.0]), "head.weight": torch.tensor([1.0, -7e4])})
        with pytest.raises(CheckpointError, match=r"head\.weight: got 70000, expected at most 65504"):
            publish(source, tmp_path / "released.pth", half=True)
        assert list(tmp_path.iterdir()) == [source]

    def test_variances_below_its_range_are_told(self, tmp_path):
        state = {"bn.running_var": torch.tensor([1.0, 1e-5]), "other": torch.tensor([1e-9, 1.0])}
        notes = publish(saved(tmp_path / "w.pth", state), tmp_path / "released.pth", half=True).notes
        assert any("became 0 (first: other)" in note for note in notes)
        assert any("running variances" in note and "bn.running_var" in note for note in notes)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
    def test_weights_that_are_not_finite_are_refused(self, tmp_path, value, suffix):
        source = saved(tmp_path / "w.pth", {"a": torch.tensor([1.0, value])})
        with pytest.raises(CheckpointError, match="a: got 1 values that are NaN or infinite"):
            publish(source, tmp_path / f"released{suffix}")
        found = publish(source, tmp_path / f"released{suffix}", allow_nonfinite=True)
        assert torch.equal(load_state_dict(found.path)["a"].isfinite(), torch.tensor([True, False]))

    def test_every_kind_of_number_comes_through(self, tmp_path):
        kinds = (torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.float8_e4m3fn, torch.complex64)
        state = {str(kind): torch.ones(2, 2).to(kind) for kind in kinds}
        state |= {"empty": torch.empty(0, 3), "scalar": torch.tensor(3.0)}
        found = publish(saved(tmp_path / "w.pth", state), tmp_path / "released.pth")
        assert found.tensors == 8
        assert {name: t.dtype for name, t in read(found.path).items()} == {name: t.dtype for name, t in state.items()}

    def test_a_sparse_tensor_is_refused(self, tmp_path):
        source = saved(tmp_path / "w.pth", {"a": torch.eye(3).to_sparse()})
        with pytest.raises(CheckpointError, match="expected a dense one"):
            publish(source, tmp_path / "released.pth")
