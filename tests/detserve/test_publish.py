"""Publishing: what is in a release is what was evaluated, under a name that proves it, and nothing private."""

import hashlib
import resource
import struct
import subprocess
import sys
import types
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from detserve.checkpoint import load_state_dict
from detserve.errors import CheckpointError
from detserve.publish import PublishError, _Release, _verify, publish
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from training_checkpoints import network, read, same, saved, trained


@pytest.fixture
def net():
    return network(1)


class TestTheFile:
    def test_the_name_ends_in_the_digest_of_the_content(self, tmp_path, net):
        found = publish(saved(tmp_path / "epoch_12.pth", trained(net)), tmp_path / "released.pth")
        digest = hashlib.sha256(found.path.read_bytes()).hexdigest()
        assert found.path == tmp_path / f"released-{digest[:8]}.pth"
        assert (found.sha256, found.size) == (digest, found.path.stat().st_size)
        assert {path.name for path in tmp_path.iterdir()} == {"epoch_12.pth", found.path.name}

    def test_torch_hub_checks_and_loads_it(self, tmp_path, net):
        found = publish(saved(tmp_path / "w.pth", net.state_dict()), tmp_path / "faster-rcnn.pth")
        loaded = torch.hub.load_state_dict_from_url(
            found.path.as_uri(), tmp_path / "hub", check_hash=True, progress=False, weights_only=True
        )
        same(loaded, net.state_dict())
        assert found.notes == ()

    def test_a_name_that_torch_hub_misreads_is_told(self, tmp_path, net):
        found = publish(saved(tmp_path / "w.pth", net.state_dict()), tmp_path / "model-1.0.pth")
        assert "torch.hub" in found.notes[0]

    @pytest.mark.parametrize(
        ("given", "stem"),
        [("a-0123abcd.pth", "a"), ("a-20200130.pth", "a-20200130"), ("a-0123abc.pth", "a-0123abc"), ("é b.pth", "é b")],
        ids=["an old digest goes", "a date stays", "seven digits stay", "other letters"],
    )
    def test_the_stem(self, tmp_path, net, given, stem):
        found = publish(saved(tmp_path / "w.pth", net.state_dict()), tmp_path / given)
        assert found.path.name == f"{stem}-{found.sha256[:8]}.pth"

    @pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
    def test_the_same_input_gives_the_same_bytes_in_another_process_folder_and_name(self, tmp_path, net, suffix):
        """The original's digest was not the same from run to run."""
        source = saved(tmp_path / "w.pth", trained(net))
        first = publish(source, tmp_path / f"released{suffix}")
        program = (
            "import sys; from pathlib import Path; from detserve.publish import publish;"
            "print(publish(Path(sys.argv[1]), Path(sys.argv[2]), dry_run=True).sha256)"
        )
        other = subprocess.run(
            [sys.executable, "-c", program, source, tmp_path / f"other{suffix}"],
            env={"PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"},
            check=True,
            capture_output=True,
            text=True,
        )
        assert other.stdout.strip() == first.sha256
        renamed = [publish(source, tmp_path / f"{name}{suffix}", dry_run=True).sha256 for name in ("a", "longer-name")]
        assert set(renamed) == {first.sha256}

    def test_torch_save_to_a_name_is_what_must_not_be_done(self, tmp_path, net):
        """What the reproducible bytes rest on: saved by name, equal weights give other bytes under other names."""
        one, two = (saved(tmp_path / name, net.state_dict()).read_bytes() for name in ("one.pth", "two.pth"))
        assert one != two

    @pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
    def test_a_release_published_again_is_itself(self, tmp_path, net, suffix):
        first = publish(saved(tmp_path / "w.pth", trained(net)), tmp_path / f"released{suffix}")
        before = first.path.stat()
        again = publish(first.path, tmp_path / f"released{suffix}")
        assert (again.path, again.existed, again.written) == (first.path, True, False)
        assert first.path.stat().st_mtime_ns == before.st_mtime_ns

    def test_a_checkpoint_that_training_began_from_a_release_tells_its_own_digest(self, tmp_path, net):
        released = read(publish(saved(tmp_path / "w.pth", trained(net)), tmp_path / "released.pth").path)
        source = saved(tmp_path / "tuned.pth", {**released, "state_dict": network(2).state_dict(), "optimizer": {}})
        found = publish(source, tmp_path / "tuned-release.pth")
        assert read(found.path)["meta"]["published"]["source_sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()

    def test_a_dry_run_tells_the_name_and_writes_nothing(self, tmp_path, net):
        source = saved(tmp_path / "w.pth", trained(net))
        told = publish(source, tmp_path / "released.pth", dry_run=True)
        assert (told.written, told.path.exists(), list(tmp_path.iterdir())) == (False, False, [source])
        done = publish(source, tmp_path / "released.pth")
        # The original returned while `mv` was still running: the file was not yet there.
        assert (done.written, done.path.exists(), done.path, done.sha256) == (True, True, told.path, told.sha256)

    def test_another_file_of_that_name_stays_unless_forced(self, tmp_path, net):
        source = saved(tmp_path / "w.pth", net.state_dict())
        path = publish(source, tmp_path / "released.pth", dry_run=True).path
        path.write_text("other")
        with pytest.raises(PublishError, match="--force"):
            publish(source, tmp_path / "released.pth")
        assert path.read_text() == "other"
        assert publish(source, tmp_path / "released.pth", force=True).written
        same(read(path), net.state_dict())

    def test_a_full_disk_leaves_nothing(self, tmp_path):
        source = saved(tmp_path / "w.pth", {"a": torch.zeros(1 << 16)})
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
        try:
            with pytest.raises(PublishError, match="cannot be written"):
                publish(source, tmp_path / "released.pth")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert list(tmp_path.iterdir()) == [source]


class TestReadingBack:
    """The original never looked at what it had written."""

    @pytest.mark.parametrize("form", ["pth", "safetensors"])
    def test_a_difference_is_found(self, tmp_path, form):
        def content(release):
            return release.pickled() if form == "pth" else release.as_safetensors()

        meta = {"meta": {"classes": ("cat", "dog")}}
        release = _Release(OrderedDict(a=torch.ones(3), b=torch.zeros(2)), meta, plain=False)
        path = tmp_path / f"w.{form}"
        path.write_bytes(content(release))
        _verify(path, content(release), release)
        others = {
            "a tensor": _Release(OrderedDict(a=torch.ones(3), b=-torch.zeros(2)), meta, plain=False),
            "its metadata": _Release(release.state, {"meta": {"classes": ("dog", "cat")}}, plain=False),
        }
        for fault, other in others.items():
            path.write_bytes(content(other))
            with pytest.raises(PublishError, match=fault):
                _verify(path, content(other), release)
            with pytest.raises(PublishError, match="its digest"):
                _verify(path, content(release), release)


class TestTheInputStays:
    """The original, given one name twice, overwrote its input and then moved it away."""

    def test_in_and_out_are_the_same(self, tmp_path, net):
        source = saved(tmp_path / "w.pth", trained(net))
        before = source.read_bytes()
        (tmp_path / "link.pth").symlink_to(source)
        for out in (source, tmp_path / "link.pth", tmp_path / "." / "w.pth"):
            with pytest.raises(PublishError, match="as input and as output"):
                publish(source, out)
        assert source.read_bytes() == before
        assert {path.name for path in tmp_path.iterdir()} == {"w.pth", "link.pth"}

    def test_the_release_would_get_the_inputs_name(self, tmp_path, net):
        source = saved(tmp_path / "w.pth", net.state_dict())
        name = publish(source, tmp_path / "released.pth", dry_run=True).path
        # Other bytes than the release, under the release's name, and given as the input.
        torch.save(net.state_dict(), name, _use_new_zipfile_serialization=False)
        before = name.read_bytes()
        with pytest.raises(PublishError, match="another OUT"):
            publish(name, tmp_path / "released.pth", force=True)
        assert name.read_bytes() == before


class TestWhatIsKept:
    def test_weights_and_metadata_and_nothing_else(self, tmp_path, net):
        found = publish(saved(tmp_path / "w.pth", trained(net)), tmp_path / "released.pth")
        content = read(found.path)
        assert list(content) == ["meta", "state_dict"]
        same(content["state_dict"], net.state_dict())
        same(load_state_dict(found.path), net.state_dict())
        assert content["state_dict"]._metadata["1"] == {"version": 2}
        adam = sum(2 * parameter.nbytes for parameter in net.parameters())
        dropped = {one.key: one.size for one in found.dropped}
        assert list(dropped) == ["optimizer", "param_schedulers", "args"]
        assert adam < dropped["optimizer"] < adam + 1000

    def test_a_plain_state_dict_stays_plain(self, tmp_path, net):
        found = publish(saved(tmp_path / "w.pth", net.state_dict()), tmp_path / "released.pth")
        same(read(found.path), net.state_dict())

    def test_a_view_does_not_carry_the_tensor_that_it_looks_into(self, tmp_path):
        found = publish(saved(tmp_path / "w.pth", {"a": torch.zeros(100_000)[:3]}), tmp_path / "released.pth")
        assert found.size < 3000
        assert found.source_size > 400_000

    def test_tied_weights_stay_tied_in_a_pth_and_are_told_for_safetensors(self, tmp_path):
        tied = torch.rand(1000)
        source = saved(tmp_path / "w.pth", {"a": tied, "b": tied, "c": torch.rand(4, 6).t()})
        pickled, tensors = (publish(source, tmp_path / name) for name in ("r.pth", "r.safetensors"))
        content = read(pickled.path)
        assert content["a"].data_ptr() == content["b"].data_ptr()
        assert torch.equal(load_file(tensors.path)["b"], tied)
        assert "share" in tensors.notes[0]
        assert torch.equal(load_file(tensors.path)["c"], read(source)["c"])

    def test_safetensors_hold_classes_and_the_order_of_names(self, tmp_path, net):
        found = publish(saved(tmp_path / "w.pth", trained(net)), tmp_path / "released.safetensors")
        same({name: load_file(found.path)[name] for name in net.state_dict()}, net.state_dict())
        with safe_open(found.path, "pt") as file:
            assert file.metadata()["format"] == "pt"
            assert file.metadata()["classes"] == '["cat", "dog"]'
        content = found.path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        assert length % 8 == 0
        positions = [content[: 8 + length].index(f'"{name}"'.encode()) for name in net.state_dict()]
        assert positions == sorted(positions)

    def test_from_safetensors_to_a_pth_that_mmdetection_reads(self, tmp_path, net):
        texts = {"format": "pt", "classes": '["cat", "dog"]', "author": "ann@example.org", "epoch": "3"}
        save_file(net.state_dict(), tmp_path / "w.safetensors", texts)
        found = publish(tmp_path / "w.safetensors", tmp_path / "released.pth")
        meta = read(found.path)["meta"]
        assert (meta["dataset_meta"], meta["epoch"]) == ({"classes": ("cat", "dog")}, 3)
        assert [one.key for one in found.scrubbed] == ["meta.author"]
        got = read(found.path)["state_dict"]
        same({name: got[name] for name in net.state_dict()}, net.state_dict())

    def test_more_keys_are_kept_when_asked_for(self, tmp_path, net):
        checkpoint = trained(net)
        source = saved(tmp_path / "w.pth", checkpoint)
        found = publish(source, tmp_path / "r.pth", save_keys=["state_dict", "optimizer", "args"])
        content = read(found.path)
        assert set(content) == {"state_dict", "optimizer", "args"}
        assert content["args"] == {"lr": 0.1}
        assert [one.key for one in found.scrubbed] == ["args.output_dir"]
        assert [one.key for one in found.dropped] == ["meta", "param_schedulers"]
        moments = [one["optimizer"]["state"][0]["exp_avg"] for one in (content, checkpoint)]
        assert torch.equal(*moments)


class TestReading:
    def test_the_training_state_of_mmengine_is_read_past(self, tmp_path, net, monkeypatch):
        """Its history buffers hold arrays; a plain restricted reading refuses the whole checkpoint."""
        module = types.ModuleType("mmengine.logging.history_buffer")

        class HistoryBuffer:
            def __init__(self):
                self._log_history = np.arange(1000.0)

        HistoryBuffer.__module__, HistoryBuffer.__qualname__ = module.__name__, "HistoryBuffer"
        module.HistoryBuffer = HistoryBuffer
        with monkeypatch.context() as patch:
            for name in ("mmengine", "mmengine.logging"):
                patch.setitem(sys.modules, name, types.ModuleType(name))
            patch.setitem(sys.modules, module.__name__, module)
            content = trained(net, message_hub={"log_scalars": OrderedDict(loss=HistoryBuffer())})
            source = saved(tmp_path / "w.pth", content)
        found = publish(source, tmp_path / "released.pth")
        same(read(found.path)["state_dict"], net.state_dict())
        assert {one.key: one.size for one in found.dropped}["message_hub"] > 8000

    def test_a_pickle_that_calls_something_is_refused_and_not_obeyed(self, tmp_path, net):
        class Calls:
            def __reduce__(self):
                return Path.touch, (tmp_path / "called",)

        source = saved(tmp_path / "w.pth", {**trained(net), "hook": Calls()})
        with pytest.raises(CheckpointError, match="nothing was executed"):
            publish(source, tmp_path / "released.pth")
        assert list(tmp_path.iterdir()) == [source]

    @pytest.mark.parametrize("name", ["w.pth", "w.ckpt", "w.safetensors"])
    def test_what_is_no_checkpoint(self, tmp_path, name):
        (tmp_path / name).write_bytes(b"no checkpoint, but some text")
        with pytest.raises(CheckpointError, match=name):
            publish(tmp_path / name, tmp_path / "released.pth")

    @pytest.mark.parametrize("content", [{"epoch": 3}, [1, 2], {}], ids=["no weights", "a list", "empty"])
    def test_a_file_without_weights(self, tmp_path, content):
        with pytest.raises(CheckpointError, match="expected a state dict"):
            publish(saved(tmp_path / "w.pth", content), tmp_path / "released.pth")


class TestUsage:
    @pytest.mark.parametrize(
        ("out", "options", "message"),
        [
            ("released", {}, r"expected a file named \.pth, \.pt or \.safetensors"),
            ("released.onnx", {}, r"expected a file named \.pth"),
            ("-0123abcd.pth", {}, "a name before the digest"),
            ("none/released.pth", {}, "there is no folder"),
            ("released.pth", {"save_keys": ["meta", "state_dict", "optimiser"]}, r"got optimiser, .*optimizer"),
            ("released.pth", {"save_keys": ["meta"]}, "expected state_dict among them"),
            ("released.safetensors", {"save_keys": ["state_dict", "optimizer"]}, r"Publish a \.pth"),
        ],
    )
    def test_what_cannot_be_done_is_told(self, tmp_path, net, out, options, message):
        source = saved(tmp_path / "w.pth", trained(net))
        with pytest.raises(PublishError, match=message):
            publish(source, tmp_path / out, **options)
        assert list(tmp_path.iterdir()) == [source]

    def test_no_such_input(self, tmp_path):
        with pytest.raises(CheckpointError, match="is no file"):
            publish(tmp_path / "none.pth", tmp_path / "released.pth")


@pytest.mark.shared_data
def test_a_checkpoint_of_mmdetection(tmp_path, shared_data):
    source = shared_data / "models/mmdet_yolox_nano/yolox_nano_mmdet.pth"
    before = torch.load(source, weights_only=True)
    found = publish(source, tmp_path / "yolox_nano.pth")
    after = torch.load(found.path, weights_only=True)
    same(after["state_dict"], before["state_dict"])
    assert after["meta"]["dataset_meta"]["classes"] == before["meta"]["dataset_meta"]["classes"]
    assert found.dropped == ()
