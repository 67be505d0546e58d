"""One question over REST, gRPC and the Open Inference Protocol, on a real TorchServe whose batches mix all three."""

import base64
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import requests
import torch
from builder_parity import spec_of
from checkout import ROOT
from detserve import server
from detserve.archive import build_archive
from detserve.errors import ClientError, EndpointError
from detserve.grpc_client import GrpcClient
from detserve.grpc_messages import MODEL_INFER, PREDICTIONS
from detserve.instance import Instance
from detserve.open_inference_client import OpenInferenceClient
from detserve.spec import load_spec
from dettools.cli import main
from dettools.datasets.scenes import render_scene
from documented_commands import code_blocks
from random_detectors import NUM_CLASSES, RandomDetector
from torchvision.models import get_model

SPEC = ROOT / "model_store" / "shapes" / "shapes.yaml"
PAGE = ROOT / "docs" / "grpc.md"
MASKS = "maskrcnn_resnet50_fpn"
TINY = {"min_size": 96, "max_size": 96, "rpn_post_nms_top_n_test": 20}

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def instance(serve, tmp_path_factory) -> str:
    """A detector that finds shapes, and one with masks; batches of four."""
    folder = tmp_path_factory.mktemp("store")
    batched = {"batch_size": 4, "max_batch_delay_ms": 30}
    shapes = load_spec(SPEC)
    shapes = replace(shapes, serving=replace(shapes.serving, **batched))
    build_archive(shapes, folder=SPEC.parent, out=folder / "shapes.mar")
    torch.manual_seed(0)
    state = get_model(MASKS, weights=None, weights_backbone=None, num_classes=NUM_CLASSES).state_dict()
    # Untrained, so that scores lie near one fifth: it has masks, and that is what counts here.
    masks = spec_of(RandomDetector(MASKS, TINY, state, 0.05), "masks", folder, golden_check="off", **batched)
    masks = replace(masks, serving=replace(masks.serving, max_detections=4))
    build_archive(masks, folder=folder, out=folder / "masks.mar")
    return serve([folder / "shapes.mar", folder / "masks.mar"], "protocols")


@pytest.fixture(scope="module")
def image() -> bytes:
    stream = io.BytesIO()
    render_scene(5).image.save(stream, "JPEG")
    return stream.getvalue()


@dataclass(frozen=True)
class Ways:
    """The raw answers, each with what stands on the wire."""

    url: str
    channel: grpc.Channel
    token: str

    def rest(self, model: str, image: bytes, options: dict[str, str]) -> bytes:
        answer = requests.post(f"{self.url}/{model}/predict", data=image, params=options, headers=self.headers())
        assert answer.status_code == 200, answer.text
        return answer.content

    def rest_infer(self, model: str, body: object) -> requests.Response:
        return requests.post(f"{self.url}/v2/models/{model}/infer", json=body, headers=self.headers())

    def infer(self, model: str, *inputs: dict[str, Any], **fields: Any) -> Any:
        request = MODEL_INFER.request(model_name=model, inputs=inputs, **fields)
        call = self.channel.unary_unary(
            MODEL_INFER.path, MODEL_INFER.request.SerializeToString, MODEL_INFER.response.FromString
        )
        return call(request, timeout=30, metadata=[("authorization", f"Bearer {self.token}")])

    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}


@pytest.fixture(scope="module")
def ways(instance) -> Iterator[Ways]:
    state = Instance.named(instance).require_running()
    token = server.token(Instance.named(instance), "inference").value
    with grpc.insecure_channel(f"127.0.0.1:{state.ports.grpc_inference}") as channel:
        yield Ways(state.inference_url, channel, token)


@pytest.fixture(scope="module")
def worker(instance) -> Callable[[], list[int]]:
    """The processes of the workers, to see that none was replaced."""
    return lambda: [one.pid for model in server.status(Instance.named(instance)).models for one in model.workers]


def tensor(name: str, *values: Any, datatype: str = "BYTES", shape: list[int] | None = None) -> dict[str, Any]:
    field = {"BYTES": "bytes_contents", "FP32": "fp32_contents", "INT64": "int64_contents", "BOOL": "bool_contents"}
    return {
        "name": name,
        "datatype": datatype,
        "shape": [len(values)] if shape is None else shape,
        "contents": {field[datatype]: values},
    }


def error_of(answer: Any) -> dict[str, Any]:
    assert [output.name for output in answer.outputs] == ["error"]
    return json.loads(answer.outputs[0].contents.bytes_contents[0])


OPTIONS = [
    ("shapes", {}),
    ("shapes", {"score_threshold": "0.2", "max_detections": "5", "classes": "circle,star", "category_id": "true"}),
    ("shapes", {"format": "columns"}),
    ("masks", {"max_detections": "3"}),
    ("masks", {"max_detections": "3", "masks": "rle"}),
    ("masks", {"max_detections": "2", "masks": "rle", "format": "coco"}),
]


@pytest.mark.parametrize(("model", "options"), OPTIONS)
def test_the_answer_is_the_same_byte_for_byte(instance, ways, image, model, options):
    call = ways.channel.unary_unary(
        PREDICTIONS.path, PREDICTIONS.request.SerializeToString, PREDICTIONS.response.FromString
    )
    texts = {name: value.encode() for name, value in options.items()}
    request = PREDICTIONS.request(model_name=model, input={"data": image, **texts})
    over_grpc = call(request, metadata=[("authorization", f"Bearer {ways.token}")]).prediction
    inferred = ways.infer(model, tensor("image", image), *(tensor(name, text) for name, text in texts.items()))
    rest_infer = ways.rest_infer(
        model,
        {
            "inputs": [{**tensor("image", 0), "contents": None, "data": [base64.b64encode(image).decode()]}],
            "parameters": options,
        },
    ).json()

    over_rest = ways.rest(model, image, options)
    assert over_grpc == over_rest
    assert inferred.outputs[0].contents.bytes_contents[0] == over_rest
    assert rest_infer["outputs"][0]["data"][0].encode() == over_rest
    assert len(json.loads(over_rest)) > 0
    if "masks" in options:
        assert all(one["segmentation"]["counts"] for one in json.loads(over_rest))
    with OpenInferenceClient.for_instance(instance) as oip, GrpcClient.for_instance(instance) as plain:
        assert oip.predict(model, image, options=options) == json.loads(over_rest)
        assert plain.predict(model, image, options=options) == json.loads(over_rest)


def test_the_typed_outputs_are_the_detections(instance, image):
    with OpenInferenceClient.for_instance(instance) as client:
        answer = client.infer("shapes", image, id="seven")
        none = client.infer("shapes", image, options={"score_threshold": 1})
    assert (answer.model, answer.version, answer.id) == ("shapes", load_spec(SPEC).version, "seven")
    assert answer.detections.boxes_xyxy.tolist() == client_boxes(answer.document)
    assert answer.detections.labels.tolist() == [one["class_label"] for one in answer.document]
    assert len(answer.detections) == len(answer.document) > 0
    assert none.document == []
    assert none.detections.boxes_xyxy.shape == (0, 4)
    assert none.id


def client_boxes(document: list[dict[str, Any]]) -> list[list[float]]:
    return np.float32([one["bbox"] for one in document]).tolist()


def test_the_server_and_its_models_tell_of_themselves(instance):
    with OpenInferenceClient.for_instance(instance) as client:
        assert (client.live(), client.ready(), client.ping()) == (True, True, "Healthy")
        assert client.model_ready("shapes") is True
        assert client.metadata("masks").versions == ("1.0",)
        for ask in (client.model_ready, client.metadata, lambda name: client.predict(name, b"x")):
            with pytest.raises(EndpointError, match="'nothing'") as error:
                ask("nothing")
            assert (error.value.status, error.value.type) == (404, "unknown_model")
        with pytest.raises(EndpointError) as error:
            client.model_ready("shapes", "77")
        assert (error.value.status, error.value.type) == (404, "unknown_version")


MALFORMED = [
    ([], "empty_body"),
    ([tensor("image")], "malformed_request"),
    ([tensor("image", b"a", b"b")], "malformed_request"),
    ([tensor("image", b"text")], "not_an_image"),
    ([tensor("image", b"a", shape=[2])], "malformed_request"),
    ([tensor("image", 1.5, datatype="FP32")], "malformed_request"),
    ([tensor("image", b"a"), tensor("image", b"a")], "invalid_option"),
    ([tensor("image", b"a"), tensor("data", b"a")], "invalid_image"),
    ([tensor("image", b"a"), tensor("treshold", b"a")], "unknown_option"),
    ([tensor("image", b"a"), tensor("max_detections", 0, datatype="INT64")], "invalid_option"),
    ([tensor("image", b"a"), tensor("classes", b"\xff\xfe")], "invalid_option"),
    ([tensor("image", b"a"), tensor("\u2028\x00", b"a")], "unknown_option"),
    ([{"name": "image"}], "malformed_request"),
    ([{"name": "image", "datatype": "FP16", "shape": [1]}], "malformed_request"),
]


def test_malformed_requests_fail_alone_and_no_worker_dies_of_them(ways, worker, image):
    before = worker()
    expected = ways.rest("shapes", image, {})
    asked = [
        *((lambda inputs=inputs: error_of(ways.infer("shapes", *inputs))["type"], kind) for inputs, kind in MALFORMED),
        *(
            (lambda body=body: ways.rest_infer("shapes", body).json()["type"], "malformed_request")
            for body in (
                {"inputs": 5},
                {"inputs": [3]},
                {"inputs": [], "parameters": 3},
                {"inputs": [{"name": "image"}]},
            )
        ),
    ]
    with ThreadPoolExecutor(8) as pool:
        answers = []
        for index, (ask, kind) in enumerate(asked):
            neighbour = (
                pool.submit(lambda: ways.infer("shapes", tensor("image", image)).outputs[0].contents.bytes_contents[0])
                if index % 2
                else pool.submit(ways.rest, "shapes", image, {})
            )
            answers.append((pool.submit(ask), kind, neighbour))
        for answer, kind, neighbour in answers:
            assert answer.result() == kind
            assert neighbour.result() == expected
    assert worker() == before


def test_errors_over_rest_have_the_protocols_word_too(ways):
    answer = ways.rest_infer("shapes", {"inputs": []})
    told = answer.json()
    assert answer.status_code == told["code"] == 400
    assert told["error"] == told["message"]


def test_calls_that_are_given_up_do_not_harm_the_worker(instance, ways, worker, image):
    before = worker()
    with OpenInferenceClient.for_instance(instance, timeout_s=0.01) as hurried:
        for _ in range(5):
            with pytest.raises(ClientError) as error:
                hurried.predict("masks", image)
            assert error.value.type == "timeout"
    assert ways.infer("masks", tensor("image", image)).outputs[0].name == "detections"
    assert worker() == before


@pytest.mark.parametrize("protocol", ["grpc", "oip"])
def test_predict_by_protocol(instance, image, protocol, tmp_path, capsys):
    path = tmp_path / "scene.jpg"
    path.write_bytes(image)
    arguments = ["predict", "shapes", str(path), "--instance", instance, "--max-detections", "2"]
    assert main(arguments) == 0
    over_rest = capsys.readouterr().out
    assert main([*arguments, "--protocol", protocol]) == 0
    assert capsys.readouterr().out == over_rest
    assert len(json.loads(over_rest)["detections"]) == 2


def test_predict_from_another_server_by_its_grpc_address(instance, ways, image, tmp_path, capsys):
    path = tmp_path / "scene.jpg"
    path.write_bytes(image)
    port = Instance.named(instance).require_running().ports.grpc_inference
    at = ["--url", f"http://127.0.0.1:{port}", "--token", ways.token, "--protocol", "oip"]
    assert main(["predict", "shapes", str(path), *at]) == 0
    assert json.loads(capsys.readouterr().out)["detections"] == json.loads(ways.rest("shapes", image, {}))


# the page for people without our client


@pytest.fixture(scope="module")
def page(instance) -> str:
    """docs/grpc.md with this server's ports."""
    ports = Instance.named(instance).require_running().ports
    text = PAGE.read_text(encoding="utf-8")
    return text.replace(":7070", f":{ports.grpc_inference}").replace(":8080", f":{ports.inference}")


@pytest.fixture(scope="module")
def generated(page, image, tmp_path_factory) -> Path:
    """A folder with what protoc makes by the page's own command, and the page's scene."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "scene.jpg").write_bytes(image)
    (command,) = [
        line for line in page.splitlines() if line.startswith("python -m grpc_tools") and "--python_out" in line
    ]
    shell(command, folder)
    return folder


def shell(command: str, folder: Path, token: str = "") -> str:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PROTOCOL": str(ROOT / "serving" / "detserve" / "protocol"),
        "TOKEN": token,
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("script", ["ask.py", "ask_oip.py"])
def test_the_pages_python_clients_get_what_rest_gives(page, generated, ways, image, script):
    (source,) = [text for text in code_blocks(page, "python") if text.startswith(f"# {script}\n")]
    (generated / script).write_text(source, encoding="utf-8")
    answer = shell(f'python {script} "$TOKEN" scene.jpg', generated, ways.token)
    assert answer.encode().strip() == ways.rest("shapes", image, {"max_detections": "2"})


def test_the_pages_curl_gets_what_rest_gives(page, generated, ways, image):
    (command,) = [text for text in code_blocks(page, "bash") if "curl -H" in text]
    answer = json.loads(shell(command.replace("curl ", "curl -s "), generated, ways.token))
    assert [output["name"] for output in answer["outputs"]] == ["detections"]
    assert answer["outputs"][0]["data"][0].encode() == ways.rest("shapes", image, {"max_detections": "2"})


def test_the_pages_grpcurl_input_is_the_request(page, generated):
    """grpcurl reads protobuf's JSON form; that the page's text is one, with the image, is all that is seen here."""
    (command,) = [text for text in code_blocks(page, "bash") if "grpcurl" in text]
    request = shell(command.partition("|\n")[0], generated)
    read = (
        "import sys; from google.protobuf import json_format; from inference_pb2 import PredictionsRequest; "
        "got = json_format.Parse(sys.stdin.read(), PredictionsRequest()); "
        "assert got.input['data'] == open('scene.jpg', 'rb').read(); print(got.model_name, got.input['max_detections'])"
    )
    (generated / "request.json").write_text(request)
    assert shell(f'python -c "{read}" < request.json', generated) == "shapes b'2'\n"
