"""A conversion of weights for people: what became of the keys, which class's channels moved where, and the proofs."""

import json
import sys
from collections import Counter
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dettools.converters.conversion import COPY, Conversion, MoveBackground, Proof, Row
from dettools.converters.weight_files import Written

_BACKGROUND = "background"
# Of one kind; what is more is in the certificate.
MOST_LINES = 20


def print_conversion(
    conversion: Conversion, written: Written | None, out: Path, *, explain: bool, as_json: bool
) -> None:
    """Print what was converted, what was left over, what was proven and what was written.

    Args:
        conversion: what was done.
        written: the files; None for a dry run, or when a proof failed.
        out: where they were wanted.
        explain: print each row and each class, too.
        as_json: print the certificate to stdout, and all else to stderr.
    """
    console = Console(stderr=as_json)
    for note in conversion.notes:
        print(f"{conversion.command}: note: {note}", file=sys.stderr)
    _print_rows(conversion, console, explain=explain)
    if conversion.proofs:
        console.print(_proofs(conversion.proofs))
    _print_verdict(conversion, written, out, console)
    if as_json:
        print(json.dumps(conversion.to_json() | {"written": written.to_json() if written else None}))


def _print_rows(conversion: Conversion, console: Console, *, explain: bool) -> None:
    for text in _headlines(conversion):
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    shown = [row for row in conversion.rows if explain or isinstance(row.transform, MoveBackground)]
    for text in [text for row in shown for text in _lines(row, conversion.command, renamed=explain)]:
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    if explain:
        _print_moves(conversion, tuple(conversion.facts.get("classes", ())), console)
    told = "Not Convert" if conversion.command == "detectron2pytorch" else "not converted"
    _print_some([f"{told}: {key}" for key in conversion.unused], console, explain=explain)
    _print_some([f"missing: {key}" for key in conversion.missing], console, explain=explain)
    _print_some([f"not in the config's model: {key}" for key in conversion.unexpected], console, explain=explain)


def _print_verdict(conversion: Conversion, written: Written | None, out: Path, console: Console) -> None:
    failed = [proof.name for proof in conversion.proofs if not proof.passed]
    if not conversion.proven:
        if failed:
            why = f"the outputs differ: {', '.join(failed)}"
        elif conversion.missing:
            why = f"{len(conversion.missing)} tensors are missing"
        else:
            why = f"{conversion.coverage['changed_without_proof']} changed tensors are in no comparison"
        console.print(
            f"[bold red]FAIL[/] {escape(why)}; {escape(str(out))} was not written", highlight=False, soft_wrap=True
        )
        return
    worst = max((proof.max_delta for proof in conversion.proofs), default=0.0)
    proven = f", outputs agree to {worst:.1e}" if conversion.proofs else ""
    state = f"{written.path}: written" if written else f"{out}: would be written (dry run)"
    console.print(
        f"[bold green]PASS[/] {escape(state)}, {len(conversion.state)} tensors{proven}", highlight=False, soft_wrap=True
    )
    console.print(f"proof: {_coverage(conversion)}", highlight=False, soft_wrap=True)
    if written:
        console.print(f"sha256 {written.sha256}\ncertificate {written.certificate}", highlight=False, soft_wrap=True)


def _coverage(conversion: Conversion) -> str:
    """Tell what stands behind which tensors: a comparison of outputs, or only that they are copies."""
    texts = {
        "by_outputs": "{} tensors by the outputs above",
        "copied_under_their_name": "{} are copies",
        "copied_under_another_name": "{} are copies whose new names only the table vouches for",
        "changed_without_proof": "{} were changed without proof",
    }
    return ", ".join(texts[key].format(count) for key, count in conversion.coverage.items() if count)


def _print_moves(conversion: Conversion, names: tuple[str, ...], console: Console) -> None:
    """Print a row for each class: its channels before and after, in each kind of layer."""
    layers: dict[MoveBackground, list[str]] = {}
    for row in conversion.rows:
        if isinstance(row.transform, MoveBackground):
            layer = row.target.rpartition(".")[0].removeprefix("roi_head.")
            known = layers.setdefault(row.transform, [])
            if layer not in known:
                known.append(layer)
    by_classes: dict[int, list[MoveBackground]] = {}
    for move in layers:
        by_classes.setdefault(move.classes, []).append(move)
    for classes, moves in by_classes.items():
        table = Table(header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("class")
        for move in moves:
            of_anchor = f"\nof {move.anchors} anchors, the first" if move.anchors > 1 else ""
            table.add_column(escape("\n".join(layers[move])) + of_anchor, justify="right", overflow="fold")
        columns = [move.moves() for move in moves]
        order = [*range(1, classes), 0]
        for label in order:
            name = _BACKGROUND if label == 0 else names[label - 1] if len(names) == classes - 1 else f"class {label}"
            cells = [_cell(*column[label][1:]) for column in columns]
            table.add_row(escape(name), *cells, style="yellow" if label == 0 else None)
        console.print(table)


def _cell(before: slice, after: slice | None) -> str:
    return f"{_channels(before)} → {'left out' if after is None else _channels(after)}"


def _channels(part: slice) -> str:
    return str(part.start) if part.stop - part.start == 1 else f"{part.start}–{part.stop - 1}"


def _headlines(conversion: Conversion) -> list[str]:
    facts = conversion.facts
    if "made_by" in facts:
        lines = [f"MMDetection {facts['made_by']} → {facts['wanted']}: {len(conversion.rows)} tensors"]
        if "num_classes" in facts:
            lines[0] += f", {facts['num_classes']} classes with the background"
        lines += [f"{one['since']}: {one['what']} ({one['tensors']} tensors)" for one in facts["changes"]]
        return lines
    preprocessing = facts["preprocessing"]
    between = f"{facts['names']} → {facts['to']}" if "names" in facts else f"{facts['format']} → torchvision, mmdet"
    lines = [f"{facts['architecture']}, {between}: {len(conversion.rows)} tensors"]
    mean, std = (", ".join(f"{one:g}" for one in preprocessing[key]) for key in ("mean", "std"))
    changed = Counter(str(row.transform) for row in conversion.rows if row.transform != COPY)
    lines += [f"{transform}: {count} tensors" for transform, count in changed.items()]
    lines.append(f"images: {preprocessing['colours']} 0 to 255, mean {mean}, std {std}")
    return lines


def _lines(row: Row, command: str, *, renamed: bool) -> list[str]:
    """Return what the original scripts print of a row."""
    if command != "upgrade-checkpoint":
        return [f"Convert {row.source} to {row.target}" + ("" if row.transform == COPY else f" ({row.transform})")]
    lines = [] if row.source == row.target or not renamed else [f"rename the name of {row.source} to {row.target}"]
    if isinstance(row.transform, MoveBackground):
        if row.transform.kept:
            told = "reorder cls channels"
        else:
            told = (
                "truncate regression channels" if row.transform.per_class > 1 else "truncate mask prediction channels"
            )
        lines.append(f"{told} of {row.target}: {row.transform}")
    return lines


def _print_some(lines: list[str], console: Console, *, explain: bool) -> None:
    shown = lines if explain else lines[:MOST_LINES]
    if len(shown) < len(lines):
        shown = [*shown, f"… and {len(lines) - len(shown)} more (--explain)"]
    for line in shown:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _proofs(proofs: tuple[Proof, ...]) -> Table:
    table = Table(header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("outputs before and after", overflow="fold")
    for name in ("numbers", "largest", "max |Δ|", "allowed"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for proof in proofs:
        verdict = "[green]yes[/]" if proof.passed else "[red]NO[/]"
        table.add_row(
            escape(proof.name),
            str(proof.compared),
            f"{proof.largest:.3g}",
            f"{proof.max_delta:.1e}",
            f"{proof.tolerance:.1e}",
            verdict,
        )
    return table
