"""The cost of a model as tables in the terminal, and the block that MMDetection's get_flops prints."""

from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dettools.flops.averages import Average
from dettools.flops.cost import Cost, Share

_RULE = "=" * 30
_CAUTION = (
    "!!!Please be cautious if you use the results in papers. You may need to check if all ops are supported and "
    "verify that the flops computation is correct."
)
_MOST_UNCOUNTED = 12


def print_cost(cost: Cost, console: Console, *, depth: int) -> None:
    """Print everything that is known about one input size."""
    console.print(_facts(cost))
    for note in cost.notes:
        console.print(f"[yellow]note[/] {escape(note)}", highlight=False)
    console.print(_shares("counted operators", cost.operators, cost, calls=True))
    if depth > 0:
        modules = [share for share in cost.modules if share.name.count(".") < depth]
        if modules:
            console.print(_shares(f"modules, depth {depth}", modules, cost, calls=False))
    console.print(_uncounted(cost))


def print_average(average: Average, console: Console) -> None:
    """Print the mean over some images."""
    span = _range(round(average.macs), round(average.most_macs))
    least, most = average.smallest, average.largest
    console.print(
        f"mean of {average.images} images in {average.shapes} input size{'' if average.shapes == 1 else 's'}: {span} "
        f"MACs ({_size(least)}: {amount(least.macs / least.batch)} … {_size(most)}: "
        f"{amount(most.most_macs / most.batch)}); the tables are of the largest",
        highlight=False,
    )


def original_block(cost: Cost, average: Average | None = None) -> str:
    """Return what ``get_flops`` of MMDetection 3.3 prints, of one image; its ``Flops`` are MACs."""
    macs = round(average.most_macs if average else cost.most_macs / cost.batch)
    source = "dataloader: load a picture from the dataset" if average else "direct: randomly generate a picture"
    count = "with the most proposals and detections, " if cost.parts else ""
    return "\n".join(
        [
            f"MMDetection's get_flops ({count}Flops below are multiply-accumulates: FLOPs are twice as many)",
            _RULE,
            f"Compute type: {source}",
            f"Input shape: {cost.input_size}",
            f"Flops: {original_amount(macs)}",
            f"Params: {original_amount(cost.parameters)}",
            _RULE,
            _CAUTION,
        ]
    )


def original_amount(value: int) -> str:
    """Return a number as MMEngine prints it: at most three decimals, a larger unit from a tenth of it on."""
    for exponent, unit in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "K")):
        if abs(value) > 10 ** (exponent - 1):
            return f"{value / 10**exponent:.3f}".rstrip("0").rstrip(".") + unit
    return str(value)


def amount(value: float) -> str:
    """Return a number with four digits and a unit: ``4.089 G``."""
    for exponent, unit in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(value) >= 10**exponent:
            return f"{value / 10**exponent:#.4g} {unit}"
    return f"{value:.0f}"


def cost_document(cost: Cost) -> dict[str, Any]:
    """Return the cost as JSON-ready values."""

    def share(one: Share) -> dict[str, Any]:
        return {**vars(one), "per_item": list(one.per_item), "most_macs": one.most(cost.parts)}

    return {
        **vars(cost),
        "input_size": list(cost.input_size),
        "flops": 2 * cost.macs,
        "most_macs": cost.most_macs,
        "most_flops": 2 * cost.most_macs,
        "parts": [vars(part) for part in cost.parts],
        "operators": [share(one) for one in cost.operators],
        "modules": [share(one) for one in cost.modules],
        "uncounted": [vars(one) for one in cost.uncounted],
        "uncounted_share": cost.uncounted_share,
        "uncounted_arithmetic_share": cost.uncounted_arithmetic_share,
        "parameter_types": dict(cost.parameter_types),
        "notes": list(cost.notes),
    }


def average_document(average: Average) -> dict[str, Any]:
    """Return the average as JSON-ready values."""
    return {
        "images": average.images,
        "shapes": average.shapes,
        "macs": average.macs,
        "most_macs": average.most_macs,
        "smallest": {
            "input_size": list(average.smallest.input_size),
            "macs": round(average.smallest.macs / average.smallest.batch),
        },
        "largest": {
            "input_size": list(average.largest.input_size),
            "most_macs": round(average.largest.most_macs / average.largest.batch),
        },
    }


def _facts(cost: Cost) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    batch = f", batch of {cost.batch}" if cost.batch != 1 else ""
    per_image = f", {_range(cost.macs / cost.batch, cost.most_macs / cost.batch)} an image" if batch else ""
    rows = {
        "model": escape(cost.subject),
        "input": f"{_size(cost)} px (height × width){batch}",
        "MACs": f"{_range(cost.macs, cost.most_macs)}{per_image}",
        "FLOPs": f"{_range(2 * cost.macs, 2 * cost.most_macs)} (2 × MACs; nothing else is in them)",
    }
    for part in cost.parts:
        seen = f", {part.seen} in the measured run" if part.seen is not None else ""
        rows[f"per {part.item}"] = f"+ {amount(part.macs)} MACs, 0 to {part.most} of them{seen}"
    types = ", ".join(f"{count:,} {name}" for name, count in cost.parameter_types.items())
    kept = f"; buffers {cost.buffers:,}" if cost.buffers else ""
    rows["parameters"] = f"{cost.parameters:,} ({types}{kept})"
    if cost.activation_bytes is not None and cost.largest_activation_bytes is not None:
        rows["activations"] = (
            f"{cost.activation_bytes / 1e6:.1f} MB written by all operators, the largest output "
            f"{cost.largest_activation_bytes / 1e6:.1f} MB"
        )
    rows["not counted"] = (
        f"{cost.uncounted_share:.0%} of the output elements come from operators without a formula, "
        f"{cost.uncounted_arithmetic_share:.0%} from arithmetic among them (activations, normalisation)"
    )
    rows["measured by"] = cost.measured_by
    for name, text in rows.items():
        table.add_row(name, text)
    return table


def _shares(title: str, shares: Any, cost: Cost, *, calls: bool) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("operator" if calls else "module", overflow="fold")
    for name in ("calls",) if calls else ("parameters",):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("MACs", justify="right", no_wrap=True)
    for part in cost.parts:
        table.add_column(f"per\n{part.item}", justify="right", no_wrap=True)
    if cost.parts:
        table.add_column("at\nmost", justify="right", no_wrap=True)
    table.add_column("share", justify="right", no_wrap=True)
    for share in shares:
        most = share.most(cost.parts)
        known = share.calls if calls else share.parameters
        cells = [_short(share.name, calls=calls), f"{known:,}" if known else "", amount(share.macs)]
        cells += [amount(macs) for macs in share.per_item]
        cells += [amount(most)] if cost.parts else []
        table.add_row(*cells, f"{most / cost.most_macs:.1%}" if cost.most_macs else "–")
    return table


def _short(name: str, *, calls: bool) -> str:
    """Return the operator without its library, or the module's last name under those above it."""
    if calls:
        return escape(name.removeprefix("aten.").removeprefix("torchvision."))
    return "  " * name.count(".") + escape(name.rpartition(".")[2])


def _uncounted(cost: Cost) -> Table:
    rest = cost.uncounted[_MOST_UNCOUNTED:]
    caption = f"and {len(rest)} more; all are in --json" if rest else None
    table = Table(
        title="not counted: operators without a formula",
        title_justify="left",
        caption=caption,
        caption_justify="left",
        header_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("operator", overflow="fold")
    table.add_column("what it does")
    for name in ("calls", "output elements", "share"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in cost.uncounted[:_MOST_UNCOUNTED]:
        share = one.elements / cost.elements if cost.elements else 0.0
        table.add_row(_short(one.operator, calls=True), one.kind, f"{one.calls:,}", f"{one.elements:,}", f"{share:.1%}")
    return table


def _range(least: float, most: float) -> str:
    return amount(least) if least == most else f"{amount(least)} … {amount(most)}"


def _size(cost: Cost) -> str:
    return f"{cost.input_size[0]}×{cost.input_size[1]}"
