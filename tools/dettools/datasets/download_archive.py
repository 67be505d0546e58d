"""Archives from the net: shown whole by their own checks, and unpacked without leaving the folder.

    archive ─► every name, kind and size ─► a folder beside the target ─► moved file by file into the target

A name that leads out, a link, a device, or more bytes than such an archive can hold: nothing of it is kept.
"""

import lzma
import shutil
import stat
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Literal, Self

from dettools.datasets.download_table import DownloadError

_ZIP, _TAR = (".zip",), (".tar", ".tar.gz", ".tgz")
_CHUNK = 1 << 20
_MOST_GROWTH = 100
_FREE_GROWTH = 64 << 20
_MOST_MEMBERS = 5_000_000
_LARGEST_HEADER = 1 << 20
_DAMAGE = (
    zipfile.BadZipFile,
    tarfile.TarError,
    EOFError,
    zlib.error,
    lzma.LZMAError,
    NotImplementedError,
    RuntimeError,
    ValueError,
)


@dataclass(frozen=True)
class Unpacked:
    """What an archive brought: how many files, and the names of what lies at its top."""

    files: int
    top: tuple[str, ...]


class _BoundedHeader(tarfile.TarInfo):
    """A header whose long names and attributes, which tarfile reads at once, are not as long as memory."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """Refuse one that is too long."""
        found = super().frombuf(buf, encoding, errors)
        special = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
        if found.type in special and found.size > _LARGEST_HEADER:
            raise DownloadError(f"a header of the tar has {found.size} bytes. Do not trust it.")
        return found


def check_whole(path: Path) -> bool:
    """Check an archive by what it says of itself; return False for a file that is no archive by its name.

    A zip ends with its table of members, each with a CRC; a gzip with its CRC; a tar with two empty blocks.

    Raises:
        DownloadError: it is cut, or damaged.
    """
    name = path.name.removesuffix(".part")
    if not name.endswith((*_ZIP, *_TAR)):
        return False
    try:
        if name.endswith(_ZIP):
            with zipfile.ZipFile(path) as archive:
                _check_zip(archive, path)
                bad = archive.testzip()
            if bad is not None:
                raise DownloadError(f"{name}: its member {bad} is damaged.")
        else:
            with tarfile.open(path, _tar_mode(path), tarinfo=_BoundedHeader) as tar:
                total = 0
                for member in tar:
                    total += member.size
                    _require_bounded(total, path)
                _require_end(tar, path)
    except (*_DAMAGE, OSError) as error:
        raise DownloadError(f"{name}: is no whole archive ({error}).") from error
    return True


def unpack(path: Path, target: Path, stop: threading.Event | None = None) -> Unpacked:
    """Unpack an archive into a folder; all of it, or nothing.

    Args:
        path: of the archive.
        target: the folder.
        stop: set from outside to end.

    Raises:
        DownloadError: a member is not allowed, it is damaged or too large, or it was ended from outside.
    """
    stop = stop or threading.Event()
    staging = target / f".unpacking-{path.name}"
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        if path.name.endswith(_ZIP):
            _unpack_zip(path, staging, stop)
        else:
            _unpack_tar(path, staging, stop)
        return _move(staging, target)
    except _DAMAGE as error:
        raise DownloadError(f"{path.name}: cannot be unpacked, it is damaged ({error}).") from error
    except OSError as error:
        raise DownloadError(f"{path.name}: cannot be unpacked into {target}: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _check_zip(archive: zipfile.ZipFile, path: Path) -> None:
    entries = archive.infolist()
    names = [entry.filename for entry in entries]
    if len(set(names)) != len(names):
        raise DownloadError(f"{path.name}: two members have the same name.")
    for entry in entries:
        mode = entry.external_attr >> 16
        kind = stat.S_IFMT(mode)
        if kind and kind not in (stat.S_IFREG, stat.S_IFDIR):
            raise DownloadError(f"{path.name}: its member {entry.filename!r} is a link or a device. Do not trust it.")
        # What the archive says, before zipfile cuts the name at a zero.
        _require_inside(entry.orig_filename, path)
    if sum(entry.compress_size for entry in entries) > path.stat().st_size:
        raise DownloadError(f"{path.name}: its members share their bytes, as a zip bomb's do. Do not trust it.")
    _require_bounded(sum(entry.file_size for entry in entries), path)
    _require_few(names, path)


def _unpack_zip(path: Path, staging: Path, stop: threading.Event) -> None:
    with zipfile.ZipFile(path) as archive:
        _check_zip(archive, path)
        _require_room(sum(entry.file_size for entry in archive.infolist()), path, staging)
        for entry in archive.infolist():
            _require_going_on(stop)
            target = staging / entry.filename
            if entry.is_dir():
                target.mkdir(parents=True, exist_ok=True)
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            # `open` gives no more bytes than the entry states, and checks their CRC.
            with archive.open(entry) as source, target.open("xb") as file:
                shutil.copyfileobj(source, file, _CHUNK)


def _unpack_tar(path: Path, staging: Path, stop: threading.Event) -> None:
    total = count = 0
    with tarfile.open(path, _tar_mode(path), tarinfo=_BoundedHeader) as tar:
        for member in tar:
            _require_going_on(stop)
            if not (member.isreg() or member.isdir()):
                raise DownloadError(f"{path.name}: its member {member.name!r} is a link or a device. Do not trust it.")
            _require_inside(member.name, path)
            total += member.size
            count += 1
            _require_bounded(total, path)
            _require_room(member.size, path, staging)
            if count > _MOST_MEMBERS:
                _require_few(range(count), path)
            tar.extract(member, staging, filter="data")
        _require_end(tar, path)


def _require_going_on(stop: threading.Event) -> None:
    if stop.is_set():
        raise DownloadError("interrupted while it was unpacked; the archive is kept.")


def _tar_mode(path: Path) -> Literal["r:", "r:gz"]:
    return "r:gz" if path.name.removesuffix(".part").endswith("gz") else "r:"


def _require_inside(name: str, path: Path) -> None:
    parts = PurePosixPath(name).parts
    outside = name.startswith("/") or ".." in parts or PureWindowsPath(name).drive or "\\" in name or "\0" in name
    if outside or not name:
        raise DownloadError(f"{path.name}: its member {name!r} leads out of the folder. Do not trust it.")


def _require_bounded(total: int, path: Path) -> None:
    allowed = max(_FREE_GROWTH, _MOST_GROWTH * path.stat().st_size)
    if total > allowed:
        raise DownloadError(
            f"{path.name}: unpacks to {total} bytes or more, expected at most {_MOST_GROWTH} times its own "
            f"{path.stat().st_size}. Do not trust it."
        )


def _require_few(names: Iterable[object], path: Path) -> None:
    if sum(1 for _ in names) > _MOST_MEMBERS:
        raise DownloadError(f"{path.name}: has more than {_MOST_MEMBERS} members. Do not trust it.")


def _require_room(size: int, path: Path, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise DownloadError(f"{path.name}: unpacks to {size} bytes, the disk has {free} left. Make room.")


def _require_end(tar: tarfile.TarFile, path: Path) -> None:
    """A tar that was cut between two members looks whole to tarfile: only its two empty blocks end it."""
    file = tar.fileobj
    if file is None:
        raise DownloadError(f"{path.name}: cannot be read.")
    file.seek(tar.offset)
    end = file.read(2 * tarfile.BLOCKSIZE)
    if len(end) < 2 * tarfile.BLOCKSIZE or any(end):
        raise DownloadError(f"{path.name}: is no whole archive (its end is missing).")
    while file.read(_CHUNK):  # A gzip's CRC is checked where it ends.
        pass


def _move(staging: Path, target: Path) -> Unpacked:
    """Move the files into the target, over older ones; a link that stands where a folder belongs is refused."""
    count = 0
    top = tuple(sorted(one.name for one in staging.iterdir()))
    for source in sorted(staging.rglob("*")):
        place = target / source.relative_to(staging)
        if place.is_symlink():
            raise DownloadError(f"{place} is a link: nothing is unpacked through it. Remove it.")
        if source.is_dir():
            place.mkdir(parents=True, exist_ok=True)
        else:
            source.replace(place)
            count += 1
    return Unpacked(count, top)
