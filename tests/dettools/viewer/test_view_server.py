"""The page's server as other programs meet it: what it gives, and to whom it gives nothing."""

import os
import re
import socket
import subprocess

import pytest
import requests
from checkout import ROOT
from dettools import cli
from PIL import Image
from viewing import data_set, viewing


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("view")
    annotations, results = data_set(folder, 6)
    (folder / "secret.txt").write_text("not of the data set")
    (folder / "images" / "00005.png").unlink()
    (folder / "images" / "00004.png").write_text("no image")
    with viewing(results, "--annotations", annotations) as viewed:
        yield viewed


def test_index_matches_details_and_photographs_come(page):
    meta = page.get("/api/meta").json()
    assert (meta["images"], meta["has_truth"], meta["has_predictions"], meta["model"]) == (6, True, True, None)
    index = page.get("/api/index").json()
    assert index["missing"] == [5]
    matches = page.get("/api/matches?iou=0.5").json()
    assert len(matches["object_of"]) == len(index["score"]) == index["detection_ends"][-1]
    details = page.get("/api/image/0").json()
    assert (details["size"], details["problem"], details["reduced"]) == ([160, 120], None, False)
    for variant in ("thumbnail", "view", "full"):
        answer = page.get(f"/image/0/{variant}")
        assert answer.headers["Content-Type"] in ("image/png", "image/jpeg")
        assert "immutable" in answer.headers["Cache-Control"]
        assert "private" in answer.headers["Cache-Control"]


def test_an_image_without_a_readable_file_still_has_its_boxes(page):
    for image, words in ((4, "no image"), (5, "no file")):
        details = page.get(f"/api/image/{image}").json()
        assert words in details["problem"]
        assert details["size"] == [160, 120]
    assert page.get("/image/4/view").status_code == 422
    assert page.get("/image/4/thumbnail").status_code == 422
    assert page.get("/image/5/view").status_code == 404


def test_the_page_needs_nothing_from_elsewhere(page):
    for path in ("/", "/view.css", "/view.js"):
        answer = page.get(path)
        assert answer.status_code == 200
        assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'")
        assert "http" not in answer.text.replace("http://www.w3.org/2000/svg", "")
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert not re.search(r"\son[a-z]+=|style=", page.get("/").text)


@pytest.mark.parametrize(
    "path",
    [
        "/secret.txt", "/../secret.txt", "/image/..%2f..%2fsecret.txt/view", "/image/0/../../secret.txt",
        "/image/-1/view", "/image/6/view", "/image/0/huge", "/api/image/6", "/upload/1/view", "/view.html",
        "/assets/view.js", "/api/matches2", "/image/99999999999999999999/view",
    ],
)  # fmt: skip
def test_only_what_is_of_the_data_set_is_served(page, path):
    # requests would tidy the path up.
    with socket.create_connection(("127.0.0.1", int(page.url.rstrip("/").rpartition(":")[2])), timeout=10) as raw:
        raw.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: raw.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 404")
    assert b"not of the data set" not in answer


@pytest.mark.parametrize("iou", ["", "0.05", "1.5", "nan", "x"])
def test_a_threshold_that_is_none_is_refused(page, iou):
    answer = page.get(f"/api/matches?iou={iou}")
    assert answer.status_code == 400
    assert "0.1 to 1" in answer.json()["message"]


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "0.0.0.0", ""])
def test_another_name_for_this_address_gets_nothing(page, host):
    """DNS rebinding: a page of evil.example whose name suddenly means 127.0.0.1."""
    for path in ("/", "/api/meta", "/api/image/0", "/image/0/view"):
        answer = page.get(path, headers={"Host": host})
        assert answer.status_code == 421
        assert "title" not in answer.text


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:9000", "localhost:9000"])
def test_a_tunnel_may_have_another_port(page, host):
    assert page.get("/api/meta", headers={"Host": host}).status_code == 200


def test_it_listens_on_the_loopback_only(page):
    import psutil

    process = psutil.Process(page.process.pid)
    listening = [one for one in process.net_connections("inet") if one.status == psutil.CONN_LISTEN]
    assert [one.laddr.ip for one in listening] == ["127.0.0.1"]


def test_nobody_is_asked_without_a_model(page):
    answer = requests.post(f"{page.url}api/ask", data=b"x", headers={"Origin": page.url.rstrip("/")}, timeout=10)
    assert answer.status_code == 404
    assert "--model" in answer.json()["message"]


def test_a_browser_that_goes_away_is_not_told_of(tmp_path):
    annotations, _ = data_set(tmp_path, 1)
    large = Image.frombytes("RGB", (2000, 1400), os.urandom(3 * 2000 * 1400))
    large.save(tmp_path / "images" / "00000.png", compress_level=0)
    with viewing("--annotations", annotations) as viewed:
        for _ in range(3):
            with viewed.get("/image/0/full", stream=True) as answer:
                next(answer.iter_content(1))
        assert viewed.get("/api/meta").json()["has_predictions"] is False
    # `viewing` looks for a traceback.


def test_a_port_that_is_taken_is_said(page, capsys):
    taken = page.url.rstrip("/").rpartition(":")[2]
    assert cli.main(["view", "--images", str(ROOT / "model_store" / "shapes"), "--port", taken, "--no-browser"]) == 2
    assert f"got the port {taken}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "got nothing to show"),
        (["--images", "nowhere"], "nowhere"),
        (["--instance", "x", "--images", "."], "--model NAME"),
        (["--model", "shapes", "--url", "http://127.0.0.1:9"], "127.0.0.1:9"),
        (["nothing.json"], "nothing.json"),
    ],
)
def test_what_cannot_work_is_said(arguments, words, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["view", *arguments, "--no-browser"]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--score-thr", "2"], ["--iou-thr", "0.05"], ["--score-thr", "nan"]])
def test_a_number_out_of_range_is_a_usage_error(words, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["view", *words])
    assert left.value.code == 2
    assert "expected a number from" in capsys.readouterr().err


def test_the_wheel_holds_the_page(tmp_path):
    import sys
    import zipfile

    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path], cwd=ROOT, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        assert {f"dettools/viewer/assets/view.{kind}" for kind in ("html", "css", "js")} <= set(packed.namelist())


def test_without_json_the_address_stands_on_stdout(tmp_path):
    import signal

    from viewing import DETSERVE

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    process = subprocess.Popen(
        [DETSERVE, "view", "--images", tmp_path, "--no-browser"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    line = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert re.match(r"http://127\.0\.0\.1:\d+/ ", line)
    assert process.returncode == 0
