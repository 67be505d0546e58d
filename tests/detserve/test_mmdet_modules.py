"""The user's own modules in an MMDetection archive: what is packed, what is told, and that it is enough by itself."""

import os
import subprocess
import sys
import zipfile
from dataclasses import replace

import pytest
from checkout import ROOT
from dethandlers.detections import Category
from dethandlers.spec import Spec
from detserve.errors import SpecError
from detserve.mmdet_modules import packed_modules
from mmdet_models import CONFIGS, needs_mmdet, packaged

SPEC = Spec(name="own", family="mmdet", categories=(Category(1, "ring", 0),), config="own.py")
# It stands on its data file, and on a module beside it that is found wherever the training ran.
BACKBONE = """
import json
from pathlib import Path

import beside
from mmdet.registry import MODELS
from torch import nn

WIDTH = json.loads((Path(__file__).parent / "settings" / "width.json").read_text())


@MODELS.register_module()
class SettledPyramid(nn.Module):
    def __init__(self):
        super().__init__()
        self.levels = nn.ModuleList(
            nn.Conv2d(3 if place == 0 else WIDTH, WIDTH, 9, stride, 4) for place, stride in enumerate(beside.STRIDES)
        )

    def forward(self, pixels):
        found = []
        for level in self.levels:
            pixels = level(pixels).relu()
            found.append(pixels)
        return tuple(found)
"""
# A process of its own, so that nothing of it is registered here.
TRAINING = """
import ast, sys, torch
from pathlib import Path
from dethandlers.mmdet_model import build_network
from dettools.cli import main
from mmdet_models import write_files
values = ast.literal_eval(Path("values.txt").read_text())
torch.manual_seed(1)
write_files(values, build_network(values, modules=[Path.cwd()], allow_code=True).state_dict(), Path(), "own")
command = ["archive", "own.py", "own.pth", "--allow-code", "--model-store", "store", "--module", "pyramid"]
assert main(command) == 2
assert not list(Path("store").glob("*.mar")) and not list(Path("store").glob("*/*.yaml"))
assert main([*command, "--module", "beside.py"]) == 0
"""


def package(folder, *files):
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"# {name}\n")


def pack(folder, *modules, imports=()):
    return packed_modules(replace(SPEC, modules=modules), folder, imports)


def test_a_package_is_packed_with_its_data_without_caches_and_hidden_files(tmp_path):
    package(tmp_path, "pyramid/__init__.py", "pyramid/sub/deep.py", "pyramid/settings/width.json", "pyramid/names.txt")
    package(tmp_path, "pyramid/__pycache__/a.cpython-311.pyc", "pyramid/.git/config", "pyramid/.env", "pyramid/old.pyc")
    members, notes = pack(tmp_path, "pyramid", imports=["pyramid.sub.deep"])
    assert sorted(members) == [
        "modules/pyramid/__init__.py",
        "modules/pyramid/names.txt",
        "modules/pyramid/settings/width.json",
        "modules/pyramid/sub/deep.py",
    ]
    assert members["modules/pyramid/names.txt"] == b"# pyramid/names.txt\n"
    assert notes == []


def test_pickles_stay_out_and_that_is_told(tmp_path):
    package(tmp_path, "pyramid/__init__.py", "pyramid/start.pth", "pyramid/cache.pkl")
    members, [note] = pack(tmp_path, "pyramid", imports=["pyramid"])
    assert sorted(members) == ["modules/pyramid/__init__.py"]
    assert "left out of pyramid: cache.pkl, start.pth" in note


def test_two_of_one_name_clash(tmp_path):
    package(tmp_path, "a/net.py", "b/net.py", "net/__init__.py")
    for one, other in (("a/net.py", "b/net.py"), ("a/net.py", "net")):
        with pytest.raises(SpecError, match=r"a/net\.py and .*net.*by one name"):
            pack(tmp_path, one, other)
    # Named twice it is still one.
    assert list(pack(tmp_path, "a/net.py", "a/net.py", imports=["net"])[0]) == ["modules/net.py"]


def test_what_is_imported_and_not_packed_is_told(tmp_path):
    package(tmp_path, "net.py")
    _, notes = pack(tmp_path, "net.py", imports=["net", "mmdet.models", "projects.one", "projects.two", "timm"])
    assert [note.partition(" is not packed")[0] for note in notes] == ["projects", "timm"]
    assert "has to be installed where the worker runs" in notes[0]


def test_what_is_no_module_is_refused(tmp_path):
    package(tmp_path, "data/names.txt", "names.txt")
    for name in ("data", "names.txt", "nothing.py"):
        with pytest.raises(SpecError, match=r"expected a \.py file or a folder with some"):
            pack(tmp_path, name)


@needs_mmdet
@pytest.mark.filterwarnings("ignore")
def test_an_archive_is_built_only_when_what_is_packed_is_enough_by_itself(tmp_path):
    values = packaged(CONFIGS["fcos"], (96, 96))
    values["model"]["backbone"] = {"type": "SettledPyramid"}
    values["model"]["neck"] |= {"in_channels": [8, 8, 8], "start_level": 0, "out_channels": 16}
    values["model"]["bbox_head"] |= {"in_channels": 16, "feat_channels": 16, "stacked_convs": 1, "norm_cfg": None}
    values["custom_imports"] = {"imports": ["pyramid"], "allow_failed_imports": False}
    (tmp_path / "values.txt").write_text(repr(values))
    (tmp_path / "pyramid" / "settings").mkdir(parents=True)
    (tmp_path / "pyramid" / "__init__.py").write_text(BACKBONE)
    (tmp_path / "pyramid" / "settings" / "width.json").write_text("8")
    (tmp_path / "beside.py").write_text("STRIDES = (8, 2, 2)\n")

    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TRAINING],
        cwd=tmp_path,
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(tmp_path)])},
    )

    assert done.returncode == 0, done.stderr
    assert "would not load" in done.stderr
    assert "No module named 'beside'" in done.stderr
    with zipfile.ZipFile(tmp_path / "store" / "own.mar") as archive:
        packed = {name for name in archive.namelist() if name.startswith("modules/")}
    assert packed == {"modules/beside.py", "modules/pyramid/__init__.py", "modules/pyramid/settings/width.json"}
