"""The exceptions of building, serving and calling, drawn once and caught once, in dettools.cli.

    DetserveError                 exit 2  the root
    ├── SpecError                         a spec that does not say what a spec says
    ├── CheckpointError                   weights that cannot or must not be read, or do not fit
    ├── ArchiveError                      an archive that is damaged, incomplete or not allowed
    ├── ServerError                       the server cannot be started, found or stopped
    └── ClientError                       the endpoint did not give an answer
        └── EndpointError                 it answered with an error: HTTP status, machine word, remedy

A message says what was got, what was expected and what to do.
"""


class DetserveError(Exception):
    """Root of the exceptions that a user is meant to read."""

    exit_code = 2


class SpecError(DetserveError):
    """A spec is not valid."""


class CheckpointError(DetserveError):
    """Weights cannot be read, must not be read, or do not fit the model."""


class ArchiveError(DetserveError):
    """An archive is damaged, incomplete or holds what it must not hold."""


class ServerError(DetserveError):
    """The server cannot be started, found or stopped."""


class ClientError(DetserveError):
    """A request to the endpoint got no answer.

    Attributes:
        type: machine word: ``timeout``, ``reset`` (the connection was cut), ``refused`` (nothing listens),
            ``unreachable``, ``bad_answer`` (it is no answer of ours), or ``no_answer``.
    """

    def __init__(self, message: str, *, type: str = "no_answer") -> None:  # noqa: A002
        super().__init__(message)
        self.type = type


class EndpointError(ClientError):
    """The endpoint answered with an error.

    Attributes:
        status: HTTP status of the answer.
        type: machine word of the error (``unknown_model``, ``body_too_large``, ``invalid_option``, …).
        retryable: whether the same request may succeed later.
        request_id: by which the server's logs name the request; None when the answer did not say.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int,
        type: str,  # noqa: A002
        retryable: bool = False,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message, type=type)
        self.status = status
        self.retryable = retryable
        self.request_id = request_id


class ExportError(DetserveError):
    """An ONNX file cannot be made, or does not equal the model that it was made from."""
