"""P, mPC and rPC of a robustness run, honest about what was not measured.

    P    figure without corruption
    mPC  mean over corruptions and severities 1 to 5      (Michaelis et al. 2019, arXiv:1907.07484, section 3.3)
    rPC  mPC / P

A mean over fewer cells than it is defined over is *partial*, and says which cells are missing. MMDetection's script
fills them with zeros, which makes a detector look worse than it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dettools.analysis.corruptions import BENCHMARK, GROUPS, severities_of
from dettools.analysis.robustness_results import RobustnessResults


@dataclass(frozen=True)
class Aggregate:
    """The mean over some corruptions.

    Attributes:
        name: ``benchmark``, ``all`` or a group.
        metric: such as ``AP50``.
        p: without corruption; None where that was not measured.
        mpc: mean over the cells that there are; None where there is none.
        cells: how many there are.
        missing: the corruptions and severities that are not there.
    """

    name: str
    metric: str
    p: float | None
    mpc: float | None
    cells: int
    missing: tuple[tuple[str, int], ...]

    @property
    def partial(self) -> bool:
        """Whether the mean is over fewer cells than it is defined over."""
        return bool(self.missing)

    @property
    def rpc(self) -> float | None:
        """The share of P that is left under corruption; None without P."""
        return None if self.mpc is None or not self.p else self.mpc / self.p

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {
            "name": self.name,
            "metric": self.metric,
            "P": self.p,
            "mPC": self.mpc,
            "rPC": self.rpc,
            "partial": self.partial,
            "cells": self.cells,
            "missing": [list(one) for one in self.missing],
        }


def aggregate(results: RobustnessResults, name: str, *, task: str = "bbox", metric: str = "AP") -> Aggregate:
    """Average a figure over a set of corruptions, found by their names.

    Args:
        results: of a run.
        name: ``benchmark`` (the 15), ``all`` (those of the file that change the picture), or a group of ``GROUPS``.
        task: IoU type.
        metric: COCO's short name.
    """
    found: list[float] = []
    missing: list[tuple[str, int]] = []
    for corruption in _corruptions(results, name):
        for severity in severities_of(corruption):
            cell = results.cells.get(corruption, {}).get(severity)
            value = None if cell is None else cell.figures.get(task, {}).get(metric)
            if value is None:
                missing.append((corruption, severity))
            else:
                found.append(value)
    clean = None if results.clean is None else results.clean.figures.get(task, {}).get(metric)
    return Aggregate(name, metric, clean, sum(found) / len(found) if found else None, len(found), tuple(missing))


def groups_of(results: RobustnessResults) -> tuple[str, ...]:
    """Return the groups that the run measured anything of."""
    return tuple(name for name, corruptions in GROUPS.items() if any(one in results.cells for one in corruptions))


def corruption_mean(results: RobustnessResults, corruption: str, *, task: str, metric: str) -> Aggregate:
    """Return the same for one corruption."""
    values = {
        severity: cell.figures.get(task, {}).get(metric) for severity, cell in results.cells.get(corruption, {}).items()
    }
    found = [value for value in values.values() if value is not None]
    clean = None if results.clean is None else results.clean.figures.get(task, {}).get(metric)
    missing = tuple((corruption, one) for one in severities_of(corruption) if values.get(one) is None)
    return Aggregate(corruption, metric, clean, sum(found) / len(found) if found else None, len(found), missing)


def missing_text(missing: Sequence[tuple[str, int]], *, most: int = 6) -> str:
    """Return the missing cells in words, those of one corruption together."""
    by_name: dict[str, list[int]] = {}
    for corruption, severity in missing:
        by_name.setdefault(corruption, []).append(severity)
    parts = [
        name if tuple(severities) == severities_of(name) else f"{name} {', '.join(map(str, severities))}"
        for name, severities in by_name.items()
    ]
    more = len(parts) - most
    return "; ".join(parts[:most]) + (f"; and {more} more corruptions" if more > 0 else "")


def _corruptions(results: RobustnessResults, name: str) -> tuple[str, ...]:
    if name == "benchmark":
        return BENCHMARK
    if name == "all":
        return tuple(one for one in results.cells if one not in GROUPS["transport"])
    return GROUPS[name]
