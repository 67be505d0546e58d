"""Anchors that cover the boxes of a data set best: k-means with restarts, or differential evolution.

    SizeHistogram ─┬► cluster_anchors (k-means++ seeds, restarts, no dead cluster) ────────┬─► Search ─► polished
                   └► evolve_anchors  (scipy's differential evolution, whole generations) ─┘

Both maximise the mean IoU of a box with its best anchor. What they start from is drawn from a seed, so that the same
boxes give the same anchors.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import differential_evolution, minimize

from dettools.analysis.anchor_boxes import AnchorError, SizeHistogram, Sizes, iou_of_sizes

Progress = Callable[[int, float], None]
"""Gets the number of the step and the mean IoU so far."""

# As the original asks scipy to.
_POPULATION = 15
_TOLERANCE = 1e-4
_MUTATION = (0.5, 1.0)
_RECOMBINATION = 0.7
# Pixels, of the numeric gradient: the mean IoU has kinks, but none so narrow.
_GRADIENT_STEP = 0.01
_REVIVING_STEPS = 30
# What one pass of the cost works on stays in the processor's cache.
_CANDIDATES_AT_ONCE = 32


@dataclass(frozen=True)
class Search:
    """What a search found.

    Attributes:
        anchors: ``(K, 2)`` width and height in pixels, not rounded, the smallest area first.
        mean_iou: on the histogram.
        steps: iterations of k-means in the best restart, or generations.
        converged: it ended before the number of steps that was allowed.
        repaired: clusters that had lost all their boxes and were put on the worst covered ones.
        spread: the mean IoU that each restart reached, the first one first; empty for evolution.
    """

    anchors: Sizes
    mean_iou: float
    steps: int
    converged: bool
    repaired: int = 0
    spread: tuple[float, ...] = field(default=(), repr=False)


def cluster_anchors(
    histogram: SizeHistogram, count: int, *, iterations: int = 1000, restarts: int = 10, seed: int = 0
) -> Search:
    """k-means with 1 − IoU as the distance; seeds by k-means++ (Arthur and Vassilvitskii 2007).

    A cluster that loses its last box is put on the box that is covered worst: its mean would be that of nothing, and
    the original makes it an anchor of 0 × 0.

    Raises:
        AnchorError: fewer different box sizes than anchors, or no restart.
    """
    _require(histogram, count)
    if restarts < 1 or iterations < 1:
        raise AnchorError(f"got {restarts} restarts of {iterations} iterations, expected at least 1 of each")
    random = np.random.default_rng(seed)
    runs = [_clustered(histogram, _seeds(histogram, count, random), iterations) for _ in range(restarts)]
    best = max(runs, key=lambda run: run.mean_iou)
    return Search(
        anchors=_by_area(best.anchors),
        mean_iou=best.mean_iou,
        steps=best.steps,
        converged=best.converged,
        repaired=sum(run.repaired for run in runs),
        spread=tuple(run.mean_iou for run in runs),
    )


def evolve_anchors(
    histogram: SizeHistogram,
    count: int,
    input_size: tuple[int, int],
    *,
    steps: int = 1000,
    seed: int = 0,
    tolerance: float = _TOLERANCE,
    progress: Progress | None = None,
) -> Search:
    """Differential evolution (Storn and Price 1997, best/1/bin) of all anchors at once.

    Widths and heights lie between 1 px and the input's. scipy's own defaults and those of the original hold, but for
    ``updating``: a whole generation is measured at once.

    Args:
        histogram: the boxes.
        count: how many anchors.
        input_size: width and height in pixels.
        steps: generations at most.
        seed: of the population and its mutations.
        tolerance: it ends when the population's spread is below this part of its mean cost.
        progress: is told every generation.

    Raises:
        AnchorError: fewer different box sizes than anchors, or no step.
    """
    _require(histogram, count)
    if steps < 1:
        raise AnchorError(f"got {steps} steps, expected at least 1")
    # Half the precision is twice the speed, and far finer than the whole pixels that come out.
    cost = _Cost(histogram, count, np.float32)
    told = 0

    def tell(intermediate_result: object) -> None:
        nonlocal told
        told += 1
        if progress is not None:
            progress(told, 1 - float(intermediate_result.fun))  # type: ignore[attr-defined]

    found = differential_evolution(
        cost,
        bounds=[(1.0, float(input_size[0])), (1.0, float(input_size[1]))] * count,
        strategy="best1bin",
        maxiter=steps,
        popsize=_POPULATION,
        tol=tolerance,
        mutation=_MUTATION,
        recombination=_RECOMBINATION,
        rng=np.random.default_rng(seed),
        polish=False,
        vectorized=True,
        updating="deferred",
        callback=tell,
    )
    anchors = found.x.reshape(count, 2)
    return Search(_by_area(anchors), mean_iou_of(anchors, histogram), int(found.nit), bool(found.success))


def polished(found: Search, histogram: SizeHistogram, input_size: tuple[int, int]) -> Search:
    """Climb from what a search found (L-BFGS-B, within 1 px and the input's size), on a finer histogram if wanted.

    The mean of a cluster is not what has the best IoU with its boxes; evolution ends near the top, not on it, and
    leaves anchors that are no box's best: a few steps of k-means put those on the boxes that are covered worst.

    Returns:
        The better of the two; ``mean_iou`` is that on this histogram.
    """
    count = len(found.anchors)
    revived = _clustered(histogram, found.anchors, _REVIVING_STEPS)
    start = revived.anchors.clip(1.0, np.array(input_size, np.float64))
    cost = _Cost(histogram, count, np.float64)
    climbed = minimize(
        lambda anchors: float(cost(anchors[:, None])[0]),
        start.ravel(),
        method="L-BFGS-B",
        bounds=[(1.0, float(input_size[0])), (1.0, float(input_size[1]))] * count,
        jac=lambda anchors: _gradient(cost, anchors),
    )
    candidates = [found.anchors, climbed.x.reshape(count, 2)]
    means = [mean_iou_of(anchors, histogram) for anchors in candidates]
    best = int(np.argmax(means))
    return replace(
        found,
        anchors=_by_area(candidates[best]),
        mean_iou=means[best],
        repaired=found.repaired + (revived.repaired if best else 0),
    )


def mean_iou_of(anchors: Sizes, histogram: SizeHistogram) -> float:
    """Return the mean IoU of a box with its best anchor, the boxes taken from their histogram."""
    best = iou_of_sizes(histogram.sizes, anchors).max(axis=1)
    return float(np.average(best, weights=histogram.weights))


class _Cost:
    """1 − mean IoU of many sets of anchors at once; called by scipy with ``(2 K, S)``, one column a candidate."""

    def __init__(self, histogram: SizeHistogram, count: int, precision: type[np.floating[Any]]) -> None:
        self._count = count
        self._width = np.ascontiguousarray(histogram.sizes[:, 0], precision)
        self._height = np.ascontiguousarray(histogram.sizes[:, 1], precision)
        self._area = self._width * self._height
        self._weights = (histogram.weights / histogram.weights.sum()).astype(precision)
        shape = (_CANDIDATES_AT_ONCE, len(self._width))
        self._inside, self._other, self._best = (np.empty(shape, precision) for _ in range(3))

    def __call__(self, candidates: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        sets = np.atleast_2d(candidates.T).reshape(-1, self._count, 2).astype(self._width.dtype)
        costs = np.empty(len(sets))
        for start in range(0, len(sets), _CANDIDATES_AT_ONCE):
            part = sets[start : start + _CANDIDATES_AT_ONCE]
            costs[start : start + len(part)] = 1 - self._mean_iou(part)
        return costs

    def _mean_iou(self, sets: npt.NDArray[Any]) -> npt.NDArray[Any]:
        inside, other, best = (buffer[: len(sets)] for buffer in (self._inside, self._other, self._best))
        for place in range(self._count):
            width, height = sets[:, place, 0, None], sets[:, place, 1, None]
            np.minimum(self._width, width, out=inside)
            np.minimum(self._height, height, out=other)
            inside *= other
            # inside / (both areas) grows as inside / union does, and needs one step less for every anchor.
            np.add(self._area, width * height, out=other)
            if place:
                inside /= other
                np.maximum(best, inside, out=best)
            else:
                np.divide(inside, other, out=best)
        np.subtract(1, best, out=other)
        best /= other
        found: npt.NDArray[Any] = best @ self._weights
        return found


def _gradient(cost: _Cost, anchors: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    steps = np.eye(len(anchors)) * _GRADIENT_STEP
    return (cost(anchors[:, None] + steps) - cost(anchors[:, None] - steps)) / (2 * _GRADIENT_STEP)


def _clustered(histogram: SizeHistogram, anchors: Sizes, iterations: int) -> Search:
    sizes, weights = histogram.sizes, histogram.weights
    count = len(anchors)
    nearest = np.full(len(sizes), -1)
    repaired = 0
    best_anchors, best_mean = anchors, -1.0
    step = 0
    while step < iterations:
        step += 1
        iou = iou_of_sizes(sizes, anchors)
        now = iou.argmax(axis=1)
        best = iou[np.arange(len(sizes)), now]
        # The mean of a cluster is not what has the best IoU with it: a step can lose, and the best one counts.
        if (mean := float(np.average(best, weights=weights))) > best_mean:
            best_anchors, best_mean = anchors, mean
        held = np.bincount(now, minlength=count)
        for empty in np.flatnonzero(held == 0):
            # Of a cluster that keeps others, so that no new one dies.
            losing = np.where(held[now] > 1, (1 - best) * weights, -1.0)
            place = int(losing.argmax())
            held[now[place]] -= 1
            now[place], best[place], held[empty] = empty, 1.0, 1
            repaired += 1
        if np.array_equal(now, nearest):
            break
        nearest = now
        mass = np.bincount(nearest, weights=weights, minlength=count)
        sums = [np.bincount(nearest, weights=weights * sizes[:, side], minlength=count) for side in (0, 1)]
        anchors = np.stack(sums, axis=1) / mass[:, None]
    else:
        if (mean := mean_iou_of(anchors, histogram)) > best_mean:
            best_anchors, best_mean = anchors, mean
    return Search(best_anchors, best_mean, step, step < iterations, repaired)


def _seeds(histogram: SizeHistogram, count: int, random: np.random.Generator) -> Sizes:
    """Draw different boxes, each with a chance that grows with its distance from those drawn before."""
    sizes, weights = histogram.sizes, histogram.weights
    drawn = [int(random.choice(len(sizes), p=weights / weights.sum()))]
    distance = 1 - iou_of_sizes(sizes, sizes[drawn])[:, 0]
    while len(drawn) < count:
        chance = weights * distance
        chance[drawn] = 0
        drawn.append(int(random.choice(len(sizes), p=chance / chance.sum())))
        distance = np.minimum(distance, 1 - iou_of_sizes(sizes, sizes[drawn[-1:]])[:, 0])
    return sizes[drawn]


def _by_area(anchors: Sizes) -> Sizes:
    return anchors[np.argsort(anchors.prod(axis=1), kind="stable")]


def _require(histogram: SizeHistogram, count: int) -> None:
    if not 1 <= count <= len(histogram.sizes):
        raise AnchorError(
            f"got {count} anchors for {len(histogram.sizes)} different box sizes, expected between 1 and as many "
            "anchors as sizes"
        )
