"""What a conversion in pieces keeps true: one rule for VOC's first pixel, photographs found, nothing left behind."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from dataset_trees import annotation, coco_document, coco_tree, photograph, voc_object, voc_tree, voc_xml, yolo_tree
from dettools.datasets.conversion_pieces import workspace
from dettools.datasets.dataset import DocumentBuilder
from dettools.datasets.voc import Pictures, read_voc, read_voc_file

DETSERVE = Path(sys.executable).with_name("detserve")


def boxes(path: Path) -> list[list[float]]:
    return [one["bbox"] for one in json.loads(path.read_text())["annotations"]]


@pytest.mark.parametrize(
    ("whole", "first"), [(200, 1), (50, 0)], ids=["as in VOC2012, two files of 17,125", "one box of fifty"]
)
@pytest.mark.parametrize("processes", [1, 2])
def test_a_few_fractions_do_not_make_coordinates_count_from_0(tmp_path, convert, whole, first, processes):
    objects = voc_object("dog", 5, 5, 20, 20) * whole
    # 2011_003353.xml
    strange = voc_object("dog", "45.70000076293945", 5, 60, 20)
    source = voc_tree(tmp_path / "voc", a=voc_xml(objects), b=voc_xml(strange, name="b.jpg"))
    report = convert("voc", source, "-o", tmp_path / "coco.json", "--nproc", processes)
    assert boxes(tmp_path / "coco.json")[0] == [5 - first, 5 - first, 15 + first, 15 + first]
    assert bool(report["notes"]) == (first == 0)
    assert [one["bbox"] for one in read_voc(source).annotations] == boxes(tmp_path / "coco.json")


@pytest.mark.parametrize("left", [-10, -0.5, 0])
def test_boxes_come_back_from_voc_where_one_begins_outside_its_image(tmp_path, convert, left):
    ordinary = [annotation(number, 1, [number % 7, number % 5, 1, 2]) for number in range(2, 300)]
    source = coco_tree(tmp_path / "coco", coco_document([annotation(1, 1, [left, 3, 20, 20]), *ordinary]))
    convert("coco", source, "--to", "voc", "-o", tmp_path / "voc")
    report = convert("voc", tmp_path / "voc", "--to", "coco", "-o", tmp_path / "back.json")
    assert report["skipped"] == {}
    assert boxes(tmp_path / "back.json") == boxes(source)


def test_boxes_come_back_from_voc_where_yolo_rounds(tmp_path, convert):
    """1/3 of 48 pixels is 15.999…: VOC's file says 16, and its reader counts from 1."""
    source = yolo_tree(tmp_path / "yolo", {"train/a": "0 0.5 0.3333333333 0.25 0.3333333333\n" * 9})
    convert("yolo", source, "--to", "coco", "-o", tmp_path / "first.json")
    convert("yolo", source, "--to", "voc", "-o", tmp_path / "voc")
    convert("voc", tmp_path / "voc", "--to", "coco", "-o", tmp_path / "back.json")
    assert len(boxes(tmp_path / "back.json")) == 9
    for one, other in zip(boxes(tmp_path / "first.json"), boxes(tmp_path / "back.json"), strict=True):
        assert one == pytest.approx(other, abs=1e-6)


def test_xml_that_is_no_annotation_is_no_image(tmp_path, convert):
    source = voc_tree(tmp_path / "voc", a=voc_xml(voc_object("dog", 1, 1, 9, 9)), b="<html>404</html>")
    report = convert("voc", source, "-o", tmp_path / "coco.json")
    assert "got <html>, expected <annotation>" in report["skipped"]["bad_label"]["examples"][0]
    assert report["outputs"][0]["images"] == 1


def test_images_that_training_will_miss_are_told(tmp_path, convert):
    text = voc_xml(voc_object("dog", 1, 1, 9, 9), name="same.jpg")
    source = voc_tree(tmp_path / "voc", a=text, b=text, c=voc_xml("", name="c.jpg", size=""))
    for photo in (source / "JPEGImages").iterdir():
        photo.unlink()
    skipped = convert("voc", source, "-o", tmp_path / "coco.json")["skipped"]
    assert {reason: one["count"] for reason, one in skipped.items()} == {
        "duplicate_file_name": 1,
        "missing_file": 3,
        "no_image_size": 1,
    }
    assert skipped["duplicate_file_name"]["examples"] == ["same.jpg: 2 images"]


@pytest.mark.parametrize("target", ["coco", "voc", "yolo"])
def test_a_class_that_is_no_key_is_told(tmp_path, convert, target):
    objects = [annotation(1, 1, [1, 1, 5, 5]), annotation(2, 1, [1, 1, 5, 5], category=[1])]
    source = coco_tree(tmp_path / "coco", coco_document(objects))
    report = convert("coco", source, "--to", target, "-o", tmp_path / ("o.json" if target == "coco" else "o"))
    assert report["skipped"]["unknown_category"]["examples"] == ["1.jpg: category_id [1]"]


def found(source: Path, stem: str, images: Path | None = None) -> str | None:
    builder = DocumentBuilder()
    read_voc_file(source / "Annotations" / f"{stem}.xml", source, Pictures(source, images), builder)
    file = builder.files[0]
    return file and file.relative_to(source).as_posix()


def test_photographs_are_found_by_the_name_of_the_xml_file_then_by_what_it_names(tmp_path):
    source = tmp_path / "voc"
    names = {"a.b": r"C:\data\other.JPG", "c": "Named.PNG", "d": "plain", "e": "gone.jpg", "f": "c.jpg"}
    for stem, name in names.items():
        (source / "Annotations").mkdir(parents=True, exist_ok=True)
        (source / "Annotations" / f"{stem}.xml").write_text(voc_xml("", name=name))
    for name in ("JPEGImages/A.B.PNG", "JPEGImages/a.b.jpg", "JPEGImages/other.jpg", "images/named.png", "plain.jpg"):
        photograph(source / name)
    photograph(source / "Annotations/f.bmp")
    assert {stem: found(source, stem) for stem in names} == {
        "a.b": "JPEGImages/a.b.jpg",
        "c": "images/named.png",
        "d": "plain.jpg",
        "e": None,
        "f": "Annotations/f.bmp",
    }
    assert found(source, "c", source / "JPEGImages") is None


def test_a_folder_is_written_where_a_link_says_and_never_over_a_file(tmp_path, convert):
    source = voc_tree(tmp_path / "voc", a=voc_xml(voc_object("dog", 1, 1, 9, 9)))
    (tmp_path / "empty").mkdir()
    for target in ("empty", "new"):
        link = tmp_path / f"to-{target}"
        link.symlink_to(tmp_path / target)
        convert("voc", source, "--to", "yolo", "-o", link)
        assert link.is_symlink()
        assert (tmp_path / target / "data.yaml").is_file()
    (tmp_path / "file").write_text("mine")
    assert "got a file, expected" in convert("voc", source, "--to", "yolo", "-o", tmp_path / "file", code=2)
    assert (tmp_path / "file").read_text() == "mine"


def test_what_a_killed_conversion_left_is_removed_by_the_next_one(tmp_path):
    script = (
        "import os, pathlib, sys\n"
        "from dettools.datasets.conversion_pieces import workspace\n"
        f"with workspace(pathlib.Path({str(tmp_path)!r})) as folder:\n"
        "    (folder / 'spill').write_text('x')\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGKILL
    left = list(tmp_path.iterdir())
    assert len(left) == 1
    with workspace(tmp_path) as mine:
        assert list(tmp_path.iterdir()) == [mine]
        # One that runs is let be.
        with workspace(tmp_path) as other:
            assert sorted(tmp_path.iterdir()) == sorted([mine, other])
        assert list(tmp_path.iterdir()) == [mine]
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_has_workspaces_all_the_same(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with workspace(tmp_path) as first, workspace(tmp_path) as second:
        assert first.is_dir()
        assert second.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_ends_all_processes_from_their_first_moment_without_a_traceback(tmp_path):
    text = voc_xml("".join(voc_object("dog", one % 30 + 1, 2, 40, 40) for one in range(500)))
    source = voc_tree(tmp_path / "voc", **{f"a{one}": text for one in range(600)})
    out = tmp_path / "out" / "a.json"
    command = [DETSERVE, "convert-dataset", "voc", source, "-o", out, "--nproc", "2"]
    process = psutil.Popen([str(one) for one in command], stderr=subprocess.PIPE, text=True, start_new_session=True)
    workers: list[psutil.Process] = []
    end = time.monotonic() + 60
    while not workers and process.poll() is None and time.monotonic() < end:
        workers = [one for one in process.children() if "--multiprocessing-fork" in one.cmdline()]
    # They import yet.
    time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert workers, "the conversion ended before it was interrupted"
    assert process.returncode == 130
    assert "Traceback" not in error
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive
    assert list(out.parent.iterdir()) == []


def test_processes_that_read_voc_do_not_wait_for_numpy():
    script = "import sys, dettools.datasets.conversion_pieces; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
