"""The handler as TorchServe drives it: its own context object, an unpacked archive, one line when it cannot start."""

import ast
import base64
import inspect
import json
import os
import shutil
import subprocess
import sys
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from dethandlers import entry
from dethandlers.entry import DetectionHandler
from dethandlers.errors import ArtefactError
from detserve.archive import build_archive
from small_artefacts import IMAGES, SSDLITE, artefact_of, detector_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore", ResourceWarning)  # ts leaves its version file open
    from ts.context import Context, RequestProcessor


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """A real archive, unpacked as TorchServe does."""
    folder = tmp_path_factory.mktemp("archive")
    golden = folder / "golden.jpg"
    golden.write_bytes(IMAGES[0])
    spec = artefact_of(detector_of(SSDLITE), folder, max_detections=50).spec
    mar = build_archive(replace(spec, name="tiny"), folder=folder, out=folder / "tiny.mar", golden_image=golden).path
    with zipfile.ZipFile(mar) as file:
        file.extractall(folder / "unpacked")
    return folder / "unpacked"


def context_of(folder, headers=({},)):
    context = Context("tiny", str(folder), {}, 1, None, "0.12.0")
    context.request_processor = [RequestProcessor(dict(one)) for one in headers]
    return context


@pytest.fixture(scope="module")
def handler(archive):
    handler = DetectionHandler()
    handler.initialize(context_of(archive))
    return handler


def handle(handler, archive, rows, headers=None):
    """Return status, content type and parsed body of each answer."""
    context = context_of(archive, headers or [{}] * len(rows))
    texts = handler.handle(rows, context)
    assert isinstance(texts, list)
    assert all(isinstance(text, str) for text in texts)
    return [
        (context.get_response_status(index)[0], context.get_response_content_type(index), json.loads(text))
        for index, text in enumerate(texts)
    ]


JSON = "application/json"


def test_an_image_is_answered_with_the_published_list(handler, archive):
    ((status, kind, found),) = handle(handler, archive, [{"body": bytearray(IMAGES[0])}])
    assert (status, kind) == (200, JSON)
    assert len(found) >= 20
    assert list(found[0]) == ["class_label", "class_name", "bbox", "score"]
    assert [one["score"] for one in found] == sorted((one["score"] for one in found), reverse=True)


def test_a_batch_is_answered_in_its_order_with_a_status_each(handler, archive):
    rows = [
        {"body": IMAGES[0]},
        {"body": b""},
        {"data": IMAGES[1], "score_threshold": b"abc"},
        {"body": {"data": base64.b64encode(IMAGES[1]).decode(), "max_detections": 3}},
        {"body": b"this is text"},
        {"data": IMAGES[2], "treshold": b"0.5"},
        {"data": IMAGES[2], "masks": b"rle"},
        {"body": IMAGES[3], "model_name": b"tiny", "format": b"columns"},
    ]
    answers = handle(handler, archive, rows)
    assert [status for status, _, _ in answers] == [200, 400, 400, 200, 415, 400, 400, 200]
    assert {kind for _, kind, _ in answers} == {JSON}
    for status, _, body in answers:
        if status != 200:
            assert list(body) == ["code", "type", "message", "request_id"]
            assert body["code"] == status
    types = [body["type"] for status, _, body in answers if status != 200]
    assert types == ["empty_body", "invalid_option", "not_an_image", "unknown_option", "invalid_option"]
    assert len(answers[3][2]) == 3
    assert list(answers[7][2]) == ["boxes_xyxy", "scores", "labels", "class_names"]
    ((_, _, alone),) = handle(handler, archive, rows[:1])
    assert [one["class_label"] for one in alone] == [one["class_label"] for one in answers[0][2]]
    assert [one["score"] for one in alone] == pytest.approx([one["score"] for one in answers[0][2]], abs=1e-5)


def test_timings_count_every_request_of_the_batch(handler, archive):
    rows = [{"body": IMAGES[0], "timings": b"true"}, {"body": b"text"}, {"body": IMAGES[1], "timings": b"true"}]
    first, _, third = (body for _, _, body in handle(handler, archive, rows))
    assert (first["batch_size"], third["batch_size"]) == (3, 3)
    assert (first["forward_size"], third["forward_size"]) == (2, 2)
    assert first["image_size"] == [320, 256]
    stages = {"decode", "preprocess", "forward", "postprocess", "serialise"}
    assert set(first["timings_ms"]) == stages | {"handler"}
    for answer in (first, third):
        assert answer["timings_ms"]["handler"] >= max(answer["timings_ms"][stage] for stage in stages)
    # It counts from the batch's arrival: the third is written after the first.
    assert third["timings_ms"]["handler"] > first["timings_ms"]["handler"]


@pytest.mark.parametrize("name", ["X-Detserve-Options", "x-detserve-options"])
def test_options_in_the_header_are_each_request_s_own(handler, archive, name):
    rows = [{"body": IMAGES[0]}, {"body": IMAGES[0]}, {"body": IMAGES[0]}]
    headers = [{name: "max_detections=2"}, {}, {name: "max_detections=many"}]
    first, second, third = handle(handler, archive, rows, headers)
    assert len(first[2]) == 2
    assert len(second[2]) >= 20
    assert (third[0], third[2]["type"]) == (400, "invalid_option")


def test_a_form_field_named_as_the_header_harms_nobody(handler, archive):
    # TorchServe puts the headers of each form field under the field's name, beside the request's own headers.
    field = "X-Detserve-Options"
    rows = [{"data": IMAGES[0]}, {"data": IMAGES[0], field: b"max_detections=2"}]
    good, bad = handle(handler, archive, rows, [{}, {field: {"content-type": "text/plain"}}])
    assert good[0] == 200
    assert (bad[0], bad[2]["type"]) == (400, "unknown_option")


def test_describe_answers_what_runs(handler, archive):
    ((status, _, described),) = handle(handler, archive, [{}], [{"describe": "True"}])
    assert status == 200
    assert (described["name"], described["family"], described["device"]) == ("tiny", "torchvision", "cpu")
    assert described["source"]["file"] == f"{SSDLITE}.safetensors"


def test_a_client_that_sends_the_describe_header_does_not_change_its_neighbours(handler, archive):
    rows = [{"body": IMAGES[0]}, {"body": IMAGES[1]}, {"body": IMAGES[2]}]
    first, second, third = handle(handler, archive, rows, [{"describe": "True"}, {}, {"describe": "false"}])
    assert first[2]["name"] == "tiny"
    assert list(second[2][0]) == ["class_label", "class_name", "bbox", "score"]
    assert list(third[2][0]) == ["class_label", "class_name", "bbox", "score"]


def infer(image, **fields):
    data = [base64.b64encode(image).decode()]
    return {"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": data, **fields}]}


def test_open_inference_requests_share_a_batch_with_others(handler, archive):
    rows = [{"body": IMAGES[0]}, {"body": infer(IMAGES[0])}, {"body": infer(IMAGES[0])}, {"body": infer(b"text")}]
    rest = {"host": "here"}
    plain, over_rest, over_grpc, wrong = handle(handler, archive, rows, [rest, rest, {}, {}])
    assert json.loads(over_rest[2]["outputs"][0]["data"][0]) == plain[2]
    assert over_grpc[2]["outputs"][0]["data"][0] == plain[2]
    assert over_grpc[2]["model_name"] == "tiny"
    assert wrong[2]["outputs"][0]["data"][0]["type"] == "not_an_image"


def test_json_too_deep_to_be_quoted_is_the_requests_own_fault(handler, archive):
    """The parser's limit is not that of quoting a value: between them lies what a client may send."""
    deep = []
    for _ in range(5000):
        deep = [deep]
    rows = [{"body": IMAGES[0]}, {"body": infer(IMAGES[0], shape=deep)}, {"data": IMAGES[0], "max_detections": deep}]
    good, *bad = handle(handler, archive, rows)
    assert good[0] == 200
    assert [status for status, _, _ in bad] == [400, 400]
    assert "nested too deeply" in bad[1][2]["message"]


def test_ready_is_said_with_what_runs(archive, capsys):
    DetectionHandler().initialize(context_of(archive))
    line = capsys.readouterr().out.strip()
    assert line.startswith("DETSERVE_READY {")
    assert json.loads(line.removeprefix("DETSERVE_READY "))["name"] == "tiny"


# what keeps a worker from starting


@pytest.fixture
def copy(archive, tmp_path):
    return Path(shutil.copytree(archive, tmp_path / "copy"))


def startup_error(folder, capsys):
    with pytest.raises(ArtefactError) as caught:
        DetectionHandler().initialize(context_of(folder))
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("DETSERVE_STARTUP_ERROR {")
    reason = json.loads(lines[0].removeprefix("DETSERVE_STARTUP_ERROR "))
    assert reason == {"type": caught.value.type, "message": str(caught.value)}
    return reason


MEMBERS = [
    "spec.json",
    "category_map.json",
    "weights.safetensors",
    "golden/golden.jpg",
    "golden/golden.json",
    "entry.py",
]


@pytest.mark.parametrize("member", MEMBERS)
def test_a_damaged_member_is_named(copy, capsys, member):
    data = bytearray((copy / member).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / member).write_bytes(data)
    reason = startup_error(copy, capsys)
    assert reason["type"] == "invalid_artefact"
    assert reason["message"].startswith(f"{member}: got SHA-256 ")


@pytest.mark.parametrize("member", MEMBERS)
def test_a_missing_member_is_named(copy, capsys, member):
    (copy / member).unlink()
    assert startup_error(copy, capsys)["message"].startswith(f"{member}: listed in SHA256SUMS, but missing")


def test_a_folder_that_is_no_archive_is_refused(tmp_path, capsys):
    assert startup_error(tmp_path, capsys)["message"].startswith("SHA256SUMS: missing")


def rewrite(folder, member, change):
    """Change a JSON member and its digest, as somebody who knows how would."""
    from dethandlers.artefact import digest_file

    path = folder / member
    before = digest_file(path)
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
    sums = folder / "SHA256SUMS"
    sums.write_text(sums.read_text().replace(before, digest_file(path)))


def move_boxes(golden):
    golden["boxes_xyxy"] = [[x1 + 5, y1, x2, y2] for x1, y1, x2, y2 in golden["boxes_xyxy"]]


def test_a_golden_image_that_is_not_reproduced_keeps_the_worker_from_starting(copy, capsys):
    rewrite(copy, "golden/golden.json", move_boxes)
    reason = startup_error(copy, capsys)
    assert reason["type"] == "golden_drift"
    assert "on the golden image moved by 5.00 px" in reason["message"]
    assert "build the archive again, or set serving.golden_check: warn" in reason["message"]


def test_a_golden_drift_may_be_a_warning_or_unseen(copy, capsys, caplog):
    rewrite(copy, "golden/golden.json", move_boxes)
    rewrite(copy, "spec.json", lambda spec: spec["serving"].update(golden_check="warn"))
    DetectionHandler().initialize(context_of(copy))
    assert "moved by 5.00 px" in caplog.text
    caplog.clear()
    rewrite(copy, "spec.json", lambda spec: spec["serving"].update(golden_check="off"))
    DetectionHandler().initialize(context_of(copy))
    assert caplog.text == ""
    assert "DETSERVE_STARTUP_ERROR" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("member", "change", "word"),
    [
        ("spec.json", lambda spec: spec.update(colour="red"), "spec.json: got a spec that this code does not read"),
        ("spec.json", lambda spec: spec["serving"].pop("device") and spec.pop("serving"), "spec.json: got a spec"),
        ("spec.json", lambda spec: spec.update(weights="other.bin"), "other.bin: the weights are missing"),
        ("spec.json", lambda spec: spec.update(family="detr"), "family: got 'detr', expected one of"),
        ("spec.json", lambda spec: spec.update(num_classes=9), "weights do not fit"),
        ("category_map.json", lambda rows: rows.pop(0), "category_map.json: labels are not 0, 1, 2"),
        ("golden/golden.json", lambda golden: golden.pop("scores"), "golden/golden.json: damaged"),
    ],
    ids=["unknown key", "missing part", "no weights", "unknown family", "misfit", "gap in labels", "golden damaged"],
)
def test_a_member_that_does_not_say_what_it_must_is_named(copy, capsys, member, change, word):
    rewrite(copy, member, change)
    assert startup_error(copy, capsys)["message"].startswith(word)


# the file itself


def test_there_is_exactly_one_class_in_the_file():
    # TorchServe takes the only class of a handler's module.
    tree = ast.parse(inspect.getsource(entry))
    assert [node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)] == ["DetectionHandler"]
    classes = [name for name, value in vars(entry).items() if inspect.isclass(value)]
    assert classes in (["DetectionHandler"], ["Any", "DetectionHandler"])


def test_nothing_of_ours_is_imported_at_module_level():
    tree = ast.parse(inspect.getsource(entry))
    modules = [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
    modules += [node.module for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert set(modules) <= {"contextlib", "gc", "json", "logging", "os", "sys", "time", "typing"}


DRIVER = """
import importlib, json, sys
folder, image = sys.argv[1:3]
sys.path[:] = [folder] + [path for path in sys.path if not path.rstrip("/").endswith(("handlers", "serving", "tools"))]
sys.meta_path[:] = [finder for finder in sys.meta_path if "ditable" not in str(finder)]
entry = importlib.import_module("entry")
from ts.context import Context, RequestProcessor
context = Context("tiny", folder, {}, 1, None, "0.12.0")
context.request_processor = [RequestProcessor({})]
handler = entry.DetectionHandler()
handler.initialize(context)
import dethandlers
(text,) = handler.handle([{"body": open(image, "rb").read()}], context)
print(json.dumps({"code": dethandlers.__file__, "found": len(json.loads(text))}))
"""


def test_the_archive_runs_on_the_code_that_it_carries(archive, tmp_path):
    image = tmp_path / "image.jpg"
    image.write_bytes(IMAGES[0])
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(archive), str(image)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ready, last = done.stdout.strip().splitlines()
    assert ready.startswith("DETSERVE_READY ")
    assert json.loads(last)["code"] == str(archive / "dethandlers" / "__init__.py")
    assert json.loads(last)["found"] >= 20
