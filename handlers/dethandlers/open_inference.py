"""The Open Inference Protocol (v2): its requests taken apart, its answers put together.

    REST  POST /v2/models/NAME/infer  {"inputs": […], "parameters": {…}, "outputs": […], "id"} ─┐
    gRPC  ModelInfer ─► frontend ─►   {"inputs": […], "id", "model_name"}, no header ───────────┴─► image, options

TorchServe's own envelope for it answers only the first request of a batch, so each request is recognised here, one by
one, whatever its neighbours are. What TorchServe 0.12's frontend does with ModelInfer decides the form of the answers:

- An answer that is not of this form ends the worker, so errors take it too: an output named ``error``.
- It passes on neither ``parameters``, nor ``outputs``, nor ``raw_input_contents``: options come as further inputs.
- It writes BYTES inputs in base64, and each element of a BYTES output as the JSON text of that element: an answer that
  stands there as JSON, not as a string, arrives byte for byte as over the other ways.
"""

import base64
import binascii
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from dethandlers.detections import Detections
from dethandlers.errors import OptionError, RequestError
from dethandlers.payload import IMAGE_FIELDS, split_row
from dethandlers.responses import json_text

OUTPUTS = ("detections", "boxes_xyxy", "scores", "labels")
"""The outputs of an answer; an error has one alone, named ``error``."""

_EXPECTED = (
    'expected {"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": ["<base64>"]}], '
    '"parameters": {option: value}}'
)


@dataclass(frozen=True)
class InferRequest:
    """One v2 request.

    Attributes:
        body: its JSON, unchecked.
        id: the client's word for it, or the one that the frontend made.
        grpc: whether it came as ModelInfer.
    """

    body: Mapping[str, Any]
    id: str
    grpc: bool

    @classmethod
    def recognise(cls, row: Mapping[str, Any], headers: Mapping[str, Any], request_id: str) -> Self | None:
        """Return the request when it is one of the protocol, else None; nothing in it is an error yet.

        Args:
            row: parameter name to value, as TorchServe's worker makes it.
            headers: the request's, lower case; TorchServe adds one for each parameter.
            request_id: the one that the frontend made.
        """
        body = row.get("body")
        if not isinstance(body, dict) or "inputs" not in body:
            return None
        given = body.get("id")
        # JSON over REST is known by its Content-Type alone; ModelInfer comes without any header.
        return cls(body, given if isinstance(given, str) and given else request_id, headers.keys() <= row.keys())

    def split(self, row: Mapping[str, Any], header: str = "") -> tuple[bytes, dict[str, Any]]:
        """Split it into the encoded image and its options, both still unchecked, as `payload.split_row` does.

        Raises:
            RequestError: it is malformed, or holds no image.
        """
        fields = self._inputs()
        parameters = self.body.get("parameters")
        if not isinstance(parameters, dict | None):
            raise _malformed(f"parameters of type {type(parameters).__name__}")
        for name, value in (parameters or {}).items():
            if name in fields:
                raise OptionError(f"{name!r}: got it twice (as input and parameter). Send it once.")
            fields[name] = value
        self.wanted()
        return split_row({**row, "body": fields}, header)

    def wanted(self) -> tuple[str, ...]:
        """Return the names of the outputs that it asks for; all when it names none.

        Raises:
            OptionError: it asks for one that there is not.
        """
        outputs = self.body.get("outputs")
        if not outputs:
            return OUTPUTS
        if not isinstance(outputs, list) or not all(isinstance(one, dict) for one in outputs):
            raise _malformed("outputs that are no list of objects")
        names = tuple(one.get("name") for one in outputs)
        for name in names:
            if name not in OUTPUTS:
                raise OptionError(f"got the output {str(name)[:80]!r}, expected one of {', '.join(OUTPUTS)}.")
        return names

    def answer(self, text: str, detections: Detections, model: tuple[str, str]) -> str:
        """Write the answer.

        Args:
            text: the JSON answer that the other ways give; the element of the output ``detections``.
            detections: boxes (N, 4) FP32 px, scores (N) FP32 and labels (N) INT64, the other outputs.
            model: name and version.
        """
        count = len(detections)
        written = {
            "detections": ("BYTES", "[1]", f"[{text if self.grpc else json_text(text)}]"),
            "boxes_xyxy": ("FP32", f"[{count},4]", _numbers(detections.boxes_xyxy.reshape(-1).tolist())),
            "scores": ("FP32", f"[{count}]", _numbers(detections.scores.tolist())),
            "labels": ("INT64", f"[{count}]", json_text(detections.labels.tolist())),
        }
        return self._write(model, [(name, *written[name]) for name in self.wanted()])

    def error(self, error: RequestError, model: tuple[str, str]) -> str:
        """Write the answer to a request that failed: REST has the object itself, with the protocol's ``error``."""
        told = error.to_json()
        if not self.grpc:
            return json_text({**told, "error": error.message})
        return self._write(model, [("error", "BYTES", "[1]", f"[{json_text(told)}]")])

    def _write(self, model: tuple[str, str], outputs: list[tuple[str, str, str, str]]) -> str:
        head = json_text({"model_name": model[0], "model_version": model[1], "id": self.id})
        tensors = ",".join(
            f'{{"name":"{name}","datatype":"{datatype}","shape":{shape},"data":{data}}}'
            for name, datatype, shape, data in outputs
        )
        return f'{head[:-1]},"outputs":[{tensors}]}}'

    def _inputs(self) -> dict[str, Any]:
        """The inputs by name: an image as base64 text, an option as its value."""
        inputs = self.body["inputs"]
        if not isinstance(inputs, list):
            raise _malformed(f"inputs of type {type(inputs).__name__}")
        fields: dict[str, Any] = {}
        for tensor in inputs:
            if not isinstance(tensor, dict) or not isinstance(tensor.get("name"), str):
                raise _malformed(f"an input {str(tensor)[:80]!r} without a name")
            name = tensor["name"]
            if name in fields:
                raise OptionError(f"{name[:80]!r}: got two inputs of this name. Send it once.")
            values = self._elements(tensor)
            if name in IMAGE_FIELDS and (len(values) != 1 or tensor["datatype"] != "BYTES"):
                raise _malformed(
                    f"an image of datatype {str(tensor['datatype'])[:20]!r} with {len(values)} elements, where one "
                    "BYTES element is the file; the server makes the batches"
                )
            if self.grpc and tensor["datatype"] == "BYTES" and name not in IMAGE_FIELDS:
                values = [_decoded(value) for value in values]
            fields[name] = values[0] if len(values) == 1 else values
        return fields

    def _elements(self, tensor: Mapping[str, Any]) -> list[Any]:
        """The elements of an input, as many as its shape says."""
        name, shape, data = tensor["name"][:80], tensor.get("shape"), tensor.get("data")
        if not isinstance(tensor.get("datatype"), str):
            raise _malformed(f"the input {name!r} without a datatype")
        if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
            raise _malformed(f"the input {name!r} with the shape {str(shape)[:80]!r}")
        if not isinstance(data, list):
            raise _malformed(f"the input {name!r} without data")
        if len(data) != math.prod(shape[:8]) or len(shape) > 8 or not data:
            raw = " Raw contents are not passed on by TorchServe: use the contents." if self.grpc and not data else ""
            raise _malformed(f"the input {name!r} with shape {str(shape)[:80]} and {len(data)} elements", raw)
        return data


def _malformed(got: str, remedy: str = "") -> RequestError:
    return RequestError(f"got {got}, {_EXPECTED}.{remedy}", type="malformed_request")


def _decoded(value: Any) -> str:
    try:
        return base64.b64decode(value, validate=True).decode("utf-8", "replace")
    except (binascii.Error, ValueError, TypeError) as error:
        raise _malformed(f"a BYTES element {str(value)[:40]!r} that is no base64") from error


def _numbers(values: list[float]) -> str:
    """Nine significant digits: the fewest that bring every float32 back unchanged."""
    return f"[{','.join(f'{value:.9g}' for value in values)}]"
