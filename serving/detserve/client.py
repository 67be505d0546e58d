"""The REST client: an image in, detections out, and errors that say what to do.

    predict / detect ─► inference API :8080        describe ─► management API :8081

**Options and TorchServe's paths.** TorchServe 0.12 drops the query string of ``/predictions/NAME``: the worker never
sees it. It passes it on under ``/NAME/predict`` and ``/NAME/VERSION/predict``. A request without options goes to the
first, one with options to the second; both take the image as the body.
"""

import contextlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self, cast
from urllib.parse import quote, urlsplit

import requests

from detserve.client_errors import Said, endpoint_error, is_reset, no_connection
from detserve.detecting_client import DetectingClient, image_bytes, option_texts
from detserve.errors import ClientError, DetserveError, EndpointError, ServerError
from detserve.instance import Instance
from detserve.retry import wait_s

TokenSource = str | Callable[[], str] | None
"""A token, or a function that returns the one to use now: asked first, and again when the server refuses it."""

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


class _Bearer(requests.auth.AuthBase):
    """Sets the token. As requests' own ``auth`` it also keeps a ~/.netrc from replacing it."""

    def __init__(self, source: TokenSource) -> None:
        self.renewable = callable(source)
        self._source = source
        self._value = source if isinstance(source, str) else None

    def forget(self) -> None:
        """Ask the source again the next time."""
        self._value = None

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._value is None and callable(self._source):
            self._value = self._source()
        if self._value:
            request.headers["Authorization"] = f"Bearer {self._value}"
        return request


class Client(DetectingClient):
    """Calls the models of one server. Not safe to share between threads: give each thread its own.

    Args:
        base_url: address of the inference API, such as ``http://127.0.0.1:8080``.
        token: the inference token, or a function that returns the one to use now.
        management_url: address of the management API; needed by `describe`, and to list models in error messages.
        management_token: as ``token``, for the management API.
        timeout_s: how long to wait for a connection, and for an answer.
        retries: how often to try again what may succeed later (queue full, worker or server being restarted), with
            waits that grow to 2 s, or as long as the server's Retry-After says: 20 are patience for half a minute.
            A reset connection and a token that has run out are tried again once in any case: asking for detections
            changes nothing.

    Attributes:
        retried: how often this client has sent a request again.
    """

    def __init__(
        self,
        base_url: str,
        token: TokenSource = None,
        *,
        management_url: str | None = None,
        management_token: TokenSource = None,
        timeout_s: float = 60.0,
        retries: int = 0,
    ) -> None:
        parts = urlsplit(base_url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ClientError(f"Got the address {base_url!r}; expected one such as http://127.0.0.1:8080.")
        self.base_url = base_url.rstrip("/")
        self.management_url = management_url.rstrip("/") if management_url else None
        self.timeout_s = timeout_s
        self.retries = retries
        self.retried = 0
        self._token = _Bearer(token)
        self._management_token = _Bearer(management_token)
        self._max_request_bytes: int | None = None
        self._session = requests.Session()
        if parts.hostname in LOOPBACK:
            self._session.trust_env = False  # a proxy has no business on the loopback

    @classmethod
    def for_instance(cls, name: str | None = None, *, timeout_s: float = 60.0, retries: int = 0) -> Self:
        """Return a client of a server that runs on this machine; its tokens are renewed when they run out."""
        from detserve import server

        instance = Instance.named(name)
        state = instance.require_running()
        tokens: dict[str, TokenSource] = {"token": None, "management_token": None}
        if state.token_auth:
            tokens["token"] = server.token_source(instance, "inference")
            tokens["management_token"] = server.token_source(instance, "management")
        client = cls(
            state.inference_url, management_url=state.management_url, timeout_s=timeout_s, retries=retries, **tokens
        )
        client._max_request_bytes = state.max_request_bytes
        return client

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._session.close()

    def predict(
        self,
        model: str,
        image: bytes | Path,
        *,
        version: str | None = None,
        options: Mapping[str, object] | None = None,
        request_id: str | None = None,
    ) -> Any:
        """Send one image, return the JSON answer.

        Args:
            image: the bytes of an image file, or its path.
            options: ``score_threshold``, ``max_detections``, ``classes``, ``format``, ``masks``, ``keypoints``,
                ``category_id``, ``timings``; a list becomes comma-separated, a bool true or false, None is left out.
            request_id: what the server's logs shall call it: letters, digits and ``._:/+=@-``, at most 128.

        Raises:
            EndpointError: the endpoint answered with an error.
            ClientError: there was no answer.
        """
        body = image_bytes(image)
        path, query = request_path(model, version, options)
        extra = {"X-Request-Id": request_id} if request_id else None
        answer = self._ask("POST", self.base_url, path, self._token, query, body, extra)
        if answer.status_code != 200:
            raise self._error(answer, model, version)
        try:
            return answer.json()
        except requests.JSONDecodeError as error:
            raise ClientError(
                f"{self.base_url}{path} answered with something that is not JSON: {answer.text[:100]!r}. "
                "Is that a detserve endpoint?",
                type="bad_answer",
            ) from error

    def describe(self, model: str, version: str | None = None) -> dict[str, Any]:
        """Return what the worker of a model says of itself: spec, runtime, device, precision, categories.

        Without the management API's address the worker itself is asked, through the inference API.
        """
        name = quote(model, safe="") + (f"/{quote(version, safe='')}" if version else "")
        if self.management_url is None:
            answer = self._ask("POST", self.base_url, f"/predictions/{name}", self._token, extra={"describe": "True"})
            if answer.status_code != 200:
                raise self._error(answer, model, version)
            metadata = _json_or_none(answer)
        else:
            metadata = self._management(f"/models/{name}", model)[0].get("customizedMetadata")
        if not isinstance(metadata, dict) or "categories" not in metadata:
            raise ClientError(
                f"The worker of {model!r} does not describe itself; was its archive built by detserve?",
                type="bad_answer",
            )
        return cast("dict[str, Any]", metadata)

    def models(self) -> list[str]:
        """Return the names of the models that are served."""
        return sorted(entry["modelName"] for entry in self._management("/models?limit=100", None)["models"])

    def ready(self) -> bool:
        """Tell whether the server answers; with the management address also whether every worker is READY.

        Never by ``/ping`` alone when there is a better way: it is happy with dead workers.
        """
        try:
            if self.management_url is None:
                return self._ask("GET", self.base_url, "/ping", self._token).status_code == 200
            for model in self.models():
                for described in self._management(f"/models/{quote(model, safe='')}/all", model, customized=False):
                    workers = described["workers"]
                    if len(workers) < described["minWorkers"] or any(one["status"] != "READY" for one in workers):
                        return False
        except ClientError:
            return False
        return True

    def _management(self, path: str, model: str | None, *, customized: bool = True) -> Any:
        if self.management_url is None:
            raise ClientError(
                "This client does not know the management API; give management_url and management_token, "
                "or use Client.for_instance()."
            )
        query = {"customized": "true"} if customized and model is not None else {}
        answer = self._ask("GET", self.management_url, path, self._management_token, query)
        if answer.status_code != 200:
            raise self._error(answer, model, None)
        return answer.json()

    def _ask(
        self,
        method: str,
        base_url: str,
        path: str,
        token: _Bearer,
        query: Mapping[str, str] | None = None,
        body: bytes | None = None,
        extra: Mapping[str, str] | None = None,
    ) -> requests.Response:
        """Send; once more after a reset or a token that ran out, ``retries`` times more what may succeed later."""
        reset = renewed = 0
        attempt = 0

        def waited(retry_after: str | None = None) -> bool:
            """Wait for another attempt, when there is one left."""
            nonlocal attempt, renewed
            if attempt >= self.retries:
                return False
            attempt += 1
            renewed = 0  # a server that was started anew has other tokens
            self.retried += 1
            time.sleep(wait_s(attempt, retry_after))
            return True

        while True:
            headers = {**(extra or {}), **({} if body is None else {"Content-Type": "application/octet-stream"})}
            try:
                answer = self._session.request(
                    method,
                    base_url + path,
                    params=query or None,
                    data=body,
                    headers=headers,
                    auth=token,
                    timeout=self.timeout_s,
                    allow_redirects=False,
                )
            except requests.Timeout as error:
                raise ClientError(
                    f"No answer from {base_url} within {self.timeout_s:g} s. "
                    "Is the model slow or the queue long (`detserve serve status`)? Give it a longer timeout.",
                    type="timeout",
                ) from error
            except requests.ConnectionError as error:
                if is_reset(error) and not reset:
                    reset += 1
                    self.retried += 1
                    continue
                problem = no_connection(base_url, error, body, self._max_request_bytes)
                if problem.type in {"reset", "refused"} and waited():
                    continue
                raise problem from error
            except requests.RequestException as error:
                raise ClientError(f"The request to {base_url}{path} failed: {error}") from error
            except ServerError:  # the token's source: its server is being started anew
                if waited():
                    continue
                raise
            said = None if answer.status_code == 200 else Said.by(answer)
            if said and said.bad_token and token.renewable and not renewed:
                renewed += 1
                self.retried += 1
                token.forget()
                continue
            if said and said.retryable and waited(answer.headers.get("Retry-After")):
                continue
            return answer

    def _error(self, answer: requests.Response, model: str | None, version: str | None) -> EndpointError:
        said = Said.by(answer)
        details = ""
        if said.unknown is not None:
            details = self._served(model, said.unknown)
        elif said.unavailable:
            details = self._why_unavailable(model, version)
        what = f"{model!r} {version}" if version else repr(model)
        error = endpoint_error(said, what, details, self._max_request_bytes)
        told = _json_or_none(answer)
        # TorchServe's header has its own id in any case; the worker and the edge say the client's.
        error.request_id = (told.get("request_id") if isinstance(told, dict) else None) or answer.headers.get(
            "X-Request-Id"
        )
        return error

    def _served(self, model: str | None, kind: str) -> str:
        with contextlib.suppress(DetserveError, KeyError):
            if kind == "unknown_version" and model is not None:
                described = self._management(f"/models/{quote(model, safe='')}/all", model, customized=False)
                return f"It serves the versions: {', '.join(one['modelVersion'] for one in described)}."
            return f"It serves: {', '.join(self.models()) or 'nothing'}."
        return "`detserve serve status` lists what it serves."

    def _why_unavailable(self, model: str | None, version: str | None) -> str:
        """TorchServe says "no worker" for a full queue too: look which it is."""
        with contextlib.suppress(DetserveError, KeyError):
            path = f"/models/{quote(model or '', safe='')}" + (f"/{quote(version)}" if version else "")
            described = self._management(path, model, customized=False)
            ready = any(worker["status"] == "READY" for worker in described[0]["workers"])
            return "queue_full" if ready else "no_worker"
        return "unavailable"


def request_path(
    model: str, version: str | None = None, options: Mapping[str, object] | None = None
) -> tuple[str, dict[str, str]]:
    """Return the path and the query of a request; an option that is None is left out."""
    query = option_texts(options)
    name = quote(model, safe="") + (f"/{quote(version, safe='')}" if version else "")
    return f"/{name}/predict" if query else f"/predictions/{name}", query


def _json_or_none(answer: requests.Response) -> Any:
    try:
        return answer.json()
    except requests.JSONDecodeError:
        return None
