"""Which images of a data set are looked at: by class, size, crowd, emptiness, problems, place, or at random."""

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from dettools.datasets.dataset import Dataset, DatasetFormatError
from dettools.datasets.inspection import KINDS, Inspection
from dettools.datasets.statistics import SIZES, area_of, size_name
from dettools.ground_truth import SHOWN


@dataclass(frozen=True)
class Filters:
    """What images must have; None or False does not ask.

    ``classes``, ``sizes`` and ``crowd`` are of one object: a small person, not a person and something small.

    Attributes:
        classes: names, one of which an object has.
        sizes: of `SIZES`, one of which an object has.
        crowd: an object is a crowd.
        empty: the image has no annotation; joined with the filters above by "or".
        problems: kinds, one of which the image has; empty for any problem.
        first: place of the first image that may be taken, from 0.
        end: place after the last one; None for all.
        sample: take so many at random.
        seed: of the sample.
    """

    classes: Collection[str] | None = None
    sizes: Collection[str] | None = None
    crowd: bool = False
    empty: bool = False
    problems: Collection[str] | None = None
    first: int = 0
    end: int | None = None
    sample: int | None = None
    seed: int = 0

    @property
    def narrow(self) -> bool:
        """Whether anything is asked for."""
        return self != Filters(seed=self.seed)


def select_images(dataset: Dataset, inspection: Inspection, filters: Filters) -> list[int]:
    """Return the places of the images that pass, in the data set's order.

    Raises:
        DatasetFormatError: a class, size or problem that does not exist.
    """
    check_filters(dataset, filters)
    places = [
        place
        for place in range(len(dataset.images))[filters.first : filters.end]
        if _has_objects(dataset, place, filters) and _has_problems(inspection, place, filters)
    ]
    return sampled(places, filters.sample, filters.seed) if filters.sample is not None else places


def sampled(places: Sequence[int], count: int, seed: int) -> list[int]:
    """Return ``count`` of the places at random, in order; all if there are no more."""
    return sorted(random.Random(seed).sample(places, min(count, len(places))))  # noqa: S311 - no secret


def most_telling(places: Sequence[int], inspection: Inspection, count: int, seed: int) -> list[int]:
    """Return ``count`` of the places: those with problems first, the rest at random; in order."""
    troubled = [place for place in places if place in inspection.of_image]
    if len(troubled) >= count:
        return sampled(troubled, count, seed)
    others = [place for place in places if place not in inspection.of_image]
    return sorted([*troubled, *sampled(others, count - len(troubled), seed)])


def check_filters(dataset: Dataset, filters: Filters) -> None:
    """Refuse a class, size or problem that does not exist.

    Raises:
        DatasetFormatError: there is one.
    """
    there = list(dict.fromkeys(dataset.names.values()))
    if unknown := [name for name in filters.classes or () if name not in there]:
        more = f" and {len(there) - 5 * SHOWN} more" if len(there) > 5 * SHOWN else ""
        raise DatasetFormatError(
            f"--classes: got {unknown[0]!r}, expected one of {', '.join(there[: 5 * SHOWN])}{more}."
        )
    for option, values, known in (("--size", filters.sizes, SIZES), ("--problems", filters.problems, KINDS)):
        if wrong := [value for value in values or () if value not in known]:
            raise DatasetFormatError(f"{option}: got {wrong[0]!r}, expected one of {', '.join(known)}.")


def _has_objects(dataset: Dataset, place: int, filters: Filters) -> bool:
    annotations = dataset.annotations_of.get(place, [])
    asked = filters.classes is not None or filters.sizes is not None or filters.crowd
    if not asked:
        return not filters.empty or not annotations
    if filters.empty and not annotations:
        return True
    for one in (dataset.annotations[each] for each in annotations):
        if filters.crowd and not one.get("iscrowd"):
            continue
        if filters.classes is not None and _name(dataset, one.get("category_id")) not in filters.classes:
            continue
        if filters.sizes is None or size_name(area_of(one)) in filters.sizes:
            return True
    return False


def _name(dataset: Dataset, category: object) -> str | None:
    return dataset.names.get(category) if isinstance(category, int) else None


def _has_problems(inspection: Inspection, place: int, filters: Filters) -> bool:
    if filters.problems is None:
        return True
    return any(not filters.problems or one.kind in filters.problems for one in inspection.of_image.get(place, ()))
