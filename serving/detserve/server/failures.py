"""Why a start failed, in the worker's or Java's own words, with what to do."""

import re
from collections.abc import Sequence
from pathlib import Path

from detserve.errors import ServerError
from detserve.instance import Instance, InstanceState, ServedModel
from detserve.server.worker_log import WorkerFailure


class NotStartedError(ServerError):
    """A model that was registered while the server runs did not start, so it is not served.

    Attributes:
        name, version: of the model.
    """

    def __init__(self, message: str, name: str, version: str) -> None:
        super().__init__(message)
        self.name = name
        self.version = version


class PortTakenError(ServerError):
    """Somebody took a port between our look and Java's bind."""


def worker_died(
    instance: Instance, state: InstanceState, failure: WorkerFailure, *, outcome: str = "The server was ended."
) -> ServerError:
    """A worker died while it loaded its model; ``outcome`` is what was done about it."""
    archives = {(model.name, model.version): model.archive for model in state.models}
    archive = archives.get((failure.model, failure.version), f"{failure.model}.mar")
    said = f"{failure.type}: {failure.message}" if failure.type else failure.message
    remedy = f"Try `detserve verify {archive}`."
    if "startup timeout" in failure.message and not failure.type:
        remedy = "Build the archive with a larger startup timeout."
    elif missing := re.search(r"No module named '([\w.]+)'", failure.message):
        remedy = f"Install the package of {missing[1].split('.')[0]!r} into the environment that serves."
    return ServerError(
        f"Model {failure.model!r} {failure.version} did not start; its worker said: {said}\n"
        f"{outcome} {remedy} Full log: {instance.log_folder / 'model_log.log'}"
    )


def not_registered(instance: Instance, error: str) -> ServerError:
    """TorchServe does not take an archive."""
    return ServerError(
        f"TorchServe refused an archive: {error}\nThe server was ended. Build the archive again with "
        f"`detserve archive SPEC.yaml`. Full log: {instance.log_folder / 'ts_log.log'}"
    )


def frontend_died(instance: Instance, code: int) -> ServerError:
    """Java ended before the server was ready."""
    console = _read(instance.log_folder / "console.log")
    if taken := re.search(r"Failed to bind to address: (\S+)|(Address already in use)", console):
        return PortTakenError(
            f"TorchServe could not listen: {taken[1] or 'an address'} was taken while it started. "
            "Start again, or take free ports with --port free."
        )
    lines = [line.strip() for line in console.splitlines() if line.strip() and not line.startswith("WARNING")]
    said = next((line for line in reversed(lines) if "Exception" in line or "rror" in line), " / ".join(lines[-3:]))
    return ServerError(
        f"TorchServe ended while starting (exit code {code}): {said or 'it printed nothing'}. "
        f"Full log: {instance.log_folder / 'console.log'}"
    )


def too_slow(instance: Instance, waiting: Sequence[ServedModel]) -> ServerError:
    """The time was over before every model answered."""
    names = ", ".join(f"{model.name} {model.version}" for model in waiting)
    lines = [line for line in _read(instance.log_folder / "model_log.log").splitlines() if line.strip()]
    return ServerError(
        f"Not ready in time: {names}. The server was ended. Give it longer with --timeout SECONDS. "
        f"The last that a worker printed: {lines[-1] if lines else 'nothing'}. "
        f"Full log: {instance.log_folder / 'model_log.log'}"
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
