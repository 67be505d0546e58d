"""Archives of MMDetection's own script: what is taken out of them, and what is refused."""

import json
import stat
import zipfile

import pytest
import torch
from detserve.errors import ArchiveError, SpecError
from detserve.mmdet_archive import is_original, read_original
from detserve.mmdet_checkpoint import read_checkpoint
from detserve.mmdet_config import read_config
from original_packing import CONFIG, HANDLER, pack_as_original

META = {"dataset_meta": {"classes": ("cat", "dog")}}
MANIFEST = "MAR-INF/MANIFEST.json"


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "epoch_12.pth"
    torch.save({"state_dict": {"weight": torch.arange(4.0)}, "meta": META}, path)
    return path


@pytest.fixture
def old(tmp_path, checkpoint):
    return pack_as_original(tmp_path / "store", checkpoint, name="nano", version="2.1")


def rewritten(path, *, change=None, add=()):
    """The archive with its manifest changed, and with members added as they are given."""
    with zipfile.ZipFile(path) as source:
        members = {name: source.read(name) for name in source.namelist()}
    manifest = json.loads(members[MANIFEST])
    (change or (lambda _: None))(manifest["model"])
    members[MANIFEST] = json.dumps(manifest).encode()
    result = path.with_name("changed.mar")
    with zipfile.ZipFile(result, "w", zipfile.ZIP_DEFLATED) as target:
        for name, content in [*members.items(), *add]:
            target.writestr(name, content)
    return result


def test_config_and_checkpoint_come_out_as_they_went_in(tmp_path, old, checkpoint):
    assert is_original(old)
    read = read_original(old, tmp_path / "out")
    assert (read.name, read.version) == ("nano", "2.1")
    assert read.checkpoint.name == "epoch_12.pth"
    assert read.checkpoint.read_bytes() == checkpoint.read_bytes()
    assert read.config.read_text() == CONFIG
    assert read_config(read.config).values["model"]["type"] == "FasterRCNN"
    assert read_checkpoint(read.checkpoint).class_names == ("cat", "dog")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.py", "epoch_12.pth"]


def test_the_handler_is_described_by_its_text_and_its_threshold_is_told(tmp_path, old):
    read = read_original(old, tmp_path / "out")
    handler = read.handler
    assert (handler.name, handler.threshold) == ("mmdet_handler.py", 0.5)
    assert {"mmcv", "mmdet.apis"} <= set(handler.imports)
    assert (handler.one_by_one, handler.decodes_unchecked, handler.reads_masks) == (True, True, False)
    [note] = read.notes
    assert "--serving score_threshold=0.5" in note


def test_another_handler_and_more_files_are_told(tmp_path, checkpoint):
    (tmp_path / "plugin.py").write_text("x = 1\n")
    handler = "class Handler:\n    def handle(self, data, context):\n        return [one.masks for one in data]\n"
    path = pack_as_original(tmp_path / "store", checkpoint, handler=handler, extra_files=str(tmp_path / "plugin.py"))
    read = read_original(path, tmp_path / "out")
    assert read.handler.reads_masks
    other, left = read.notes
    assert "mmdet_handler.py is not MMDetection's own" in other
    assert left.startswith("left behind: plugin.py")


def test_before_the_archiver_took_settings_the_config_stood_in_one_place(tmp_path, old):
    path = rewritten(old, change=lambda model: model.pop("configFile"))
    assert is_original(path)
    assert read_original(path, tmp_path / "out").config_slot == ""
    assert read_original(old, tmp_path / "out").config_slot == "config.py"


def test_an_archive_of_another_kind_is_none(tmp_path, old):
    path = rewritten(old, change=lambda model: model.update(modelFile="net.py", handler="x.py", configFile="c.yaml"))
    assert not is_original(path)
    with pytest.raises(ArchiveError, match=r"got the model file net\.py and the handler x\.py"):
        read_original(path, tmp_path / "out")
    (tmp_path / "text.mar").write_text("no zip")
    assert not is_original(tmp_path / "text.mar")
    with pytest.raises(ArchiveError, match="cannot be read as a zip file"):
        read_original(tmp_path / "text.mar", tmp_path / "out")
    with pytest.raises(ArchiveError, match="cannot be read"):
        read_original(tmp_path / "none.mar", tmp_path / "out")


@pytest.mark.parametrize("name", ["../evil.py", "/evil.py", "a/../../evil.py"])
def test_a_member_that_leads_out_is_refused_before_anything_is_written(tmp_path, old, name):
    path = rewritten(old, add=[(name, b"print(1)")])
    with pytest.raises(ArchiveError, match="leads out of the archive"):
        read_original(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_in_the_manifest_cannot_lead_out_either(tmp_path, old):
    path = rewritten(old, change=lambda model: model.update(serializedFile="../../epoch_12.pth"))
    assert read_original(path, tmp_path / "out").checkpoint.parent == tmp_path / "out"
    path = rewritten(old, change=lambda model: model.update(serializedFile="other.pth"))
    with pytest.raises(ArchiveError, match=r"its manifest names other\.pth, which is not in it"):
        read_original(path, tmp_path / "out")


def test_a_link_is_refused(tmp_path, old):
    link = zipfile.ZipInfo("link.py")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with pytest.raises(ArchiveError, match="symbolic link"):
        read_original(rewritten(old, add=[(link, "/etc/passwd")]), tmp_path / "out")


def test_a_text_that_unpacks_to_gigabytes_is_refused_before_it_is_unpacked(tmp_path, old):
    path = rewritten(old, add=[("bomb.py", b" " * (17 << 20))])
    assert path.stat().st_size < 1 << 20
    assert not is_original(path)
    with pytest.raises(ArchiveError, match="17,825,792 bytes when it is unpacked, expected at most 16,777,216"):
        read_original(path, tmp_path / "out")


def test_a_config_that_would_run_is_refused(tmp_path, checkpoint, capsys):
    path = pack_as_original(tmp_path / "store", checkpoint, config=f"print('executed')\n{CONFIG}")
    with pytest.raises(SpecError, match="more than an assignment of data"):
        read_original(path, tmp_path / "out")
    assert capsys.readouterr().out == ""


def test_a_model_in_place_of_a_config_is_refused(tmp_path, checkpoint):
    path = pack_as_original(tmp_path / "store", checkpoint, config="optimizer = dict(lr=0.1)\n")
    with pytest.raises(SpecError, match="has no model with a type"):
        read_original(path, tmp_path / "out")


def test_what_the_handler_holds_is_not_run(tmp_path, checkpoint, capsys):
    path = pack_as_original(tmp_path / "store", checkpoint, handler=f"print('executed')\n{HANDLER}")
    assert read_original(path, tmp_path / "out").handler.threshold == 0.5
    assert capsys.readouterr().out == ""
