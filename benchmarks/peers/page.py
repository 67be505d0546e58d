"""PEERS.md: the table and all that one must know to read it."""

from collections.abc import Sequence
from typing import Any

from contest import Entrant, Plan
from dettools.benchmark.validity import OTHERS
from standings import Standing

HEAD = (
    "| server | req/s | ours ÷ theirs | p50 ms | p99 ms | ours ÷ theirs | errors | CPU ms/request: server, client "
    "| detections |\n|---|---|---|---|---|---|---|---|---|"
)


def markdown_page(
    entrants: Sequence[Entrant],
    rows: Sequence[Standing],
    plan: Plan,
    environment: dict[str, Any],
    images: str,
    note: str = "",
) -> str:
    """Return the whole page; a note stands at its head."""
    lines = [
        "# Our server beside others",
        "",
        "Written by `make peers`; how it is measured stands in [README.md](README.md). The model is the demo detector",
        "(SSDlite320 MobileNetV3, `model_store/shapes`), the body a JPEG, the answer JSON; one client for all.",
        "",
        *([f"**{note}**", ""] if note else []),
        *_facts(environment, images, plan),
        _others(rows),
        "- detections: `=` when those of a few images, asked for at once, are eager's within 0.05 px and 1e-4",
        "",
    ]
    by_name = {one.name: one for one in entrants}
    for concurrency in dict.fromkeys(row.concurrency for row in rows):
        lines += [f"## Concurrency {concurrency}", "", HEAD]
        lines += [_line(row, by_name[row.server]) for row in rows if row.concurrency == concurrency]
        lines.append("")
    lines += ["## Settings", ""]
    lines += [f"- **{one.title}**: {one.settings}" for one in entrants if one.settings]
    failed = [one for one in entrants if one.failure]
    if failed:
        lines += ["", "## Not measured, or not to the end", ""]
        lines += [f"- **{one.title}**: {_one_line(one.failure)}" for one in failed]
    different = [one for one in entrants if one.difference]
    if different:
        lines += ["", "## Other detections than eager's", ""]
        lines += [f"- **{one.title}**: {one.difference}" for one in different]
    return "\n".join(lines).rstrip() + "\n"


def _others(rows: Sequence[Standing]) -> str:
    shares = [row.others_share for row in rows if row.others_share is not None]
    if not shares:
        return "- what other processes took of the cores is not known"
    told = f"- other processes took at most {max(shares):.0%} of the cores in any level"
    return told if max(shares) <= OTHERS else f"{told}: **too much; end them and measure again**"


def _facts(environment: dict[str, Any], images: str, plan: Plan) -> list[str]:
    cpu, java = environment["cpu"], environment["java"] or {}
    machine = (
        f"{cpu['model']}, {cpu['usable_cores']} cores that server and client share, {environment['memory_gb']} GiB"
    )
    versions = f"{environment['python']}, torch {environment['packages'].get('torch')}, Java {java.get('version')}"
    return [
        f"- {environment['date'][:10]}, {machine}, {environment['os']}, {versions}",
        f"- {images}",
        f"- levels of {plan.seconds:g} s, {plan.rounds} rounds in turns (A B C … A B C …), each with new starts",
        "- req/s: median over the rounds (least–greatest); ours ÷ theirs within a round, above 1: ours answers more",
        "- latency: over the answers of all rounds (~: fewer than a p99 needs); ours ÷ theirs below 1: ours is shorter",
    ]


def _line(row: Standing, entrant: Entrant) -> str:
    errors = ", ".join(f"{word} ×{count}" for word, count in row.errors.items())
    server_cpu = "–" if row.server_cpu_ms is None else f"{row.server_cpu_ms:.1f}"
    cells = [
        entrant.title,
        row.throughput_rps.text(".1f"),
        "–" if row.throughput_ratio is None else row.throughput_ratio.text(".2f"),
        "–" if row.p50_ms is None else f"{row.p50_ms:.1f}",
        "–" if row.p99_ms is None else f"{'~' if row.p99_rough else ''}{row.p99_ms:.1f}",
        "–" if row.p99_ratio is None else f"{row.p99_ratio:.2f}",
        f"{errors} of {row.requests}" if errors else "0",
        f"{server_cpu}, {row.client_cpu_ms:.2f}",
        "**≠**" if entrant.difference else "=",
    ]
    return f"| {' | '.join(cells)} |"


def _one_line(text: str) -> str:
    return " ".join(text.split())[:500]
