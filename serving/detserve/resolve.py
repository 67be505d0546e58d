"""From what a spec says to what a checkpoint needs: the number of classes, and which output is which category."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from dethandlers.errors import ArtefactError
from dethandlers.families.torchvision_detection import build_module
from dethandlers.spec import Spec

from detserve.categories import assign_model_labels, candidate_class_counts
from detserve.errors import CheckpointError, SpecError


def resolve_spec(spec: Spec, state: Mapping[str, torch.Tensor] | None) -> Spec:
    """Fill in what only the checkpoint tells.

    Args:
        spec: as written.
        state: the checkpoint's weights; None for an ONNX file, whose outputs are its categories in their order.

    Raises:
        SpecError: the spec names something that does not exist.
        CheckpointError: the weights fit no model of the spec's builder.
    """
    if state is None:
        return replace(spec, categories=assign_model_labels(spec.categories, spec.num_classes or len(spec.categories)))
    if spec.num_classes:
        _build_meta(spec, state)
    num_classes = spec.num_classes or _count_classes(spec, state)
    return replace(spec, num_classes=num_classes, categories=assign_model_labels(spec.categories, num_classes))


def _count_classes(spec: Spec, state: Mapping[str, torch.Tensor]) -> int:
    candidates = candidate_class_counts(spec.categories)
    problems = {}
    for count in candidates:
        try:
            _build_meta(replace(spec, num_classes=count), state)
        except CheckpointError as error:
            problems[count] = str(error)
        else:
            return count
    raise CheckpointError(
        f"{problems[candidates[0]]} (tried {', '.join(map(str, candidates))} classes for {len(spec.categories)} "
        "categories). Give the categories that the model was trained with, the right builder and its builder_options, "
        "or set num_classes in the spec."
    )


def _build_meta(spec: Spec, state: Mapping[str, torch.Tensor]) -> None:
    """Build the model without memory, only to compare names and shapes."""
    try:
        with torch.device("meta"):
            build_module(spec, {name: tensor.to("meta") for name, tensor in state.items()})
    except ArtefactError as error:
        kind = CheckpointError if "weights do not fit" in str(error) else SpecError
        raise kind(str(error)) from error
