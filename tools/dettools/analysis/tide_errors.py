"""TIDE: of which kind each error is, and how much AP would rise if that kind were mended.

    Overlaps ─► match at IoU .5 ─► found, missed ─► each false positive: Cls Loc Both Dupe Bkg ─┬► counts by class, size
                                                    each missed object: Miss, or one of those   └► ΔAP by class, size

After Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection Errors" (arXiv 2008.08115). The matches
are those of every other tool here: objects found and missed add up to the objects, false positives to their kinds.
hotcoco's ``tide_errors`` has the totals too: the same where there are no crowds (tests), but it takes a crowd for an
object that can be badly placed; here, as in the paper's own program, it only excuses.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np

from dettools.analysis.error_stacks import AREA_NAMES, AREAS, Ranking, size_groups
from dettools.analysis.overlaps import Bools, Floats, Ints, Overlaps, match

Kind = Literal["Cls", "Loc", "Both", "Dupe", "Bkg", "Miss"]
KINDS: tuple[Kind, ...] = ("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss")
SPECIALS = ("FP", "FN")
MEANINGS: dict[str, str] = {
    "Cls": "on an object, but of another class",
    "Loc": "right class, badly placed",
    "Both": "another class and badly placed",
    "Dupe": "the object is found already",
    "Bkg": "on no object",
    "Miss": "object that nothing lies on, neither Cls nor Loc",
    "FP": "all false positives",
    "FN": "all missed objects",
}
_RIGHT, _UNCOUNTED = -1, -2


@dataclass(frozen=True)
class Figures:
    """One class or all, of one size or all.

    Attributes:
        objects: to be found: ``found`` + ``missed``.
        detections: that count: ``found`` + the kinds of false positives.
        counts: errors by kind; ``Miss`` are those missed objects that no Cls or Loc error lies on.
        ap: at the IoU of the matches; None without objects.
        delta_ap: what it would rise by, by kind and for ``FP`` and ``FN``; None likewise.
    """

    objects: int
    found: int
    missed: int
    detections: int
    counts: dict[str, int]
    ap: float | None
    delta_ap: dict[str, float] | None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return vars(self)


@dataclass(frozen=True)
class TideErrors:
    """The errors of one data set; K classes, D detections and G objects as in ``overlaps``.

    A false positive belongs to the class that was predicted, and to the size of the object it lies on, on background to
    its own; so the sizes, like the classes, add up to all.

    Attributes:
        kind: ``(D,)`` place in `KINDS`; -1: right, -2: not counted.
        target: ``(D,)`` the object that a detection found or lies on; -1 for none.
        found: ``(G,)``.
        missed: ``(G,)`` those of the kind Miss.
        ap: ``(4, K)`` by size; NaN without objects.
        delta_ap: ``(8, 4, K)`` by `KINDS` and `SPECIALS`.
        iou_threshold, background_iou: t_f and t_b of the paper.
        size: ``(D,)`` and object_size ``(G,)``, as `size_groups`.
        overlaps: what was matched.
    """

    kind: Ints
    target: Ints
    found: Bools
    missed: Bools
    ap: Floats
    delta_ap: Floats
    iou_threshold: float
    background_iou: float
    size: Ints
    object_size: Ints
    overlaps: Overlaps = field(repr=False)

    def figures(self, area: int = 0, label: int | None = None) -> Figures:
        """Return the figures of one class, or of all: AP as the mean of the classes that have objects."""
        tables, objects, found = self._tables, self._objects[area], self._found[area]
        places = slice(None) if label is None else slice(label, label + 1)
        has = objects[places] > 0
        number, right = int(objects[places].sum()), int(found[places].sum())
        counts: dict[str, int] = {kind: int(tables[place, area, places].sum()) for place, kind in enumerate(KINDS)}
        wrong = sum(count for kind, count in counts.items() if kind != "Miss")
        if not has.any():
            return Figures(number, right, number - right, right + wrong, counts, None, None)
        delta = self.delta_ap[:, area, places][:, has].mean(axis=1)
        return Figures(
            number,
            right,
            number - right,
            right + wrong,
            counts,
            float(self.ap[area, places][has].mean()),
            dict(zip((*KINDS, *SPECIALS), delta.tolist(), strict=True)),
        )

    def worst(self, kind: Kind, most: int, among: Collection[int] | None = None) -> list[int]:
        """Return detections of a kind, the surest first, of Miss objects, the largest first; one of an image.

        Args:
            kind: of error.
            most: how many.
            among: ids of the images to look at; all by default.
        """
        overlaps = self.overlaps
        if kind == "Miss":
            places, by, image = np.flatnonzero(self.missed), overlaps.object_area, overlaps.object_image
        else:
            places, by, image = np.flatnonzero(self.kind == KINDS.index(kind)), overlaps.score, overlaps.image
        if among is not None:
            places = places[np.isin(overlaps.image_ids[image[places]], list(among))]
        ranked = places[np.argsort(-by[places], kind="stable")]
        _, first = np.unique(image[ranked], return_index=True)
        chosen: list[int] = ranked[np.sort(first)][:most].tolist()
        return chosen

    @cached_property
    def _tables(self) -> Ints:
        """``(6, 4, K)`` counts."""
        overlaps = self.overlaps
        tables = [
            _by_size(overlaps.label, self.size, self.kind == place, len(overlaps.category_ids))
            for place in range(len(KINDS) - 1)
        ]
        return np.stack([*tables, self._of_objects(self.missed)])

    @cached_property
    def _objects(self) -> Ints:
        return self._of_objects(~self.overlaps.crowd)

    @cached_property
    def _found(self) -> Ints:
        return self._of_objects(self.found)

    def _of_objects(self, chosen: Bools) -> Ints:
        overlaps = self.overlaps
        return _by_size(overlaps.object_class, self.object_size, chosen, len(overlaps.category_ids))


def tide_errors(
    overlaps: Overlaps,
    *,
    iou_threshold: float = 0.5,
    background_iou: float = 0.1,
    areas: Sequence[float] = AREAS,
) -> TideErrors:
    """Tell the errors apart and mend one kind at a time.

    Args:
        overlaps: of one data set.
        iou_threshold: t_f, to find an object.
        background_iou: t_b, to lie on one.
        areas: ends of small, medium and large, px².

    Raises:
        MetricsError: a threshold below the overlaps that were kept.
    """
    matches = match(overlaps, iou_threshold)
    own, own_iou = _nearest(overlaps, overlaps.same_class)
    other, other_iou = _nearest(overlaps, ~overlaps.same_class)
    # In this order, as in the paper's own program: what is of two kinds is of the first.
    conditions = [
        (own_iou >= background_iou) & (own_iou < iou_threshold),
        other_iou >= iou_threshold,
        own_iou >= iou_threshold,
        np.maximum(own_iou, other_iou) < background_iou,
    ]
    names: tuple[Kind, ...] = ("Loc", "Cls", "Dupe", "Bkg")
    kind = np.select(conditions, [KINDS.index(name) for name in names], KINDS.index("Both"))
    kind = np.where(matches.counted, np.where(matches.true_positive, _RIGHT, kind), _UNCOUNTED)
    target = np.select(
        [kind == _RIGHT, np.isin(kind, _places("Loc", "Dupe")), np.isin(kind, _places("Cls", "Both"))],
        [matches.object_of, own, other],
        -1,
    )
    found = matches.detection_of >= 0
    mendable = np.isin(kind, _places("Cls", "Loc"))
    reached = np.zeros(len(found), bool)
    reached[target[mendable]] = True
    missed = ~found & ~reached & ~overlaps.crowd
    object_size = size_groups(overlaps.object_area, areas)
    size = np.where(target >= 0, np.append(object_size, 0)[target], size_groups(overlaps.area, areas))
    mended = mendable & _first_of_target(overlaps, target, mendable & ~np.append(found, True)[target])
    ranking, classes = Ranking(overlaps), len(overlaps.category_ids)
    ap = np.full((len(AREA_NAMES), classes), np.nan)
    delta = np.full((len(KINDS) + len(SPECIALS), len(AREA_NAMES), classes), np.nan)
    true_class = np.where(mended, np.append(overlaps.object_class, 0)[target], overlaps.label)
    for area in range(len(AREA_NAMES)):
        inside = np.ones(len(size), bool) if area == 0 else size == area - 1
        objects, hit, gone = (
            _by_size(overlaps.object_class, object_size, chosen, classes)[area]
            for chosen in (~overlaps.crowd, found, missed)
        )
        true, counted = (kind == _RIGHT) & inside, (kind != _UNCOUNTED) & inside

        def average(true: Bools, counted: Bools, objects: Ints, label: Ints | None = None) -> Floats:
            curves: Floats = ranking.precision(true, counted, objects, label=label).mean(axis=1)
            return curves

        ap[area] = average(true, counted, objects)
        fixed = []
        for place, name in enumerate(KINDS[:-1]):
            those = kind == place
            turned = mended & those & inside if name in ("Cls", "Loc") else np.zeros(len(kind), bool)
            label = true_class if name == "Cls" else None
            fixed.append(average(true | turned, counted & (~those | turned), objects, label))
        fixed += [
            average(true, counted, objects - gone),
            average(true, true, objects),
            average(true, counted, hit),
        ]
        # A class with nothing left to find: what it had stays.
        delta[:, area] = np.where(np.isnan(fixed) & (objects > 0), 0.0, np.array(fixed) - ap[area])
    return TideErrors(
        kind, target, found, missed, ap, delta, iou_threshold, background_iou, size, object_size, overlaps
    )


def _places(*kinds: Kind) -> list[int]:
    return [KINDS.index(kind) for kind in kinds]


def _nearest(overlaps: Overlaps, allowed: Bools) -> tuple[Ints, Floats]:
    """Return ``(D,)`` the object that each detection overlaps most among the allowed pairs, and the IoU; -1 and 0."""
    used = np.flatnonzero(allowed & ~overlaps.crowd[overlaps.pair_object])
    used = used[np.lexsort((overlaps.pair_object[used], -overlaps.pair_iou[used], overlaps.pair_detection[used]))]
    detection, first = np.unique(overlaps.pair_detection[used], return_index=True)
    nearest, iou = np.full(len(overlaps.score), -1, np.int64), np.zeros(len(overlaps.score))
    nearest[detection] = overlaps.pair_object[used[first]]
    iou[detection] = overlaps.pair_iou[used[first]]
    return nearest, iou


def _first_of_target(overlaps: Overlaps, target: Ints, chosen: Bools) -> Bools:
    """Return which of the chosen detections has the best score of all that lie on the same object."""
    places = np.flatnonzero(chosen)
    ranked = places[np.lexsort((-overlaps.score[places], target[places]))]
    _, first = np.unique(target[ranked], return_index=True)
    best = np.zeros(len(chosen), bool)
    best[ranked[first]] = True
    return best


def _by_size(label: Ints, size: Ints, chosen: Bools, classes: int) -> Ints:
    """Count ``(4, K)``: all sizes, and each."""
    groups = [chosen, *(chosen & (size == one) for one in range(len(AREA_NAMES) - 1))]
    return np.stack([np.bincount(label[one], minlength=classes) for one in groups])
