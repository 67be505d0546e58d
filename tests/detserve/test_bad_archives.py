"""What must never be served: a table of bad archives, each refused where archives are packed, registered and served."""

import argparse
import hashlib
import io
import json
import os
import pickle
import re
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from detserve import server
from detserve.errors import ArchiveError, DetserveError
from detserve.instance import Instance
from detserve.mar import MANIFEST_FILE, check_archive, write_mar
from detserve.signature import new_key_pair, sign_archive, signature_path
from dettools.cli import main
from original_packing import pack_as_original
from throwaway import build

WORKER = {"minWorkers": 1, "maxWorkers": 1}
HANDLER = b"class Handler:\n    def initialize(self, context): pass\n    def handle(self, data, context): return [1]\n"


def members(folder: Path, version: str = "1.0") -> dict[str, bytes]:
    """What TorchServe would serve without a word: only its digests and its name make it an archive of detserve."""
    model = {"modelName": "bad", "modelVersion": version, "handler": "entry.py", "configFile": "model-config.yaml"}
    return {
        MANIFEST_FILE: json.dumps({"runtime": "python", "model": model}).encode(),
        "model-config.yaml": json.dumps(WORKER).encode(),
        "entry.py": HANDLER,
        "spec.json": b"{}\n",
    }


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder / "executed"),)


def packed(path: Path, content: dict[str, bytes]) -> Path:
    write_mar(path, content)
    return path


def zipped(path: Path, content: dict[str, bytes], *, sums: dict[str, bytes] | None = None, how: int = 0) -> Path:
    lines = [f"{hashlib.sha256(one).hexdigest()}  {name}\n" for name, one in (sums or content).items()]
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, one in {**content, "SHA256SUMS": "".join(lines).encode()}.items():
            archive.writestr(name, one)
    return path


def malicious_pickle(folder: Path) -> Path:
    return packed(folder / "bad.mar", {**members(folder), "weights.pth": pickle.dumps(Malicious(folder))})


def pickle_by_another_name(folder: Path) -> Path:
    return packed(folder / "bad.mar", {**members(folder), "weights.dat": pickle.dumps(Malicious(folder), protocol=4)})


def checkpoint_by_another_name(folder: Path) -> Path:
    """What torch.save writes today: a zip with a pickle in it."""
    checkpoint = io.BytesIO()
    torch.save(Malicious(folder), checkpoint)
    return packed(folder / "bad.mar", {**members(folder), "weights.dat": checkpoint.getvalue()})


def foreign_pickle(folder: Path) -> Path:
    path = build(folder, "bad")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("model.pt", pickle.dumps(Malicious(folder)))
    return path


def traversal(folder: Path) -> Path:
    return packed(folder / "bad.mar", {**members(folder), "../../executed/x.py": b""})


def absolute_path(folder: Path) -> Path:
    return packed(folder / "bad.mar", {**members(folder), f"{folder}/executed/x.py": b""})


def symlink(folder: Path) -> Path:
    path = packed(folder / "bad.mar", members(folder))
    link = zipfile.ZipInfo("link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(link, b"/etc/passwd")
    return path


def wrong_digest(folder: Path) -> Path:
    return zipped(folder / "bad.mar", {**members(folder), "entry.py": HANDLER + b"# changed\n"}, sums=members(folder))


def extra_member(folder: Path) -> Path:
    return zipped(folder / "bad.mar", {**members(folder), "torch.py": b"import os\n"}, sums=members(folder))


def hidden_bytes(folder: Path) -> Path:
    path = packed(folder / "bad.mar", members(folder))
    path.write_bytes(path.read_bytes() + b"PK\3\4 appended")
    return path


def zip_bomb(folder: Path) -> Path:
    return zipped(folder / "bad.mar", {**members(folder), "zeros.onnx": bytes(100 << 20)}, how=zipfile.ZIP_DEFLATED)


def bomb_as_manifest(folder: Path) -> Path:
    content = {**members(folder), MANIFEST_FILE: b" " * (100 << 20)}
    return zipped(folder / "bad.mar", content, how=zipfile.ZIP_DEFLATED)


BAD: list[tuple[Callable[[Path], Path], str]] = [
    (malicious_pickle, r"got weights\.pth, which may hold a pickle"),
    (pickle_by_another_name, r"got weights\.dat, which may hold a pickle"),
    (checkpoint_by_another_name, r"got weights\.dat, which may hold a pickle"),
    (foreign_pickle, r"got model\.pt, which may hold a pickle"),
    (traversal, r"member '\.\./\.\./executed/x\.py' leads out of the archive"),
    (absolute_path, r"executed/x\.py' leads out of the archive"),
    (symlink, r"member 'link' is a symbolic link"),
    (wrong_digest, r"member entry\.py has SHA-256"),
    (extra_member, r"member torch\.py is not in SHA256SUMS: it was added later"),
    (hidden_bytes, "zip structure is not what detserve writes"),
    (zip_bomb, "a zip bomb"),
    (bomb_as_manifest, "a zip bomb|has more than 1048576 bytes"),
]
each = pytest.mark.parametrize(("make", "said"), BAD, ids=[make.__name__ for make, _ in BAD])


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Three pairs: one that servers trust, one that they do not, and the folder of the trusted public one."""
    folder = tmp_path_factory.mktemp("keys")
    ours, theirs = new_key_pair(folder / "ours"), new_key_pair(folder / "theirs")
    trusted = folder / "trusted"
    trusted.mkdir()
    (trusted / ours.public.name).write_bytes(ours.public.read_bytes())
    return argparse.Namespace(ours=ours, theirs=theirs, trusted=trusted)


def unsigned(folder: Path, keys: argparse.Namespace) -> Path:
    return packed(folder / "bad.mar", members(folder))


def signed_by_a_stranger(folder: Path, keys: argparse.Namespace) -> Path:
    path = unsigned(folder, keys)
    sign_archive(path, keys.theirs.private)
    return path


def changed_after_signing(folder: Path, keys: argparse.Namespace) -> Path:
    path = unsigned(folder, keys)
    sign_archive(path, keys.ours.private)
    return packed(path, {**members(folder), "entry.py": HANDLER + b"# changed\n"})


def false_signature(folder: Path, keys: argparse.Namespace) -> Path:
    """Of the right bytes and the right key's id, made without the key."""
    path = signed_by_a_stranger(folder, keys)
    text = signature_path(path).read_text()
    signature_path(path).write_text(text.replace(keys.theirs.key, keys.ours.key))
    return path


UNTRUSTED: list[tuple[Callable[[Path, argparse.Namespace], Path], str]] = [
    (unsigned, r"it is not signed \(there is no bad\.mar\.sig beside it\)"),
    (signed_by_a_stranger, "it is signed by the key [0-9a-f]{16}, which is not trusted"),
    (changed_after_signing, "it was changed after it was signed"),
    (false_signature, "its signature is false"),
]
each_untrusted = pytest.mark.parametrize(("make", "said"), UNTRUSTED, ids=[make.__name__ for make, _ in UNTRUSTED])


def nothing_ran(folder: Path) -> bool:
    return not any(place.exists() for place in (folder / "executed", folder.parent.parent / "executed"))


# At start: refused before anything runs.


@pytest.fixture
def no_instance(tmp_path, monkeypatch):
    monkeypatch.setenv("DETSERVE_STATE_DIR", str(tmp_path / "state"))
    instance = Instance.named("refused")
    yield instance
    assert not instance.folder.exists()


@each
def test_start_refuses(make, said, tmp_path, no_instance):
    with pytest.raises(DetserveError, match=said):
        server.start([make(tmp_path)], server.ServerSettings(ports=None), instance=no_instance)
    assert nothing_ran(tmp_path)


@each_untrusted
def test_start_refuses_what_nobody_trusted_signed(make, said, tmp_path, no_instance, keys):
    settings = server.ServerSettings(ports=None, trusted_keys=(keys.trusted,))
    with pytest.raises(ArchiveError, match=said):
        server.start([make(tmp_path, keys)], settings, instance=no_instance)


def test_start_refuses_an_empty_folder_of_keys(tmp_path, no_instance):
    (tmp_path / "keys").mkdir()
    settings = server.ServerSettings(ports=None, trusted_keys=(tmp_path / "keys",))
    with pytest.raises(ArchiveError, match="Without one nothing could be trusted"):
        server.start([packed(tmp_path / "bad.mar", members(tmp_path))], settings, instance=no_instance)


# At register: refused by a server that runs, which goes on as before.


@pytest.fixture(scope="module")
def running(tmp_path_factory, keys):
    """A server that requires a signature, and the archive that it serves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETSERVE_STATE_DIR", str(tmp_path_factory.mktemp("state")))
        instance = Instance.named("strict")
        good = build(tmp_path_factory.mktemp("store"))
        sign_archive(good, keys.ours.private)
        settings = server.ServerSettings(ports=None, workers=1, warm_up_s=0, trusted_keys=(keys.trusted,))
        server.start([good], settings, instance=instance)
        yield instance
        assert server.stop(instance).was_running


def as_before(instance: Instance) -> bool:
    served = [(model.name, model.version) for model in server.status(instance, ask_workers=False).models]
    stored = sorted(path.name for path in instance.model_store.iterdir())
    return served == [("echo", "1.0")] and stored == ["echo-1.0.mar", "echo-1.0.mar.sig"]


@pytest.mark.server
@each
def test_register_refuses(make, said, tmp_path, running, keys):
    """Signed by the right key: a signature is no excuse."""
    path = make(tmp_path)
    sign_archive(path, keys.ours.private)
    with pytest.raises(DetserveError, match=said):
        server.register(path, instance=running, foreign=True)
    assert as_before(running)
    assert nothing_ran(tmp_path)


@pytest.mark.server
@each_untrusted
def test_register_refuses_what_nobody_trusted_signed(make, said, tmp_path, running, keys):
    """The server's keys hold, whatever keys the caller brings."""
    path = make(tmp_path, keys)
    for brought in (None, [keys.theirs.public]):
        with pytest.raises(ArchiveError, match=said):
            server.register(path, instance=running, trusted_keys=brought)
    assert as_before(running)


@pytest.mark.server
def test_register_refuses_an_archive_that_detserve_did_not_build(tmp_path, running, keys):
    path = build(tmp_path, "other")
    sign_archive(path, keys.ours.private)
    with pytest.raises(ArchiveError, match="was not built by detserve"):
        server.register(path, instance=running)
    assert as_before(running)


@pytest.mark.server
def test_what_is_served_is_the_copy_that_was_checked(running):
    """Not a link: whoever can write where the archive came from cannot change it any more."""
    served = running.model_store / "echo-1.0.mar"
    assert not served.is_symlink()
    assert running.folder.stat().st_mode & 0o077 == 0
    check_archive(served)


# At archive: what is packed anew is refused in the same way, and nothing of it is run.


def original(folder: Path, *, evil: bool = False, extra: dict[str, bytes] | None = None, link: bool = False) -> Path:
    checkpoint = folder / "model.pth"
    torch.save({"state_dict": Malicious(folder) if evil else {"weight": torch.zeros(1)}}, checkpoint)
    path = pack_as_original(folder / "original", checkpoint)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        for name, content in (extra or {}).items():
            archive.writestr(name, content)
        if link:
            entry = zipfile.ZipInfo("link")
            entry.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(entry, b"/etc/passwd")
    return path


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"evil": True}, "mkdir"),
        ({"extra": {"../../executed/x.py": b""}}, "leads out of the archive"),
        ({"link": True}, "is a symbolic link"),
        ({"extra": {"zeros": bytes(100 << 20)}}, "a zip bomb|unpacked"),
    ],
    ids=["malicious pickle", "traversal", "symlink", "zip bomb"],
)
def test_archive_refuses(how, said, tmp_path, capsys):
    store = tmp_path / "store"
    assert main(["archive", str(original(tmp_path, **how)), "--model-store", str(store)]) == 2
    assert re.search(said, capsys.readouterr().err)
    assert nothing_ran(tmp_path)
    assert not list(store.glob("*.mar"))
