"""TorchServe's management API, as far as we read it."""

from typing import Any, Self, cast
from urllib.parse import quote

import requests

from detserve.errors import ServerError
from detserve.instance import Instance, InstanceState
from detserve.server.tokens import NotAnsweringError, Token, renewed, token

Description = dict[str, Any]
"""One model version as the API describes it: modelName, modelVersion, workers, jobQueueStatus, customizedMetadata."""


class NotServedError(ServerError):
    """The model or version is not registered."""


class Management:
    """Reads the state of a running server."""

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

    def _get(self, path: str, params: dict[str, str] | None = None, timeout_s: float = 10.0) -> Any:
        answer = self._send(path, params, timeout_s)
        if answer.status_code in {400, 401} and self._state.token_auth and self._token is not None:
            self._token = renewed(self._instance, self._state, "management", self._token.value)
            answer = self._send(path, params, timeout_s)
        if answer.status_code == 404:
            raise NotServedError(f"The server does not serve {path.removeprefix('/models/')}: {_message(answer)}")
        if answer.status_code != 200:
            raise ServerError(f"The management API answered {path} with HTTP {answer.status_code}: {_message(answer)}")
        return answer.json()

    def _send(self, path: str, params: dict[str, str] | None, timeout_s: float) -> requests.Response:
        headers = {}
        if self._state.token_auth:
            if self._token is None:
                self._token = token(self._instance, "management")
            headers["Authorization"] = f"Bearer {self._token.value}"
        url = f"{self._state.management_url}{path}"
        try:
            return self._session.get(url, params=params, headers=headers, timeout=timeout_s)
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
