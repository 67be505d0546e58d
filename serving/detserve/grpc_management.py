"""The gRPC client of TorchServe's management service: it describes, scales, registers and unregisters models.

It listens on this machine only, and registers nothing unless the server's model API is on: an archive is code.
`detserve models` checks an archive before it is registered; this client does not.
"""

import json
from typing import Any, Literal, cast

from detserve.errors import ClientError
from detserve.grpc_channel import GrpcChannel
from detserve.grpc_client import named
from detserve.grpc_messages import (
    DESCRIBE_MODEL,
    LIST_MODELS,
    REGISTER_MODEL,
    SCALE_WORKER,
    SET_DEFAULT,
    UNREGISTER_MODEL,
    Method,
)

Description = dict[str, Any]
"""One model version as TorchServe describes it: modelName, modelVersion, workers, jobQueueStatus, …"""


class GrpcManagement(GrpcChannel):
    """Manages the models of one server. May be shared between threads; the arguments are `GrpcChannel`'s.

    Every method raises EndpointError when the server refuses, ClientError when it does not answer.
    """

    service: Literal["inference", "management"] = "management"

    def models(self) -> dict[str, str]:
        """Return the models, each with the archive of its default version."""
        found: dict[str, str] = {}
        page = 0
        while True:
            text = self._ask(LIST_MODELS, LIST_MODELS.request(limit=100, next_page_token=page))
            answer = self._parsed(text)
            found |= {entry["modelName"]: entry["modelUrl"] for entry in answer["models"]}
            if not answer.get("nextPageToken"):
                return found
            page = int(answer["nextPageToken"])

    def describe(self, model: str, version: str | None = None, *, from_worker: bool = False) -> Description:
        """Describe one version, the default one without ``version``.

        Args:
            from_worker: let a worker answer too; its words are under ``customizedMetadata``.
        """
        request = DESCRIBE_MODEL.request(model_name=model, model_version=version or "", customized=from_worker)
        text = self._ask(DESCRIBE_MODEL, request, named(model, version))
        return cast("Description", self._parsed(text)[0])

    def versions(self, model: str) -> list[Description]:
        """Describe every version of a model."""
        request = DESCRIBE_MODEL.request(model_name=model, model_version="all")
        return cast("list[Description]", self._parsed(self._ask(DESCRIBE_MODEL, request, named(model, None))))

    def register(
        self,
        url: str,
        *,
        model: str | None = None,
        workers: int = 1,
        batch_size: int | None = None,
        max_batch_delay_ms: int | None = None,
        response_timeout_s: int | None = None,
        startup_timeout_s: int | None = None,
    ) -> str:
        """Register an archive, wait until its workers run, and return what TorchServe says.

        Args:
            url: the archive's file name in the model store, or a place that the server allows.
            model: name to serve it by; without one its own. None anywhere leaves what the archive says.
        """
        request = REGISTER_MODEL.request(
            url=url,
            model_name=model or "",
            initial_workers=workers,
            synchronous=True,
            batch_size=batch_size or 0,
            max_batch_delay=max_batch_delay_ms or 0,
            response_timeout=response_timeout_s or 0,
            startup_timeout=startup_timeout_s or 0,
        )
        return self._ask(REGISTER_MODEL, request, repr(url))

    def scale(self, model: str, version: str | None = None, *, min_workers: int, max_workers: int | None = None) -> str:
        """Set how many workers a version has, wait until they run, and return what TorchServe says."""
        request = SCALE_WORKER.request(
            model_name=model,
            model_version=version or "",
            min_worker=min_workers,
            max_worker=min_workers if max_workers is None else max_workers,
            synchronous=True,
        )
        return self._ask(SCALE_WORKER, request, named(model, version))

    def set_default(self, model: str, version: str) -> str:
        """Let requests without a version go to this one; return what TorchServe says."""
        request = SET_DEFAULT.request(model_name=model, model_version=version)
        return self._ask(SET_DEFAULT, request, named(model, version))

    def unregister(self, model: str, version: str | None = None) -> str:
        """Take a version out of service, the default one without ``version``; return what TorchServe says."""
        request = UNREGISTER_MODEL.request(model_name=model, model_version=version or "")
        return self._ask(UNREGISTER_MODEL, request, named(model, version))

    def _ask(self, method: Method, request: Any, asked: str = "this") -> str:
        return self._call(method, request, lambda answer: str(answer.msg), asked)

    def _parsed(self, text: str) -> Any:
        try:
            return json.loads(text)
        except ValueError as error:
            raise ClientError(
                f"{self.address} answered with something that is not JSON: {text[:100]!r}. Is that TorchServe?",
                type="bad_answer",
            ) from error
