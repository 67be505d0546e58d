"""A disk that is full while an archive is written, and a model store that cannot be written to."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from checkout import ROOT
from detserve.archive import build_archive
from detserve.client import Client
from detserve.errors import ArchiveError, DetserveError
from detserve.mar import check_archive
from detserve.spec import load_spec
from dettools.cli import main
from fault_load import tell

SPEC = ROOT / "model_store" / "shapes" / "shapes.yaml"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own; `small_disk(options)` mounts it anew with them."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        made = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True, check=False
        )
        if made.returncode:
            pytest.skip(f"mounting a file system needs root and is not allowed here: {made.stderr.strip()}")
        return folder

    if os.geteuid() or shutil.which("mount") is None:
        pytest.skip("mounting a file system needs root")
    mount("size=64m")
    yield mount
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_the_old_archive_and_nothing_else(small_disk, shapes, tmp_path, capsys):
    size = shapes.stat().st_size
    folder = small_disk(f"remount,size={2 * size // 4096 * 4096 - (1 << 20)}")  # for less than two of them
    path = folder / "shapes.mar"
    shutil.copy(shapes, path)
    before = path.read_bytes()
    spec = load_spec(SPEC)

    with pytest.raises(DetserveError, match="No space left") as error:
        build_archive(spec, folder=SPEC.parent, out=path, force=True)
    assert str(path) in str(error.value)
    assert path.read_bytes() == before
    assert [one.name for one in folder.iterdir()] == ["shapes.mar"]

    assert main(["archive", str(SPEC), "--out", str(folder / "second.mar")]) == 2
    printed = capsys.readouterr().err
    assert "No space left" in printed
    assert "Traceback" not in printed
    assert [one.name for one in folder.iterdir()] == ["shapes.mar"]
    tell("2 archives onto a full disk: 2 refused, 0 archives lost, 0 files left behind")


def test_a_disk_that_cannot_be_written_to_is_said(small_disk, shapes):
    folder = small_disk("remount,ro")
    with pytest.raises(ArchiveError, match="Read-only file system"):
        build_archive(load_spec(SPEC), folder=SPEC.parent, out=folder / "shapes.mar")


@pytest.mark.server
def test_a_read_only_model_store_is_served(small_disk, squares, square_pictures, run):
    folder = small_disk("remount,rw")
    shutil.copy(squares, folder / "squares.mar")
    small_disk("remount,ro")
    check_archive(folder / "squares.mar")

    run("read-only", folder / "squares.mar")
    with Client.for_instance("read-only") as client:
        answers = [client.predict("squares", image) for image in square_pictures for _ in range(5)]
        retried = client.retried
    tell(f"model store read-only: {len(answers)} sent, {len(answers)} answered, {retried} retried, 0 lost")
    assert all(answers)
    assert retried == 0
