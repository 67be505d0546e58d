"""`detserve publish`: what it prints, its exit codes, and that a release is served as the original was evaluated."""

import argparse
import json
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from checkout import ROOT
from dettools.cli import main
from dettools.datasets.scenes import write_dataset
from safetensors.torch import load_file

SPEC = ROOT / "model_store/shapes/shapes.yaml"
DEMO = ROOT / "model_store/shapes/shapes.safetensors"


def run(capsys, *arguments):
    code = main(["publish", *map(str, arguments)])
    return code, capsys.readouterr()


@pytest.fixture
def checkpoint(tmp_path):
    state = {"a.weight": torch.rand(100, 250), "a.bias": torch.zeros(100)}
    content = {
        "meta": {"cfg": "work_dir='/home/ann'", "dataset_meta": {"classes": ("cat", "dog")}},
        "state_dict": state,
        "optimizer": {"state": {0: {"momentum_buffer": torch.rand(100, 250)}}},
    }
    torch.save(content, tmp_path / "epoch_12.pth")
    return tmp_path / "epoch_12.pth"


def test_it_prints_what_goes_with_sizes_and_where_the_release_is(checkpoint, tmp_path, capsys):
    code, said = run(capsys, checkpoint, tmp_path / "released.pth")
    assert code == 0
    dropped, scrubbed, weights, last = said.out.splitlines()
    assert dropped == "dropped optimizer: 100.0 kB"
    assert (
        scrubbed == "scrubbed meta.cfg: 20 bytes, configuration may tell of its makers; publish it as a file of its own"
    )
    assert weights == "weights: state_dict"
    (release,) = tmp_path.glob("released-*.pth")
    assert last.startswith(f"{release}: written and read back, 2 tensors, ")
    # As the original printed its name at once and moved the file later, scripts found nothing there.
    assert torch.load(release, weights_only=True)["state_dict"]["a.weight"].shape == (100, 250)


def test_json_is_the_last_line(checkpoint, tmp_path, capsys):
    code, said = run(capsys, checkpoint, tmp_path / "released.safetensors", "--half", "--json")
    document = json.loads(said.out.splitlines()[-1])
    assert code == 0
    assert Path(document["path"]).stat().st_size == document["bytes"]
    assert Path(document["path"]).name == f"released-{document['sha256'][:8]}.safetensors"
    assert (document["written"], document["half"], document["averaged"]) == (True, True, None)
    assert document["dropped"] == [{"key": "optimizer", "bytes": 100_000 + len("statemomentum_buffer") + 8}]


def test_twice_is_the_very_same_file(checkpoint, tmp_path, capsys):
    run(capsys, checkpoint, tmp_path / "released.pth")
    code, said = run(capsys, checkpoint, tmp_path / "released.pth")
    assert code == 0
    assert "there already, the very same file" in said.out
    assert len(list(tmp_path.glob("released*"))) == 1


def test_a_dry_run_writes_nothing(checkpoint, tmp_path, capsys):
    code, said = run(capsys, checkpoint, tmp_path / "released.pth", "--dry-run")
    assert code == 0
    assert "would be written" in said.out
    assert list(tmp_path.glob("released*")) == []


def test_the_originals_arguments_are_taken(checkpoint, tmp_path, capsys):
    code, _ = run(capsys, checkpoint, tmp_path / "released.pth", "--save-keys", "meta", "state_dict", "optimizer")
    (release,) = tmp_path.glob("released-*.pth")
    assert code == 0
    assert set(torch.load(release, weights_only=True)) == {"meta", "state_dict", "optimizer"}


@pytest.mark.parametrize("out", ["epoch_12.pth", "released.bin", "none/released.pth"])
def test_a_usage_error_is_exit_code_2_and_the_input_stays(checkpoint, tmp_path, capsys, out):
    before = checkpoint.read_bytes()
    code, said = run(capsys, checkpoint, tmp_path / out)
    assert (code, said.out) == (2, "")
    assert said.err.startswith("detserve publish: ")
    assert checkpoint.read_bytes() == before


@pytest.fixture(scope="module")
def training_checkpoint(tmp_path_factory):
    """A checkpoint as torchvision's reference training with --model-ema leaves it; the demo weights are the average."""
    averaged = load_file(DEMO)
    last = {name: tensor + 0.1 if tensor.is_floating_point() else tensor for name, tensor in averaged.items()}
    wrapped = OrderedDict(n_averaged=torch.tensor(20))
    wrapped |= {f"module.{name}": tensor for name, tensor in averaged.items()}
    content = {
        "model": last,
        "model_ema": wrapped,
        "optimizer": {"state": {n: {"momentum_buffer": tensor.clone()} for n, tensor in enumerate(last.values())}},
        "lr_scheduler": {"last_epoch": 3},
        "args": argparse.Namespace(output_dir=Path("/home/ann/secret"), data_path="/data/shapes", lr=0.02),
        "epoch": 3,
    }
    path = tmp_path_factory.mktemp("training") / "model_3.pth"
    torch.save(content, path)
    return path


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_third_of_a_training_checkpoint_is_published_and_no_path_of_it(training_checkpoint, tmp_path, capsys, suffix):
    code, said = run(capsys, training_checkpoint, tmp_path / f"shapes{suffix}", "--json")
    document = json.loads(said.out.splitlines()[-1])
    assert code == 0
    assert (document["weights"], document["averaged"]) == ("model_ema", True)
    assert document["bytes"] < document["source_bytes"] / 2.5
    for word in (b"secret", b"/data/shapes"):
        assert word in training_checkpoint.read_bytes()
        assert word not in Path(document["path"]).read_bytes()


RELEASES = {"pth": (".pth", "auto"), "safetensors": (".safetensors", "auto"), "laststep": (".pth", "drop")}


@pytest.fixture(scope="module")
def instance(serve, training_checkpoint, tmp_path_factory):
    """One server with an archive of each release."""
    folder = tmp_path_factory.mktemp("releases")
    archives = []
    for name, (suffix, ema) in RELEASES.items():
        assert main(["publish", str(training_checkpoint), str(folder / f"{name}{suffix}"), "--ema", ema]) == 0
        (release,) = folder.glob(f"{name}-*{suffix}")
        archives.append(folder / f"{name}.mar")
        arguments = ["--weights", str(release), "--name", name, "--out", str(archives[-1])]
        assert main(["archive", str(SPEC), *arguments]) == 0
    return serve(archives, "releases")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    write_dataset(folder, 4, 71_000)
    return [str(path) for path in sorted(folder.rglob("*.jpg"))]


@pytest.mark.server
@pytest.mark.parametrize(("name", "passes"), [("pth", True), ("safetensors", True), ("laststep", False)])
def test_a_release_is_served_as_the_original_was_evaluated(instance, scenes, training_checkpoint, capsys, name, passes):
    """Published, archived, served, and compared with the training checkpoint itself.

    The weights of the last step, which the original publishes when told `--save-keys model`, are other detections.
    """
    eager = ["--spec", str(SPEC), "--weights", str(training_checkpoint)]
    code = main(["compare", name, *scenes, *eager, "--instance", instance, "--json"])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (code, report["passed"]) == (0 if passes else 1, passes), report
    assert report["images"] == len(scenes) == 4
    assert report["matched"] > 0 or not passes
