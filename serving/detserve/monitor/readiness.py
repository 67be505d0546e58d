"""Whether a server may get requests, and if not, why.

TorchServe's own ``/ping`` is happy with dead workers and with models that never load. Here every worker of every model
must be READY and its process alive, its golden check passed, and no stop under way.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from detserve.errors import DetserveError
from detserve.instance import Instance
from detserve.server.status import ModelStatus, ServerStatus, status


@dataclass(frozen=True)
class Readiness:
    """The answer, and what it rests on.

    Attributes:
        reasons: why the server is not ready, for people; empty when it is.
        draining: whether a stop waits for the requests in flight.
        status: of the server; None when it could not be asked, or not yet.
    """

    reasons: tuple[str, ...]
    draining: bool
    status: ServerStatus | None

    @property
    def ready(self) -> bool:
        """Whether the server may get requests."""
        return not self.reasons

    def to_json(self) -> dict[str, Any]:
        """Return what ``/ready`` answers."""
        models = self.status.models if self.status else ()
        return {
            "ready": self.ready,
            "reasons": list(self.reasons),
            "draining": self.draining,
            "models": [
                {
                    "name": model.name,
                    "version": model.version,
                    "workers_wanted": model.min_workers,
                    "workers": [
                        {key: value for key, value in asdict(worker).items() if key in {"id", "state", "pid"}}
                        for worker in model.workers
                    ],
                }
                for model in models
            ],
        }


def readiness(instance: Instance, golden: Mapping[tuple[str, str], bool], *, frontend_problem: str = "") -> Readiness:
    """Ask the server.

    Args:
        golden: name and version to whether the golden image is reproduced, of the models whose workers say it.
        frontend_problem: why the frontend does not answer; it is not asked then.
    """
    draining = instance.draining_path.exists()
    reasons = ["the server is being stopped"] if draining else []
    state = instance.running()
    if state is None:
        return Readiness((*reasons, "no server runs"), draining, None)
    if not state.ready:
        return Readiness((*reasons, "the server is starting"), draining, None)
    if frontend_problem:
        return Readiness((*reasons, frontend_problem), draining, None)
    try:
        found = status(instance, ask_workers=False)
    except DetserveError as error:
        return Readiness((*reasons, str(error)), draining, None)
    except (KeyError, IndexError, TypeError) as error:
        return Readiness((*reasons, f"the management API's answer cannot be read ({error!r})"), draining, None)
    if not found.models:
        reasons.append("no model is served")
    recorded = {(one.name, one.version): one.min_workers for one in state.models}
    for model in found.models:
        settled = _settled(model, recorded.get((model.name, model.version)))
        if settled is not None:
            reasons += model_reasons(settled, golden.get((model.name, model.version)))
    return Readiness(tuple(reasons), draining, found)


def _settled(model: ModelStatus, recorded_workers: int | None) -> ModelStatus | None:
    """Return a version as far as it serves: what `detserve models` is bringing in or taking out serves nothing yet.

    Such a change is in the instance's state when it is done. Meanwhile the server answers as before, and must not lose
    its requests for it.
    """
    if recorded_workers is None or model.min_workers == 0:
        return None
    if model.min_workers <= recorded_workers:
        return model
    # More are being started: those that there were have to be there.
    there = sorted(model.workers, key=lambda worker: worker.state != "READY" or not worker.memory_bytes)
    return replace(model, min_workers=recorded_workers, workers=tuple(there[:recorded_workers]))


def model_reasons(model: ModelStatus, golden_passed: bool | None) -> list[str]:
    """Return why a model is not ready."""
    name = f"{model.name} {model.version}"
    serving = alive_workers(model)
    reasons = []
    if serving < model.min_workers or serving < len(model.workers):
        wanted = max(model.min_workers, len(model.workers))
        reasons.append(f"{name}: {serving} of {wanted} workers are ready")
    if golden_passed is False:
        reasons.append(f"{name}: a worker does not reproduce its golden image")
    return reasons


def alive_workers(model: ModelStatus) -> int:
    """Count the workers that are READY; TorchServe calls one so for some time after it was killed."""
    return sum(worker.state == "READY" and worker.memory_bytes > 0 for worker in model.workers)
