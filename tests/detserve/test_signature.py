"""Signatures of archives: checked against OpenSSL, and each way to be untrusted told apart."""

import base64
import json
import shutil
import stat
import subprocess

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from detserve.errors import ArchiveError
from detserve.mar import check_archive, write_mar
from detserve.signature import (
    check_signature,
    drop_stale_signature,
    load_private_key,
    load_public_keys,
    new_key_pair,
    read_signature,
    sign_archive,
    signature_path,
)
from dettools.cli import main
from throwaway import build


@pytest.fixture
def pair(tmp_path):
    return new_key_pair(tmp_path / "keys")


@pytest.fixture
def mar(tmp_path):
    return build(tmp_path)


def test_a_new_pair_is_private_where_it_must_be_and_never_replaced(pair):
    assert stat.S_IMODE(pair.private.stat().st_mode) == 0o600
    assert stat.S_IMODE(pair.public.stat().st_mode) == 0o644
    before = pair.private.read_bytes()
    with pytest.raises(ArchiveError, match=r"signing\.pem.*exists already.*never replaced"):
        new_key_pair(pair.private.parent)
    pair.private.unlink()
    with pytest.raises(ArchiveError, match=r"signing\.pub\.pem.*exists already"):
        new_key_pair(pair.private.parent)
    assert not pair.private.exists()
    assert before
    assert new_key_pair(pair.private.parent, "second").key != pair.key


def test_what_is_signed_is_trusted(pair, mar):
    assert sign_archive(mar, pair.private) == read_signature(mar)
    assert check_signature(mar, [pair.public]) == pair.key
    check_archive(mar, trusted_keys=[pair.public])


def test_signing_changes_nothing_in_the_archive_and_is_the_same_each_time(pair, mar):
    before = mar.read_bytes()
    sign_archive(mar, pair.private)
    first = signature_path(mar).read_bytes()
    sign_archive(mar, pair.private)
    assert (mar.read_bytes(), signature_path(mar).read_bytes()) == (before, first)
    assert sorted(path.name for path in mar.parent.iterdir()) == ["echo-1.0.mar", "echo-1.0.mar.sig", "keys"]


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl")
def test_openssl_verifies_the_signature_and_its_keys_can_sign(pair, mar, tmp_path):
    """What is signed: a line of text with its purpose, then the archive's SHA-256 in hex."""
    sign_archive(mar, pair.private)
    signature = json.loads(signature_path(mar).read_text())
    digest = ["openssl", "dgst", "-sha256", "-r", mar]
    said = subprocess.run(digest, capture_output=True, text=True, check=True).stdout
    assert said.split()[0] == signature["sha256"]
    (tmp_path / "message").write_text(f"detserve archive signature v1\n{signature['sha256']}")
    (tmp_path / "signature").write_bytes(base64.b64decode(signature["signature"]))
    verify = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", pair.public, "-rawin"]
    files = ["-in", tmp_path / "message", "-sigfile", tmp_path / "signature"]
    answer = subprocess.run([*verify, *files], capture_output=True, text=True, check=False)
    assert "Signature Verified Successfully" in answer.stdout + answer.stderr

    theirs = tmp_path / "theirs.pem"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", theirs], capture_output=True, check=True)
    public = ["openssl", "pkey", "-in", theirs, "-pubout", "-out", tmp_path / "theirs.pub.pem"]
    subprocess.run(public, capture_output=True, check=True)
    sign_archive(mar, theirs)
    assert check_signature(mar, [tmp_path / "theirs.pub.pem"]) == read_signature(mar).key


def test_any_of_several_keys_is_enough_from_files_and_folders(pair, mar, tmp_path):
    other = new_key_pair(tmp_path / "others")
    sign_archive(mar, pair.private)
    (tmp_path / "trusted").mkdir()
    shutil.copy(pair.public, tmp_path / "trusted")
    assert check_signature(mar, [other.public, tmp_path / "trusted"]) == pair.key
    assert set(load_public_keys([other.public, tmp_path / "trusted"])) == {pair.key, other.key}
    said = f"signed by the key {pair.key}, which is not trusted; trusted are {other.key}"
    with pytest.raises(ArchiveError, match=said):
        check_signature(mar, [other.public])


def test_every_byte_of_the_archive_and_of_the_signature_counts(pair, mar):
    sign_archive(mar, pair.private)
    whole = mar.read_bytes()
    for place in range(0, len(whole), 97):
        mar.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ArchiveError, match="was changed after it was signed"):
            check_signature(mar, [pair.public])
    mar.write_bytes(whole)
    signature = json.loads(signature_path(mar).read_text())
    raw = bytearray(base64.b64decode(signature["signature"]))
    for place in range(len(raw)):
        raw[place] ^= 1
        signature_path(mar).write_text(json.dumps({**signature, "signature": base64.b64encode(raw).decode()}))
        raw[place] ^= 1
        with pytest.raises(ArchiveError, match="its signature is false"):
            check_signature(mar, [pair.public])
    signature_path(mar).write_text(json.dumps({**signature, "signature": "not base64"}))
    with pytest.raises(ArchiveError, match="its signature is false"):
        check_signature(mar, [pair.public])


def test_a_signature_of_another_archive_is_not_about_this_one(pair, mar, tmp_path):
    other = build(tmp_path, "other")
    sign_archive(other, pair.private)
    shutil.copy(signature_path(other), signature_path(mar))
    with pytest.raises(ArchiveError, match="was changed after it was signed"):
        check_signature(mar, [pair.public])
    # Even when it is made to name this archive's digest.
    sign_archive(mar, pair.private)
    mine, theirs = (json.loads(signature_path(path).read_text()) for path in (mar, other))
    signature_path(mar).write_text(json.dumps({**mine, "signature": theirs["signature"]}))
    with pytest.raises(ArchiveError, match="its signature is false"):
        check_signature(mar, [pair.public])


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "no json", '{"key": "a", "sha256": "b", "signature": "c", "more": 1}', "x" * 100_000]
)
def test_what_is_no_signature_is_refused(pair, mar, text):
    signature_path(mar).write_text(text)
    with pytest.raises(ArchiveError, match=r"got no signature of detserve|expected a key or a signature"):
        check_signature(mar, [pair.public])


def test_another_algorithm_is_refused(pair, mar):
    sign_archive(mar, pair.private)
    text = signature_path(mar).read_text()
    signature_path(mar).write_text(text.replace('"ed25519"', '"none"'))
    with pytest.raises(ArchiveError, match="got the algorithm 'none', expected 'ed25519'"):
        check_signature(mar, [pair.public])


def test_keys_that_are_none_of_ours_are_named(pair, mar, tmp_path):
    curve = generate_private_key(SECP256R1())
    (tmp_path / "ec.pem").write_bytes(curve.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public = curve.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "ec.pub.pem").write_bytes(public)
    (tmp_path / "text.pem").write_text("no key\n")
    for path in (tmp_path / "ec.pem", tmp_path / "text.pem", pair.public, tmp_path / "nowhere.pem"):
        with pytest.raises(ArchiveError, match=path.name):
            load_private_key(path)
    for path in (tmp_path / "ec.pub.pem", tmp_path / "text.pem", tmp_path / "nowhere.pem"):
        with pytest.raises(ArchiveError, match=path.name):
            load_public_keys([path])
    with pytest.raises(ArchiveError, match="It is a private key: keep it away from servers"):
        load_public_keys([pair.private])
    with pytest.raises(ArchiveError, match="Without one nothing could be trusted"):
        load_public_keys([])


def test_a_stale_signature_goes_and_a_right_one_stays(pair, mar):
    assert not drop_stale_signature(mar)
    sign_archive(mar, pair.private)
    assert not drop_stale_signature(mar)
    mar.write_bytes(mar.read_bytes() + b"x")
    assert drop_stale_signature(mar)
    assert not signature_path(mar).exists()


def test_the_commands(tmp_path, capsys):
    assert main(["keys", "new", str(tmp_path / "keys"), "--json"]) == 0
    made = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert main(["keys", "show", made["public"], "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["key"] == made["key"]
    members = {"MAR-INF/MANIFEST.json": b"{}", "spec.json": b"{}"}
    write_mar(tmp_path / "m.mar", members)
    assert main(["verify", str(tmp_path / "m.mar"), "--trusted-key", made["public"]]) == 2
    assert "it is not signed" in capsys.readouterr().err
    assert main(["keys", "sign", str(tmp_path / "m.mar"), "--key", made["private"], "--json"]) == 0
    signed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (signed["key"], signed["signature"]) == (made["key"], str(tmp_path / "m.mar.sig"))
    assert main(["keys", "show", str(tmp_path / "m.mar")]) == 0
    assert made["key"] in capsys.readouterr().out
    # A damaged archive is not signed.
    (tmp_path / "bad.mar").write_bytes((tmp_path / "m.mar").read_bytes()[:-1])
    assert main(["keys", "sign", str(tmp_path / "bad.mar"), "--key", made["private"]]) == 2
    assert not (tmp_path / "bad.mar.sig").exists()
    assert main(["keys", "show", str(tmp_path / "bad.mar")]) == 2
