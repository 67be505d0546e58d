"""TorchServe's gRPC messages and methods, as far as the clients use them.

Declared here field by field, so that no generated code has to be kept, which would tie the protobuf package to a
version; ``protocol/*.proto`` says the same for other languages, and a test holds both against TorchServe's own files.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, empty_pb2, message_factory

_Field = tuple[int, str]
"""Number and type: a scalar, a message's name, or either after ``repeated``; ``map X`` is from string to X."""

_INFERENCE: Mapping[str, Mapping[str, _Field]] = {
    "PredictionsRequest": {"model_name": (1, "string"), "model_version": (2, "string"), "input": (3, "map bytes")},
    "PredictionResponse": {"prediction": (1, "bytes")},
    "TorchServeHealthResponse": {"health": (1, "string")},
}
_MANAGEMENT: Mapping[str, Mapping[str, _Field]] = {
    "ManagementResponse": {"msg": (1, "string")},
    "DescribeModelRequest": {
        "model_name": (1, "string"),
        "model_version": (2, "string"),
        "customized": (3, "bool"),
    },
    "ListModelsRequest": {"limit": (1, "int32"), "next_page_token": (2, "int32")},
    "RegisterModelRequest": {
        "batch_size": (1, "int32"),
        "initial_workers": (3, "int32"),
        "max_batch_delay": (4, "int32"),
        "model_name": (5, "string"),
        "response_timeout": (6, "int32"),
        "synchronous": (8, "bool"),
        "url": (9, "string"),
        "startup_timeout": (11, "int32"),
    },
    "ScaleWorkerRequest": {
        "model_name": (1, "string"),
        "model_version": (2, "string"),
        "max_worker": (3, "int32"),
        "min_worker": (4, "int32"),
        "synchronous": (6, "bool"),
    },
    "SetDefaultRequest": {"model_name": (1, "string"), "model_version": (2, "string")},
    "UnregisterModelRequest": {"model_name": (1, "string"), "model_version": (2, "string")},
}
_TENSOR = {
    "name": (1, "string"),
    "datatype": (2, "string"),
    "shape": (3, "repeated int64"),
    "contents": (5, "InferTensorContents"),
}
_OPEN_INFERENCE: Mapping[str, Mapping[str, _Field]] = {
    "ServerLiveRequest": {},
    "ServerLiveResponse": {"live": (1, "bool")},
    "ServerReadyRequest": {},
    "ServerReadyResponse": {"ready": (1, "bool")},
    "ModelReadyRequest": {"name": (1, "string"), "version": (2, "string")},
    "ModelReadyResponse": {"ready": (1, "bool")},
    "ModelMetadataRequest": {"name": (1, "string"), "version": (2, "string")},
    "ModelMetadataResponse": {"name": (1, "string"), "versions": (2, "repeated string")},
    "ModelInferRequest": {
        "model_name": (1, "string"),
        "model_version": (2, "string"),
        "id": (3, "string"),
        "inputs": (5, "repeated ModelInferRequest.InferInputTensor"),
    },
    "ModelInferRequest.InferInputTensor": _TENSOR,
    "ModelInferResponse": {
        "model_name": (1, "string"),
        "model_version": (2, "string"),
        "id": (3, "string"),
        "outputs": (5, "repeated ModelInferResponse.InferOutputTensor"),
    },
    "ModelInferResponse.InferOutputTensor": _TENSOR,
    "InferTensorContents": {
        "bool_contents": (1, "repeated bool"),
        "int_contents": (2, "repeated int32"),
        "int64_contents": (3, "repeated int64"),
        "uint_contents": (4, "repeated uint32"),
        "uint64_contents": (5, "repeated uint64"),
        "fp32_contents": (6, "repeated float"),
        "fp64_contents": (7, "repeated double"),
        "bytes_contents": (8, "repeated bytes"),
    },
}
_Kind = descriptor_pb2.FieldDescriptorProto


def declared(name: str, package: str, messages: Mapping[str, Mapping[str, _Field]]) -> Any:
    """Return the file descriptor of a table of messages."""
    file = descriptor_pb2.FileDescriptorProto(name=f"detserve/{name}.proto", package=package, syntax="proto3")
    for path, fields in messages.items():
        outer, _, inner = path.rpartition(".")
        message = (
            next(one for one in file.message_type if one.name == outer).nested_type if outer else file.message_type
        )
        made = message.add(name=inner)
        for field, (number, kind) in fields.items():
            repeated = kind.startswith(("repeated ", "map "))
            entry = kind.removeprefix("repeated ")
            if kind.startswith("map "):
                entry = f"{path}.{_camel(field)}Entry"
                nested = made.nested_type.add(name=f"{_camel(field)}Entry")
                nested.options.map_entry = True
                _add(nested, package, "key", 1, "string")
                _add(nested, package, "value", 2, kind.removeprefix("map "))
            _add(made, package, field, number, entry, repeated=repeated)
    return file


def _add(message: Any, package: str, name: str, number: int, kind: str, *, repeated: bool = False) -> None:
    label = _Kind.LABEL_REPEATED if repeated else _Kind.LABEL_OPTIONAL
    if kind[0].islower():
        message.field.add(name=name, number=number, label=label, type=_Kind.Type.Value(f"TYPE_{kind.upper()}"))
    else:
        message.field.add(
            name=name, number=number, label=label, type=_Kind.TYPE_MESSAGE, type_name=f".{package}.{kind}"
        )


def _camel(name: str) -> str:
    return re.sub("(?:^|_)(.)", lambda found: found[1].upper(), name)


_TABLES = {
    "inference": ("org.pytorch.serve.grpc.inference", _INFERENCE),
    "management": ("org.pytorch.serve.grpc.management", _MANAGEMENT),
    "open_inference": ("org.pytorch.serve.grpc.openinference", _OPEN_INFERENCE),
}
FILES = {name: declared(name, package, messages) for name, (package, messages) in _TABLES.items()}
"""File descriptor by the name of the .proto that says the same."""

_POOL = descriptor_pool.DescriptorPool()
for _file in FILES.values():
    _POOL.Add(_file)


@dataclass(frozen=True)
class Method:
    """A method of a service.

    Attributes:
        path: as it stands in the request, ``/package.Service/Method``.
        request, response: the classes of its messages.
        repeatable: whether asking twice is as good as asking once.
    """

    path: str
    request: Any
    response: Any
    repeatable: bool = True


def _message(file: str, name: str) -> Any:
    return message_factory.GetMessageClass(_POOL.FindMessageTypeByName(f"{FILES[file].package}.{name}"))


def _method(file: str, service: str, name: str, request: str, response: str, *, repeatable: bool = True) -> Method:
    path = f"/{FILES[file].package}.{service}/{name}"
    return Method(path, _message(file, request), _message(file, response), repeatable)


def _managed(name: str, *, repeatable: bool = True) -> Method:
    names = (name, f"{name}Request", "ManagementResponse")
    return _method("management", "ManagementAPIsService", *names, repeatable=repeatable)


def _inferred(name: str) -> Method:
    return _method("open_inference", "GRPCInferenceService", name, f"{name}Request", f"{name}Response")


PREDICTIONS = _method("inference", "InferenceAPIsService", "Predictions", "PredictionsRequest", "PredictionResponse")
PING = Method(
    f"/{FILES['inference'].package}.InferenceAPIsService/Ping",
    empty_pb2.Empty,
    _message("inference", "TorchServeHealthResponse"),
)
DESCRIBE_MODEL = _managed("DescribeModel")
LIST_MODELS = _managed("ListModels")
REGISTER_MODEL = _managed("RegisterModel", repeatable=False)
SCALE_WORKER = _managed("ScaleWorker")
SET_DEFAULT = _managed("SetDefault")
UNREGISTER_MODEL = _managed("UnregisterModel", repeatable=False)
SERVER_LIVE = _inferred("ServerLive")
SERVER_READY = _inferred("ServerReady")
MODEL_READY = _inferred("ModelReady")
MODEL_METADATA = _inferred("ModelMetadata")
MODEL_INFER = _inferred("ModelInfer")
METHODS = (
    *(PREDICTIONS, PING),
    *(DESCRIBE_MODEL, LIST_MODELS, REGISTER_MODEL, SCALE_WORKER, SET_DEFAULT, UNREGISTER_MODEL),
    *(SERVER_LIVE, SERVER_READY, MODEL_READY, MODEL_METADATA, MODEL_INFER),
)
