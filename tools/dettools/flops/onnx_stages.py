"""Which nodes of an ONNX graph run once per proposal, and which once per detection.

    features ─┐
    proposals ┴► RoiAlign ─► box head ─► NMS ─► boxes ─┐
                 stage 1                     features ─┴► RoiAlign ─► mask head
                                                          stage 2

A node's stage is the number of RoiAlign operators, one after another, that its inputs went through. The RoIs of a
stage are detections when a NonMaxSuppression or TopK lies between them and the stage before, else proposals.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dettools.onnx_graph.model_file import bodies

_CHOOSING = frozenset({"NonMaxSuppression", "TopK"})


@dataclass(frozen=True)
class Stages:
    """The stages of a graph's nodes.

    Attributes:
        of_node: stage by the node's number; 0 runs once.
        items: of each stage from 1 on, ``proposal`` or ``detection``.
    """

    of_node: dict[int, int]
    items: tuple[str, ...]


def find_stages(graph: Any) -> Stages:
    """Follow the data from the RoiAlign operators on; the nodes in the bodies of a node share its stage."""
    stage_of: dict[str, int] = {}
    chosen: dict[str, bool] = {}
    of_node: dict[int, int] = {}
    items: dict[int, str] = {}
    inner = len(graph.node)
    for number, node in enumerate(graph.node):
        names = list(_reads(node))
        stage = max((stage_of.get(name, 0) for name in names), default=0)
        is_chosen = node.op_type in _CHOOSING or any(chosen.get(name, False) for name in names)
        if _aligns(node):
            rois = node.input[1] if node.op_type == "RoiAlign" else ""
            before = stage_of.get(rois, 0) if rois else stage
            after_choice = before > 0 and chosen.get(rois, False)
            stage = before + 1
            items.setdefault(stage, "detection" if after_choice else "proposal")
            is_chosen = False
        of_node[number] = stage
        # The nodes inside follow those of the graph itself, as `numbered_nodes` counts.
        for _ in _inside(node):
            of_node[inner] = stage
            inner += 1
        for name in node.output:
            stage_of[name], chosen[name] = stage, is_chosen and stage > 0
    return Stages(of_node, tuple(items[stage] for stage in sorted(items)))


def _aligns(node: Any) -> bool:
    return node.op_type == "RoiAlign" or any(inner.op_type == "RoiAlign" for inner in _inside(node))


def _reads(node: Any) -> Iterator[str]:
    yield from node.input
    for inner in _inside(node):
        yield from inner.input


def _inside(node: Any) -> Iterator[Any]:
    for body in bodies(node):
        for inner in body.node:
            yield inner
            yield from _inside(inner)
