"""print-config against MMEngine's own reading and writing, and each origin against the line that it names."""

import ast
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from detserve.mmdet_config import ConfigError, NotLiteralError, read_config
from dettools.cli import main
from dettools.configs.config_source import leaves, load_located
from dettools.configs.config_text import flat_text, pretty_text, save_config
from dettools.configs.difference import differences
from dettools.configs.origins import Place
from dettools.configs.overrides import option_value
from dettools.configs.redaction import redacted

BASE = """\
lr = 0.01
model = dict(
    type='RetinaNet',
    backbone=dict(type='ResNet', depth=50, out_indices=(0, 1, 2, 3)),
    neck=dict(type='FPN', start_level=1))
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(1333, 800)),
    dict(type='RandomFlip', prob=0.5)]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
"""
OVER = """\
_base_ = './base.py'
model = dict(
    backbone=dict(depth=101),
    neck=dict(_delete_=True, type='PAFPN'))
depth = _base_.model.backbone.depth
names = ['a'] + ['b']
widths = [2 ** one for one in range(3)]
model['head'] = dict(classes=3)
train_dataloader = dict(batch_size=4)
train_dataloader.update(num_workers=2)
"""


@pytest.fixture
def config(tmp_path) -> Path:
    (tmp_path / "base.py").write_text(BASE)
    path = tmp_path / "over.py"
    path.write_text(OVER)
    return path


def places(config: Path, *options: str) -> dict[str, str]:
    found = load_located(config, options)
    return {
        ".".join(map(str, path)): str(found.origins.of(path).place).replace(f"{os.path.relpath(config.parent)}/", "")
        for path, _ in leaves(found.values)
    }


def test_each_value_has_the_line_that_sets_it(config):
    found = {key: Path(place).name for key, place in places(config).items()}
    assert {key: found[key] for key in found if key.startswith(("lr", "model", "depth", "names", "widths"))} == {
        "lr": "base.py:1",
        "model.type": "base.py:3",
        "model.backbone.type": "base.py:4",
        "model.backbone.depth": "over.py:3",
        "model.backbone.out_indices": "base.py:4",
        "model.neck.type": "over.py:4",
        "model.head.classes": "over.py:8",
        "depth": "over.py:5",
        "names": "over.py:6",
        "widths": "over.py:7",
    }
    assert found["train_dataloader.dataset.pipeline.1.scale"] == "base.py:8"
    assert found["train_dataloader.batch_size"] == "over.py:9"
    assert found["train_dataloader.num_workers"] == "over.py:10"


def test_what_a_value_replaced_is_told(config):
    found = load_located(config, ["model.backbone.depth=18"])
    origins = found.origins.of(("model", "backbone", "depth"))
    assert origins.place == Place("--cfg-options", 0)
    assert [Path(str(place)).name for place in origins.replaced] == ["over.py:3", "base.py:4"]
    assert found.values["model"]["backbone"]["depth"] == 18


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("c.yaml", "_base_: base.py\nmodel:\n  backbone:\n    depth: 101\n"),
        ("c.json", '{\n"_base_": "base.py",\n"model": {"backbone": {\n"depth": 101}}}\n'),
        ("c.py", "_base_ = ['base.py']\n\nmodel = {'backbone':\n{'depth': 101}}\n"),
    ],
)
def test_places_in_yaml_json_and_python(tmp_path, name, text):
    (tmp_path / "base.py").write_text(BASE)
    (tmp_path / name).write_text(text)
    found = places(tmp_path / name)
    assert Path(found["model.backbone.depth"]).name == f"{name}:4"
    assert Path(found["model.backbone.type"]).name == "base.py:4"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("c.py", "_base_ = 'base.py'\n\nback = {{_base_.model.backbone}}\nrate = dict(\n    lr={{_base_.lr}})\n"),
        ("c.yaml", "_base_: base.py\n\nback: {{_base_.model.backbone}}\nrate:\n  lr: {{_base_.lr}}\n"),
        ("c.json", '{"_base_": "base.py",\n\n"back": {{_base_.model.backbone}},\n"rate": {\n"lr": {{_base_.lr}}}}\n'),
    ],
)
def test_a_value_of_the_base_keeps_its_place_and_its_key_has_its_own(tmp_path, name, text):
    (tmp_path / "base.py").write_text(BASE)
    (tmp_path / name).write_text(text)
    found = load_located(tmp_path / name)
    assert found.values["back"]["depth"] == 50
    assert Path(str(found.origins.of(("back",)).place)).name == f"{name}:3"
    assert Path(str(found.origins.of(("back", "depth")).place)).name == "base.py:4"
    assert Path(str(found.origins.of(("rate", "lr")).place)).name == f"{name}:5"


def packaged(count: int) -> list[Path]:
    mmdet = pytest.importorskip("mmdet")
    folder = Path(mmdet.__file__).parent / ".mim" / "configs"
    paths = sorted(path for path in folder.rglob("*.py") if "_base_" not in path.parts and "__init__" not in path.name)
    return paths[:: max(1, len(paths) // count)]


def test_the_named_line_of_mmdetections_own_configs_has_the_value():
    checked, elsewhere, literal = 0, [], 0
    for path in packaged(12):
        try:
            found = load_located(path)
        except NotLiteralError:
            continue
        literal += 1
        lines: dict[str, list[str]] = {}
        for where, value in leaves(found.values):
            assert found.origins.of(where).place.line > 0
            if not isinstance(value, str | bool | None) or not found.origins.knows(where):
                continue
            place = found.origins.of(where).place
            text = lines.setdefault(place.file, Path(place.file).read_text("utf-8").splitlines())
            checked += 1
            # What a name stands for is written at its own line; a text may go on over several.
            line = text[place.line - 1]
            if str(value) not in line and not any(word in line for word in (str(where[-1]), "_base_")):
                elsewhere.append((path.name, where, value, str(place)))
    assert elsewhere == []
    assert literal >= 8
    assert checked > 700


@pytest.mark.parametrize("index", range(3))
def test_the_text_is_read_back_as_mmengine_reads_the_config(index, tmp_path):
    from mmengine.config import Config

    paths = [path for path in packaged(40) if "read_base" not in path.read_text("utf-8")]
    path = paths[index * len(paths) // 3]
    try:
        config = load_located(path)
    except NotLiteralError:
        pytest.skip("not literal")
    theirs = Config.fromfile(path)
    for suffix in (".py", ".json", ".yml"):
        saved = tmp_path / f"flat{suffix}"
        save_config(saved, config.values)
        again = Config.fromfile(saved).to_dict()
        expected = theirs.to_dict() if suffix == ".py" else json.loads(json.dumps(theirs.to_dict()))
        assert again == expected
        assert read_config(saved).values == expected
    # The keys come in the order that the original prints.
    ours = [line.partition(" = ")[0] for line in pretty_text(config.values).splitlines() if line[0] not in " )]}"]
    assert ours == [one.targets[0].id for one in ast.parse(theirs.pretty_text).body]


@pytest.mark.parametrize(
    "text",
    [
        "1",
        "0.5",
        "1e-3",
        "true",
        "False",
        "None",
        "SGD",
        "[1,2]",
        "(1333,800)",
        "a,b",
        "[(1,2),(3,4)]",
        "[]",
        "'x'",
        "[[a,b],c]",
        "((1,),2)",
        "3,",
        "()",
        "nan5",
        "-1",
    ],
)
def test_an_option_means_what_it_means_to_mmengine(text):
    DictAction = pytest.importorskip("mmengine.config").DictAction  # noqa: N806
    theirs = DictAction._parse_iterable(text)
    assert option_value(text) == theirs
    assert type(option_value(text)) is type(theirs)


def test_an_option_is_merged_as_mmengine_does(config):
    Config = pytest.importorskip("mmengine.config").Config  # noqa: N806
    theirs = Config.fromfile(config)
    theirs.merge_from_dict({"train_pipeline.1.scale": (1, 2), "model.backbone.depth": 18, "new.key": None})
    ours = load_located(config, ["train_pipeline.1.scale=(1,2)", "model.backbone.depth=18", "new.key=None"])
    assert ours.values == theirs.to_dict()


def test_a_mistyped_option_is_told(config):
    notes = load_located(config, ["model.backbonne.depth=18"]).notes
    assert len(notes) == 1
    assert "did you mean model.backbone?" in notes[0]


@pytest.mark.parametrize("option", ["depth", "=3", "model..x=1", "train_pipeline.9.type=X", "lr.x=1", "a=[1,2", "a=1]"])
def test_an_option_that_leads_nowhere_is_refused(config, option):
    with pytest.raises(ConfigError, match="--cfg-options"):
        load_located(config, [option])


def test_text_with_blanks_stays_where_the_original_takes_them_out():
    DictAction = pytest.importorskip("mmengine.config").DictAction  # noqa: N806
    assert DictAction._parse_iterable("traffic light") == "trafficlight"
    assert option_value("traffic light") == "traffic light"


def test_a_bare_file_name_is_saved_where_the_original_fails(config, tmp_path, monkeypatch, capsys):
    """[REPRO] The original makes the folder of the name, and a bare name has none."""
    monkeypatch.chdir(tmp_path)
    save_path = "flat.py"
    with pytest.raises(FileNotFoundError):
        os.makedirs(os.path.split(save_path)[0])  # noqa: PTH103
    assert main(["print-config", str(config), "--save-path", save_path]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Config:\n")
    assert out.endswith("Config saving at flat.py\n")
    assert read_config(Path(save_path)).values == read_config(config).values
    assert main(["print-config", str(config), "--save-path", "deep/er/flat.yml"]) == 0
    assert main(["print-config", str(config), "--save-path", "flat.txt"]) == 2


def test_a_config_with_code_is_not_run(tmp_path, capsys):
    """The original runs it: the file of the marker appears."""
    marker = tmp_path / "ran"
    config = tmp_path / "evil.py"
    config.write_text(f"open({str(marker)!r}, 'w').close()\nx = 1\n")
    assert main(["print-config", str(config)]) == 2
    assert not marker.exists()
    assert "run it" in (told := capsys.readouterr().err)
    assert "allow that with --allow-code" in told
    pytest.importorskip("mmengine")
    assert main(["print-config", str(config), "--allow-code", "--origins"]) == 0
    assert marker.exists()
    captured = capsys.readouterr()
    assert "was run" in captured.err
    assert "x = 1  # " in captured.out


def test_the_difference_names_both_places(config, capsys):
    other = config.with_name("base.py")
    assert main(["print-config", str(other), "--diff", str(config), "--key", "model", "--json"]) == 1
    rows = {row["key"]: row for row in json.loads(capsys.readouterr().out)["differences"]}
    assert set(rows) == {"model.backbone.depth", "model.head", "model.neck.start_level", "model.neck.type"}
    assert (rows["model.backbone.depth"]["before"], rows["model.backbone.depth"]["after"]) == (50, 101)
    assert rows["model.backbone.depth"]["before_place"].endswith("base.py:4")
    assert rows["model.backbone.depth"]["after_place"].endswith("over.py:3")
    assert rows["model.neck.start_level"]["kind"] == "removed"
    assert rows["model.head"]["kind"] == "added"
    # Its places are told anyway.
    assert main(["print-config", str(config), "--diff", str(config), "--origins"]) == 0
    assert capsys.readouterr().out.endswith("no difference\n")


def test_a_step_put_into_a_pipeline_is_one_addition(config, tmp_path):
    longer = tmp_path / "longer.py"
    longer.write_text(BASE.replace("dict(type='Resize'", "dict(type='Mosaic'),\n    dict(type='Resize'"))
    changes = differences(load_located(tmp_path / "base.py"), load_located(longer))
    pipeline = [one for one in changes if one.path[0] == "train_pipeline"]
    assert [(one.kind, one.key, one.after) for one in pipeline] == [("added", "train_pipeline.1", {"type": "Mosaic"})]


def test_secrets_are_hidden_and_counts_are_not():
    values = {
        "vis_backends": [{"type": "WandbVisBackend", "init_kwargs": {"api_key": "abc", "project": "p"}}],
        "db": {"password": 1234, "user": "u"},
        "url": "https://me:hunter2@host/x.pth?X-Amz-Signature=beef&part=1",
        "head": {"num_token": 4, "token": 7, "tokenizer": "bert", "keypoint": "k", "passwords_file": "p"},
        "note": "AKIAABCDEFGHIJKLMNOP",
        "secretAccessKey": "zzz",
    }
    found = redacted(values)
    text = flat_text(found.values)
    for secret in ("abc", "1234", "hunter2", "beef", "AKIA", "zzz"):
        assert secret not in text
    assert found.values["head"] == values["head"]
    assert found.values["url"] == "https://***@host/x.pth?X-Amz-Signature=***&part=1"
    assert set(found.hidden) == {"vis_backends.0.init_kwargs.api_key", "db.password", "url", "note", "secretAccessKey"}


def test_hidden_everywhere_unless_asked_for(tmp_path, capsys):
    config = tmp_path / "c.py"
    config.write_text("token = 'hush-hush'\n")
    other = tmp_path / "d.py"
    other.write_text("token = 'other-hush'\n")
    for words in (["--origins"], ["--json"], ["--save-path", str(tmp_path / "s.json")], ["--diff", str(other)]):
        main(["print-config", str(config), *words])
        captured = capsys.readouterr()
        assert "hush" not in captured.out + captured.err
    assert "hush" not in (tmp_path / "s.json").read_text()
    assert main(["print-config", str(config), "--show-secrets"]) == 0
    assert "hush-hush" in capsys.readouterr().out


def archive(path: Path, members: dict[str, str]) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, text in members.items():
            file.writestr(name, text)
    return path


def test_the_config_in_an_archive(config, tmp_path, capsys):
    text = "{\n    'model': {'type': 'RetinaNet', 'backbone': {'depth': 101}},\n}\n"
    manifest = json.dumps({"model": {"modelName": "m", "modelFile": "config.py", "serializedFile": "w.pth"}})
    original = archive(tmp_path / "original.mar", {"MAR-INF/MANIFEST.json": manifest, "config.py": text})
    ours = archive(tmp_path / "ours.mar", {"spec.json": json.dumps({"config": "config.py"}), "config.py": text})
    for mar in (original, ours):
        assert main(["print-config", str(mar), "--origins", "--key", "model.backbone"]) == 0
        assert f"{mar.name}/config.py:2\n" in capsys.readouterr().out
    assert main(["print-config", str(original), "--diff", str(config)]) == 1
    none = archive(tmp_path / "none.mar", {"spec.json": json.dumps({"family": "torchvision"})})
    assert main(["print-config", str(none)]) == 2
    assert "detserve inspect" in capsys.readouterr().err
    (tmp_path / "broken.mar").write_bytes(b"no zip")
    assert main(["print-config", str(tmp_path / "broken.mar")]) == 2


@pytest.mark.shared_data
def test_a_real_config(shared_data, tmp_path):
    path = next((shared_data / "models" / "mmdet_yolox_nano").glob("*.py"))
    config = load_located(path)
    save_config(tmp_path / "flat.py", config.values)
    assert read_config(tmp_path / "flat.py").values == config.values
    assert all(config.origins.of(where).place.line for where, _ in leaves(config.values))


def test_keys_that_are_no_names_and_numbers_without_a_literal(tmp_path):
    values = {"a": {"class": 1, "b c": [float("inf")]}, "t": (1,), "long": ["x" * 50, ("y" * 50, {1: 2})]}
    save_config(tmp_path / "c.py", values)
    assert read_config(tmp_path / "c.py").values == values
    save_config(tmp_path / "d.py", {"no name": 1})
    assert read_config(tmp_path / "d.py").values == {"no name": 1}


def test_a_part_that_is_not_there_is_told(config, capsys):
    assert main(["print-config", str(config), "--key", "model.bakbone"]) == 2
    assert "expected a key of model: type, backbone" in capsys.readouterr().err
    assert main(["print-config", str(config), "--key", "model.backbone.depth"]) == 0
    assert capsys.readouterr().out == "101\n"


def test_the_original_prints_the_same_values(config, capsys):
    """`Config:` and assignments that Python reads: the text that people copy out of logs."""
    Config = pytest.importorskip("mmengine.config").Config  # noqa: N806
    assert main(["print-config", str(config)]) == 0
    title, _, text = capsys.readouterr().out.partition("\n")
    assert title == "Config:"
    theirs: dict[str, object] = {}
    ours: dict[str, object] = {}
    exec(Config.fromfile(config).pretty_text, theirs)
    exec(text, ours)
    assert ours == theirs


def test_no_torch_for_a_config(config):
    words = ["print-config", str(config)]
    code = f"import sys; from dettools.cli import main; main({words}); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_a_config_is_never_written_over_what_was_read(config, capsys):
    before = {path.name: path.read_text() for path in config.parent.iterdir()}
    for name in ("over.py", "base.py"):
        assert main(["print-config", str(config), "--save-path", str(config.with_name(name))]) == 2
        assert "which was read, expected another file" in capsys.readouterr().err
    assert {path.name: path.read_text() for path in config.parent.iterdir()} == before


def test_a_file_that_cannot_be_written_whole_stays_as_it_was(config, tmp_path, monkeypatch, capsys):
    saved = tmp_path / "flat.py"
    saved.write_text("older = 1\n")

    def stopped(path: Path, text: str, **_: object) -> None:
        path.write_bytes(text[:5].encode())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", stopped)
    assert main(["print-config", str(config), "--save-path", str(saved)]) == 2
    assert "cannot be written (No space left on device)" in capsys.readouterr().err
    assert saved.read_text() == "older = 1\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.py", "flat.py", "over.py"]
    assert main(["print-config", str(config), "--save-path", "x" * 300 + ".py"]) == 2


def test_other_secrets_differ_without_being_shown(tmp_path, capsys):
    """Hidden first and compared then, they were all `***`, and equal."""
    before, after = tmp_path / "a.py", tmp_path / "b.py"
    before.write_text("db = dict(token='hush-one')\n")
    after.write_text("db = dict(token='hush-two')\n")
    assert main(["print-config", str(before), "--diff", str(after), "--json"]) == 1
    captured = capsys.readouterr()
    assert "hush" not in captured.out + captured.err
    assert json.loads(captured.out)["differences"][0]["after"] == "***"
    assert main(["print-config", str(before), "--diff", str(after), "--show-secrets"]) == 1
    assert "'hush-one' → 'hush-two'" in capsys.readouterr().out


def test_the_difference_at_a_key_is_told_where_all_around_it_differs(config, capsys):
    base = config.with_name("base.py")
    assert main(["print-config", str(base), "--diff", str(config), "--key", "model.head.classes"]) == 1
    assert "+ model.head: dict(classes=3)" in capsys.readouterr().out
    assert main(["print-config", str(base), "--diff", str(config), "--key", "model.bakbone"]) == 2
    assert "expected a key of model" in capsys.readouterr().err


def test_more_shapes_of_secrets():
    values = {
        "api_keys": ["hush"],
        "passwords": ["hush"],
        "headers": {"Authorization": "Basic hush"},
        "auth": "Bearer hush-hush",
        "ssh_key": "hush",
        "database": "Server=x;Password=hush;Timeout=3",
        "hook": "https://hooks.slack.com/services/hush/hush",
    }
    found = redacted(values)
    assert "hush" not in flat_text(found.values)
    assert found.values["database"] == "Server=x;Password=***;Timeout=3"
    harmless = {"tokens": ["cat"], "passwords_file": "p", "anchor_key": "k", "threshold": float("nan")}
    # NaN differs from itself.
    assert redacted(harmless).hidden == ()


def test_an_error_does_not_tell_a_secret(tmp_path, capsys):
    config = tmp_path / "c.py"
    config.write_text("token = 'hush'\n")
    assert main(["print-config", str(config), "--cfg-options", "token.x=1"]) == 2
    assert "token is a str, which has no 'x'" in (told := capsys.readouterr().err)
    assert "hush" not in told


@pytest.mark.parametrize("suffix", [".json", ".yml"])
def test_python_values_that_json_and_yaml_lack_are_written(suffix, tmp_path, capsys):
    config, saved = tmp_path / "c.py", tmp_path / f"flat{suffix}"
    config.write_text("kinds = {1, 'a'}\nsteps = range(3)\npairs = {(1, 2): 3, 'b': 4}\nlast = float('inf')\n")
    assert main(["print-config", str(config), "--save-path", str(saved), "--json"]) == 0
    expected = {"kinds": [1, "a"], "steps": [0, 1, 2], "pairs": {"(1, 2)": 3, "b": 4}}
    assert read_config(saved).values == {**expected, "last": float("inf")}

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    document = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert document["values"] == {**expected, "last": "inf"}


def test_a_json_file_indented_by_tabs_has_lines(tmp_path):
    config = tmp_path / "c.json"
    config.write_text('{\n\t"a": 1,\n\t"b": {\n\t\t"c": 2}}\n')
    assert {key: Path(place).name for key, place in places(config).items()} == {"a": "c.json:2", "b.c": "c.json:4"}
