"""Our messages, the .proto files for other languages, and TorchServe's own: one protocol."""

import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
from checkout import ROOT
from detserve.grpc_messages import FILES, METHODS
from google.protobuf import descriptor_pb2
from grpc_tools import protoc

OURS = ROOT / "serving" / "detserve" / "protocol"
THEIRS = {
    "inference": "inference.proto",
    "management": "management.proto",
    "open_inference": "open_inference_grpc.proto",
}
DROPPED = {  # what TorchServe does not pass on, or we do not use
    "PredictionsRequest": {"sequence_id"},
    "PredictionResponse": {"sequence_id", "status"},
    "RegisterModelRequest": {"handler", "runtime", "s3_sse_kms"},
    "ScaleWorkerRequest": {"number_gpu", "timeout"},
    "ModelMetadataResponse": {"platform", "inputs", "outputs"},
    "ModelInferRequest": {"parameters", "outputs", "raw_input_contents"},
    "ModelInferResponse": {"parameters", "raw_output_contents"},
    "InferInputTensor": {"parameters"},
    "InferOutputTensor": {"parameters"},
}


def compiled(folder: Path, name: str, out: Path) -> descriptor_pb2.FileDescriptorProto:
    google = Path(protoc.__file__).parent / "_proto"
    assert protoc.main(["protoc", f"-I{folder}", f"-I{google}", f"--descriptor_set_out={out}", name]) == 0
    return descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file[0]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> Path:
    """The .proto files in TorchServe's jar."""
    folder = tmp_path_factory.mktemp("theirs")
    (package,) = find_spec("ts").submodule_search_locations
    with zipfile.ZipFile(Path(package) / "frontend" / "model-server.jar") as jar:
        jar.extractall(folder, [name for name in jar.namelist() if name.endswith(".proto")])
    for path in (folder / "proto").glob("*.proto"):
        path.rename(folder / path.name)
    return folder


def fields(message) -> dict[str, tuple]:
    return {one.name: (one.number, one.type, one.label, one.type_name) for one in message.field}


def messages(nest) -> dict[str, object]:
    found = {}
    for one in getattr(nest, "message_type", None) or getattr(nest, "nested_type", ()):
        found |= {one.name: one, **messages(one)}
    return found


@pytest.mark.parametrize("name", FILES)
def test_each_message_field_and_number_is_torchserves(name, theirs, tmp_path):
    ours, original = compiled(OURS, f"{name}.proto", tmp_path / "a"), compiled(theirs, THEIRS[name], tmp_path / "b")
    assert ours.package == original.package
    known = messages(original)
    assert messages(ours)
    for word, message in messages(ours).items():
        expected = {key: value for key, value in fields(known[word]).items() if key not in DROPPED.get(word, ())}
        assert fields(message) == expected, word
    (service,), (original_service,) = ours.service, original.service
    calls = {one.name: (one.input_type, one.output_type, one.server_streaming) for one in original_service.method}
    assert service.name == original_service.name
    for one in service.method:
        assert calls[one.name] == (one.input_type, one.output_type, False)


@pytest.mark.parametrize("name", FILES)
def test_what_the_clients_use_is_what_the_files_say(name, tmp_path):
    file = compiled(OURS, f"{name}.proto", tmp_path / "a")
    mine = messages(FILES[name])
    assert mine.keys() == messages(file).keys()
    for word, message in messages(file).items():
        assert fields(mine[word]) == fields(message), word
    (service,) = file.service
    prefix = f"/{file.package}.{service.name}/"
    methods = {method.path: method for method in METHODS if method.path.startswith(prefix)}
    assert methods.keys() == {prefix + one.name for one in service.method}
    for one in service.method:
        method = methods[prefix + one.name]
        assert f".{method.request.DESCRIPTOR.full_name}" == one.input_type
        assert f".{method.response.DESCRIPTOR.full_name}" == one.output_type
