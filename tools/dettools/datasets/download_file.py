"""One file over HTTP: resumed where it was cut, tried again, and never taken for whole before it is proven whole.

    NAME.part (+ NAME.part.json: which file of which server) ─► length ─► digest, or the archive's own checks ─► NAME

A name without ``.part`` therefore always is a whole file. What cannot be proven whole is refused with the reason.
"""

import fcntl
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import requests
import tenacity
from urllib3.exceptions import HTTPError

from dettools.datasets.download_proof import proof_of, sha256_of
from dettools.datasets.download_table import DownloadError

Progress = Callable[[int, int], None]

_CHUNK = 1 << 20
_CONNECT_S = 10.0
_LONGEST_WAIT_S = 60.0
# Against a server that gives a few bytes each time for ever.
_MOST_ATTEMPTS = 500
_MAY_PASS = {408, 425, 429, 500, 502, 503, 504}


@dataclass(frozen=True)
class Wanted:
    """A file to be had.

    Attributes:
        urls: tried in this order.
        path: where it goes.
        size: bytes, where known.
        digest: ``sha256:…``, ``md5:…`` or empty.
    """

    urls: tuple[str, ...]
    path: Path
    size: int | None = None
    digest: str = ""


@dataclass(frozen=True)
class Patience:
    """How long a server is waited for.

    Attributes:
        retries: attempts without a further byte, before it is given up.
        timeout_s: seconds without a byte, before a connection counts as cut.
        first_wait_s: about how long the first wait between attempts is, in seconds; later ones double.
    """

    retries: int = 5
    timeout_s: float = 60.0
    first_wait_s: float = 1.0


@dataclass(frozen=True)
class Fetched:
    """A whole file.

    Attributes:
        url: where it came from.
        size: bytes.
        sha256: of the file.
        proof: what showed it whole: ``sha256``, ``md5``, ``archive`` (its own checks) or ``length``.
        attempts: requests that it took.
    """

    url: str
    size: int
    sha256: str
    proof: str
    attempts: int


class _MayPassError(Exception):
    """The same request may succeed later, after ``wait_s`` seconds if the server said so."""

    def __init__(self, message: str, wait_s: float | None = None) -> None:
        super().__init__(message)
        self.wait_s = wait_s


def fetch(wanted: Wanted, patience: Patience, stop: threading.Event, progress: Progress) -> Fetched:
    """Download a file; it stands at its path only once it is whole.

    Args:
        wanted: the file.
        patience: with the server.
        stop: set from outside to end; what has come is kept for the next time.
        progress: told the bytes that have come, and the bytes of the whole (0: unknown).

    Raises:
        DownloadError: none of the addresses gave the whole file; each with its reason.
    """
    reasons = []
    for url in wanted.urls:
        try:
            with locked(wanted.path) as part:
                return _Download(url, wanted, part, patience, stop, progress).run()
        except DownloadError as error:
            reasons.append(f"{url}: {error}")
        except OSError as error:
            raise DownloadError(f"{wanted.path}: cannot be written: {error.strerror or error}.") from error
        if stop.is_set():
            break
    raise DownloadError("; ".join(reasons))


def stated_size(urls: tuple[str, ...], timeout_s: float, silent: set[str]) -> int | None:
    """Ask the first server that answers for a file's size in bytes; None where none tells.

    Args:
        urls: of the file.
        timeout_s: seconds without an answer.
        silent: servers that did not answer, which are not asked again; grows.
    """
    for url in urls:
        host = urlsplit(url).netloc
        if host in silent:
            continue
        try:
            answer = requests.head(
                url, allow_redirects=True, timeout=(_CONNECT_S, timeout_s), headers={"Accept-Encoding": "identity"}
            )
        except (requests.RequestException, ValueError):
            silent.add(host)
            continue
        length = _whole_number(answer.headers.get("Content-Length", ""))
        if answer.status_code == 200 and length is not None:
            return length
    return None


@contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[IO[bytes]]:
    """Open a file's part for this process alone; what is empty in the end is removed.

    Raises:
        DownloadError: another process has it, and that is not waited for.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.with_name(f"{path.name}.part")
    while True:
        with name.open("ab") as part:
            try:
                fcntl.flock(part, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                # Another process may have made it whole, and so another name's, between the two lines above.
                ours = name.exists() and name.stat().st_ino == os.fstat(part.fileno()).st_ino
            except BlockingIOError:
                ours = False
            if not ours and wait:
                continue
            if not ours:
                raise DownloadError("another run downloads or unpacks it. Wait for it.")
            try:
                yield part
            finally:
                part.flush()
                if os.fstat(part.fileno()).st_size == 0:
                    name.unlink(missing_ok=True)
                    _note_of(path).unlink(missing_ok=True)
            return


def _note_of(path: Path) -> Path:
    """Where it is told which file of which server a part is of."""
    return path.with_name(f"{path.name}.part.json")


class _Download:
    """The attempts at one address."""

    def __init__(
        self, url: str, wanted: Wanted, part: IO[bytes], patience: Patience, stop: threading.Event, progress: Progress
    ) -> None:
        self._url, self._wanted, self._part = url, wanted, part
        self._patience, self._stop, self._progress = patience, stop, progress
        self._note = _note_of(wanted.path)
        self._most = self._barren = self._attempts = 0

    def run(self) -> Fetched:
        waits = tenacity.wait_random_exponential(multiplier=self._patience.first_wait_s, max=_LONGEST_WAIT_S)

        def wait_s(state: tenacity.RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            told = error.wait_s if isinstance(error, _MayPassError) else None
            return waits(state) if told is None else min(told, _LONGEST_WAIT_S)

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_MayPassError),
            stop=self._out_of_patience,
            wait=wait_s,
            sleep=tenacity.sleep_using_event(self._stop),
            reraise=True,
        )
        try:
            return retrying(self._attempt)
        except _MayPassError as error:
            kept = "; what has come is kept" if self._size() else ""
            tried = f"{self._attempts} attempts" if self._attempts > 1 else "1 attempt"
            raise DownloadError(f"{error} ({tried}{kept})") from error

    def _out_of_patience(self, _: tenacity.RetryCallState) -> bool:
        size = self._size()
        self._barren = 0 if size > self._most else self._barren + 1
        self._most = max(size, self._most)
        return self._stop.is_set() or self._barren > self._patience.retries or self._attempts >= _MOST_ATTEMPTS

    def _attempt(self) -> Fetched:
        if self._stop.is_set():
            raise DownloadError("interrupted; what has come is kept.")
        self._attempts += 1
        start, note = self._start()
        whole = note.get("total") or self._wanted.size
        if not (start and start == whole):
            whole = self._receive(start, note)
        return self._finished(whole, resumed=start > 0)

    def _start(self) -> tuple[int, dict[str, Any]]:
        """Return how many bytes of this very file have come, and what its server said of it."""
        try:
            note = json.loads(self._note.read_text("utf-8"))
        except (OSError, ValueError, RecursionError):
            note = {}
        if not isinstance(note, dict) or not isinstance(note.get("total"), int | None):
            note = {}
        same = note.get("url") == self._url and note.get("validator")
        whole = self._wanted.size or note.get("total")
        start = self._size()
        if not (same or self._wanted.digest) or (whole and start > whole):
            self._begin_anew()
            return 0, {}
        return start, note if same else {}

    def _receive(self, start: int, note: Mapping[str, Any]) -> int | None:
        headers = {"Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
            if note.get("validator"):
                headers["If-Range"] = str(note["validator"])
        reached = False
        try:
            with requests.get(
                self._url, headers=headers, stream=True, timeout=(_CONNECT_S, self._patience.timeout_s)
            ) as answer:
                reached = True
                return self._take(answer, start, note)
        except (requests.TooManyRedirects, ValueError) as error:  # A ValueError is of an address or a header.
            raise DownloadError(f"it leads nowhere ({error}).") from error
        except requests.exceptions.SSLError as error:
            raise DownloadError(f"its certificate is not valid ({error}).") from error
        except (requests.RequestException, HTTPError) as error:
            what = "the connection was cut or stood still" if reached else "the server cannot be reached"
            raise _MayPassError(f"{what} ({_cause(error)})") from error

    def _take(self, answer: requests.Response, start: int, note: Mapping[str, Any]) -> int | None:
        """Check the answer's head, append its body; return the size of the whole, where it is known."""
        chain = [one.url for one in (*answer.history, answer)]
        if chain[0].startswith("https:") and not all(url.startswith("https:") for url in chain):
            raise DownloadError(f"it leads from https to {chain[-1]}, which anyone on the way can change.")
        if answer.status_code in _MAY_PASS:
            raise _MayPassError(f"HTTP {answer.status_code}", _whole_number(answer.headers.get("Retry-After", "")))
        if answer.status_code == 416:
            self._begin_anew()
            raise _MayPassError("HTTP 416: what had come does not fit")
        if answer.status_code not in (200, 206):
            raise DownloadError(f"HTTP {answer.status_code} {answer.reason}.")
        if answer.headers.get("Content-Encoding", "identity") != "identity":
            raise DownloadError("the server compresses what was asked for as it is, so that its length means nothing.")
        if answer.headers.get("Content-Type", "").startswith("text/html"):
            raise DownloadError("the server sent a web page instead, perhaps to log in.")
        total = self._total(answer, start)
        validator = _validator(answer)
        if answer.status_code == 200:
            self._begin_anew()
            start = 0
        elif start:
            self._require_same(answer, total, note)
            validator = validator or note.get("validator") or ""
        self._require_room(total, start)
        self._note.write_text(json.dumps({"url": self._url, "validator": validator, "total": total}), "utf-8")
        done = start
        # What has come, be it less: of a chunk that is cut, `iter_content` would keep nothing.
        while chunk := answer.raw.read1(_CHUNK):
            self._part.write(chunk)
            done += len(chunk)
            if total is not None and done > total:
                self._begin_anew()
                raise _MayPassError(f"got more than the {total} bytes that it has")
            self._progress(done, total or 0)
            if self._stop.is_set():
                self._part.flush()
                raise DownloadError("interrupted; what has come is kept.")
        self._part.flush()
        return total

    def _require_same(self, answer: requests.Response, total: int | None, note: Mapping[str, Any]) -> None:
        """Not every server heeds If-Range: the rest may be another file's than what has come."""
        known = str(note.get("validator") or "")
        told = answer.headers.get("ETag" if known.startswith('"') else "Last-Modified", "")
        longer = None not in (total, note.get("total")) and total != note["total"]
        if longer or (known and told not in ("", known)):
            self._begin_anew()
            raise _MayPassError("the file has changed since it was begun")

    def _total(self, answer: requests.Response, start: int) -> int | None:
        """Return the size of the whole file by the answer's head."""
        if answer.status_code == 206:
            span, _, whole = answer.headers.get("Content-Range", "").partition("/")
            if span.removeprefix("bytes ").partition("-")[0] != str(start):
                self._begin_anew()
                raise _MayPassError(f"asked from byte {start}, the server answered {span or 'without a range'}")
            stated = _whole_number(whole)
        else:
            stated = _whole_number(answer.headers.get("Content-Length", ""))
        total = self._wanted.size if stated is None else stated
        if total is not None and self._wanted.size not in (None, total):
            raise DownloadError(f"the server has {total} bytes, expected {self._wanted.size}: another file.")
        chunked = answer.headers.get("Transfer-Encoding", "").lower() == "chunked"
        if total is None and not chunked and not self._wanted.digest:
            raise DownloadError(
                "the server does not say how long it is, and no digest is known: half would look whole."
            )
        return total

    def _finished(self, whole: int | None, *, resumed: bool) -> Fetched:
        size, part = self._size(), Path(self._part.name)
        if whole is not None and size < whole:
            raise _MayPassError(f"got {size} of {whole} bytes")
        try:
            # The end of a chunked answer is its length: it came to an end, or urllib3 had raised.
            proof = proof_of(part, whole if whole is not None else size, self._wanted.digest)
        except DownloadError as error:
            self._begin_anew()
            if resumed:  # Perhaps the beginning was another file's.
                raise _MayPassError(str(error)) from error
            raise
        os.fsync(self._part.fileno())
        fetched = Fetched(self._url, size, sha256_of(part, self._wanted.digest), proof, self._attempts)
        part.replace(self._wanted.path)
        self._note.unlink(missing_ok=True)
        return fetched

    def _size(self) -> int:
        self._part.flush()
        return os.fstat(self._part.fileno()).st_size

    def _begin_anew(self) -> None:
        self._part.truncate(0)
        self._note.unlink(missing_ok=True)

    def _require_room(self, total: int | None, start: int) -> None:
        free = shutil.disk_usage(self._wanted.path.parent).free
        if total is not None and total - start > free:
            raise DownloadError(f"{total - start} bytes are to come, the disk has {free} left.")


def _whole_number(text: str) -> int | None:
    """Read a number of a header, as far as a file can be long."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else None


def _validator(answer: requests.Response) -> str:
    """Return what tells this file from its next version: a strong ETag, or its date."""
    tag = answer.headers.get("ETag", "")
    return tag if tag and not tag.startswith("W/") else answer.headers.get("Last-Modified", "")


def _cause(error: Exception) -> str:
    """Return the name of what went wrong first: requests wraps what urllib3 wraps."""
    while isinstance(inner := getattr(error, "reason", None) or next(iter(error.args), None), Exception):
        error = inner
    return type(error).__name__
