"""The category map: read from a COCO annotation file, and joined to the numbers that a model puts out.

A checkpoint does not say which of its outputs is which class. What is known is the category list and the model's number
of classes K; the three conventions in use are told apart by K:

    K = categories + 1              output i + 1 is category i; 0 is background
    K = categories                  output i is category i
    K = highest category_id + 1     outputs are the COCO category ids themselves (torchvision's pretrained models)
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dethandlers.detections import Category

from detserve.errors import SpecError


def read_categories(path: Path) -> tuple[Category, ...]:
    """Read the categories of a COCO annotation file, in its order; the model labels are still open (-1).

    Raises:
        SpecError: no such file, or no categories in it.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
        rows = value["categories"] if isinstance(value, dict) else value
        categories = tuple(Category(id=int(row["id"]), name=str(row["name"]), model_label=-1) for row in rows)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SpecError(
            f"categories: cannot read {path} ({type(error).__name__}: {error}); expected a COCO annotation file with "
            '"categories": [{"id": 1, "name": "person"}, …].'
        ) from error
    if not categories:
        raise SpecError(f"categories: {path} lists none. Give the annotation file that the model was trained with.")
    return categories


def candidate_class_counts(categories: Sequence[Category]) -> list[int]:
    """Return the numbers of classes that a model of these categories may have, the likeliest first."""
    highest = max(category.id for category in categories)
    return list(dict.fromkeys([len(categories) + 1, highest + 1, len(categories)]))


def assign_model_labels(categories: Sequence[Category], num_classes: int) -> tuple[Category, ...]:
    """Join the categories to the outputs of a model with ``num_classes`` classes.

    Categories whose model labels are given keep them.

    Raises:
        SpecError: the number of classes fits none of the conventions, or given labels do not fit it.
    """
    given = [category.model_label for category in categories]
    if all(label >= 0 for label in given):
        if max(given) >= num_classes or len(set(given)) != len(given):
            raise SpecError(
                f"categories: got model_label up to {max(given)}, expected different ones below the model's "
                f"{num_classes} classes. Correct the model labels."
            )
        return tuple(categories)
    if any(label >= 0 for label in given):
        raise SpecError("categories: got model_label for some, expected it for all or for none.")
    if num_classes == len(categories) + 1:
        return tuple(replace(category, model_label=place + 1) for place, category in enumerate(categories))
    if num_classes == len(categories):
        return tuple(replace(category, model_label=place) for place, category in enumerate(categories))
    if num_classes == max(category.id for category in categories) + 1:
        return tuple(replace(category, model_label=category.id) for category in categories)
    raise SpecError(
        f"categories: got {len(categories)} for a model with {num_classes} classes, expected {num_classes - 1} (with "
        f"background), {num_classes} (without), or category ids up to {num_classes - 1}. Give the annotation file that "
        "the model was trained with."
    )
