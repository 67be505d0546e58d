"""The `.mar` file: the same members give the same bytes, and no byte of it can change unseen."""

import hashlib
import io
import json
import os
import random
import shutil
import stat
import struct
import subprocess
import zipfile
from pathlib import Path

import pytest
from detserve.errors import ArchiveError
from detserve.mar import MANIFEST_FILE, check_archive, manifest_json, read_json_member, unpacked, write_mar

MEMBERS = {
    MANIFEST_FILE: b'{"model": {"modelName": "m"}}\n',
    "spec.json": b'{"name": "m"}\n',
    "entry.py": b"class Handler:\n    pass\n",
    "dethandlers/__init__.py": b"",
    "golden/größe.jpg": b"\xff\xd8\xff" * 5,
    "weights.safetensors": bytes(range(256)) * 2,
}


@pytest.fixture
def mar(tmp_path):
    write_mar(tmp_path / "m.mar", MEMBERS)
    return tmp_path / "m.mar"


def sums(members: dict[str, bytes]) -> bytes:
    return "".join(f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in members.items()).encode()


def zipped(path: Path, members: list[tuple[str | zipfile.ZipInfo, bytes]], how: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def refusal(path: Path) -> str:
    with pytest.raises(ArchiveError) as caught:
        check_archive(path)
    message = str(caught.value)
    assert path.name in message
    return message


def test_the_same_members_give_the_same_bytes(tmp_path):
    write_mar(tmp_path / "a.mar", MEMBERS)
    write_mar(tmp_path / "b.mar", dict(reversed(MEMBERS.items())))
    assert (tmp_path / "a.mar").read_bytes() == (tmp_path / "b.mar").read_bytes()
    assert stat.S_IMODE((tmp_path / "a.mar").stat().st_mode) == 0o644


def test_what_was_written_is_what_is_read(mar):
    written = write_mar(mar, MEMBERS)
    assert check_archive(mar) == written
    assert [member.name for member in written] == sorted([*MEMBERS, "SHA256SUMS"])
    with unpacked(mar) as folder:
        for member in written:
            content = (folder / member.name).read_bytes()
            assert (len(content), hashlib.sha256(content).hexdigest()) == (member.size, member.sha256)
            assert content == MEMBERS.get(member.name, content)
    assert not folder.exists()
    assert read_json_member(mar, "spec.json") == {"name": "m"}


def test_the_manifest_is_the_archivers_with_a_fixed_date():
    manifest = json.loads(
        manifest_json(
            name="m",
            version="2.0",
            serialized_file="w.safetensors",
            handler="entry.py",
            config_file="model-config.yaml",
        )
    )
    assert manifest["createdOn"] == "01/01/1980 00:00:00"
    assert manifest["runtime"] == "python"
    assert manifest["model"] == {
        "modelName": "m",
        "modelVersion": "2.0",
        "serializedFile": "w.safetensors",
        "handler": "entry.py",
        "configFile": "model-config.yaml",
    }


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="no sha256sum")
def test_sha256sum_agrees_with_the_unpacked_files(mar, tmp_path):
    with zipfile.ZipFile(mar) as archive:
        archive.extractall(tmp_path / "out")
    command = ["sha256sum", "--strict", "-c", "SHA256SUMS"]
    answer = subprocess.run(command, cwd=tmp_path / "out", capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.count(": OK") == len(MEMBERS)
    (tmp_path / "out" / "entry.py").write_bytes(b"changed")
    assert subprocess.run(command, cwd=tmp_path / "out", capture_output=True, check=False).returncode == 1


# Written whole or not at all.


def test_a_failure_in_the_middle_leaves_the_old_file_and_nothing_else(mar, monkeypatch):
    before = mar.read_bytes()
    written = []

    def fails(self, entry, content, *rest):
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        written.append(entry)
        original(self, entry, content, *rest)

    original = zipfile.ZipFile.writestr
    monkeypatch.setattr(zipfile.ZipFile, "writestr", fails)
    with pytest.raises(ArchiveError, match=r"m\.mar: cannot be written .*No space left.*--out"):
        write_mar(mar, MEMBERS)
    assert mar.read_bytes() == before
    assert names_in(mar.parent) == ["m.mar"]
    with pytest.raises(ArchiveError):
        write_mar(mar.parent / "new.mar", MEMBERS)
    assert names_in(mar.parent) == ["m.mar"]


def test_an_interrupt_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(zipfile.ZipFile, "writestr", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_mar(tmp_path / "m.mar", MEMBERS)
    assert names_in(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArchiveError, match=r"m\.mar: cannot be written"):
        write_mar(tmp_path / "file" / "m.mar", MEMBERS)
    with pytest.raises(ArchiveError, match="cannot be written"):
        write_mar(tmp_path, MEMBERS)
    assert names_in(tmp_path) == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ArchiveError, match=r"cannot be written .*Permission"):
        write_mar(tmp_path / "m.mar", MEMBERS)


# No change goes unseen.


def test_every_changed_byte_is_refused(mar, tmp_path):
    """No exception: neither in a member, nor in the zip's headers, directory and end, times and attributes included."""
    whole = mar.read_bytes()
    chance = random.Random(11)
    offsets = {*range(60), *range(len(whole) - 90, len(whole)), *chance.sample(range(len(whole)), 500)}
    changed = tmp_path / "changed.mar"
    for offset in sorted(offsets):
        for flip in (1 << chance.randrange(8), 0xFF):
            content = bytearray(whole)
            content[offset] ^= flip
            changed.write_bytes(bytes(content))
            assert refusal(changed), offset


def test_a_changed_member_is_named(mar):
    content = mar.read_bytes()
    place = content.index(bytes(range(256)))
    mar.write_bytes(content[:place] + b"\x01" + content[place + 1 :])
    assert "weights.safetensors is damaged" in refusal(mar)


def test_a_truncated_or_longer_file_is_refused(mar):
    whole = mar.read_bytes()
    for content in (whole[:-1], whole[: len(whole) // 2], whole[1:], whole + b"\0", b"\0" + whole, whole + whole):
        mar.write_bytes(content)
        refusal(mar)


def test_a_changed_member_with_a_right_checksum_is_refused_by_its_digest(mar):
    members = {**MEMBERS, "entry.py": b"import os\n", "SHA256SUMS": sums(MEMBERS)}
    zipped(mar, list(members.items()))
    assert "member entry.py has SHA-256" in refusal(mar)
    with pytest.raises(ArchiveError, match=r"entry\.py"), unpacked(mar):
        pass


def test_an_added_a_missing_and_swapped_members_are_named(mar):
    added = {**MEMBERS, "torch.py": b"", "SHA256SUMS": sums(MEMBERS)}
    assert "member torch.py is not in SHA256SUMS: it was added" in refusal(zipped(mar, list(added.items())))
    missing = {name: content for name, content in MEMBERS.items() if name != "entry.py"}
    zipped(mar, [*missing.items(), ("SHA256SUMS", sums(MEMBERS))])
    assert "member entry.py is in SHA256SUMS, but missing" in refusal(mar)
    swapped = {**MEMBERS, "entry.py": MEMBERS["spec.json"], "spec.json": MEMBERS["entry.py"]}
    zipped(mar, [*MEMBERS.items(), ("SHA256SUMS", sums(swapped))])
    assert "has SHA-256" in refusal(mar)
    assert "SHA256SUMS is missing" in refusal(zipped(mar, list(MEMBERS.items())))
    for damaged in (b"", b"no digests\n", b"\xff\xfe"):
        refusal(zipped(mar, [*MEMBERS.items(), ("SHA256SUMS", damaged)]))


def test_the_same_members_packed_again_are_refused(mar):
    members = [*MEMBERS.items(), ("SHA256SUMS", sums(dict(sorted(MEMBERS.items()))))]
    for how in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        assert "zip structure is not what detserve writes" in refusal(zipped(mar, members, how))


def test_a_member_that_only_java_would_unpack_is_refused(mar):
    """TorchServe unpacks by the header before each member; Python does not see what the directory does not list."""
    hidden = io.BytesIO()
    with zipfile.ZipFile(hidden, "w") as archive:
        archive.writestr("torch.py", b"print('instead of torch')")
        length = archive.fp.tell()
    whole = mar.read_bytes()
    (start,) = struct.unpack("<L", whole[-6:-2])
    moved = whole[:start] + hidden.getvalue()[:length] + whole[start:-6] + struct.pack("<LH", start + length, 0)
    mar.write_bytes(moved)
    with zipfile.ZipFile(mar) as archive:
        assert "torch.py" not in archive.namelist()
        assert archive.testzip() is None
    assert f"zip structure is not what detserve writes, from byte {start + 2} on" in refusal(mar)


@pytest.mark.parametrize(
    "name", ["weights.pth", "a/b.pkl", "model.pt", "x.bin", "y.npy", "z.joblib", "c.ckpt", "W.PTH"]
)
def test_a_pickle_is_refused(mar, name):
    write_mar(mar, {**MEMBERS, name: b"x"})
    assert f"got {name}, which may hold a pickle" in refusal(mar)


def test_a_zip_is_refused_when_it_holds_a_pickle_or_cannot_be_read(tmp_path):
    def inner(name: str) -> bytes:
        held = io.BytesIO()
        with zipfile.ZipFile(held, "w") as archive:
            archive.writestr(name, b"x")
        return held.getvalue()

    for content, refused in ((inner("code.py"), False), (inner("a/data.pkl"), True), (inner("code.py")[:-9], True)):
        path = zipped(tmp_path / "foreign.mar", [(MANIFEST_FILE, b"{}"), ("library.whl", content)])
        if refused:
            with pytest.raises(ArchiveError, match=r"got library\.whl, which may hold a pickle"):
                check_archive(path, pickles=False)
        else:
            assert len(check_archive(path, pickles=False)) == 2


@pytest.mark.parametrize(
    "name",
    [
        "../outside.py",
        "a/../../outside.py",
        "/etc/outside.py",
        "..",
        "a\\..\\outside.py",
        "C:/outside.py",
        "../folder/",
        "./entry.py",
        "a//b.py",
        "a/./b.py",
    ],
)
@pytest.mark.parametrize("ours", [True, False], ids=["ours", "foreign"])
def test_a_name_that_leads_elsewhere_is_refused(tmp_path, name, ours):
    members = {**(MEMBERS if ours else {MANIFEST_FILE: b"{}"}), name: b""}
    path = zipped(tmp_path / "m.mar", [*members.items(), *([("SHA256SUMS", sums(members))] if ours else [])])
    assert repr(name) in refusal(path)
    with pytest.raises(ArchiveError), unpacked(path):
        pass
    assert names_in(tmp_path) == ["m.mar"]
    assert not (tmp_path.parent / "outside.py").exists()


def test_a_symbolic_link_is_refused(tmp_path):
    link = zipfile.ZipInfo("link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    path = zipped(tmp_path / "m.mar", [(MANIFEST_FILE, b"{}"), (link, b"/etc/passwd")])
    assert "'link' is a symbolic link" in refusal(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_stands_twice_is_refused(tmp_path):
    path = zipped(tmp_path / "m.mar", [(MANIFEST_FILE, b"{}"), ("a.py", b"1"), ("a.py", b"2")])
    assert "'a.py' stands in it twice" in refusal(path)


# What is no archive at all.


@pytest.mark.parametrize("content", [b"", b"text\n" * 50, b"PK\x03\x04" + b"\0" * 60, b"PK\x05\x06"], ids=repr)
def test_what_is_no_zip_is_refused(tmp_path, content):
    (tmp_path / "m.mar").write_bytes(content)
    assert "not a zip file" in refusal(tmp_path / "m.mar")


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    assert "there is none" in refusal(tmp_path / "nowhere.mar")
    (tmp_path / "folder.mar").mkdir()
    assert "not a zip file" in refusal(tmp_path / "folder.mar")


def test_a_zip_without_manifest_is_no_archive(tmp_path):
    assert f"{MANIFEST_FILE} is missing" in refusal(zipped(tmp_path / "m.mar", [("a.py", b"")]))
    assert f"{MANIFEST_FILE} is missing" in refusal(zipped(tmp_path / "m.mar", []))


def test_a_foreign_archive_is_only_checked_for_names_and_wholeness(tmp_path):
    foreign = [(MANIFEST_FILE, b"{}"), ("model.pth", b"weights" * 40), ("handler.py", b"x = 1\n" * 9), ("folder/", b"")]
    path = zipped(tmp_path / "m.mar", foreign, zipfile.ZIP_DEFLATED)
    assert [member.name for member in check_archive(path)] == [MANIFEST_FILE, "model.pth", "handler.py"]
    content = bytearray(path.read_bytes())
    place = content.index(b"model.pth") + len(b"model.pth") + 2
    content[place] ^= 0xFF
    path.write_bytes(bytes(content))
    assert "member model.pth is damaged" in refusal(path)


@pytest.mark.parametrize("how", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_damaged_foreign_archive_is_never_a_traceback(tmp_path, how):
    whole = zipped(tmp_path / "m.mar", [(MANIFEST_FILE, b"{}" * 50), ("a.py", b"x = 1\n" * 50)], how).read_bytes()
    refused = 0
    for offset in range(len(whole)):
        content = bytearray(whole)
        content[offset] ^= 0xFF
        (tmp_path / "m.mar").write_bytes(bytes(content))
        try:
            check_archive(tmp_path / "m.mar")
        except ArchiveError:
            refused += 1
    assert refused > len(whole) // 2


def test_a_json_member_that_is_missing_or_damaged_is_named(tmp_path):
    path = zipped(tmp_path / "m.mar", [(MANIFEST_FILE, b"{"), ("text.json", b"\xff")])
    for name in (MANIFEST_FILE, "text.json", "nowhere.json"):
        with pytest.raises(ArchiveError, match=f"{name} is missing or damaged"):
            read_json_member(path, name)
