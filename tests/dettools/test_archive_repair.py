"""`archive OLD.mar`: an archive of MMDetection's script is packed anew, and nothing of the old one is lost."""

import json
import zipfile

import pytest
from dettools.archive_repair import original_unpacked
from dettools.cli import build_parser, main
from mmdet_models import mmdet_warnings, needs_mmdet, random_model
from original_packing import pack_as_original

pytestmark = [needs_mmdet, *mmdet_warnings]
MANIFEST = "MAR-INF/MANIFEST.json"
NAMES_AFTER = ("config.py", "notes.txt", "old.yaml", "yolox.pth")


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    folder = tmp_path_factory.mktemp("old")
    model = random_model("yolox", folder)
    return pack_as_original(
        folder / "packed", model.checkpoint, config=model.config.read_text("utf-8"), name="old", version="2.1"
    )


def archive(*arguments) -> int:
    return main(["archive", *map(str, arguments)])


def renamed(path, to, name):
    """The archive with another model name in its manifest."""
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(to, "w") as target:
        for member in source.namelist():
            content = source.read(member)
            if member == MANIFEST:
                manifest = json.loads(content)
                manifest["model"]["modelName"] = name
                content = json.dumps(manifest).encode()
            target.writestr(member, content)
    return to


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


@pytest.mark.parametrize("name", ["../victim", "/tmp/victim", "..", "a/b", ".hidden"])
def test_a_name_in_the_manifest_that_leads_out_is_refused_before_anything_is_written(old, tmp_path, capsys, name):
    evil = renamed(old, tmp_path / "evil.mar", name)
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "config.py").write_text("mine = 1\n")

    assert archive(evil, "--model-store", tmp_path / "store", "--force") == 2

    assert "expected letters, digits" in capsys.readouterr().err
    assert list((tmp_path / "store").iterdir()) == []
    assert [path.name for path in (tmp_path / "victim").iterdir()] == ["config.py"]
    assert (tmp_path / "victim" / "config.py").read_text() == "mine = 1\n"


def test_such_a_name_on_the_command_line_is_refused_too_and_a_good_one_stands_in(old, tmp_path, capsys):
    store = tmp_path / "store"
    assert archive(old, "--model-store", store, "--name", "../victim") == 2
    assert "got '../victim'" in capsys.readouterr().err
    assert not (tmp_path / "victim").exists()
    assert archive(renamed(old, tmp_path / "evil.mar", "my model"), "--model-store", store, "--name", "mine") == 0
    assert (store / "mine.mar").is_file()


@pytest.fixture
def store_before(tmp_path):
    store = tmp_path / "store"
    (store / "old").mkdir(parents=True)
    for path in ("old/config.py", "old/yolox.pth", "old/old.yaml", "old/notes.txt", "old.mar"):
        (store / path).write_text(f"{path} from before\n")
    return store


def contents(store):
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}


def test_a_failure_leaves_what_stood_there_before_as_it_was(old, store_before, capsys):
    before = contents(store_before)
    assert archive(old, "--model-store", store_before, "--force", "--serving", "score_threshold=7") == 2
    assert "score_threshold" in capsys.readouterr().err
    assert contents(store_before) == before


@pytest.mark.parametrize("kind", [KeyboardInterrupt, OSError, SystemExit])
def test_an_interruption_after_everything_was_written_puts_all_of_it_back(old, store_before, kind):
    before = contents(store_before)
    args = build_parser().parse_args(["archive", str(old), "--model-store", str(store_before), "--force"])

    def write_and_fail():
        with original_unpacked(args, store_before):
            assert (store_before / "old" / "yolox.pth").read_bytes() != before["old/yolox.pth"]
            (store_before / "old.mar").write_text("half of")
            (store_before / "old" / "old.yaml").write_text("half of")
            raise kind

    with pytest.raises(kind):
        write_and_fail()
    assert contents(store_before) == before


def test_with_force_what_stood_there_is_replaced_and_no_copy_stays(old, store_before):
    assert archive(old, "--model-store", store_before, "--force") == 0
    assert sorted(contents(store_before)) == ["old.mar", *sorted(f"old/{name}" for name in NAMES_AFTER)]
    assert main(["verify", str(store_before / "old.mar")]) == 0
