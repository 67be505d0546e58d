"""A photograph dropped on the page, and the answer of a real TorchServe."""

import json
import signal
import socket
from pathlib import Path

import pytest
import requests
from checkout import ROOT
from chromium import browser
from detserve import server
from detserve.archive import build_archive
from detserve.client import Client
from detserve.instance import Instance
from detserve.spec import load_spec
from dettools import cli
from dettools.datasets.scenes import write_dataset
from dettools.endpoint import Endpoint
from dettools.viewer import live
from PIL import Image
from viewing import viewing
from viewing_page import Page

SHAPES = ROOT / "model_store" / "shapes" / "shapes.yaml"

pytestmark = [pytest.mark.server, pytest.mark.slow]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_dataset(folder, count=3, seed=500)
    return folder / "images"


@pytest.fixture(scope="module")
def shapes(serve, tmp_path_factory) -> str:
    archive = tmp_path_factory.mktemp("store") / "shapes.mar"
    build_archive(load_spec(SHAPES), folder=SHAPES.parent, out=archive)
    return serve([archive], "viewed")


@pytest.fixture(scope="module")
def viewed(shapes):
    with viewing("--model", "shapes", "--instance", shapes) as found:
        yield found


@pytest.fixture(scope="module")
def page(viewed):
    with browser(1200, 800) as window:
        opened = Page(window)
        opened.open(viewed.url)
        yield opened


def shown(page) -> list[tuple[str, list[int]]]:
    """Class with score, and box in pixels of the photograph, best first."""
    width = page.run("return photograph.naturalWidth")
    frame = page.run("const r = photograph.getBoundingClientRect(); return [r.x, r.y, r.width / arguments[0]]", width)
    boxes = {int(mark["place"]): [round(value) for value in mark["box"]] for mark in page.marks(frame)}
    return [(f"{one['class']} {one['figure']}", boxes[place]) for place, one in enumerate(page.panel())]


def answered(instance: str, photograph: Path) -> list[tuple[str, list[int]]]:
    with Client.for_instance(instance) as client:
        found = client.predict("shapes", photograph, options={"score_threshold": 0.3})
    return [
        (
            f"{one['class_name']} {one['score']:.2f}",
            [round(value) for value in (x1, y1, x2 - x1, y2 - y1)],
        )
        for one in found
        for x1, y1, x2, y2 in [one["bbox"]]
    ]


def near(one: list[tuple[str, list[int]]], other: list[tuple[str, list[int]]]) -> bool:
    """Whether both are the same up to rounding to a pixel."""
    return [text for text, _ in one] == [text for text, _ in other] and all(
        abs(a - b) <= 1 for (_, box), (_, box2) in zip(one, other, strict=True) for a, b in zip(box, box2, strict=True)
    )


def test_a_dropped_photograph_shows_what_the_endpoint_answers(page, shapes, scenes):
    assert page.run("return !welcome.hidden")
    photograph = scenes / "000002.jpg"
    page.drop(photograph)
    assert len(answered(shapes, photograph)) >= 2
    assert near(shown(page), answered(shapes, photograph))
    assert page.run("return document.getElementById('name').textContent") == "000002.jpg"
    assert page.run("return welcome.hidden")
    assert page.errors() == []


def test_several_photographs_are_chosen_with_the_button(page, shapes, scenes):
    before = len(page.rows())
    page.choose_files(scenes / "000001.jpg", scenes / "000003.jpg")
    assert [row["name"] for row in page.rows()][:2] == ["000003.jpg", "000001.jpg"]
    assert len(page.rows()) == before + 2
    assert near(shown(page), answered(shapes, scenes / "000003.jpg"))
    page.press("j")
    assert near(shown(page), answered(shapes, scenes / "000001.jpg"))


def test_the_slider_holds_for_answers_too(page):
    few = len(page.panel())
    page.focus("#score")
    page.press("⤒")
    assert len(page.panel()) > few
    assert all(float(one["figure"]) >= live.ASKED_SCORE - 0.005 for one in page.panel())
    page.press("⤓")
    assert page.panel() == []
    page.run("document.activeElement.blur()")
    page.press("[" * 14)
    assert page.output("score") == "0.30"


def test_boxes_lie_right_on_a_photograph_that_was_taken_upright(page, shapes, scenes, tmp_path):
    """The pixels lie on their side, the EXIF orientation says so."""
    path = tmp_path / "upright.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(scenes / "000002.jpg") as image:
        stored = image.transpose(Image.Transpose.ROTATE_90)
        stored.save(path, quality=95, exif=exif)
        size = list(image.size)
    page.drop(path)
    assert page.run("return [photograph.naturalWidth, photograph.naturalHeight]") == size
    assert near(shown(page), answered(shapes, path))


def test_what_is_no_photograph_is_said_and_nothing_else_changes(page, tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    rows = page.rows()
    page.drop(tmp_path / "notes.txt")
    assert "notes.txt: got 5 bytes that are no image" in page.run("return message.textContent")
    assert page.rows() == rows
    assert all("415" in one for one in page.errors())
    page.press("j")
    assert page.run("return message.hidden")


def test_the_token_stays_in_the_process(page, viewed, shapes, scenes):
    """Neither does a page hold it, nor does the browser talk to the endpoint."""
    token = server.token(Instance.named(shapes), "inference").value
    origin = viewed.url.rstrip("/")
    content = (scenes / "000001.jpg").read_bytes()
    answers = [viewed.get(path).text for path in ("/", "/view.js", "/api/meta")]
    asked = requests.post(f"{origin}/api/ask", data=content, headers={"Origin": origin}, timeout=60)
    assert asked.status_code == 200
    for text in (
        *answers,
        asked.text,
        json.dumps(dict(asked.headers)),
        page.run("return document.documentElement.outerHTML"),
    ):
        assert token not in text
    assert {one.split("/")[2] for one in page.requests()} == {origin.split("/")[2]}


@pytest.mark.parametrize("origin", [None, "http://evil.example", "null", "http://127.0.0.1:1"])
def test_another_page_cannot_ask_the_model(viewed, scenes, origin):
    headers = {"Origin": origin} if origin else {}
    content = (scenes / "000001.jpg").read_bytes()
    answer = requests.post(f"{viewed.url}api/ask", data=content, headers=headers, timeout=30)
    assert answer.status_code == 403
    assert "detections" not in answer.text


@pytest.mark.parametrize(
    ("length", "status"), [("20000001", 413), ("999999999999", 413), ("-1", 411), ("x", 411), (None, 411)]
)
def test_no_more_is_read_than_is_allowed(viewed, length, status):
    address = viewed.url.split("/")[2]
    with socket.create_connection(("127.0.0.1", int(address.partition(":")[2])), timeout=10) as raw:
        head = f"POST /api/ask HTTP/1.1\r\nHost: {address}\r\nOrigin: http://{address}\r\n"
        raw.sendall((head + (f"Content-Length: {length}\r\n" if length else "") + "\r\n").encode())
        answer = b"".join(iter(lambda: raw.recv(65536), b""))
    assert answer.startswith(f"HTTP/1.1 {status}".encode())
    assert b"Connection: close" in answer


def test_only_the_last_photographs_are_kept(shapes, scenes, monkeypatch):
    monkeypatch.setattr(live, "_KEPT", 2)
    content = (scenes / "000001.jpg").read_bytes()
    with live.LiveModel(Endpoint(instance=shapes), "shapes") as model:
        assert model.categories == ("circle", "square", "triangle", "star", "ring", "cross")
        numbers = [model.ask(content)["number"] for _ in range(3)]
        with pytest.raises(KeyError):
            model.photograph(numbers[0])
        folder = model.photograph(numbers[2]).parent
        assert len(list(folder.iterdir())) == 2
    assert not folder.exists()


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_no_photograph_is_left_behind(shapes, scenes, tmp_path, end):
    with viewing("--model", "shapes", "--instance", shapes, env={"TMPDIR": str(tmp_path)}, end=end) as found:
        origin = found.url.rstrip("/")
        content = (scenes / "000001.jpg").read_bytes()
        number = requests.post(f"{origin}/api/ask", data=content, headers={"Origin": origin}, timeout=60).json()[
            "number"
        ]
        assert found.get(f"/upload/{number}/view").content == content
        assert len(list(tmp_path.rglob("detserve-view-*/*"))) == 1
    assert not list(tmp_path.rglob("detserve-view-*"))


def test_a_foreign_address_with_its_token(shapes, scenes):
    instance = Instance.named(shapes)
    token = server.token(instance, "inference").value
    url = instance.require_running().inference_url
    with viewing("--model", "shapes", "--url", url, env={"DETSERVE_TOKEN": token}) as found:
        origin = found.url.rstrip("/")
        content = (scenes / "000001.jpg").read_bytes()
        answer = requests.post(f"{origin}/api/ask", data=content, headers={"Origin": origin}, timeout=60)
        assert len(answer.json()["detections"]) >= 2
        assert found.get("/api/meta").json()["model_classes"][0] == "circle"


def test_a_model_that_is_not_served_is_said_at_once(shapes, capsys):
    assert cli.main(["view", "--model", "nothing", "--instance", shapes, "--no-browser"]) == 2
    assert "nothing" in capsys.readouterr().err
