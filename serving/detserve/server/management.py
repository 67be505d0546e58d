"""TorchServe's management API, as far as we use it.

Registering goes by `detserve.server.lifecycle`, which checks the archive first. Here an archive is only ever named by a
file of the instance's own model store: TorchServe takes an absolute path to any folder, whatever ``allowed_urls`` says,
and runs the code in it.
"""

import re
from typing import Any, Self, cast
from urllib.parse import quote

import requests

from detserve.errors import ServerError
from detserve.instance import Instance, InstanceState
from detserve.server.archives import ModelSettings
from detserve.server.tokens import NotAnsweringError, Token, renewed, token

Description = dict[str, Any]
"""One model version as the API describes it: modelName, modelVersion, workers, jobQueueStatus, customizedMetadata."""


_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.mar")
_CHANGE_TIMEOUT_S = 60.0


class NotServedError(ServerError):
    """The model or version is not registered."""


class Management:
    """Reads and changes what a running server serves."""

    def __init__(self, instance: Instance, state: InstanceState) -> None:
        self._instance = instance
        self._state = state
        self._token: Token | None = None
        self._session = requests.Session()
        self._session.trust_env = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._session.close()

    def models(self) -> dict[str, str]:
        """Return the models, each with the archive of its default version."""
        found: dict[str, str] = {}
        page: str | None = None
        while True:
            answer = self._get("/models", {"limit": "100", **({"next_page_token": page} if page else {})})
            found |= {entry["modelName"]: entry["modelUrl"] for entry in answer["models"]}
            page = answer.get("nextPageToken")
            if not page:
                return found

    def versions(self, model: str) -> list[Description]:
        """Describe every version of a model."""
        return cast("list[Description]", self._get(f"/models/{quote(model)}/all"))

    def describe(
        self, model: str, version: str | None = None, *, from_worker: bool = False, timeout_s: float = 10.0
    ) -> Description:
        """Describe one version, the default one without ``version``.

        Args:
            from_worker: let a worker answer too; its words are under ``customizedMetadata``.
        """
        path = f"/models/{quote(model)}" + (f"/{quote(version)}" if version else "")
        params = {"customized": "true"} if from_worker else {}
        answer = self._get(path, params, timeout_s)
        return cast("Description", answer[0])

    def answers(self, model: str, version: str, min_workers: int, *, timeout_s: float = 5.0) -> bool:
        """Return whether a version has its workers, all of them READY, and one has answered a question.

        Raises:
            NotServedError: it is not registered.
        """
        workers = self.describe(model, version)["workers"]
        if len(workers) < min_workers or any(worker["status"] != "READY" for worker in workers):
            return False
        if not workers:
            return True
        try:
            self.describe(model, version, from_worker=True, timeout_s=timeout_s)
        except NotAnsweringError:
            return False
        except ServerError as error:
            # A foreign handler that cannot describe itself fails in its own code: then a worker has answered.
            return "Prediction failed" in str(error) or "Invalid model predict output" in str(error)
        return True

    def register(self, file_name: str, settings: ModelSettings) -> None:
        """Register an archive of the instance's model store; its workers start, and are not waited for.

        Args:
            file_name: of the archive in the model store, no path.
            settings: win over those in the archive.

        Raises:
            ServerError: it is no file of the model store, or TorchServe does not take it.
        """
        if not _FILE_NAME.fullmatch(file_name) or not (self._instance.model_store / file_name).is_file():
            raise ServerError(
                f"Got {file_name!r} to register; expected an archive in the instance's own model store "
                f"({self._instance.model_store}). Register with `detserve models register`."
            )
        known = settings.to_torchserve()
        params = {
            "url": file_name,
            "initial_workers": known["minWorkers"],
            "batch_size": known["batchSize"],
            "max_batch_delay": known["maxBatchDelay"],
            "response_timeout": known["responseTimeout"],
            "startup_timeout": known["startupTimeout"],
            "synchronous": "false",
        }
        self._change("POST", "/models", {name: str(value) for name, value in params.items()})

    def scale(self, model: str, version: str, min_workers: int, max_workers: int) -> None:
        """Set how many workers a version has; they are not waited for. Those that are too many are cut off at once."""
        params = {"min_worker": str(min_workers), "max_worker": str(max_workers), "synchronous": "false"}
        self._change("PUT", f"/models/{quote(model)}/{quote(version)}", params)

    def set_default(self, model: str, version: str) -> None:
        """Let requests that name no version have this one from now on; those already queued stay where they are."""
        self._change("PUT", f"/models/{quote(model)}/{quote(version)}/set-default")

    def unregister(self, model: str, version: str) -> None:
        """Remove a version. What is in its queue is never answered, and its workers are cut off: drain it first."""
        self._change("DELETE", f"/models/{quote(model)}/{quote(version)}")

    def _change(self, method: str, path: str, params: dict[str, str] | None = None) -> None:
        answer = self._send_authorised(method, path, params, _CHANGE_TIMEOUT_S)
        if answer.status_code == 405:
            raise ServerError(
                "The server takes no models while it runs: its model API is off, as it always is without tokens "
                "(--no-token) and with --no-model-api. Start it again with the models to serve."
            )
        self._require(answer, path, {200, 202})

    def _get(self, path: str, params: dict[str, str] | None = None, timeout_s: float = 10.0) -> Any:
        answer = self._send_authorised("GET", path, params, timeout_s)
        self._require(answer, path, {200})
        return answer.json()

    @staticmethod
    def _require(answer: requests.Response, path: str, expected: set[int]) -> None:
        if answer.status_code == 404:
            raise NotServedError(f"The server does not serve {path.removeprefix('/models/')}: {_message(answer)}")
        if answer.status_code not in expected:
            raise ServerError(f"The management API answered {path} with HTTP {answer.status_code}: {_message(answer)}")

    def _send_authorised(
        self, method: str, path: str, params: dict[str, str] | None, timeout_s: float
    ) -> requests.Response:
        answer = self._send(method, path, params, timeout_s)
        if answer.status_code in {400, 401} and self._state.token_auth and self._token is not None:
            self._token = renewed(self._instance, self._state, "management", self._token.value)
            answer = self._send(method, path, params, timeout_s)
        return answer

    def _send(self, method: str, path: str, params: dict[str, str] | None, timeout_s: float) -> requests.Response:
        headers = {}
        if self._state.token_auth:
            if self._token is None:
                self._token = token(self._instance, "management")
            headers["Authorization"] = f"Bearer {self._token.value}"
        url = f"{self._state.management_url}{path}"
        try:
            return self._session.request(method, url, params=params, headers=headers, timeout=timeout_s)
        except requests.RequestException as error:
            raise NotAnsweringError(
                f"The management API at {self._state.management_url} does not answer ({type(error).__name__}). "
                f"Look at `detserve serve logs --instance {self._instance.name}`, or restart the server."
            ) from error


def _message(answer: requests.Response) -> str:
    try:
        return str(answer.json()["message"])
    except (ValueError, KeyError, TypeError):
        return answer.text.strip()[:200] or "no text"
