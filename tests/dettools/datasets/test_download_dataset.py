"""Downloads against a server that drops, stalls, truncates and tampers: a name stands for a whole file, always."""

import hashlib
import io
import json
import random
import stat
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from multiprocessing.pool import ThreadPool
from pathlib import Path

import pytest
from dettools.cli import main
from dettools.datasets import download, download_file, download_table
from dettools.datasets.download_archive import check_whole, unpack
from dettools.datasets.download_file import Patience, Wanted, fetch
from dettools.datasets.download_table import DATA_SETS, DataSet, DownloadError, Part
from faulty_file_server import FileServer, file_server

DATA = random.Random(0).randbytes(300_000)
SHA256 = f"sha256:{hashlib.sha256(DATA).hexdigest()}"
QUICK = Patience(retries=2, timeout_s=0.3, first_wait_s=0.001)


@pytest.fixture
def server() -> Iterator[FileServer]:
    with file_server() as running:
        running.files["/a.bin"] = DATA
        yield running


def get(server: FileServer, folder: Path, *script: str, digest: str = SHA256, size=None, name="a.bin"):
    server.scripts[f"/{name}"] = list(script)
    wanted = Wanted((f"{server.url}/{name}",), folder / name, size, digest)
    return fetch(wanted, QUICK, threading.Event(), lambda done, total: None)


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("digest", [SHA256, ""])
@pytest.mark.parametrize(
    "script",
    [
        ["whole"],
        ["drop", "whole"],
        ["drop", "drop", "drop", "drop", "drop", "whole"],
        ["stall", "whole"],
        ["drop", "plain"],
        ["drop", "shifted", "whole"],
        ["busy", "busy", "whole"],
        ["drop", "busy", "stall", "whole"],
        ["redirect"],
        ["cut-chunks", "whole"],
        ["chunks"],
        ["longer", "whole"],
    ],
    ids=" ".join,
)
def test_what_passes_is_survived(server, tmp_path, script, digest):
    fetched = get(server, tmp_path, *script, digest=digest)
    assert (tmp_path / "a.bin").read_bytes() == DATA
    assert left(tmp_path) == {"a.bin"}
    assert fetched.sha256 == SHA256.removeprefix("sha256:")
    assert fetched.proof == ("sha256" if digest else "length")


def test_what_has_come_is_not_asked_for_again(server, tmp_path):
    get(server, tmp_path, "drop", "drop", "whole")
    ranges = [int(span.removeprefix("bytes=").rstrip("-") or 0) for _, span, _ in server.asked]
    assert ranges == [0, 150_000, 225_000]
    assert all(tag for _, _, tag in server.asked[1:])


def test_a_later_run_goes_on(server, tmp_path):
    with pytest.raises(DownloadError, match="what has come is kept"):
        get(server, tmp_path, "drop", "busy")
    assert left(tmp_path) == {"a.bin.part", "a.bin.part.json"}
    get(server, tmp_path, "whole")
    assert server.asked[-1][1] == "bytes=150000-"
    assert (tmp_path / "a.bin").read_bytes() == DATA


@pytest.mark.parametrize("digest", [SHA256, ""])
@pytest.mark.parametrize("way", ["whole", "stubborn"])
def test_a_file_that_changed_meanwhile_is_not_patched_together(server, tmp_path, way, digest):
    with pytest.raises(DownloadError):
        get(server, tmp_path, "drop", "busy", digest="")
    newer = bytes(reversed(DATA))
    server.files["/a.bin"] = newer
    if digest:
        with pytest.raises(DownloadError, match="expected"):
            get(server, tmp_path, way, digest=digest)
        assert left(tmp_path) == set()
    else:
        get(server, tmp_path, way, digest="")
        assert (tmp_path / "a.bin").read_bytes() == newer


def test_a_file_that_grew_meanwhile_is_not_patched_together(server, tmp_path):
    """Its server tells no ETag that would show it, but another length."""
    with pytest.raises(DownloadError):
        get(server, tmp_path, "drop", "busy", digest="")
    note = tmp_path / "a.bin.part.json"
    server.files["/a.bin"] = longer = bytes(reversed(DATA)) + b"more"
    note.write_text(json.dumps({**json.loads(note.read_text()), "validator": f'"{hash(longer)}"'}))
    get(server, tmp_path, "stubborn", digest="")
    assert (tmp_path / "a.bin").read_bytes() == longer


@pytest.mark.parametrize(
    ("script", "why"),
    [
        (["tamper"], "damaged on the way, or another file"),
        (["truncate"], "damaged on the way, or another file"),
        (["drop", "tamper"], "damaged on the way, or another file"),
        (["gone"], "HTTP 404"),
        (["loop"], "leads nowhere"),
        (["nowhere"], "leads nowhere"),
        (["odd"], "HTTP 503"),
        (["page"], "a web page instead"),
        (["gzip"], "its length means nothing"),
        (["longer"], "cut or stood still|HTTP 416"),
        (["cut-chunks"], "cut or stood still"),
        (["drop", "stall", "busy"], "HTTP 503"),
    ],
    ids=lambda one: " ".join(one) if isinstance(one, list) else None,
)
def test_what_is_not_whole_never_gets_the_name(server, tmp_path, script, why):
    with pytest.raises(DownloadError, match=why):
        get(server, tmp_path, *script)
    assert "a.bin" not in left(tmp_path)


@pytest.mark.parametrize("way", ["truncate", "tamper"])
def test_without_a_digest_an_archive_shows_it_itself(server, tmp_path, way):
    for name, data in {"z.zip": zip_of({"a.txt": DATA}), "t.tar.gz": tar_of({"a.txt": DATA}, "w:gz")}.items():
        if way == "tamper" and name == "z.zip":  # The last byte of a zip is a comment's; the middle is data's.
            server.files[f"/{name}"] = data[:1000] + bytes([data[1000] ^ 1]) + data[1001:]
        else:
            server.files[f"/{name}"] = data
        with pytest.raises(DownloadError, match=r"whole archive|damaged"):
            get(server, tmp_path, "whole" if name == "z.zip" and way == "tamper" else way, digest="", name=name)
        assert name not in left(tmp_path)


def test_nothing_is_no_file(server, tmp_path):
    server.files["/a.bin"] = b""
    with pytest.raises(DownloadError, match="it is empty"):
        get(server, tmp_path, "whole", digest="")
    assert left(tmp_path) == set()


def test_a_size_that_is_known_refuses_another_file_before_it_comes(server, tmp_path):
    with pytest.raises(DownloadError, match="another file"):
        get(server, tmp_path, "truncate", digest="", size=len(DATA))
    assert left(tmp_path) == set()


def test_without_length_or_digest_half_would_look_whole(server, tmp_path):
    with pytest.raises(DownloadError, match="half would look whole"):
        get(server, tmp_path, "no-length", digest="")
    get(server, tmp_path, "no-length")
    assert left(tmp_path) == {"a.bin"}


def test_a_download_is_one_process_s(server, tmp_path):
    wanted = Wanted((f"{server.url}/a.bin",), tmp_path / "a.bin", None, SHA256)
    with download_file.locked(wanted.path), pytest.raises(DownloadError, match="another run"):
        fetch(wanted, QUICK, threading.Event(), lambda done, total: None)


def test_two_runs_in_one_folder_keep_each_other_s_records(tmp_path):
    one, other = download._Records(tmp_path), download._Records(tmp_path)
    record = {"url": "http://x", "size": 1, "sha256": "0", "proof": "length", "holds": []}
    one.put("a.zip", record)
    other.put("b.zip", record)
    assert json.loads((tmp_path / "downloads.json").read_text()) == {"files": {"a.zip": record, "b.zip": record}}
    assert left(tmp_path) == {"downloads.json"}


def test_an_archive_is_unpacked_by_one_process_at_a_time(server, small, tmp_path, capsys):
    assert call(tmp_path) == 0
    capsys.readouterr()
    with download_file.locked(tmp_path / "val.zip"):
        assert call(tmp_path, "--parts", "val", "--unzip") == 1
    assert "another run downloads or unpacks it" in outcomes(capsys)["val.zip"]["error"]
    assert not (tmp_path / "val").exists()


def test_unpacking_can_be_interrupted(tmp_path):
    archives = {"a.zip": zip_of({"a.txt": b"x"}), "a.tar": tar_of({"a.txt": b"x"})}
    stop = threading.Event()
    stop.set()
    for name, content in archives.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DownloadError, match="interrupted"):
            unpack(tmp_path / name, tmp_path / "out", stop)
        assert left(tmp_path / "out") == set()


@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"files": [1]}', '{"files": {"a": 1}}', '{"files": {"a": {"size": 1, "holds": 5}}}']
)
def test_damaged_records_are_told(tmp_path, capsys, content):
    (tmp_path / "downloads.json").write_text(content)
    assert main(["download-dataset", "--dataset-name", "balloon", "--save-dir", str(tmp_path), "--dry-run"]) == 2
    assert "Remove it: all is proven anew" in capsys.readouterr().err


def test_interrupted_and_gone_on(server, tmp_path):
    stop = threading.Event()
    wanted = Wanted((f"{server.url}/a.bin",), tmp_path / "a.bin", None, SHA256)
    with pytest.raises(DownloadError, match="interrupted"):
        fetch(wanted, QUICK, stop, lambda done, total: stop.set())
    assert "a.bin" not in left(tmp_path)
    get(server, tmp_path, "whole")
    assert (tmp_path / "a.bin").read_bytes() == DATA


def test_https_is_not_left():
    class Answer:
        def __init__(self, url, history=()):
            self.url, self.history, self.status_code = url, history, 200

    answer = Answer("http://b/x", [Answer("https://a/x")])
    with pytest.raises(DownloadError, match="from https"):
        download_file._Download._take(object.__new__(download_file._Download), answer, 0, {})


# Archives


def zip_of(members: dict[str, bytes], kind: int = 0, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            entry = zipfile.ZipInfo(name)
            entry.external_attr = kind << 16
            entry.compress_type = method
            archive.writestr(entry, data)
    return file.getvalue()


def with_damage(data: bytes, start: int) -> bytes:
    return data[:start] + bytes(byte ^ 255 for byte in data[start : start + 60]) + data[start + 60 :]


def tar_of(members: dict[str, bytes], mode: str = "w", kind: bytes = tarfile.REGTYPE) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.type, entry.size, entry.linkname = kind, len(data), "/etc/passwd"
            archive.addfile(entry, io.BytesIO(data))
    return file.getvalue()


BAD = {
    "parent.zip": zip_of({"good.txt": b"x", "../out.txt": b"x"}),
    "deep.zip": zip_of({"a/../../out.txt": b"x"}),
    "absolute.zip": zip_of({"/tmp/out.txt": b"x"}),
    "windows.zip": zip_of({"a\\..\\..\\out.txt": b"x"}),
    "drive.zip": zip_of({"C:out.txt": b"x"}),
    "link.zip": zip_of({"link": b"/etc/passwd"}, stat.S_IFLNK | 0o777),
    "bomb.zip": zip_of({"a": bytes(80 << 20)}),
    "parent.tar": tar_of({"good.txt": b"x", "../out.txt": b"x"}),
    "absolute.tar": tar_of({"/tmp/out.txt": b"x"}),
    "link.tar": tar_of({"link": b""}, kind=tarfile.SYMTYPE),
    "hard.tar": tar_of({"link": b""}, kind=tarfile.LNKTYPE),
    "device.tar": tar_of({"dev": b""}, kind=tarfile.CHRTYPE),
    "bomb.tar.gz": tar_of({"a": bytes(80 << 20)}, "w:gz"),
    "lzma.zip": with_damage(zip_of({"a": DATA}, method=zipfile.ZIP_LZMA), 60),
    "cut.zip": zip_of({"a": DATA})[:-30],
    "cut.tar": tar_of({"a": DATA})[:200_000],
    "cut.tar.gz": tar_of({"a": DATA}, "w:gz")[:200_000],
    "header.tar.gz": tar_of({"a": bytes(2 << 20)}, "w:gz", kind=tarfile.XHDTYPE),
    "no.tar": b"not a tar" * 100,
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_archive_leaves_nothing(tmp_path, name):
    archive = tmp_path / "in" / name
    archive.parent.mkdir()
    archive.write_bytes(BAD[name])
    with pytest.raises(DownloadError, match=r"Do not trust it|damaged|whole archive"):
        unpack(archive, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    assert left(tmp_path) == {"in", "out"}


def test_the_original_s_extractall_writes_outside(tmp_path):
    """[REPRO] `TarFile(f).extractall(path)` of Python 3.11; ours is refused above."""
    archive = tmp_path / "parent.tar"
    archive.write_bytes(BAD["parent.tar"])
    with tarfile.TarFile(archive) as tar:
        tar.extractall(tmp_path / "data" / "coco", filter="fully_trusted")
    assert (tmp_path / "data" / "out.txt").exists()


def test_a_tar_cut_between_two_members_is_not_whole(tmp_path):
    """tarfile itself takes it for whole."""
    data = tar_of({"a": b"x" * 512, "b": b"y" * 512})
    path = tmp_path / "t.tar"
    path.write_bytes(data[:1024])
    with tarfile.open(path) as tar:
        assert tar.getnames() == ["a"]
    with pytest.raises(DownloadError, match="its end is missing"):
        check_whole(path)
    path.write_bytes(data)
    assert check_whole(path)


def test_members_that_share_their_bytes_are_refused(tmp_path):
    path = tmp_path / "overlap.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("a", DATA)
        shared = archive.infolist()[0]
        for number in range(3):
            twin = zipfile.ZipInfo(f"a{number}")
            for one in ("CRC", "compress_size", "file_size", "header_offset", "flag_bits"):
                setattr(twin, one, getattr(shared, one))
            archive.filelist.append(twin)
            archive.NameToInfo[twin.filename] = twin
        archive._didModify = True
    with pytest.raises(DownloadError, match="share their bytes"):
        unpack(path, tmp_path / "out")


def test_nothing_is_unpacked_through_a_link_that_stands_there(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "val").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "a.zip").write_bytes(zip_of({"val/a.txt": b"x"}))
    with pytest.raises(DownloadError, match="is a link"):
        unpack(tmp_path / "a.zip", tmp_path / "out")
    assert left(tmp_path / "elsewhere") == set()


# The command


@pytest.fixture
def small(server, monkeypatch) -> DataSet:
    """A data set of three files on the test's server, one of them with a digest."""
    val, notes = zip_of({"val/1.jpg": DATA}), tar_of({"notes/a.json": b"{}"}, "w:gz")
    server.files |= {"/val.zip": val, "/sub/notes.tar.gz": notes, "/ids.json": b"[1, 2]"}
    parts = (
        Part("val", (f"{server.url}/val.zip",), "val.zip", len(val), f"sha256:{hashlib.sha256(val).hexdigest()}"),
        Part("notes", (f"{server.url}/sub/notes.tar.gz",), "sub/notes.tar.gz", unpack_to="sub"),
        Part("ids", (f"{server.url}/ids.json",), "ids.json", usual=False),
    )
    monkeypatch.setitem(download_table.DATA_SETS, "small", found := DataSet("small", "Small", parts))
    return found


def call(folder: Path, *words: str) -> int:
    options = ["--dataset-name", "small", "--save-dir", str(folder), "--retries", "1", "--timeout", "1", "--json"]
    return main(["download-dataset", *options, *words])


def outcomes(capsys) -> dict[str, dict]:
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    return {one["path"]: one for one in document["outcomes"]}


def test_downloaded_unpacked_and_found_again(server, small, tmp_path, capsys):
    assert call(tmp_path / "d", "--parts", "all", "--unzip", "--delete") == 0
    found = outcomes(capsys)
    assert {path: (one["state"], one["proof"], one["unpacked"]) for path, one in found.items()} == {
        "val.zip": ("downloaded", "sha256", 1),
        "sub/notes.tar.gz": ("downloaded", "archive", 1),
        "ids.json": ("downloaded", "length", 0),
    }
    assert left(tmp_path / "d") == {"val", "sub", "ids.json", "downloads.json"}
    assert (tmp_path / "d" / "sub" / "notes" / "a.json").read_bytes() == b"{}"
    asked = len(server.asked)
    assert call(tmp_path / "d", "--parts", "all", "--unzip", "--delete") == 0
    again = outcomes(capsys)
    assert [one["state"] for one in again.values()] == ["unpacked", "unpacked", "there"]
    assert again["ids.json"]["proof"] == "recorded"
    assert len(server.asked) == asked


def test_the_usual_parts(small, tmp_path, capsys):
    assert call(tmp_path) == 0
    assert set(outcomes(capsys)) == {"val.zip", "sub/notes.tar.gz"}
    assert call(tmp_path, "--parts", "tset") == 2
    assert "expected parts of small: val, notes, ids, or all" in capsys.readouterr().err


def test_what_was_tampered_with_on_the_disk_is_found_and_had_again(server, small, tmp_path, capsys):
    assert call(tmp_path, "--parts", "all") == 0
    (tmp_path / "ids.json").write_bytes(b"[1, 3]")
    (tmp_path / "val.zip").write_bytes(server.files["/val.zip"][:1000])
    capsys.readouterr()
    assert call(tmp_path, "--parts", "all") == 0
    found = outcomes(capsys)
    assert {path: one["state"] for path, one in found.items()} == {
        "val.zip": "downloaded",
        "sub/notes.tar.gz": "there",
        "ids.json": "downloaded",
    }
    assert "it has changed since" in found["ids.json"]["notes"][0]
    assert (tmp_path / "ids.json").read_bytes() == b"[1, 2]"


def test_a_publisher_s_new_file_is_told_and_not_taken(server, small, tmp_path, capsys):
    assert call(tmp_path, "--parts", "ids") == 0
    (tmp_path / "ids.json").unlink()
    server.files["/ids.json"] = b"[6, 6]"
    capsys.readouterr()
    assert call(tmp_path, "--parts", "ids") == 1
    assert "if the publisher replaced the file" in capsys.readouterr().err
    assert not (tmp_path / "ids.json").exists()


def test_files_that_one_has_already_are_taken(server, small, tmp_path, capsys):
    (tmp_path / "val.zip").write_bytes(server.files["/val.zip"])
    assert call(tmp_path, "--parts", "val") == 0
    assert outcomes(capsys)["val.zip"]["state"] == "there"
    assert server.asked == []


def test_a_failure_is_an_exit_code_where_the_original_s_threads_swallow_it(server, small, tmp_path, capsys):
    """[REPRO] `pool.imap` whose results nobody reads: every download fails, and nothing is raised."""
    failed = []

    def original_download(url):
        failed.append(url)
        raise OSError("HTTP 404")

    pool = ThreadPool(4)
    pool.imap(original_download, [part.urls[0] for part in small.parts])
    pool.close()
    pool.join()
    assert len(failed) == 3  # All failed; this line is reached, so the original ends with 0.

    server.scripts["/val.zip"] = ["gone"]
    for threads in ("1", "4"):
        assert call(tmp_path / threads, "--threads", threads) == 1
        captured = capsys.readouterr()
        assert "val.zip: " in captured.err
        assert "1 of 2 files failed" in captured.err
        assert (tmp_path / threads / "sub" / "notes.tar.gz").exists()


def test_a_mirror_is_tried_first_and_believed_no_more_than_the_source(server, small, tmp_path, capsys):
    val = server.files["/val.zip"]
    server.files["/mirror/val.zip"] = val[:-1] + b"!"
    assert call(tmp_path, "--parts", "val", "--mirror", f"{server.url}/mirror/") == 0
    assert [path for path, _, _ in server.asked] == ["/mirror/val.zip", "/val.zip"]
    assert (tmp_path / "val.zip").read_bytes() == val
    for wrong in ("ftp://x", "http://", "http://[::1"):
        assert call(tmp_path, "--mirror", wrong) == 2
    assert call(tmp_path, "--timeout", "nan") == 2


def test_a_dry_run_asks_and_writes_nothing(server, small, tmp_path, capsys):
    assert call(tmp_path / "d", "--dry-run", "--parts", "all", "--unzip") == 0
    document = json.loads(capsys.readouterr().out)
    size = len(server.files["/val.zip"])
    assert document["needed_bytes"] == 2 * size
    assert [one["state"] for one in document["files"]] == ["missing"] * 3
    assert server.asked == []
    assert not (tmp_path / "d").exists()


def test_the_disk_is_looked_at_first(server, small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(download, "_free", lambda folder: 1000)
    assert call(tmp_path / "d") == 2
    assert "the disk has 0.00 GB left" in capsys.readouterr().err
    assert server.asked == []


def test_a_bad_archive_in_a_data_set_is_a_failure(server, small, tmp_path, capsys, monkeypatch):
    server.files["/sub/notes.tar.gz"] = tar_of({"../../out.txt": b"x"}, "w:gz")
    assert call(tmp_path / "d", "--unzip", "--delete") == 1
    assert "leads out of the folder" in capsys.readouterr().err
    assert not (tmp_path / "out.txt").exists()


def test_delete_goes_with_unzip(tmp_path, capsys):
    assert main(["download-dataset", "--delete", "--save-dir", str(tmp_path)]) == 2
    assert "--unzip" in capsys.readouterr().err


def test_lvis_has_its_validation_set_where_the_original_has_training_twice():
    """[SRC] The original's list of LVIS."""
    host = "https://s3-us-west-2.amazonaws.com/dl.fbaipublicfiles.com/LVIS"
    original = [f"{host}/lvis_v1_train.json.zip", f"{host}/lvis_v1_train.json.zip"]
    assert len(set(original)) == 1
    assert [part.path for part in DATA_SETS["lvis"].chosen([])] == ["lvis_v1_train.json.zip", "lvis_v1_val.json.zip"]


def test_the_table():
    for one in DATA_SETS.values():
        paths = [part.path for part in one.parts]
        assert len(set(paths)) == len(paths), one.name
        for part in one.parts:
            kind, _, digits = part.digest.partition(":")
            assert len(digits) == {"sha256": 64, "md5": 32, "": 0}[kind]
            assert all(url.startswith(("https://", "http://")) and "," not in url for url in part.urls)
            assert part.is_archive or part.path.endswith((".json", ".txt"))
            assert not Path(part.path).is_absolute()
    usual = sum(part.size or 0 for part in DATA_SETS["coco2017"].chosen([]))
    assert usual == 19_336_861_798 + 815_585_330 + 252_907_541  # The original: test and unlabeled too, some 45 GB.


def test_the_list(capsys):
    assert main(["download-dataset", "--list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["data_sets"]["lvis"] == ["train", "val", "train-images", "val-images"]
    assert main(["download-dataset", "--dataset-name", "imagenet"]) == 2
    assert "expected one of coco2017" in capsys.readouterr().err


def test_an_archive_is_unpacked_once(server, small, tmp_path, capsys):
    assert call(tmp_path, "--unzip") == 0
    capsys.readouterr()
    (tmp_path / "val" / "1.jpg").write_bytes(b"mine")
    assert call(tmp_path, "--unzip") == 0
    found = outcomes(capsys)["val.zip"]
    assert (found["state"], found["unpacked"]) == ("there", 0)
    assert "unpacked before" in found["notes"][0]
    assert call(tmp_path, "--unzip", "--dry-run") == 0
    assert json.loads(capsys.readouterr().out)["needed_bytes"] == 0
    assert (tmp_path / "val" / "1.jpg").read_bytes() == b"mine"
    (tmp_path / "val" / "1.jpg").unlink()
    (tmp_path / "val").rmdir()
    assert call(tmp_path, "--unzip") == 0
    assert outcomes(capsys)["val.zip"]["unpacked"] == 1


def test_a_server_that_cannot_be_reached(tmp_path, capsys, monkeypatch):
    parts = tuple(Part(f"p{number}", ("http://127.0.0.1:9/x.json",), f"{number}.json") for number in range(3))
    monkeypatch.setitem(download_table.DATA_SETS, "small", DataSet("small", "Small", parts))
    assert call(tmp_path, "--retries", "0") == 1
    assert capsys.readouterr().err.count("the server cannot be reached") == 3
