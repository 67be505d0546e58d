"""Who vouches for an archive: an Ed25519 signature (RFC 8032) in a file beside it, ``NAME.mar.sig``.

    private key ─► sign ─► NAME.mar.sig {algorithm, key, sha256, signature}
    NAME.mar, NAME.mar.sig, public keys ─► check_signature ─► the key that signed, or why it is refused

Beside the archive, and not a member of it, for four reasons. The signature covers every byte of the file: nothing of it
has been parsed when it is checked, whatever its zip structure says. The archive stays the same bytes, signed or not,
whoever builds it: two who build from the same inputs can both sign. It can be signed later, where the key is, and by
somebody who did not build it. And TorchServe, which unpacks every member, sees nothing new.

A signature says that a key's holder vouches for these bytes, the handler's code included. It does not say how new they
are: an older archive that was once signed stays signed.
"""

import base64
import binascii
import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from detserve.errors import ArchiveError

ALGORITHM = "ed25519"
PUBLIC_SUFFIX = ".pub.pem"
_PURPOSE = b"detserve archive signature v1\n"
"""What is signed begins with its purpose, so that the key's signatures for other ends are none of these."""
_LARGEST_FILE = 65_536


@dataclass(frozen=True)
class Signature:
    """What ``NAME.mar.sig`` holds.

    Attributes:
        key: the signing key's id, the first 16 hex digits of the SHA-256 of its 32 public bytes.
        sha256: of the archive that was signed, hex.
        signature: 64 bytes in base64.
        algorithm: ``ed25519``.
    """

    key: str
    sha256: str
    signature: str
    algorithm: str = ALGORITHM


@dataclass(frozen=True)
class KeyPair:
    """A new pair: where its halves lie, and its id."""

    private: Path
    public: Path
    key: str


def signature_path(archive: Path) -> Path:
    """Return where an archive's signature lies."""
    return archive.with_name(f"{archive.name}.sig")


def new_key_pair(folder: Path, name: str = "signing") -> KeyPair:
    """Make ``NAME.pem`` (private, 0600) and ``NAME.pub.pem`` in a folder; existing ones are never replaced.

    Raises:
        ArchiveError: one of them exists, or they cannot be written.
    """
    private, public = folder / f"{name}.pem", folder / f"{name}{PUBLIC_SUFFIX}"
    made = Ed25519PrivateKey.generate()
    written: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, mode, content in (
            (private, 0o600, made.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())),
            (public, 0o644, made.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)),
        ):
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                written.append(path)
                file.write(content)
    except OSError as error:
        for path in written:
            path.unlink(missing_ok=True)
        reason = "exists already" if isinstance(error, FileExistsError) else error.strerror
        raise ArchiveError(
            f"key {error.filename or folder}: cannot be made ({reason}). A key is never replaced: choose another "
            "folder or name."
        ) from error
    return KeyPair(private, public, key_id(made.public_key()))


def key_id(key: Ed25519PublicKey) -> str:
    """Return the first 16 hex digits of the SHA-256 of the key's 32 bytes."""
    return hashlib.sha256(key.public_bytes(Encoding.Raw, PublicFormat.Raw)).hexdigest()[:16]


def load_private_key(path: Path) -> Ed25519PrivateKey:
    """Read a private key in PEM.

    Raises:
        ArchiveError: it cannot be read, or is none of Ed25519.
    """
    try:
        key = load_pem_private_key(_read(path), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:  # TypeError: it is encrypted
        raise ArchiveError(
            f"key {path}: got no private key in PEM without a passphrase ({error}). Make one with `detserve keys new`."
        ) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ArchiveError(
            f"key {path}: got {type(key).__name__.lstrip('_')}, expected Ed25519. Make one with `detserve keys new`."
        )
    return key


def load_public_keys(paths: Sequence[Path]) -> dict[str, Ed25519PublicKey]:
    """Read the trusted keys: key id to key.

    Args:
        paths: public keys in PEM, and folders whose ``*.pem`` files are public keys (Kubernetes mounts a ConfigMap
            so).

    Raises:
        ArchiveError: there is none, or a file is no public key of Ed25519. Nothing is skipped silently.
    """
    files: list[Path] = []
    for path in paths:
        files += sorted(path.glob("*.pem")) if path.is_dir() else [path]
    if not files:
        raise ArchiveError(
            f"trusted keys: got {', '.join(map(str, paths)) or 'none'} with no *.pem file in it, expected public keys. "
            "Without one nothing could be trusted."
        )
    found: dict[str, Ed25519PublicKey] = {}
    for file in files:
        content = _read(file)
        try:
            key = load_pem_public_key(content)
        except (ValueError, UnsupportedAlgorithm) as error:
            private = " It is a private key: keep it away from servers." if b"PRIVATE KEY" in content else ""
            raise ArchiveError(
                f"key {file}: got no public key in PEM.{private} Give the *{PUBLIC_SUFFIX} of `detserve keys new`."
            ) from error
        if not isinstance(key, Ed25519PublicKey):
            raise ArchiveError(f"key {file}: got {type(key).__name__.lstrip('_')}, expected Ed25519.")
        found[key_id(key)] = key
    return found


def sign_archive(archive: Path, private_key: Path) -> Signature:
    """Sign an archive; ``NAME.mar.sig`` appears beside it whole or not at all. The same key gives the same bytes.

    Raises:
        ArchiveError: the key or the archive cannot be read, or the signature not be written.
    """
    key = load_private_key(private_key)
    digest = _digest(archive)
    signature = Signature(
        key=key_id(key.public_key()),
        sha256=digest,
        signature=base64.b64encode(key.sign(_message(digest))).decode(),
    )
    path = signature_path(archive)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(asdict(signature), indent=2, sort_keys=True) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise ArchiveError(
            f"signature {path}: cannot be written ({error.strerror}). Make its folder writable."
        ) from error
    return signature


def read_signature(archive: Path) -> Signature | None:
    """Return the signature beside an archive, unchecked; None when there is none.

    Raises:
        ArchiveError: it is no signature.
    """
    path = signature_path(archive)
    if not path.exists():
        return None
    try:
        data: Any = json.loads(_read(path))
        found = Signature(**{name: str(value) for name, value in data.items()})
    except (ValueError, TypeError, AttributeError) as error:
        raise ArchiveError(
            f"signature {path}: got no signature of detserve ({error}). Sign the archive again: `detserve keys sign`."
        ) from error
    if found.algorithm != ALGORITHM:
        raise ArchiveError(f"signature {path}: got the algorithm {found.algorithm!r}, expected {ALGORITHM!r}.")
    return found


def drop_stale_signature(archive: Path) -> bool:
    """Remove a signature that is not about these bytes (any more); tell whether there was one."""
    path = signature_path(archive)
    with contextlib.suppress(ArchiveError):
        found = read_signature(archive)
        if found is None or found.sha256 == _digest(archive):
            return False
    path.unlink(missing_ok=True)
    return True


def check_signature(archive: Path, trusted_keys: Sequence[Path]) -> str:
    """Return the id of the trusted key that signed these bytes.

    Args:
        trusted_keys: as for `load_public_keys`.

    Raises:
        ArchiveError: it is not signed, signed by a key that is not trusted, changed after it was signed, or the
            signature is false; each says so.
    """
    trusted = load_public_keys(trusted_keys)
    if not archive.is_file():
        raise ArchiveError(f"archive {archive}: there is none. Build it with `detserve archive SPEC.yaml`.")
    found = read_signature(archive)
    if found is None:
        raise ArchiveError(
            f"archive {archive.name}: it is not signed (there is no {signature_path(archive).name} beside it), and a "
            "signature is required. Sign it with `detserve keys sign` or build it with `detserve archive --sign`."
        )
    key = trusted.get(found.key)
    if key is None:
        raise ArchiveError(
            f"archive {archive.name}: it is signed by the key {found.key}, which is not trusted; trusted are "
            f"{', '.join(sorted(trusted))}. Have it signed by one of them, or add its public key to the trusted ones."
        )
    digest = _digest(archive)
    if digest != found.sha256:
        raise ArchiveError(
            f"archive {archive.name}: it was changed after it was signed: its SHA-256 is {digest[:16]}…, the signature "
            f"is about {found.sha256[:16]}…. Copy it again, or sign it anew."
        )
    try:
        key.verify(base64.b64decode(found.signature, validate=True), _message(digest))
    except (InvalidSignature, binascii.Error, ValueError) as error:
        raise ArchiveError(
            f"archive {archive.name}: its signature is false: the key {found.key} has not signed these bytes. Do not "
            "use this file."
        ) from error
    return found.key


def _message(sha256: str) -> bytes:
    return _PURPOSE + sha256.encode()


def _digest(archive: Path) -> str:
    try:
        with archive.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ArchiveError(f"archive {archive}: cannot be read ({error.strerror}). Copy or build it again.") from error


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_FILE + 1)
    except OSError as error:
        raise ArchiveError(f"{path}: cannot be read ({error.strerror}). Give the right file.") from error
    if len(content) > _LARGEST_FILE:
        raise ArchiveError(f"{path}: got more than {_LARGEST_FILE} bytes, expected a key or a signature.")
    return content
