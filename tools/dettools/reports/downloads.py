"""Downloads as tables in the terminal: the data sets, what would be done, and what became of it."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dettools.datasets.download import Outcome, Plan
from dettools.datasets.download_table import DataSet, Part

_MOST_OF_A_PART = 5


def print_data_sets(data_sets: Sequence[DataSet], *, json_follows: bool) -> None:
    """Print each data set with its parts; those that come unasked are marked."""
    table = _table("--dataset-name", "what", "parts (* without --parts)", "known size")
    for one in data_sets:
        marked = []
        for name in one.part_names:
            usual = any(part.usual for part in one.parts if part.name == name)
            marked.append(f"{name}*" if usual else name)
        usual_parts = [part for part in one.parts if part.usual]
        table.add_row(one.name, escape(one.title), escape(" ".join(marked)), _total(usual_parts))
    Console(stderr=json_follows).print(table)


def print_plan(data_set: DataSet, plan: Plan, *, json_follows: bool) -> None:
    """Print each file, whether it is there, and what the disk needs."""
    console = Console(stderr=json_follows)
    table = _table("part", "file", "size", "is", "public digest")
    for name in dict.fromkeys(one.part.name for one in plan.files):
        files = [one for one in plan.files if one.part.name == name]
        for one in files if len(files) <= _MOST_OF_A_PART else []:
            proof = one.part.digest.partition(":")[0] or "none"
            table.add_row(name, escape(one.part.path), _size(one.size), one.state, proof)
        if len(files) > _MOST_OF_A_PART:
            states = Counter(one.state for one in files)
            shown = f"{files[0].part.path} … {files[-1].part.path} ({len(files)} files)"
            size = None if any(one.size is None for one in files) else sum(one.size or 0 for one in files)
            table.add_row(name, escape(shown), _size(size), ", ".join(f"{n} {s}" for s, n in states.items()), "none")
    console.print(f"{escape(data_set.title)} → {escape(str(plan.folder))}", highlight=False)
    console.print(table)
    unknown = sum(one.size is None for one in plan.files)
    needs = [_size(plan.needed)] if plan.needed or not unknown else []
    needs += [f"{unknown} files of unknown size"] if unknown else []
    console.print(f"needs {' and '.join(needs)}; the disk has {_size(plan.free)} left", highlight=False, soft_wrap=True)


def print_outcomes(folder: Path, outcomes: Sequence[Outcome], *, json_follows: bool) -> None:
    """Print what became of each file."""
    console = Console(stderr=json_follows)
    table = _table("file", "is", "size", "proven by", "unpacked")
    for one in outcomes:
        style = "red" if one.error else None
        unpacked = f"{one.unpacked} files" if one.unpacked else ""
        table.add_row(escape(one.path), one.state, _size(one.size or None), one.proof, unpacked, style=style)
    console.print(table)
    for one in outcomes:
        for note in one.notes:
            console.print(f"[yellow]note[/] {escape(one.path)}: {escape(note)}", highlight=False, soft_wrap=True)
    done = sum(not one.error for one in outcomes)
    console.print(f"{done} of {len(outcomes)} files in {escape(str(folder))}", highlight=False, soft_wrap=True)


def _table(*names: str) -> Table:
    table = Table(header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, caption_justify="left")
    for name in names:
        right = name in ("size", "known size")
        table.add_column(name, justify="right" if right else "left", overflow="fold", no_wrap=right)
    return table


def _total(parts: Sequence[Part]) -> str:
    known = sum(part.size or 0 for part in parts)
    more = "+" if any(part.size is None for part in parts) else ""
    return f"{_size(known)}{more}" if known else "unknown"


def _size(size: int | None) -> str:
    if size is None:
        return "unknown"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size} B"
