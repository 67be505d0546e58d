"""The client of the Open Inference Protocol (v2) over gRPC: what a KServe client asks, with the same answers as REST.

    ModelInfer(inputs = [image BYTES [1], option BYTES [1], …]) ─► detections (JSON), boxes_xyxy, scores, labels

Options go as further inputs, since TorchServe does not pass on the protocol's own parameters.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from dethandlers.detections import Detections

from detserve.detecting_client import image_bytes, option_texts
from detserve.errors import ClientError
from detserve.grpc_client import GrpcClient, named
from detserve.grpc_errors import raise_told
from detserve.grpc_messages import MODEL_INFER, MODEL_METADATA, MODEL_READY, SERVER_LIVE, SERVER_READY


@dataclass(frozen=True)
class InferAnswer:
    """An answer of `OpenInferenceClient.infer`.

    Attributes:
        model, version: who answered.
        id: the request's, or the one that the server gave it.
        document: the JSON answer, as REST gives it.
        detections: from the typed outputs; without masks and keypoints, which only the document has.
    """

    model: str
    version: str
    id: str
    document: Any
    detections: Detections


@dataclass(frozen=True)
class ModelVersions:
    """A model's name and the versions that are served, in no order."""

    name: str
    versions: tuple[str, ...]


class OpenInferenceClient(GrpcClient):
    """Calls the models of one server over the Open Inference Protocol. May be shared between threads."""

    def predict(
        self,
        model: str,
        image: bytes | Path,
        *,
        version: str | None = None,
        options: Mapping[str, object] | None = None,
    ) -> Any:
        """Send one image, return the JSON answer: the same as `Client.predict`'s."""
        return self.infer(model, image, version=version, options=options).document

    def infer(
        self,
        model: str,
        image: bytes | Path,
        *,
        version: str | None = None,
        options: Mapping[str, object] | None = None,
        id: str = "",  # noqa: A002 - the protocol's word
    ) -> InferAnswer:
        """Send one image, return all of the answer.

        Raises:
            EndpointError: the worker, or TorchServe, answered with an error.
            ClientError: there was no answer, or it is not one of ours.
        """
        contents = {"image": image_bytes(image)}
        contents |= {name: text.encode() for name, text in option_texts(options).items()}
        request = MODEL_INFER.request(model_name=model, model_version=version or "", id=id)
        for name, content in contents.items():
            tensor = request.inputs.add(name=name, datatype="BYTES", shape=[1])
            tensor.contents.bytes_contents.append(content)
        return self._call(MODEL_INFER, request, self._read, named(model, version))

    def live(self) -> bool:
        """Tell whether the server answers at all."""
        return self._call(SERVER_LIVE, SERVER_LIVE.request(), lambda answer: bool(answer.live))

    def ready(self) -> bool:
        """Return what the server says, which is true also while no worker is ready: ask `model_ready`."""
        return self._call(SERVER_READY, SERVER_READY.request(), lambda answer: bool(answer.ready))

    def model_ready(self, model: str, version: str | None = None) -> bool:
        """Tell whether as many workers of a model are ready as it has at least.

        Raises:
            EndpointError: it is not served.
        """
        request = MODEL_READY.request(name=model, version=version or "")
        return self._call(MODEL_READY, request, lambda answer: bool(answer.ready), named(model, version))

    def metadata(self, model: str) -> ModelVersions:
        """Return a model's versions; TorchServe tells nothing of its inputs and outputs.

        Raises:
            EndpointError: it is not served.
        """
        request = MODEL_METADATA.request(name=model)
        return self._call(
            MODEL_METADATA,
            request,
            lambda answer: ModelVersions(str(answer.name), tuple(answer.versions)),
            named(model, None),
        )

    def _read(self, answer: Any) -> InferAnswer:
        outputs = {output.name: output for output in answer.outputs}
        if "error" in outputs:
            raise_told(b"".join(outputs["error"].contents.bytes_contents), self.address)
        try:
            document = raise_told(b"".join(outputs["detections"].contents.bytes_contents), self.address)
            detections = Detections(
                boxes_xyxy=np.array(outputs["boxes_xyxy"].contents.fp32_contents, np.float32).reshape(-1, 4),
                scores=np.array(outputs["scores"].contents.fp32_contents, np.float32),
                labels=np.array(outputs["labels"].contents.int64_contents, np.int64),
            )
            return InferAnswer(answer.model_name, answer.model_version, answer.id, document, detections)
        except (KeyError, ValueError) as error:
            raise ClientError(
                f"{self.address} answered with the outputs {', '.join(outputs) or 'none'}; expected detections, "
                "boxes_xyxy, scores and labels. Is that a detserve endpoint?",
                type="bad_answer",
            ) from error
