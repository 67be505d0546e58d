"""A data set brought into a folder: what is missing is downloaded, what is there is proven, every failure is told.

    parts ─► what is there (downloads.json: size, SHA-256) ─► room on the disk ─► downloads, side by side ─► unpacked

``downloads.json`` records the SHA-256 of each file, so that a later run finds what has changed since.
"""

import json
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from dettools.datasets.download_archive import unpack
from dettools.datasets.download_file import Patience, Wanted, fetch, locked, stated_size
from dettools.datasets.download_proof import proof_of, sha256_of
from dettools.datasets.download_table import DataSet, DownloadError, Part

MANIFEST = "downloads.json"
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Options:
    """How a data set is brought.

    Attributes:
        threads: files at a time.
        unzip: archives are unpacked.
        delete: an archive is removed once it is unpacked.
        patience: with the servers.
    """

    threads: int = 4
    unzip: bool = False
    delete: bool = False
    patience: Patience = field(default_factory=Patience)


@dataclass(frozen=True)
class Planned:
    """One file to be had.

    Attributes:
        part: of the table.
        path: where it goes.
        urls: mirrors first.
        size: bytes; None where nobody says.
        state: ``missing``, ``begun``, ``there`` (not proven yet), or ``unpacked`` (its archive was deleted).
        to_come: bytes that are to be downloaded.
        to_unpack: bytes of an archive whose members are not there yet.
    """

    part: Part
    path: Path
    urls: tuple[str, ...]
    size: int | None
    state: str
    to_come: int
    to_unpack: int


@dataclass(frozen=True)
class Plan:
    """What a run would do.

    Attributes:
        folder: of the data set.
        files: all of them.
        needed: bytes on the disk at least; what archives unpack to is reckoned as their own size.
        free: bytes on the disk.
    """

    folder: Path
    files: tuple[Planned, ...]
    needed: int
    free: int


@dataclass(frozen=True)
class Outcome:
    """What became of one file.

    Attributes:
        state: ``downloaded``, ``there``, ``unpacked`` (from before) or ``failed``.
        proof: ``sha256``, ``md5``, ``recorded`` (as in ``downloads.json``), ``archive`` or ``length``.
        unpacked: files that were unpacked; 0 when none were.
        notes: what a person should know.
        error: why it failed.
    """

    part: str
    path: str
    state: str
    size: int = 0
    sha256: str = ""
    url: str = ""
    proof: str = ""
    unpacked: int = 0
    notes: tuple[str, ...] = ()
    error: str = ""


def plan_download(
    data_set: DataSet,
    parts: Sequence[str],
    folder: Path,
    mirrors: Sequence[str],
    options: Options,
    *,
    ask: bool = True,
) -> Plan:
    """Find what is missing, and what it needs on the disk.

    Args:
        data_set: of the table.
        parts: names of its parts; the usual ones for none.
        folder: where it goes.
        mirrors: addresses that hold the files under their paths in the folder; tried before the table's.
        options: as for `run_download`.
        ask: servers are asked for sizes that the table does not know.

    Raises:
        DownloadError: there is no such part, or ``downloads.json`` is damaged.
    """
    records = _Records(folder)
    silent: set[str] = set()
    with ThreadPoolExecutor(max_workers=max(1, options.threads)) as pool:
        files = tuple(
            pool.map(
                lambda part: _planned(part, folder, mirrors, records.of(part.path), options, silent if ask else None),
                data_set.chosen(list(parts)),
            )
        )
    downloads = sum(one.to_come for one in files)
    kept = downloads
    if options.unzip and options.delete:
        # Archives go one after the other; as many as there are threads lie beside what they unpack to.
        ours = sorted((one.to_come for one in files if one.part.is_archive), reverse=True)
        kept = downloads - sum(ours[options.threads :])
    needed = kept + (sum(one.to_unpack for one in files) if options.unzip else 0)
    return Plan(folder, files, needed, _free(folder))


def run_download(plan: Plan, options: Options, progress: Progress, stop: threading.Event) -> list[Outcome]:
    """Download what is missing, prove what is there; one file's failure does not stop the others.

    Args:
        plan: of `plan_download`.
        options: as for the plan.
        progress: told the file and its MiB, done and in all.
        stop: set from outside to end; what has come is kept.

    Raises:
        DownloadError: the disk has too little room, or the folder cannot be written.
    """
    if plan.needed > plan.free:
        raise DownloadError(
            f"{plan.folder}: the disk has {plan.free / 1e9:.2f} GB left, expected at least {plan.needed / 1e9:.2f} GB. "
            "Make room, choose fewer --parts, or another --save-dir."
        )
    try:
        plan.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DownloadError(f"{plan.folder}: cannot be written: {error.strerror or error}.") from error
    records = _Records(plan.folder)
    with ThreadPoolExecutor(max_workers=max(1, options.threads)) as pool:
        futures = [pool.submit(_bring, one, records, options, progress, stop) for one in plan.files]
        try:
            return [future.result() for future in futures]
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def _planned(
    part: Part,
    folder: Path,
    mirrors: Sequence[str],
    record: dict[str, Any],
    options: Options,
    silent: set[str] | None,
) -> Planned:
    """Look at one file; ``silent`` are the servers that did not answer, None asks none."""
    path = folder / part.path
    urls = (*(f"{mirror.rstrip('/')}/{quote(part.path)}" for mirror in mirrors), *part.urls)
    if not path.exists() and record.get("deleted") and _still_there(folder, record):
        return Planned(part, path, urls, part.size or record.get("size"), "unpacked", 0, 0)
    size = part.size
    if size is None and silent is not None:
        size = stated_size(urls, options.patience.timeout_s, silent)
    packed = size or 0 if part.is_archive else 0
    if path.is_file():
        have = path.stat().st_size
        to_come = 0 if size in (None, have) else size or 0
        unpacked = not to_come and _still_there(folder, record)
        return Planned(part, path, urls, size, "there", to_come, 0 if unpacked else packed)
    begun = path.with_name(f"{path.name}.part")
    have = begun.stat().st_size if begun.is_file() else 0
    return Planned(part, path, urls, size, "begun" if have else "missing", max(0, (size or 0) - have), packed)


def _still_there(folder: Path, record: dict[str, Any]) -> bool:
    holds = record.get("holds") or []
    return bool(holds) and all((folder / name).exists() for name in holds)


def _bring(
    planned: Planned, records: "_Records", options: Options, progress: Progress, stop: threading.Event
) -> Outcome:
    """Bring one file; every failure becomes an outcome."""
    part, path = planned.part, planned.path
    record = records.of(part.path)
    if planned.state == "unpacked":
        note = "unpacked before, its archive deleted"
        return Outcome(part.name, part.path, "unpacked", record["size"], record["sha256"], record["url"], notes=(note,))
    try:
        outcome = _there(planned, record) if path.is_file() else None
        notes: tuple[str, ...] = ()
        if outcome is not None and outcome.error:
            notes, outcome = (f"what was there was not used: {outcome.error}",), None
        if outcome is None:
            outcome = _fetched(planned, record, options, progress, stop, notes)
        record = {
            "url": outcome.url,
            "size": outcome.size,
            "sha256": outcome.sha256,
            "proof": outcome.proof,
            "holds": record.get("holds", []) if outcome.state == "there" else [],
        }
        records.put(part.path, record)
        if not (options.unzip and part.is_archive):
            return outcome
        if outcome.state == "there" and _still_there(records.folder, record):
            return _with_note(outcome, "unpacked before: what came out of it is still there")
        progress(f"unpacking {path.name}", 0, 0)
        with locked(path):
            brought = unpack(path, records.folder / part.unpack_to, stop)
        holds = [str(PurePosixPath(part.unpack_to, name)) for name in brought.top]
        # The archive may go, or be kept: what it brought is found again without it.
        records.put(part.path, {**record, "holds": holds, "deleted": options.delete})
        if options.delete:
            path.unlink()
        return replace(outcome, unpacked=brought.files)
    except DownloadError as error:
        return Outcome(part.name, part.path, "failed", error=str(error))
    except OSError as error:
        return Outcome(part.name, part.path, "failed", error=f"{path}: {error.strerror or error}.")


def _with_note(outcome: Outcome, note: str) -> Outcome:
    return replace(outcome, notes=(*outcome.notes, note))


def _there(planned: Planned, record: dict[str, Any]) -> Outcome:
    """Prove a file that is there; an outcome with an error says why it is not the file."""
    part, path = planned.part, planned.path
    size, known = path.stat().st_size, record.get("sha256")
    if known and not part.digest:
        found = sha256_of(path)
        error = "" if found == known else f"got sha256 {found}, recorded was {known}: it has changed since."
        state = "failed" if error else "there"
        return Outcome(part.name, part.path, state, size, found, record["url"], "recorded", error=error)
    try:
        proof = proof_of(path, planned.size, part.digest)
    except DownloadError as error:
        return Outcome(part.name, part.path, "failed", size, error=str(error))
    sha256 = sha256_of(path, part.digest)
    return Outcome(part.name, part.path, "there", size, sha256, record.get("url", ""), proof)


def _fetched(
    planned: Planned,
    record: dict[str, Any],
    options: Options,
    progress: Progress,
    stop: threading.Event,
    notes: tuple[str, ...],
) -> Outcome:
    part = planned.part
    # What was proven once has to come again; a file that its publisher replaced is told, not taken.
    digest = part.digest or (f"sha256:{record['sha256']}" if record.get("sha256") else "")
    wanted = Wanted(planned.urls, planned.path, part.size, digest)
    try:
        fetched = fetch(
            wanted,
            options.patience,
            stop,
            lambda done, total: progress(f"{planned.path.name}, MiB", done >> 20, total >> 20),
        )
    except DownloadError as error:
        if part.digest or not digest:
            raise
        raise DownloadError(
            f"{error} Its digest is that which {MANIFEST} recorded; if the publisher replaced the file, remove "
            f"{part.path!r} from there."
        ) from error
    if not part.digest:
        how = "its archive is whole" if fetched.proof == "archive" else "it has the length that the server states"
        notes = (*notes, f"no digest of it is public: {how}; its SHA-256 is recorded in {MANIFEST}")
    return Outcome(
        part.name, part.path, "downloaded", fetched.size, fetched.sha256, fetched.url, fetched.proof, 0, notes
    )


def _free(folder: Path) -> int:
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


class _Records:
    """What ``downloads.json`` says of each file; written whole after each change, by one process at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / MANIFEST
        self._lock = threading.Lock()
        self._files = self._read()

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            files = json.loads(self._path.read_text("utf-8"))["files"]
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise DownloadError(f"--save-dir: {self._path}: {error.strerror or error}. Name another folder.") from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DownloadError(f"{self._path}: cannot be read ({error}). Remove it: all is proven anew.") from error
        if not isinstance(files, dict) or not all(map(_is_record, files.values())):
            raise DownloadError(f"{self._path}: is not what was written there. Remove it: all is proven anew.")
        return files

    def of(self, path: str) -> dict[str, Any]:
        return self._files.get(path, {})

    def put(self, path: str, record: dict[str, Any]) -> None:
        with self._lock, locked(self._path, wait=True) as draft:
            # Another run may have written other files' since.
            self._files = {**self._read(), path: record}
            text = json.dumps({"files": dict(sorted(self._files.items()))}, indent=2)
            draft.truncate(0)
            draft.write(f"{text}\n".encode())
            draft.flush()
            Path(draft.name).replace(self._path)


def _is_record(value: object) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("holds", []), list):
        return False
    texts = [value.get("url"), value.get("sha256"), value.get("proof"), *value.get("holds", [])]
    return isinstance(value.get("size"), int) and all(isinstance(one, str) for one in texts)
