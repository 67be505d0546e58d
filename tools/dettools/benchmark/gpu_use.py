"""What a GPU did during a level: the looks at it, summed up."""

from collections.abc import Sequence
from dataclasses import dataclass

from dettools.benchmark.measurement import GpuSample


@dataclass(frozen=True)
class GpuUse:
    """What one GPU did during a level: means, but the largest memory and temperature; None what is not told."""

    index: int
    utilisation: float | None
    memory_mb: float | None
    sm_clock_mhz: float | None
    power_w: float | None
    temperature_c: float | None
    throttled: bool | None


def gpu_use(looks: Sequence[GpuSample]) -> tuple[GpuUse, ...]:
    """Return what each GPU did, by its index."""
    found = []
    for index in sorted({look.index for look in looks}):
        of_it = [look for look in looks if look.index == index]
        told = {
            name: [value for look in of_it if (value := getattr(look, name)) is not None]
            for name in ("utilisation", "memory_mb", "sm_clock_mhz", "power_w", "temperature_c", "throttled")
        }
        means = {
            name: sum(told[name]) / len(told[name]) if told[name] else None
            for name in ("utilisation", "sm_clock_mhz", "power_w")
        }
        largest = {name: max(told[name], default=None) for name in ("memory_mb", "temperature_c")}
        throttled = any(told["throttled"]) if told["throttled"] else None
        found.append(GpuUse(index, **means, **largest, throttled=throttled))
    return tuple(found)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
