"""`detserve evaluate --config`: the same figures as with the paths written out, and the classes of the config."""

import json

import pytest
import torch
from checkout import ROOT
from dettools.cli import main
from dettools.datasets.scenes import write_dataset

SPEC = ROOT / "model_store" / "shapes" / "shapes.yaml"


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A folder with a config beside its data."""
    folder = tmp_path_factory.mktemp("scenes")
    write_dataset(folder / "data", count=4, seed=900)
    dataset = "type='CocoDataset', data_root='data', ann_file='annotations.json', data_prefix=dict(img='images/')"
    (folder / "all.py").write_text(f"test_dataloader = dict(dataset=dict({dataset}))\n")
    names = [one["name"] for one in json.loads((folder / "data/annotations.json").read_text())["categories"]]
    part = f"{dataset}, metainfo=dict(classes=({names[0]!r},))"
    (folder / "part.py").write_text(f"val_dataloader = dict(dataset=dict({part}))\n")
    return folder


def evaluate(capsys, *arguments):
    code = main(["evaluate", str(SPEC), *map(str, arguments), "--json"])
    told = capsys.readouterr()
    return code, json.loads(told.out.splitlines()[-1]) if told.out else {}, told.err


def test_it_is_the_data_set_that_the_paths_name(scenes, tmp_path, capsys):
    data = scenes / "data"
    paths = ["--images", data / "images", "--annotations", data / "annotations.json"]
    code, written_out, _ = evaluate(capsys, *paths, "--out", tmp_path / "a")
    same, of_config, told = evaluate(capsys, "--config", scenes / "all.py", "--out", tmp_path / "b")
    assert (code, same) == (0, 0)
    assert of_config["metrics"] == written_out["metrics"]
    assert str(data / "annotations.json") in told


def test_the_config_s_classes_are_what_the_data_set_has(scenes, tmp_path, capsys):
    # The model's other classes are then none of the data set, which is refused until it is accepted.
    options = ["--config", scenes / "part.py", "--split", "val", "--out", tmp_path]
    code, refused, _ = evaluate(capsys, *options)
    assert code == 1
    assert "classes are not in the data set" in refused["objections"][0]["message"]
    code, found, _ = evaluate(capsys, *options, "--accept-objections")
    assert code == 0
    assert len(found["metrics"]["bbox"]["per_class"]) == 1


def test_neither_a_config_nor_paths_is_told(scenes, tmp_path, capsys):
    code, _, told = evaluate(capsys, "--images", tmp_path)
    assert code == 2
    assert "got no --annotations, expected a data set" in told
    code, _, told = evaluate(capsys, "--config", scenes / "none.py")
    assert (code, "none.py" in told) == (2, True)
    code, _, told = evaluate(capsys, "--config", scenes / "part.py")
    assert code == 2
    assert "--split: val" in told
