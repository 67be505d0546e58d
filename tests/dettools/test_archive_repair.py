"""`archive OLD.mar`: an archive of MMDetection's script is packed anew, and nothing of the old one is lost."""

import json

import pytest
from dettools.cli import main
from mmdet_models import mmdet_warnings, needs_mmdet, random_model
from original_packing import pack_as_original

pytestmark = [needs_mmdet, *mmdet_warnings]


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    folder = tmp_path_factory.mktemp("old")
    model = random_model("yolox", folder)
    return pack_as_original(
        folder / "packed", model.checkpoint, config=model.config.read_text("utf-8"), name="old", version="2.1"
    )


def archive(*arguments) -> int:
    return main(["archive", *map(str, arguments)])


def test_it_is_packed_anew_with_its_name_and_version(old, tmp_path, capsys):
    store = tmp_path / "store"
    before = old.read_bytes()

    assert archive(old, "--model-store", store, "--json") == 0

    told = capsys.readouterr()
    document = json.loads(told.out.splitlines()[-1])
    assert (document["name"], document["version"]) == ("old", "2.1")
    assert document["golden_detections"] >= 0
    assert "scores of 0.5 and more alone" in told.err
    assert old.read_bytes() == before
    assert sorted(path.name for path in (store / "old").iterdir()) == ["config.py", "old.yaml", "yolox.pth"]
    assert main(["verify", str(store / "old.mar")]) == 0


def test_another_name_and_place(old, tmp_path):
    out = tmp_path / "new.mar"
    assert archive(old, "--model-store", tmp_path / "store", "--name", "other", "--out", out) == 0
    assert out.is_file()
    assert (tmp_path / "store" / "other" / "other.yaml").is_file()


def test_the_old_archive_is_never_written_over(old, tmp_path, capsys):
    store = tmp_path / "store"
    store.mkdir()
    inside = store / "old.mar"
    inside.write_bytes(old.read_bytes())

    assert archive(inside, "--model-store", store, "--force") == 2
    assert "would be overwritten by what is made of it" in capsys.readouterr().err
    assert [path.name for path in store.iterdir()] == ["old.mar"]


def test_what_cannot_be_packed_leaves_nothing_behind(old, tmp_path, capsys):
    store = tmp_path / "store"
    assert archive(old, "--model-store", store, "--serving", "score_threshold=7") == 2
    assert "score_threshold" in capsys.readouterr().err
    assert list(store.iterdir()) == []


def test_files_that_are_there_already_stay(old, tmp_path, capsys):
    store = tmp_path / "store"
    (store / "old").mkdir(parents=True)
    (store / "old" / "config.py").write_text("mine = 1\n")
    assert archive(old, "--model-store", store) == 2
    assert "exists already" in capsys.readouterr().err
    assert (store / "old" / "config.py").read_text() == "mine = 1\n"


def test_an_archive_of_ours_is_no_original(tmp_path, capsys):
    (tmp_path / "damaged.mar").write_bytes(b"no zip")
    assert archive(tmp_path / "damaged.mar", "--model-store", tmp_path / "store") == 2
    assert "cannot be read as a zip file" in capsys.readouterr().err
