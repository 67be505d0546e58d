"""What is in an ONNX file, who runs it, and what differs from another, in the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dettools.flops.cost import Cost
from dettools.onnx_graph.difference import Change
from dettools.onnx_graph.inputs import ModelInput, format_shape
from dettools.onnx_graph.providers import ProviderSupport
from dettools.onnx_graph.summary import Summary
from dettools.reports.flops_tables import amount

_LONGEST_VALUE = 60
_MOST_CHANGES = 40
_MOST_DEFAULTS = 8


def print_graph(
    summary: Summary, providers: Sequence[ProviderSupport], cost: Cost | None, why_not: str, console: Console
) -> None:
    """Print a file's contents; ``why_not`` says why there are no MACs."""
    console.print(_facts(summary, cost, why_not))
    console.print(_values(summary))
    console.print(_operators(summary, cost))
    for one in summary.subgraphs:
        console.print(f"body of {one.operator} {escape(one.holder)}: {one.name}, {one.nodes} nodes", highlight=False)
    for support in providers:
        _print_support(support, console)


def print_changes(changes: Sequence[Change], names: tuple[str, str], console: Console) -> None:
    """Print the differences of two files, at most 40 of a part."""
    if not changes:
        console.print(f"EQUAL {escape(names[0])} and {escape(names[1])}", highlight=False)
        return
    parts: dict[str, list[Change]] = {}
    for change in changes:
        parts.setdefault(change.part, []).append(change)
    for part, found in parts.items():
        console.print(f"[bold]{part}[/]: {len(found)} differences", highlight=False)
        for change in found[:_MOST_CHANGES]:
            if change.before:
                console.print(
                    f"[red]- {escape(change.where)}: {escape(_short(change.before, 160))}[/]", highlight=False
                )
            if change.after or not change.before:
                console.print(
                    f"[green]+ {escape(change.where)}: {escape(_short(change.after, 160))}[/]", highlight=False
                )
        if len(found) > _MOST_CHANGES:
            console.print(f"  and {len(found) - _MOST_CHANGES} more; all are in --json", highlight=False)
    console.print(f"DIFFERENT {escape(names[0])} and {escape(names[1])}: {len(changes)} differences", highlight=False)


def graph_document(
    summary: Summary, providers: Sequence[ProviderSupport], cost: Cost | None, why_not: str
) -> dict[str, Any]:
    """Return everything as JSON-ready values."""

    def values(ones: tuple[ModelInput, ...]) -> list[dict[str, Any]]:
        return [{**vars(one), "shape": list(one.shape)} for one in ones]

    macs = _operator_macs(cost)
    return {
        **vars(summary),
        "opsets": dict(summary.opsets),
        "metadata": dict(summary.metadata),
        "types": dict(summary.types),
        "custom_domains": dict(summary.custom_domains),
        "inputs": values(summary.inputs),
        "outputs": values(summary.outputs),
        "operators": [{**vars(one), "macs": macs.get(one.name) if cost else None} for one in summary.operators],
        "subgraphs": [vars(one) for one in summary.subgraphs],
        "providers": [vars(one) for one in providers],
        "macs": cost.macs if cost else None,
        "most_macs": cost.most_macs if cost else None,
        "macs_unknown_because": why_not or None,
    }


def _facts(summary: Summary, cost: Cost | None, why_not: str) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    rows = {
        "file": f"{summary.subject} ({summary.bytes / 1e6:.1f} MB)",
        "opset": ", ".join(f"{domain} {version}" for domain, version in summary.opsets.items()),
        "IR version": str(summary.ir_version),
        "producer": summary.producer or "not stated",
        "nodes": f"{summary.nodes:,}",
        "parameters": f"{summary.parameters:,} ({_counted(summary.types)})" if summary.parameters else "0",
        "custom domains": _counted(summary.custom_domains) or "none",
    }
    if cost:
        least, most = amount(cost.macs), amount(cost.most_macs)
        size = f"{cost.input_size[0]}×{cost.input_size[1]} px"
        rows["MACs"] = f"{least if least == most else f'{least} … {most}'} at {size}, batch of {cost.batch}"
    else:
        rows["MACs"] = f"not known: {why_not}"
    for key, value in summary.metadata.items():
        rows[f"metadata {key}"] = _short(value, _LONGEST_VALUE)
    for name, text in rows.items():
        table.add_row(escape(name), escape(text))
    return table


def _values(summary: Summary) -> Table:
    table = Table(header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, caption_justify="left")
    for name in ("", "name", "type", "shape", ""):
        table.add_column(name, overflow="fold")
    defaults = [one for one in summary.inputs if one.has_default]
    # Until IR version 4 every weight was an input.
    inputs = [one for one in summary.inputs if not one.has_default or len(defaults) <= _MOST_DEFAULTS]
    table.caption = None if len(inputs) == len(summary.inputs) else f"and {len(defaults)} weights that are inputs too"
    for kind, ones in (("input", tuple(inputs)), ("output", summary.outputs)):
        for one in ones:
            extra = "has a default" if one.has_default else ""
            table.add_row(kind, escape(one.name), one.type, escape(format_shape(one.shape)), extra)
    return table


def _operators(summary: Summary, cost: Cost | None) -> Table:
    macs = _operator_macs(cost)
    table = Table(header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("operator", overflow="fold")
    for name in ("nodes", "parameters", *(("MACs",) if cost else ())):
        table.add_column(name, justify="right", no_wrap=True)
    for one in summary.operators:
        cells = [escape(one.name), f"{one.nodes:,}", f"{one.parameters:,}" if one.parameters else ""]
        table.add_row(*cells, *([amount(macs[one.name]) if one.name in macs else ""] if cost else []))
    return table


def _operator_macs(cost: Cost | None) -> dict[str, int]:
    return {share.name: share.most(cost.parts) for share in cost.operators} if cost else {}


def _print_support(support: ProviderSupport, console: Console) -> None:
    if support.missing:
        console.print(
            f"[yellow]{support.provider}[/] does not take {escape(_counted(support.missing))}: {support.consequence}",
            highlight=False,
        )
    elif not support.problem:
        on = ", on conditions:" if support.conditions else ""
        console.print(f"[green]{support.provider}[/] takes every operator{on}", highlight=False)
    if support.problem:
        console.print(f"[red]{support.provider}[/] {escape(support.problem)}", highlight=False)
    for name, condition in support.conditions.items():
        console.print(f"  {name}: {condition}", highlight=False)
    console.print(f"  [dim]source: {escape(support.source)}[/]", highlight=False)


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _short(text: str, longest: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= longest else f"{line[: longest - 1]}… ({len(text):,} characters)"
