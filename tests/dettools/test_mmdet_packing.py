"""What `archive` takes of MMDetection's, by its command line: specs without categories, and categories by name."""

import json

import pytest
from dettools.cli import build_parser, main
from mmdet_models import NAMES, mmdet_warnings, needs_mmdet, random_model

pytestmark = [needs_mmdet, *mmdet_warnings]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return random_model("yolox", tmp_path_factory.mktemp("yolox"))


def written_spec(folder, config, *, more=""):
    path = folder / "mine.yaml"
    path.write_text(f"name: mine\nfamily: mmdet\nconfig: {config}\n{more}")
    return path


def archive(*arguments):
    return main(["archive", *map(str, arguments)])


def test_a_spec_without_categories_takes_those_of_the_checkpoint_on_the_command_line(model, tmp_path, capsys):
    spec = written_spec(tmp_path, model.config)
    assert archive(spec, "--out", tmp_path / "a.mar") == 2
    assert "weights: missing, so the categories are not known" in capsys.readouterr().err
    assert archive(spec, "--weights", model.checkpoint, "--out", tmp_path / "a.mar") == 0
    assert main(["inspect", str(tmp_path / "a.mar"), "--json"]) == 0
    described = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [one["name"] for one in described["categories"]] == list(NAMES)


def test_so_does_one_whose_config_has_to_be_run_once_that_is_allowed(model, tmp_path, capsys):
    config = tmp_path / "computed.py"
    config.write_text(model.config.read_text("utf-8") + "\nworkers = max(2, 3)\n")
    spec = written_spec(tmp_path, config.name, more=f"weights: {model.checkpoint}\n")
    assert archive(spec, "--out", tmp_path / "a.mar") == 2
    assert "Reading it would run it" in capsys.readouterr().err
    assert archive(spec, "--allow-code", "--out", tmp_path / "a.mar") == 0
    assert "was run, since it is more than a literal" in capsys.readouterr().err


def test_categories_in_another_order_keep_their_labels(model, tmp_path, capsys):
    rows = [{"id": number + 1, "name": name} for number, name in enumerate(NAMES)][::-1]
    (tmp_path / "classes.json").write_text(json.dumps({"images": [], "annotations": [], "categories": rows}))
    spec = written_spec(tmp_path, model.config)
    command = [spec, "--weights", model.checkpoint, "--categories", tmp_path / "classes.json", "--json"]
    assert archive(*command, "--out", tmp_path / "a.mar") == 0
    assert not [note for note in json.loads(capsys.readouterr().out.splitlines()[-1])["notes"] if "categories" in note]
    main(["inspect", str(tmp_path / "a.mar"), "--json"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["categories"]
    assert {one["name"]: one["model_label"] for one in found} == {name: label for label, name in enumerate(NAMES)}


def test_categories_named_otherwise_are_told(model, tmp_path, capsys):
    rows = [{"id": number + 1, "name": name.upper()} for number, name in enumerate(NAMES)]
    (tmp_path / "classes.json").write_text(json.dumps({"images": [], "annotations": [], "categories": rows}))
    command = [model.config, model.checkpoint, "--categories", tmp_path / "classes.json", "--model-store", tmp_path]
    assert archive(*command) == 0
    assert "label 0 is 'thing 0' there and 'THING 0' in the categories given" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        ["archive", "m"],
        ["export", "m"],
        ["verify", "m"],
        ["compare", "m", "a.jpg"],
        ["evaluate", "m", "--images", "a", "--annotations", "b"],
        ["benchmark", "eager", "m", "--images", "a"],
        ["benchmark", "runtime", "m", "--images", "a"],
        ["flops", "m"],
    ],
)
def test_every_command_that_may_have_to_run_a_config_can_be_allowed_to(command):
    assert build_parser().parse_args([*command, "--allow-code"]).allow_code
