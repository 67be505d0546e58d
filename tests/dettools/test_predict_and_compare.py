"""predict and compare against a small HTTP endpoint that answers as TorchServe does, with the real client between.

Eager is replaced at its loader: what an image holds is written into its first pixels' colour.
"""

import argparse
import io
import json
import threading
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from dethandlers.detections import Category, Detections
from detserve.errors import ClientError, EndpointError, ServerError
from dettools.agreement import TIER_NAMES
from dettools.commands import compare, predict
from PIL import Image

NAMES = ("cat", "dog", "car")


def scene(image):
    """Return what the image of that seed holds; seed 0 holds nothing."""
    with Image.open(io.BytesIO(image)) as picture:
        seed = picture.convert("RGB").getpixel((5, 5))[0]
    rng = np.random.default_rng(seed)
    count = 8 if seed else 0
    corners = rng.uniform(0, 150, (count, 2))
    scores = np.sort(rng.uniform(0.06, 0.99, count))[::-1]
    return Detections(
        np.hstack([corners, corners + rng.uniform(20, 45, (count, 2))]).astype(np.float32),
        scores.astype(np.float32),
        rng.integers(0, 3, count),
    )


def as_json(found):
    return [
        {"class_label": int(label), "class_name": NAMES[label], "bbox": box.tolist(), "score": float(score)}
        for box, score, label in zip(found.boxes_xyxy, found.scores, found.labels, strict=True)
    ]


class Endpoint:
    """A server whose answer to an image is ``fault(image bytes, its detections)``."""

    def __init__(self):
        self.fault = lambda _image, found: found
        self.asked = []
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                image = self.rfile.read(int(self.headers["Content-Length"]))
                url = urlsplit(self.path)
                query = {name: values[0] for name, values in parse_qs(url.query).items()}
                endpoint.asked.append((url.path, query, self.headers.get("Authorization")))
                if "shapes" not in url.path:
                    return self.answer(404, {"code": 404, "type": "ModelNotFoundException", "message": "no"})
                try:
                    found = scene(image)
                except OSError:
                    error = {"code": 415, "type": "not_an_image", "message": "got text, expected JPEG."}
                    return self.answer(415, error)
                if float(query.get("score_threshold", 0)) > 1:
                    error = {"code": 400, "type": "invalid_option", "message": "got 7, expected a number from 0 to 1."}
                    return self.answer(400, error)
                found = found.filtered(float(query.get("score_threshold", 0.3)), int(query.get("max_detections", 100)))
                return self.answer(200, as_json(endpoint.fault(image, found)))

            def answer(self, status, document):
                body = json.dumps(document).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    @contextmanager
    def running(self):
        thread = threading.Thread(target=self.server.serve_forever)
        thread.start()
        try:
            yield self
        finally:
            self.server.shutdown()
            self.server.server_close()
            thread.join()


class Eager:
    categories = tuple(Category(k + 1, name, k + 1) for k, name in enumerate(NAMES))
    source = "the scenes of this test"

    def detect(self, image, score_threshold, max_detections, *, masks=False, keypoints=False):
        return scene(image).filtered(score_threshold, max_detections)


@pytest.fixture
def endpoint():
    with Endpoint().running() as running:
        yield running


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    for number, name in enumerate(("empty.png", "a/dog.png", "b/dog.png", "b/cat.png")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (200, 200), (number, 90, 90)).save(folder / name)
    return folder


@pytest.fixture
def command(endpoint, monkeypatch):
    import detserve.eager

    monkeypatch.setattr(detserve.eager, "load_eager", lambda *_args, **_kwargs: Eager())

    def run(module, *arguments, url=endpoint.url):
        parser = argparse.ArgumentParser()
        module.add_parser(parser.add_subparsers())
        name = module.__name__.rpartition(".")[2]
        return module.run(parser.parse_args([name, *map(str, arguments), "--url", url]))

    return run


def lines(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


class TestPredict:
    def test_one_json_line_per_image_in_order(self, command, photos, capsys):
        assert command(predict, "shapes", photos) == 0
        answers = lines(capsys)
        assert [line["image"].removeprefix(f"{photos}/") for line in answers] == [
            "a/dog.png",
            "b/cat.png",
            "b/dog.png",
            "empty.png",
        ]
        assert answers[3]["detections"] == []
        assert answers[0]["detections"][0].keys() == {"class_label", "class_name", "bbox", "score"}

    def test_pictures_of_equal_names_do_not_overwrite(self, command, photos, tmp_path):
        assert command(predict, "shapes", photos, "--save-dir", tmp_path / "out") == 0
        assert {path.name for path in (tmp_path / "out").iterdir()} == {
            "a__dog.png",
            "b__dog.png",
            "cat.png",
            "empty.png",
        }

    def test_options_travel_and_the_defaults_are_left_to_the_server(self, command, endpoint, photos):
        command(predict, "shapes", photos / "empty.png")
        assert endpoint.asked[-1][:2] == ("/predictions/shapes", {})
        command(
            predict,
            *("shapes", photos / "empty.png", "--score-threshold", "0.2", "--max-detections", "3"),
            *("--classes", "cat,dog", "--masks", "--keypoints"),
        )
        assert endpoint.asked[-1][1] == {
            "score_threshold": "0.2",
            "max_detections": "3",
            "classes": "cat,dog",
            "masks": "rle",
            "keypoints": "true",
        }

    def test_the_token_comes_from_the_command_line_or_the_environment(self, command, endpoint, photos, monkeypatch):
        monkeypatch.setenv("DETSERVE_TOKEN", "from-environment")
        command(predict, "shapes", photos / "empty.png")
        command(predict, "shapes", photos / "empty.png", "--token", "given")
        assert [asked[2] for asked in endpoint.asked] == ["Bearer from-environment", "Bearer given"]

    def test_a_refused_image_is_a_line_and_exit_code_1(self, command, photos, capsys):
        (photos / "text.jpg").write_text("no image")
        assert command(predict, "shapes", photos, "--json") == 1
        *answers, summary = lines(capsys)
        errors = [line for line in answers if "error" in line]
        assert [line["error"]["type"] for line in errors] == ["not_an_image"]
        assert len(answers) == 5
        assert (summary["images"], summary["answered"], summary["failed"]) == (5, 4, 1)

    def test_a_missing_input_is_told_before_anything_is_sent(self, command, endpoint, photos):
        with pytest.raises(Exception, match=r"got '.*none\.jpg'") as caught:
            command(predict, "shapes", photos, photos / "none.jpg")
        assert caught.value.exit_code == 2
        assert endpoint.asked == []

    def test_an_unknown_model_ends_at_once(self, command, photos, capsys):
        with pytest.raises(EndpointError, match="nomodel") as caught:
            command(predict, "nomodel", photos)
        assert (caught.value.exit_code, capsys.readouterr().out) == (2, "")

    def test_an_option_that_the_model_refuses_ends_at_once(self, command, photos):
        with pytest.raises(EndpointError, match="expected a number") as caught:
            command(predict, "shapes", photos, "--score-threshold", "7")
        assert caught.value.exit_code == 2

    def test_nothing_listening_ends_at_once(self, command, photos):
        with pytest.raises(ClientError, match="Nothing listens") as caught:
            command(predict, "shapes", photos, url="http://127.0.0.1:9")
        assert caught.value.exit_code == 2

    def test_no_instance_running_says_how_to_start_one(self, photos, monkeypatch, tmp_path):
        monkeypatch.setenv("DETSERVE_STATE_DIR", str(tmp_path))
        parser = argparse.ArgumentParser()
        predict.add_parser(parser.add_subparsers())
        with pytest.raises(ServerError, match="detserve serve start"):
            predict.run(parser.parse_args(["predict", "shapes", str(photos)]))


class TestCompare:
    def test_equal_sides_pass_with_table_json_and_pictures(self, command, photos, tmp_path, capsys):
        work = tmp_path / "out"
        assert command(compare, "shapes", photos, "--work-dir", work, "--json") == 0
        out = capsys.readouterr()
        document = json.loads(out.out.splitlines()[-1])
        assert (document["passed"], document["tier"], document["images"], document["matched"]) == (True, "bit", 4, 24)
        assert "PASS 4 of 4 images" in out.err
        assert json.loads((work / "comparison.json").read_text())["per_image"][0]["passed"]
        names = {path.name for path in work.iterdir()}
        assert names == {"comparison.json", "a__dog.png", "b__dog.png", "cat.png", "empty.png"}

    def test_both_sides_get_the_same_threshold_and_number(self, command, endpoint, photos):
        assert command(compare, "shapes", photos, "--score-threshold", "0.4", "--max-detections", "5") == 0
        assert {tuple(query.items()) for _, query, _ in endpoint.asked} == {
            (("score_threshold", "0.4"), ("max_detections", "5"))
        }

    @pytest.mark.parametrize(
        ("fault", "reason", "hint"),
        [
            (lambda _image, found: found.filtered(0.5, 100), "missing", "served_threshold_higher"),
            (lambda _image, found: found.take(np.arange(len(found)) != 2), "missing", None),
            (lambda _image, found: replace(found, labels=(found.labels + 1) % 3), "label_flip", "category_map_differs"),
            (lambda _image, found: replace(found, scores=found.scores * 0.9), "score_drift", "preprocessing_differs"),
            (lambda _image, found: replace(found, boxes_xyxy=found.boxes_xyxy + 1), "box_drift", "precision_differs"),
            (lambda _image, _found: Detections.empty(), "missing", "served_finds_nothing"),
        ],
        ids=["threshold of a half", "dropped", "labels shifted", "scores scaled", "boxes moved", "nothing"],
    )
    def test_seeded_faults_fail_with_their_reason(self, command, endpoint, photos, capsys, fault, reason, hint):
        endpoint.fault = fault
        assert command(compare, "shapes", photos, "--json") == 1
        document = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert document["reasons"] == {reason: 3}
        assert [one["code"] for one in document["hints"]] == ([hint] if hint else [])

    def test_swapped_replies_fail_with_their_reason(self, command, endpoint, photos, capsys):
        dog, cat = ((photos / name).read_bytes() for name in ("a/dog.png", "b/cat.png"))
        other = {dog: cat, cat: dog}
        endpoint.fault = lambda image, found: scene(other[image]) if image in other else found
        assert command(compare, "shapes", photos, "--json") == 1
        document = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert document["reasons"] == {"swapped_replies": 2}

    def test_an_image_that_neither_side_can_read_does_not_stop_the_others(self, command, photos, capsys, monkeypatch):
        (photos / "text.jpg").write_text("no image")
        assert command(compare, "shapes", photos, "--json", "--work-dir", photos / "out") == 1
        document = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert document["reasons"] == {"eager_failed": 1}
        assert document["images_passed"] == 4

    def test_a_failed_request_carries_the_servers_message(self, command, endpoint, photos, capsys):
        def refuse(image, found):
            return found if image != (photos / "b/cat.png").read_bytes() else Broken()

        class Broken(Detections):
            def __init__(self):
                pass

        endpoint.fault = refuse
        # The handler dies while it answers: the connection closes without an answer, twice.
        endpoint.server.handle_error = lambda *_: None
        assert command(compare, "shapes", photos, "--json") == 1
        document = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert document["reasons"] == {"request_failed": 1}

    def test_an_unknown_model_is_a_usage_error(self, command, photos):
        with pytest.raises(EndpointError, match="nomodel"):
            command(compare, "nomodel", photos)

    def test_an_interruption_keeps_what_is_done(self, command, photos, tmp_path, monkeypatch):
        def stop_at_the_third(self, image, *_args, **_kwargs):
            if image == (photos / "b/dog.png").read_bytes():
                raise KeyboardInterrupt
            return scene(image).filtered(0.05, 100)

        monkeypatch.setattr(Eager, "detect", stop_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            command(compare, "shapes", photos, "--work-dir", tmp_path / "out")
        document = json.loads((tmp_path / "out" / "comparison.json").read_text())
        assert document["images"] == 2

    def test_offers_every_tier(self):
        assert compare.TIER_CHOICES == TIER_NAMES
