"""Photographs that are dropped on the page, and what the served model answers to them.

The endpoint is asked from here, never by the browser: its token stays in this process.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Self

from detserve.detecting_client import parse_detections
from detserve.errors import ClientError, DetserveError, EndpointError

from dettools.endpoint import Endpoint, concerns_every_request
from dettools.viewer.photographs import read_header

if TYPE_CHECKING:
    from detserve.client import Client

ASKED_SCORE = 0.01
"""The page has a threshold of its own: almost all is asked for."""
LARGEST_UPLOAD = 20_000_000
_KEPT = 50


class NotAPhotographError(DetserveError):
    """What was dropped cannot be read as an image."""


class LiveModel:
    """One served model, and the last photographs that it was asked about.

    Args:
        endpoint: the server.
        model: the name of the model.

    Raises:
        ClientError: nothing listens there, or it does not serve this model to us.
    """

    def __init__(self, endpoint: Endpoint, model: str) -> None:
        self.model = model
        self.categories: tuple[str, ...] = ()
        self._client: Client = endpoint.open()
        self._lock = threading.Lock()
        self._options: dict[str, object] = {"score_threshold": ASKED_SCORE}
        self._photographs: OrderedDict[int, Path] = OrderedDict()
        self._number = 0
        try:
            self._describe()
        except BaseException:
            self._client.close()
            raise
        self._folder = TemporaryDirectory(prefix="detserve-view-")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()
        self._folder.cleanup()

    def _describe(self) -> None:
        try:
            facts = self._client.describe(self.model)
        except ClientError as error:
            # A foreign archive answers, but does not describe itself.
            if concerns_every_request(error) or error.type == "timeout":
                raise
            self._options = {}
            return
        self.categories = tuple(str(one["name"]) for one in facts["categories"])
        if "masks" in facts.get("capabilities", ()):
            self._options["masks"] = "rle"

    def ask(self, content: bytes) -> dict[str, Any]:
        """Keep a photograph and return the model's detections, boxes as xywh px of it turned upright.

        Raises:
            NotAPhotographError: it is no image.
            ClientError: the endpoint gave no answer, or an error.
        """
        with self._lock:
            self._number += 1
            number = self._number
        path = Path(self._folder.name) / f"{number}"
        path.write_bytes(content)
        try:
            header = read_header(path)
        except OSError:
            path.unlink()
            raise NotAPhotographError(
                f"got {len(content)} bytes that are no image, expected a photograph such as JPEG, PNG or WebP"
            ) from None
        try:
            # A client is not to be shared between threads.
            with self._lock:
                answer = self._client.predict(self.model, content, options=self._options)
        except BaseException:
            path.unlink()
            raise
        found = parse_detections(answer)
        entries: list[dict[str, Any]] = answer["detections"] if isinstance(answer, dict) else answer
        with self._lock:
            self._photographs[number] = path
            while len(self._photographs) > _KEPT:
                with suppress(OSError):
                    self._photographs.popitem(last=False)[1].unlink()
        return {
            "number": number,
            "size": list(header.turned),
            "detections": [
                {
                    "box": [float(box[0]), float(box[1]), float(box[2] - box[0]), float(box[3] - box[1])],
                    "mask": one.get("segmentation"),
                    "score": float(one["score"]),
                    "name": str(one.get("class_name", one["class_label"])),
                }
                for one, box in zip(entries, found.boxes_xyxy.tolist(), strict=True)
            ],
        }

    def photograph(self, number: int) -> Path:
        """Return the file of a photograph that was asked about.

        Raises:
            KeyError: there is none, or no longer.
        """
        with self._lock:
            return self._photographs[number]


def status_of(error: DetserveError) -> int:
    """Return the HTTP status that tells the page about an error."""
    if isinstance(error, NotAPhotographError):
        return 415
    if isinstance(error, ClientError) and not (isinstance(error, EndpointError) and error.status < 500):
        return 502
    return 422
