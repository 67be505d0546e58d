"""How a model that is registered while the server runs is to be served: from four places, the nearest first."""

from dataclasses import dataclass

from detserve.server.archives import ModelSettings
from detserve.server.capacity import capacity

LEFT_OPEN = ModelSettings(0, 0, 0, -1, 0, 0)
"""Defaults that tell what an archive does not set: no archive may set these values."""
_TIMEOUT_S = 120


@dataclass(frozen=True)
class ServingWish:
    """How a registered model is to be served; None leaves it to what is served already, the archive and the machine."""

    workers: int | None = None
    batch_size: int | None = None
    max_batch_delay_ms: int | None = None

    def settled(self, archive: ModelSettings, current: ModelSettings | None) -> ModelSettings:
        """Return how to serve it.

        Workers: the wish, what the version has that is the default now (the load will be the same), the archive, the
        machine. Batches: the wish, the archive, the default version, the machine.

        Args:
            archive: with ``LEFT_OPEN`` where it does not say.
            current: of the default version; None for a model that is not served yet.
        """
        now, fitting = current or LEFT_OPEN, capacity("auto")
        workers = _first(self.workers, now.min_workers, archive.min_workers, fitting.workers)
        most = _first(self.workers, now.max_workers, archive.max_workers, fitting.workers)
        delays = (self.max_batch_delay_ms, archive.max_batch_delay_ms, now.max_batch_delay_ms)
        return ModelSettings(
            min_workers=workers,
            max_workers=max(workers, most),
            batch_size=_first(self.batch_size, archive.batch_size, now.batch_size, fitting.batch_size),
            max_batch_delay_ms=next(
                (delay for delay in delays if delay is not None and delay >= 0), fitting.max_batch_delay_ms
            ),
            response_timeout_s=_first(archive.response_timeout_s, now.response_timeout_s, _TIMEOUT_S),
            startup_timeout_s=_first(archive.startup_timeout_s, now.startup_timeout_s, _TIMEOUT_S),
        )


def _first(*values: int | None) -> int:
    return next(value for value in values if value)
