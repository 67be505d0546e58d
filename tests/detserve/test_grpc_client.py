"""The gRPC client on a real TorchServe: the same answers and the same errors as over REST."""

import io
import json
import socket

import pytest
from checkout import ROOT
from detserve import server
from detserve.archive import build_archive
from detserve.client import Client
from detserve.errors import ClientError, EndpointError
from detserve.grpc_client import GrpcClient
from detserve.grpc_management import GrpcManagement
from detserve.instance import Instance
from detserve.spec import load_spec
from dettools.datasets.scenes import render_scene

SPEC = ROOT / "model_store" / "shapes" / "shapes.yaml"

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def instance(serve, tmp_path_factory) -> str:
    archive = tmp_path_factory.mktemp("store") / "shapes.mar"
    build_archive(load_spec(SPEC), folder=SPEC.parent, out=archive)
    return serve([archive], "grpc")


@pytest.fixture(scope="module")
def image() -> bytes:
    stream = io.BytesIO()
    render_scene(5).image.save(stream, "JPEG")
    return stream.getvalue()


@pytest.fixture
def client(instance):
    with GrpcClient.for_instance(instance) as opened:
        yield opened


def test_the_same_json_as_over_rest(client, instance, image):
    options = {"score_threshold": 0.2, "max_detections": 5, "classes": ["circle", "star", "ring"], "category_id": True}
    with Client.for_instance(instance) as rest:
        for asked in ({}, options):
            assert client.predict("shapes", image, options=asked) == rest.predict("shapes", image, options=asked)
        mine, theirs = client.detect("shapes", image), rest.detect("shapes", image)
    assert len(mine) > 0
    assert mine.boxes_xyxy.tolist() == theirs.boxes_xyxy.tolist()


def test_the_workers_errors_are_raised_although_torchserve_says_ok(client, image):
    with pytest.raises(EndpointError, match="unknown option 'score_treshold'") as unknown:
        client.predict("shapes", image, options={"score_treshold": 0.5})
    with pytest.raises(EndpointError, match="expected") as no_image:
        client.predict("shapes", b"text")

    assert (unknown.value.status, unknown.value.type) == (400, "unknown_option")
    assert (no_image.value.status, no_image.value.type) == (415, "not_an_image")


def test_an_unknown_model_is_named(client, image):
    with pytest.raises(EndpointError, match="'nothing'") as error:
        client.predict("nothing", image)
    assert (error.value.status, error.value.type) == (404, "unknown_model")


def test_a_wrong_token_is_unauthorised_and_an_old_one_renewed(instance, image):
    state = Instance.named(instance).require_running()
    address = f"127.0.0.1:{state.ports.grpc_inference}"
    tokens = ["over", server.token(Instance.named(instance), "inference").value]
    with GrpcClient(address, "wrong") as wrong, pytest.raises(EndpointError) as error:
        wrong.predict("shapes", image)
    with GrpcClient(address, lambda: tokens.pop(0)) as renewing:
        assert renewing.predict("shapes", image)

    assert (error.value.status, error.value.type) == (401, "unauthorized")
    assert tokens == []


def test_a_deadline_is_a_timeout(instance, image):
    with GrpcClient.for_instance(instance, timeout_s=0.001) as hurried, pytest.raises(ClientError) as error:
        hurried.predict("shapes", image)
    assert error.value.type == "timeout"


def test_a_port_on_which_nobody_listens_is_refused(image):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with GrpcClient(address, timeout_s=10) as client, pytest.raises(ClientError) as error:
        client.predict("shapes", image)
    assert error.value.type == "refused"
    assert "serve start" in str(error.value)


def test_models_are_listed_described_scaled_and_made_default(instance):
    version = load_spec(SPEC).version
    with GrpcManagement.for_instance(instance) as manager:
        assert list(manager.models()) == ["shapes"]
        (one,) = manager.versions("shapes")
        assert (one["modelName"], one["modelVersion"]) == ("shapes", version)
        described = manager.describe("shapes", version, from_worker=True)
        assert described["customizedMetadata"]["family"] == load_spec(SPEC).family
        assert "2" in manager.scale("shapes", min_workers=2)
        assert len(manager.describe("shapes")["workers"]) == 2
        manager.scale("shapes", version, min_workers=1)
        assert version in manager.set_default("shapes", version)


def test_management_errors_are_the_right_ones(instance):
    with GrpcManagement.for_instance(instance) as manager:
        asked = [
            (lambda: manager.describe("nothing"), "unknown_model"),
            (lambda: manager.describe("shapes", "77"), "unknown_version"),
            (lambda: manager.set_default("shapes", "77"), "unknown_version"),
            (lambda: manager.scale("nothing", min_workers=1), "unknown_model"),
        ]
        for ask, kind in asked:
            with pytest.raises(EndpointError) as error:
                ask()
            assert (error.value.status, error.value.type) == (404, kind)
    inference = server.token(Instance.named(instance), "inference").value
    with GrpcManagement(manager.address, inference) as other, pytest.raises(EndpointError) as error:
        other.models()
    assert error.value.type == "unauthorized"


def test_a_model_is_registered_and_taken_out_again(instance, image):
    with GrpcManagement.for_instance(instance) as manager, GrpcClient.for_instance(instance) as client:
        (archive,) = manager.models().values()
        manager.register(archive, model="second", workers=1)
        assert client.predict("second", image) == client.predict("shapes", image)
        manager.unregister("second")
        assert list(manager.models()) == ["shapes"]
        with pytest.raises(EndpointError) as error:
            manager.register("none.mar")
    assert 400 <= error.value.status < 600


def test_what_is_no_detserve_model_is_a_bad_answer():
    """A server that answers bytes that are no JSON, over real gRPC."""
    from concurrent.futures import ThreadPoolExecutor

    import grpc
    from detserve.grpc_messages import PREDICTIONS

    service, method = PREDICTIONS.path.strip("/").split("/")
    handler = grpc.unary_unary_rpc_method_handler(
        lambda *_: PREDICTIONS.response(prediction=b"\x00\xff"),
        response_serializer=PREDICTIONS.response.SerializeToString,
    )
    with ThreadPoolExecutor(1) as pool:
        foreign = grpc.server(pool)
        foreign.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
        port = foreign.add_insecure_port("127.0.0.1:0")
        foreign.start()
        try:
            with GrpcClient(f"127.0.0.1:{port}") as client, pytest.raises(ClientError, match="not JSON") as error:
                client.predict("shapes", json.dumps({}).encode())
        finally:
            foreign.stop(None).wait()
    assert error.value.type == "bad_answer"
