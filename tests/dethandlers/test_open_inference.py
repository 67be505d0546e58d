"""Requests of the Open Inference Protocol taken apart, and answers put together, without a server."""

import base64
import json

import numpy as np
import pytest
from dethandlers.detections import Detections
from dethandlers.errors import RequestError
from dethandlers.open_inference import InferRequest

IMAGE = b"\xff\xd8 image"
MODEL = ("shapes", "2.0")
FOUND = Detections(
    np.array([[1.5, 0.1, 3, 4], [5, 6, 7, 8]], np.float32),
    np.array([0.9, 1e-7], np.float32),
    np.array([2, 0], np.int64),
)
OVER_REST = {"body": {}, "host": "here", "content-type": "application/json"}
OVER_GRPC = {"body": {"content-type": "application/json"}}


def encoded(content: bytes) -> str:
    return base64.b64encode(content).decode()


def tensor(name, *data, datatype="BYTES", **fields):
    return {"name": name, "datatype": datatype, "shape": [len(data)], "data": list(data), **fields}


def request(*inputs, headers=OVER_REST, **fields) -> InferRequest:
    found = InferRequest.recognise({"body": {"inputs": list(inputs), **fields}}, headers, "given")
    assert found is not None
    return found


def split(asked: InferRequest, header: str = "", **row):
    return asked.split({"body": asked.body, **row}, header)


@pytest.mark.parametrize("row", [{"body": b"{"}, {"body": {"data": "x"}}, {"body": [1]}, {"data": b"x"}, {}])
def test_anything_else_is_not_taken_for_one(row):
    assert InferRequest.recognise(row, OVER_REST, "given") is None


def test_model_infer_is_known_by_having_no_headers():
    assert request(headers=OVER_GRPC).grpc
    assert not request(headers=OVER_REST).grpc


@pytest.mark.parametrize(("given", "expected"), [("seven", "seven"), ("", "given"), (7, "given"), (None, "given")])
def test_the_id_is_the_clients_or_the_frontends(given, expected):
    assert request(id=given).id == expected


def test_options_are_parameters_or_inputs():
    image = tensor("image", encoded(IMAGE))
    parameters = {"score_threshold": 0.3, "classes": ["a", "b"]}
    assert split(request(image, parameters=parameters)) == (IMAGE, parameters)
    typed = [tensor("max_detections", 5, datatype="INT64"), tensor("classes", "a", "b"), tensor("masks", "rle")]
    assert split(request(image, *typed)) == (IMAGE, {"max_detections": 5, "classes": ["a", "b"], "masks": "rle"})


def test_over_grpc_the_frontend_has_encoded_every_element():
    inputs = [tensor("data", encoded(IMAGE)), tensor("masks", encoded(b"rle")), tensor("classes", encoded(b"\xff"))]
    assert split(request(*inputs, headers=OVER_GRPC)) == (IMAGE, {"masks": "rle", "classes": "\ufffd"})


def test_the_query_and_the_header_count_too():
    image, options = split(request(tensor("image", encoded(IMAGE))), "masks=rle", format=b"coco", model_name=b"shapes")
    assert (image, options) == (IMAGE, {"format": b"coco", "masks": "rle"})


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"inputs": "x"}, "inputs of type str"),
        ({"inputs": [1]}, "without a name"),
        ({"inputs": [{"name": 3}]}, "without a name"),
        ({"inputs": [{"name": "image"}]}, "without a datatype"),
        ({"inputs": [tensor("image", "a", shape="1")]}, "with the shape '1'"),
        ({"inputs": [tensor("image", "a", shape=[True])]}, "with the shape"),
        ({"inputs": [tensor("image", "a", shape=[-1])]}, "with the shape"),
        ({"inputs": [tensor("image", "a", data={})]}, "without data"),
        ({"inputs": [tensor("image", "a", shape=[2, 2])]}, r"shape \[2, 2\] and 1 elements"),
        ({"inputs": [tensor("image", "a", shape=[1] * 9)]}, "and 1 elements"),
        ({"inputs": [tensor("image", "a", "b")]}, "the server makes the batches"),
        ({"inputs": [tensor("image", 1.0, datatype="FP32")]}, "datatype 'FP32'"),
        ({"inputs": [tensor("image", "a"), tensor("image", "a")]}, "two inputs of this name"),
        ({"inputs": [tensor("image", "a"), tensor("data", "a")]}, "several images"),
        ({"inputs": [], "parameters": [1]}, "parameters of type list"),
        ({"inputs": [tensor("masks", "rle")], "parameters": {"masks": "rle"}}, "as input and parameter"),
        ({"inputs": [], "outputs": "all"}, "no list of objects"),
        ({"inputs": [], "outputs": [{"name": "boxes"}]}, "got the output 'boxes', expected one of detections"),
        ({"inputs": [], "outputs": [{"name": []}]}, "got the output"),
        ({"inputs": []}, "got no image"),
    ],
)
def test_what_is_malformed_is_named(asked, told):
    found = InferRequest.recognise({"body": asked}, OVER_REST, "given")
    assert found is not None
    with pytest.raises(RequestError, match=told) as error:
        found.split({"body": asked})
    assert error.value.code in {400, 415}


def test_over_grpc_an_option_that_is_no_base64_is_malformed():
    with pytest.raises(RequestError, match="no base64"):
        split(request(tensor("image", encoded(IMAGE)), tensor("masks", "ü"), headers=OVER_GRPC))


TEXT = '[{"class_name":"süß \\"x\\"","score":1e-07}]'


def test_over_grpc_the_document_stands_as_json_so_that_the_frontend_writes_it_as_it_is():
    answer = request(headers=OVER_GRPC, id="7").answer(TEXT, FOUND, MODEL)
    assert f'"data":[{TEXT}]' in answer
    assert json.loads(answer)["id"] == "7"


def test_over_rest_the_document_is_a_string_as_the_protocol_says():
    answer = json.loads(request().answer(TEXT, FOUND, MODEL))
    assert {key: answer[key] for key in ("model_name", "model_version", "id")} == {
        "model_name": "shapes",
        "model_version": "2.0",
        "id": "given",
    }
    detections, boxes, scores, labels = answer["outputs"]
    assert detections == {"name": "detections", "datatype": "BYTES", "shape": [1], "data": [TEXT]}
    assert (boxes["datatype"], boxes["shape"]) == ("FP32", [2, 4])
    assert np.float32(boxes["data"]).reshape(2, 4).tolist() == FOUND.boxes_xyxy.tolist()
    assert np.float32(scores["data"]).tolist() == FOUND.scores.tolist()
    assert (labels["datatype"], labels["data"]) == ("INT64", [2, 0])


def test_outputs_may_be_chosen_and_keep_their_order():
    asked = request(outputs=[{"name": "labels"}, {"name": "detections"}])
    assert [one["name"] for one in json.loads(asked.answer(TEXT, FOUND, MODEL))["outputs"]] == ["labels", "detections"]


def test_nothing_found_keeps_the_shapes():
    outputs = json.loads(request(headers=OVER_GRPC).answer("[]", Detections.empty(), MODEL))["outputs"]
    assert [one["shape"] for one in outputs] == [[1], [0, 4], [0], [0]]
    assert [one["data"] for one in outputs] == [[[]], [], [], []]


def test_an_error_has_the_form_that_keeps_the_worker_alive():
    error = RequestError("got \ud800 x")
    answer = json.loads(request(headers=OVER_GRPC).error(error, MODEL))
    assert answer.keys() == {"model_name", "model_version", "id", "outputs"}
    (output,) = answer["outputs"]
    assert output["name"] == "error"
    assert output["data"] == [{"code": 400, "type": "bad_request", "message": "got \ud800 x"}]
    assert json.loads(request().error(error, MODEL))["error"] == "got \ud800 x"
    request(headers=OVER_GRPC).error(error, MODEL).encode()
