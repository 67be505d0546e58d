"""The `.mar` file: written so that the same members give the same bytes, and read without trusting it.

members ─► MAR-INF/MANIFEST.json (torch-model-archiver's own classes) ─► SHA256SUMS over all ─► zip, sorted, no times
"""

import hashlib
import json
import os
import stat
import struct
import tempfile
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from dethandlers.artefact import DIGESTS_FILE, SPEC_FILE

from detserve.errors import ArchiveError

MANIFEST_FILE = "MAR-INF/MANIFEST.json"
# A manifest must carry a date; a fixed one keeps the bytes equal (the earliest that a zip can hold).
_CREATED_ON = "01/01/1980 00:00:00"
_ZIP_TIME = (1980, 1, 1, 0, 0, 0)
_ZIP_DATE = 0x21  # the same day as zip files spell it
_ATTRIBUTES = (stat.S_IFREG | 0o644) << 16
_UNIX = 3
# Larger ones have wider headers.
_LARGEST_PLAIN_ZIP = 1 << 31
_PICKLES = (".pth", ".pt", ".pkl", ".pickle", ".bin", ".ckpt", ".joblib", ".npy", ".npz")
_CHUNK = 1 << 20
# A deflated zip unpacks to a thousand times its size; weights and code hardly shrink at all.
_MOST_GROWTH = 20
_FREE_GROWTH = 64 << 20
# Their readers know no pickle, and the length that a safetensors file begins with may look like one.
_NEVER_PICKLES = (".safetensors", ".onnx")


@dataclass(frozen=True)
class Member:
    """One file of an archive: its name, its size in bytes and its SHA-256."""

    name: str
    size: int
    sha256: str


def manifest_json(*, name: str, version: str, serialized_file: str, handler: str, config_file: str) -> str:
    """Write the manifest by torch-model-archiver's own classes, with a fixed date."""
    with warnings.catch_warnings():
        # Its version module leaves a file open.
        warnings.simplefilter("ignore", ResourceWarning)
        from model_archiver.manifest_components.manifest import Manifest
        from model_archiver.manifest_components.model import Model

    model = Model(
        model_name=name,
        serialized_file=serialized_file,
        handler=handler,
        model_version=version,
        config_file=config_file,
    )
    manifest = Manifest(runtime="python", model=model)
    manifest.creation_time = _CREATED_ON
    manifest.manifest_dict["createdOn"] = _CREATED_ON
    return str(manifest)


def write_mar(path: Path, members: Mapping[str, bytes]) -> list[Member]:
    """Write an archive; its file appears whole or not at all.

    Args:
        path: the `.mar`; replaced when it exists.
        members: name to content, the manifest included; ``SHA256SUMS`` over them is added.

    Returns:
        The members, ``SHA256SUMS`` included.

    Raises:
        ArchiveError: it cannot be written there.
    """
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in sorted(members.items())}
    sums = "".join(f"{digest}  {name}\n" for name, digest in digests.items()).encode()
    contents = {**members, DIGESTS_FILE: sums}
    handle = -1
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for name in sorted(contents):
                entry = zipfile.ZipInfo(name, _ZIP_TIME)
                entry.external_attr = _ATTRIBUTES
                entry.create_system = _UNIX
                archive.writestr(entry, contents[name])
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise ArchiveError(
                f"archive {path}: cannot be written ({error}). Choose another folder with --out."
            ) from error
        raise
    return [
        Member(name, len(content), digests.get(name) or hashlib.sha256(content).hexdigest())
        for name, content in sorted(contents.items())
    ]


def check_archive(
    path: Path, *, trusted_keys: Sequence[Path] | None = None, built_by_detserve: bool = False, pickles: bool = True
) -> list[Member]:
    """Check an archive's members: safe names, whole, each with the digest that ``SHA256SUMS`` states, no pickle.

    Of an archive of detserve every byte is checked: the members by their digests, the zip's own by what ``write_mar``
    writes. An archive that is not of detserve (neither spec nor digests in it) is only checked for safe names, for
    wholeness and for its unpacked size, unless the last two arguments ask for more.

    Args:
        trusted_keys: public keys, or folders of them, one of which must have signed the file (``detserve.signature``);
            None asks for no signature.
        built_by_detserve: refuse an archive that is not of detserve.
        pickles: let one that is not of detserve hold pickles.

    Raises:
        ArchiveError: names the member that is at fault.
    """
    if trusted_keys is not None:
        # First: of what nobody vouches for nothing is parsed.
        from detserve.signature import check_signature

        check_signature(path, trusted_keys)
    with _opened(path) as archive:
        members = _check_members(archive, path, pickles=pickles)
    if built_by_detserve and not {SPEC_FILE, DIGESTS_FILE} <= {member.name for member in members}:
        raise ArchiveError(
            f"archive {path.name}: it was not built by detserve: it has no {SPEC_FILE} and {DIGESTS_FILE}, so that "
            "nothing in it can be verified. Pack its model with `detserve archive`."
        )
    return members


def read_json_member(path: Path, name: str) -> Any:
    """Read one JSON member.

    Raises:
        ArchiveError: it is missing or no JSON.
    """
    with _opened(path) as archive:
        try:
            return json.loads(archive.read(name))
        except (KeyError, ValueError, zipfile.BadZipFile) as error:
            raise ArchiveError(
                f"archive {path.name}: {name} is missing or damaged ({error}). Build it again."
            ) from error


@contextmanager
def unpacked(path: Path) -> Iterator[Path]:
    """Check an archive and unpack it into a temporary folder, which goes when the block ends.

    Raises:
        ArchiveError: as ``check_archive``.
    """
    with tempfile.TemporaryDirectory(prefix="detserve-") as folder, _opened(path) as archive:
        for member in _check_members(archive, path):
            target = Path(folder, member.name)
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member.name) as source, target.open("wb") as file:
                while chunk := source.read(_CHUNK):
                    file.write(chunk)
        yield Path(folder)


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        archive = zipfile.ZipFile(path)
    except FileNotFoundError as error:
        raise ArchiveError(f"archive {path}: there is none. Build it with `detserve archive SPEC.yaml`.") from error
    except Exception as error:  # a damaged directory fails in many ways
        raise ArchiveError(
            f"archive {path.name}: not a zip file, or its directory is damaged ({error}). Copy or build it again."
        ) from error
    with archive:
        yield archive


def _check_members(archive: zipfile.ZipFile, path: Path, *, pickles: bool = True) -> list[Member]:
    counts = Counter(entry.filename for entry in archive.infolist())
    for entry in archive.infolist():
        _check_name(entry, counts, path)
    _check_growth(archive.infolist(), path)
    entries = [entry for entry in archive.infolist() if not entry.is_dir()]
    names = [entry.filename for entry in entries]
    ours = DIGESTS_FILE in names or SPEC_FILE in names
    members, pickled = list[Member](), list[str]()
    for entry in entries:
        digest, looks_pickled = _read_through(archive, entry, path)
        members.append(Member(entry.filename, entry.file_size, digest))
        if entry.filename.lower().endswith(_PICKLES) or looks_pickled:
            pickled.append(entry.filename)
    if MANIFEST_FILE not in names:
        raise ArchiveError(f"archive {path.name}: {MANIFEST_FILE} is missing. This is no archive for TorchServe.")
    if ours:
        _check_digests(archive, members, path)
    if pickled and (ours or not pickles):
        raise ArchiveError(
            f"archive {path.name}: got {pickled[0]}, which may hold a pickle, expected weights as safetensors or "
            "ONNX. Build it again with `detserve archive`."
        )
    if ours:
        _check_frame(archive.infolist(), path)
    return members


def _check_growth(entries: list[zipfile.ZipInfo], path: Path) -> None:
    """Refuse a zip bomb by what its directory declares; reading a member ends at its declared size."""
    size = path.stat().st_size
    unpacked_size = sum(entry.file_size for entry in entries)
    if unpacked_size > _FREE_GROWTH + _MOST_GROWTH * size:
        raise ArchiveError(
            f"archive {path.name}: its {size} bytes would unpack to {unpacked_size}: a zip bomb. Do not use this file."
        )
    if sum(entry.compress_size for entry in entries) > size:
        raise ArchiveError(f"archive {path.name}: its members overlap: a zip bomb. Do not use this file.")


def _check_name(entry: zipfile.ZipInfo, counts: Mapping[str, int], path: Path) -> None:
    name = entry.filename
    parts = PurePosixPath(name).parts
    if name.startswith("/") or "\\" in name or ".." in parts or not parts or ":" in parts[0]:
        raise ArchiveError(f"archive {path.name}: member {name!r} leads out of the archive. Do not use this file.")
    if stat.S_ISLNK(entry.external_attr >> 16):
        raise ArchiveError(f"archive {path.name}: member {name!r} is a symbolic link. Do not use this file.")
    if name.removesuffix("/") != str(PurePosixPath(name)):
        raise ArchiveError(f"archive {path.name}: member {name!r} is spelt in a roundabout way. Do not use this file.")
    if counts[name] > 1:
        raise ArchiveError(f"archive {path.name}: member {name!r} stands in it twice. Do not use this file.")


def _read_through(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path) -> tuple[str, bool]:
    """Return a member's SHA-256, and whether it looks like a pickle whatever its name is.

    That is: a pickle of protocol 2 or later, or a zip with one in it, which is what ``torch.save`` writes.
    """
    digest = hashlib.sha256()
    first = last = b""
    try:
        with archive.open(entry) as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                first, last = first or chunk[:4], chunk[-1:]
    except Exception as error:  # each compression fails in its own ways
        raise ArchiveError(
            f"archive {path.name}: member {entry.filename} is damaged ({error}). Copy or build the archive again."
        ) from error
    # The first opcode is PROTO with the protocol's number, the last is STOP (pickletools).
    begins_so = first[:1] == b"\x80" and first[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
    looks_pickled = (begins_so and last == b".") or (first == b"PK\3\4" and _holds_pickles(archive, entry))
    return digest.hexdigest(), looks_pickled and not entry.filename.lower().endswith(_NEVER_PICKLES)


def _holds_pickles(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bool:
    """Return whether a member that is a zip holds a pickle; in one that cannot be read there may be one."""
    try:
        with archive.open(entry) as file, zipfile.ZipFile(file) as inner:
            return any(name.lower().endswith(_PICKLES) for name in inner.namelist())
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, LookupError, RuntimeError, struct.error, zlib.error):
        return True


def _check_digests(archive: zipfile.ZipFile, members: list[Member], path: Path) -> None:
    if DIGESTS_FILE not in archive.namelist():
        raise ArchiveError(f"archive {path.name}: {DIGESTS_FILE} is missing. It was changed after it was built.")
    listed: dict[str, str] = {}
    for line in archive.read(DIGESTS_FILE).decode("utf-8", "replace").splitlines():
        digest, _, name = line.partition("  ")
        listed[name] = digest
    for member in members:
        if member.name == DIGESTS_FILE:
            continue
        if member.name not in listed:
            raise ArchiveError(
                f"archive {path.name}: member {member.name} is not in {DIGESTS_FILE}: it was added later."
            )
        if listed.pop(member.name) != member.sha256:
            raise ArchiveError(
                f"archive {path.name}: member {member.name} has SHA-256 {member.sha256[:16]}…, which is not what "
                f"{DIGESTS_FILE} states. The archive was changed after it was built: copy or build it again."
            )
    if listed:
        raise ArchiveError(f"archive {path.name}: member {next(iter(listed))} is in {DIGESTS_FILE}, but missing.")


def _check_frame(entries: list[zipfile.ZipInfo], path: Path) -> None:
    """Refuse what stands around the members and is not what ``write_mar`` writes there.

    No digest covers it, and it is read in two ways: Java unpacks by the header before each member, Python reads by the
    directory at the end. A member that stands only in one of them would be served without having been checked.
    """
    if path.stat().st_size >= _LARGEST_PLAIN_ZIP:
        return
    with path.open("rb") as file:
        end = 0
        for offset, expected in _frame(entries):
            file.seek(offset)
            got = file.read(len(expected))
            if got != expected:
                place = offset + next(
                    (i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b), len(got)
                )
                break
            end = offset + len(expected)
        else:
            place = end
            if not file.read(1):
                return
    raise ArchiveError(
        f"archive {path.name}: its zip structure is not what detserve writes, from byte {place} on: it was changed or "
        "packed again after it was built. Copy or build it again."
    )


def _frame(entries: list[zipfile.ZipInfo]) -> Iterator[tuple[int, bytes]]:
    """Yield what a plain zip of stored members has beside their content: offset and bytes, to the file's end."""
    at = 0
    directory = b""
    for entry in entries:
        name = entry.filename.encode()
        flags = 0 if name.isascii() else 0x800  # the name is UTF-8
        shared = struct.pack(
            "<4H3L2H",
            flags,
            zipfile.ZIP_STORED,
            0,
            _ZIP_DATE,
            entry.CRC,
            entry.file_size,
            entry.file_size,
            len(name),
            0,
        )
        header = b"PK\3\4" + struct.pack("<H", 20) + shared + name
        yield at, header
        directory += b"PK\1\2" + struct.pack("<BBH", 20, _UNIX, 20) + shared
        directory += struct.pack("<3H2L", 0, 0, 0, _ATTRIBUTES, at) + name
        at += len(header) + entry.file_size
    count = len(entries)
    yield at, directory + b"PK\5\6" + struct.pack("<4H2LH", 0, 0, count, count, len(directory), at, 0)
