"""The exceptions of the worker, drawn once.

    DetectorError                         500  the root: everything the worker may raise on purpose
    ├── RequestError                      400  one request is at fault; its neighbours in the batch are answered
    │   ├── OptionError                   400  an unknown option or a malformed value
    │   └── ImageError                    4xx  bytes that are not an image we serve
    └── ArtefactError                     500  the archive cannot be served: it fails while the worker starts

Every message says what was got, what was expected and what to do. `DetectorError.to_json()` is the body that a client
sees; `code` is the HTTP status, `type` the machine word.
"""

from typing import Any


class DetectorError(Exception):
    """Root of the worker's exceptions; carries the HTTP status and the machine word of the answer."""

    code: int = 500
    type: str = "internal_error"
    request_id: str | None = None  # of the request that it answers

    def __init__(self, message: str, *, type: str | None = None, code: int | None = None) -> None:  # noqa: A002
        super().__init__(message)
        self.message = message
        if type is not None:
            self.type = type
        if code is not None:
            self.code = code

    def to_json(self) -> dict[str, Any]:
        """Return the error object of the response contract."""
        told = {"code": self.code, "type": self.type, "message": self.message}
        return told if self.request_id is None else {**told, "request_id": self.request_id}


class RequestError(DetectorError):
    """One request is at fault; it fails alone."""

    code = 400
    type = "bad_request"


class OptionError(RequestError):
    """An unknown option, or a value outside of what the option allows."""

    type = "invalid_option"


class ImageError(RequestError):
    """Bytes that cannot be served as an image."""

    type = "invalid_image"


class ArtefactError(DetectorError):
    """The archive is damaged, incomplete, or made for something this worker does not have."""

    type = "invalid_artefact"
