"""Deadlines, tokens, retries and the meaning of statuses, against a small gRPC server that fails as it is told."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from detserve.errors import ClientError, EndpointError, ServerError
from detserve.grpc_client import GrpcClient
from detserve.grpc_management import GrpcManagement
from detserve.grpc_messages import PREDICTIONS, REGISTER_MODEL

OK = b'[{"class_label":0}]'


class Script:
    """A server that gives the next of its answers: bytes, or a status with its details and trailing metadata."""

    def __init__(self) -> None:
        self.answers: list[object] = []
        self.tokens: list[str] = []
        self.valid: set[str] | None = None
        self.port = 0
        self._lock = threading.Lock()

    def answer(self, request: object, context: grpc.ServicerContext) -> object:
        with self._lock:
            token = dict(context.invocation_metadata()).get("authorization", "")
            self.tokens.append(token)
            if self.valid is not None and token not in self.valid:
                context.abort(
                    grpc.StatusCode.PERMISSION_DENIED, "Token Authorization failed. Token either incorrect, …"
                )
            next_one = self.answers.pop(0) if self.answers else OK
        if isinstance(next_one, bytes):
            return PREDICTIONS.response(prediction=next_one)
        code, details, *trailing = next_one
        context.set_trailing_metadata(trailing)
        context.abort(code, details)
        return None


@pytest.fixture
def script() -> Iterator[Script]:
    script = Script()
    handlers = []
    for method in (PREDICTIONS, REGISTER_MODEL):
        service, name = method.path.strip("/").split("/")
        handler = grpc.unary_unary_rpc_method_handler(
            script.answer, method.request.FromString, method.response.SerializeToString
        )
        handlers.append(grpc.method_handlers_generic_handler(service, {name: handler}))
    with ThreadPoolExecutor(8) as pool:
        server = grpc.server(pool)
        server.add_generic_rpc_handlers(tuple(handlers))
        script.port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield script
        finally:
            server.stop(None).wait()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Waits are recorded, not waited for."""
    waits: list[float] = []
    monkeypatch.setattr("detserve.grpc_channel.time.sleep", waits.append)
    return waits


def client(script, token=None, **options) -> GrpcClient:
    return GrpcClient(f"127.0.0.1:{script.port}", token, **options)


CODE = grpc.StatusCode
MEANINGS = [
    ((CODE.INTERNAL, "Model not found: x\norg…ModelNotFoundException"), 404, "unknown_model", False),
    (
        (CODE.INTERNAL, "Model version: 7 does not exist\norg…ModelVersionNotFoundException"),
        404,
        "unknown_version",
        False,
    ),
    ((CODE.INTERNAL, "Parameter model_name is required.\nBadRequestException.()"), 400, "bad_request", False),
    ((CODE.INTERNAL, "Worker died.\norg…InternalServerException"), 503, "unavailable", True),
    ((CODE.INTERNAL, 'Model "x" has no worker to serve inference request.'), 503, "unavailable", True),
    ((CODE.INTERNAL, "Prediction failed\norg…InternalServerException"), 500, "server_error", False),
    ((CODE.PERMISSION_DENIED, "Model API disabled\norg…ModelException"), 405, "model_api_disabled", False),
    ((CODE.PERMISSION_DENIED, "got no valid token; send …"), 401, "unauthorized", False),
    ((CODE.UNAUTHENTICATED, ""), 401, "unauthorized", False),
    ((CODE.UNIMPLEMENTED, "Method not found: x"), 501, "unimplemented", False),
    ((CODE.RESOURCE_EXHAUSTED, "gRPC message exceeds maximum size 5: 6"), 413, "body_too_large", False),
    ((CODE.RESOURCE_EXHAUSTED, "got more requests than are taken"), 429, "too_many_requests", True),
    ((CODE.UNAVAILABLE, "this server is being stopped; try again later"), 503, "unavailable", True),
    ((CODE.UNAVAILABLE, "Received http2 header with status: 429"), 429, "too_many_requests", True),
    ((CODE.UNAVAILABLE, "Received http2 header with status: 502"), 502, "unavailable", True),
    ((CODE.INTERNAL, "Received http2 header with status: 413"), 413, "body_too_large", False),
    ((CODE.UNKNOWN, ""), 500, "server_error", False),
]


@pytest.mark.parametrize(("status", "code", "kind", "retryable"), MEANINGS)
def test_a_status_is_the_error_that_rest_gives(script, status, code, kind, retryable):
    script.answers = [status]
    with client(script) as asking, pytest.raises(EndpointError) as error:
        asking.predict("x", b"image", version="7")
    assert (error.value.status, error.value.type, error.value.retryable) == (code, kind, retryable)


@pytest.mark.parametrize("code", ['"x"', "null", "1.5"])
def test_an_answer_that_only_looks_like_an_error_is_an_answer(script, code):
    script.answers = [f'{{"code":{code},"type":"x","message":"m"}}'.encode()]
    with client(script) as asking:
        assert asking.predict("x", b"image")["message"] == "m"


def test_what_passes_is_tried_again_and_what_does_not_is_not(script, quick):
    busy = (CODE.RESOURCE_EXHAUSTED, "more requests than are taken", ("retry-after", "7"))
    script.answers = [busy, b'{"code":503,"type":"x","message":"m"}', (CODE.UNAVAILABLE, "Socket closed"), OK]
    with client(script, retries=3) as patient:
        assert patient.predict("x", b"image") == [{"class_label": 0}]
        assert patient.retried == 3
    assert len(quick) == 2  # a cut connection is tried again at once
    assert 7 <= quick[0] <= 7 * 1.25
    assert quick[1] <= 2

    script.answers = [(CODE.INTERNAL, "Prediction failed"), OK]
    with client(script, retries=3) as patient, pytest.raises(EndpointError):
        patient.predict("x", b"image")
    script.answers = [busy] * 5
    with client(script, retries=3) as patient, pytest.raises(EndpointError) as error:
        patient.predict("x", b"image")
    assert error.value.status == 429
    assert len(script.answers) == 1


def test_registering_is_never_sent_twice(script):
    script.answers = [(CODE.UNAVAILABLE, "Socket closed"), OK]
    with GrpcManagement(f"127.0.0.1:{script.port}", retries=5) as manager, pytest.raises(ClientError) as error:
        manager.register("x.mar")
    assert error.value.type == "reset"
    assert len(script.tokens) == 1


def test_a_token_that_runs_out_is_renewed_once_for_all_threads(script):
    """Forty requests from eight threads, the token changed in their midst: none fails."""
    script.valid = {"Bearer first"}
    given = []

    def source() -> str:
        given.append(next(iter(script.valid)).removeprefix("Bearer "))
        return given[-1]

    with client(script, source) as asking, ThreadPoolExecutor(8) as pool:
        assert asking.predict("x", b"image")
        script.valid = {"Bearer second"}
        answers = list(pool.map(lambda _: asking.predict("x", b"image"), range(40)))
    assert len(answers) == 40
    assert given == ["first", "second"]


def test_a_token_that_stays_wrong_is_told(script):
    script.valid = set()
    with client(script, lambda: "wrong") as asking, pytest.raises(EndpointError) as error:
        asking.predict("x", b"image")
    assert error.value.type == "unauthorized"
    assert script.tokens == ["Bearer wrong", "Bearer wrong"]


def test_a_token_that_cannot_be_had_for_a_moment_is_asked_for_again(script):
    tries = []

    def source() -> str:
        tries.append(1)
        if len(tries) < 3:
            raise ServerError("is being started")
        return "good"

    with client(script, source, retries=5) as asking:
        assert asking.predict("x", b"image")
    with client(script, source) as asking:
        tries.clear()
        with pytest.raises(ServerError):
            asking.predict("x", b"image")


def test_a_closed_client_says_so(script):
    asking = client(script)
    asking.close()
    with pytest.raises(ClientError, match="closed"):
        asking.predict("x", b"image")


def test_an_image_that_cannot_be_read_is_told(script, tmp_path):
    with client(script) as asking, pytest.raises(ClientError, match="cannot be read"):
        asking.predict("x", tmp_path / "none.jpg")
