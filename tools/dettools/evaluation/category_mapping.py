"""Which of the data set's categories each class of the model is.

A bijection is wanted: each class of the model is one category of the data set, and the other way round. What is not is
told: every category that no class stands for has an AP of 0, and a class that stands for the wrong one costs twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dethandlers.detections import Category

from dettools.ground_truth import CategoryEntry

By = Literal["auto", "name", "id"]


@dataclass(frozen=True)
class CategoryMapping:
    """The mapping, and what is wrong with it.

    Attributes:
        category_ids: the data set's id for each label of the model; None for a class that the data set does not have.
        by: what it goes by.
        unmatched_classes: names of the model's classes that the data set does not have.
        unmatched_categories: names of the data set's categories that the model does not have.
        problem: why it is no bijection, as a sentence; empty when it is one.
        note: worth knowing though it is one; or empty.
    """

    category_ids: tuple[int | None, ...]
    by: Literal["name", "id"]
    unmatched_classes: tuple[str, ...] = ()
    unmatched_categories: tuple[str, ...] = ()
    problem: str = ""
    note: str = ""

    @property
    def mapped_ids(self) -> frozenset[int]:
        """The data set's categories that some class of the model stands for."""
        return frozenset(one for one in self.category_ids if one is not None)


def map_categories(model: Sequence[Category], data: Sequence[CategoryEntry], by: By = "auto") -> CategoryMapping:
    """Map a model's classes onto a data set's categories.

    Args:
        model: the category map, by label.
        data: the data set's categories.
        by: ``name``, ``id``, or ``auto``: by name, and told when the ids say something else.
    """
    data_names = [entry.name for entry in data]
    doubled = sorted({name for name in data_names if data_names.count(name) > 1})
    if by == "id":
        return _by_id(model, data)
    id_of = {entry.name: entry.id for entry in data}
    ids = tuple(id_of.get(category.name) for category in model)
    mapping = CategoryMapping(ids, "name", *_unmatched(model, data, ids))
    problem = _problem(mapping, model, data)
    if doubled:
        problem = f"the data set has several categories of the name {', '.join(doubled)}. {problem}".strip()
    if problem and {entry.id for entry in data} == {category.id for category in model} and not mapping.mapped_ids:
        problem += " The ids of both are the same: if only the spelling differs, use --categories-by id."
    moved = [category.name for category, data_id in zip(model, ids, strict=True) if data_id not in (None, category.id)]
    note = ""
    if moved:
        note = (
            f"{len(moved)} classes have another category id in the data set than in the model ({', '.join(moved[:3])}"
            f"{', …' if len(moved) > 3 else ''}); they are matched by name"
        )
    return CategoryMapping(ids, "name", mapping.unmatched_classes, mapping.unmatched_categories, problem, note)


def _by_id(model: Sequence[Category], data: Sequence[CategoryEntry]) -> CategoryMapping:
    name_of = {entry.id: entry.name for entry in data}
    ids = tuple(category.id if category.id in name_of else None for category in model)
    mapping = CategoryMapping(ids, "id", *_unmatched(model, data, ids))
    other = [f"{category.name} → {name_of[category.id]}" for category in model if _renamed(category, name_of)]
    note = (
        f"matched by id although names differ: {', '.join(other[:3])}{', …' if len(other) > 3 else ''}" if other else ""
    )
    problem = _problem(mapping, model, data)
    return CategoryMapping(ids, "id", mapping.unmatched_classes, mapping.unmatched_categories, problem, note)


def _renamed(category: Category, name_of: dict[int, str]) -> bool:
    return category.id in name_of and name_of[category.id] != category.name


def _unmatched(
    model: Sequence[Category], data: Sequence[CategoryEntry], ids: Sequence[int | None]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    used = set(ids)
    return (
        tuple(category.name for category, data_id in zip(model, ids, strict=True) if data_id is None),
        tuple(entry.name for entry in data if entry.id not in used),
    )


def _problem(mapping: CategoryMapping, model: Sequence[Category], data: Sequence[CategoryEntry]) -> str:
    parts = []
    used = [one for one in mapping.category_ids if one is not None]
    if len(used) != len(set(used)):
        parts.append("several classes of the model are the same category")
    if mapping.unmatched_classes:
        parts.append(
            f"{len(mapping.unmatched_classes)} of the model's {len(model)} classes are not in the data set "
            f"({_some(mapping.unmatched_classes)})"
        )
    if mapping.unmatched_categories:
        parts.append(
            f"{len(mapping.unmatched_categories)} of the data set's {len(data)} categories are not in the model "
            f"({_some(mapping.unmatched_categories)})"
        )
    return "; ".join(parts)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
