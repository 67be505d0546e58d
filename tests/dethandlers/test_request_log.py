"""The request log: whose id counts, what a line says, and a file that several workers roll without losing a line."""

import json
import subprocess
import sys

import pytest
from dethandlers.bookkeeping import Books
from dethandlers.errors import ImageError
from dethandlers.request_log import RequestLog, RequestRecord, take_request_id

RECORD = RequestRecord(
    request_id="a-1",
    frontend_id="f-1",
    status=200,
    type="ok",
    batch_size=2,
    body_bytes=100,
    image_size=(640, 480),
    detections=3,
    forward_size=1,
    stages_ms={"decode": 1.23456, "handler": 40.0},
)


@pytest.mark.parametrize(
    ("row", "headers", "expected"),
    [
        ({}, {"x-request-id": "abc-1"}, "abc-1"),
        ({"request_id": b"entry-1"}, {}, "entry-1"),
        ({"request_id": bytearray(b"entry-1")}, {"x-request-id": "header-1"}, "header-1"),
        ({"body": {"data": "…", "request_id": "json-1"}}, {}, "json-1"),
        ({"body": {"inputs": [], "id": "v2-1"}}, {}, "v2-1"),
        ({"body": {"data": "…", "id": "no-v2"}}, {}, "frontend-1"),
        ({}, {}, "frontend-1"),
        ({}, {"x-request-id": ""}, "frontend-1"),
        ({}, {"x-request-id": "a" * 129}, "frontend-1"),
        ({}, {"x-request-id": 'a"\r\nX-Evil: 1'}, "frontend-1"),
        ({}, {"x-request-id": "a b"}, "frontend-1"),
        ({}, {"x-request-id": {"content-type": "text/plain"}}, "frontend-1"),
        ({"request_id": b"\xff\xfe"}, {}, "frontend-1"),
        ({"body": {"request_id": 7}}, {}, "frontend-1"),
    ],
)
def test_the_client_s_id_counts_where_it_is_one(row, headers, expected):
    assert take_request_id(row, headers, "frontend-1") == expected
    assert "request_id" not in row
    assert "request_id" not in (row.get("body") or {})


def test_a_request_that_nobody_named_gets_a_new_id():
    assert take_request_id({}, {}, None) != take_request_id({}, {}, None)


def test_a_line_says_what_became_of_the_request(tmp_path):
    log = RequestLog(tmp_path / "requests.log", "shapes", "1.0")
    log.write([RECORD, RequestRecord("b-1", "f-2", 415, "not_an_image", 2, stages_ms={"handler": 1.0})])
    log.close()
    first, second = (json.loads(line) for line in (tmp_path / "requests.log").read_text().splitlines())
    assert (first.pop("worker") > 0, len(first.pop("time"))) == (True, len("2026-01-01T00:00:00.000+00:00"))
    assert first == {
        "request_id": "a-1",
        "frontend_id": "f-1",
        "model": "shapes",
        "version": "1.0",
        "status": 200,
        "type": "ok",
        "body_bytes": 100,
        "image_size": [640, 480],
        "detections": 3,
        "batch_size": 2,
        "forward_size": 1,
        "stages_ms": {"decode": 1.235, "handler": 40.0},
    }
    assert (second["status"], second["type"], second["image_size"], second["detections"]) == (
        415,
        "not_an_image",
        None,
        None,
    )
    assert (tmp_path / "requests.log").stat().st_mode & 0o777 == 0o600


def test_no_path_no_lines(tmp_path):
    RequestLog(None, "shapes", "1.0").write([RECORD])
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_once_and_costs_no_answer(caplog):
    from pathlib import Path

    log = RequestLog(Path("/dev/full"), "shapes", "1.0")
    for _ in range(3):
        log.write([RECORD])
    assert [record.getMessage() for record in caplog.records] == [
        "the request log cannot be written: [Errno 28] No space left on device"
    ]


def test_a_handler_that_fails_has_its_requests_in_the_log(tmp_path, monkeypatch):
    monkeypatch.setenv("DETSERVE_REQUEST_LOG", str(tmp_path / "requests.log"))
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    batch = Books("shapes", "1.0").batch(2)
    assert batch.begin(0, {}, {"x-request-id": "first"}, "f-1") == "first"
    batch.begin(1, {}, {}, "f-2")
    batch.refuse(1, ImageError("no"), body_bytes=4)
    batch.close()
    lines = [json.loads(line) for line in (tmp_path / "requests.log").read_text().splitlines()]
    assert [(line["request_id"], line["status"], line["type"]) for line in lines] == [
        ("first", 503, "handler_failed"),
        ("f-2", 400, "invalid_image"),
    ]


WRITER = """
import sys
from pathlib import Path
from dethandlers.request_log import RequestLog, RequestRecord
path, name, largest, kept = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
log = RequestLog(path, "m", "1", largest_bytes=largest, kept=kept)
for number in range(300):
    log.write([RequestRecord(f"{name}-{number}", "f", 200, "ok", 1)])
"""


def write_from_four_workers(path, largest, kept):
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(path), name, str(largest), str(kept)]) for name in "abcd"
    ]
    assert [writer.wait(60) for writer in writers] == [0] * 4


def test_four_workers_roll_one_file_and_no_line_is_lost_or_torn(tmp_path):
    write_from_four_workers(tmp_path / "requests.log", 20_000, 1000)
    files = list(tmp_path.iterdir())
    assert len(files) > 5
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert sorted(line["request_id"] for line in lines) == sorted(
        f"{name}-{number}" for name in "abcd" for number in range(300)
    )


def test_what_is_kept_has_an_end(tmp_path):
    write_from_four_workers(tmp_path / "requests.log", 20_000, 3)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["requests.log", "requests.log.1", "requests.log.2", "requests.log.3"]
    # A worker that had the old file open may add a line or two to it.
    assert all(path.stat().st_size < 22_000 for path in tmp_path.iterdir())
