"""A run as rows of text, the same in the terminal, in Markdown and on the page; and as CSV, with every digit."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dettools.benchmark.measurement import STAGES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dettools.benchmark.run import Run
    from dettools.benchmark.statistics import LevelSummary

NONE = "–"
UNSEEN_MS = 1e-3
"""A stage that never takes longer is left out: in process there is no network."""

MEASURED = {
    "served": "requests to the endpoint as a client sees them: building and sending the request, the server's queue "
    "and batch, decode, preprocess, forward, postprocess, writing and receiving the answer",
    "eager": "the framework's own inference in this process; includes decode, pre- and postprocessing, no server",
    "runtime": "the artefact's detector in this process; includes decode, pre- and postprocessing and writing the "
    "answer, no server: the ceiling that serving can reach",
}


@dataclass(frozen=True)
class SharedReason:
    """A reason against quoting the figures, with all the levels that gave it."""

    stamp: str
    code: str
    text: str
    where: str


def table(run: Run) -> tuple[list[str], list[list[str]]]:
    """Return the header and a row per level, as text; columns that no level fills are left out."""
    percentiles = [one.name for one in run.levels[0].percentiles] if run.levels else []
    open_loop = any(level.load.loop == "open" for level in run.levels)
    unit = "req/s" if run.kind == "served" else "images/s"
    header = ["level", *(["offered"] if open_loop else []), unit]
    header += [f"{name} ms" for name in percentiles]
    served = run.kind == "served"
    header += ["max ms", "requests" if served else "images", "errors", "batch"]
    header += ["client CPU ms", "server CPU ms" if served else "CPU ms", "AP", "stamp"]
    rows = []
    for name, level, verdict in zip(run.labels, run.levels, run.verdicts, strict=True):
        accuracy = level.accuracy
        rows.append(
            [
                name,
                *([number(level.offered_rps)] if open_loop else []),
                number(level.throughput_rps.value),
                *(number(one.ms) for one in level.percentiles),
                number(level.max_ms),
                str(level.requests),
                NONE if not level.failed else f"{level.failed} ({level.error_rate:.1%})",
                mean_batch(level),
                number(level.client_cpu_ms if served else None),
                number(level.server_cpu_ms if served else level.client_cpu_ms),
                NONE if accuracy is None else f"{accuracy.ap_delivered:.3f}",
                verdict.stamp,
            ]
        )
    return _without_empty_columns(header, rows)


def percentile_table(run: Run) -> tuple[list[str], list[list[str]]]:
    """Return throughput and percentiles with their intervals, a row per level."""
    names = [one.name for one in run.levels[0].percentiles] if run.levels else []
    rows = []
    for name, level in zip(run.labels, run.levels, strict=True):
        rate = level.throughput_rps
        figures = [(rate.value, rate.low, rate.high), *((one.ms, one.low_ms, one.high_ms) for one in level.percentiles)]
        rows.append([name, *(_with_interval(*figure) for figure in figures)])
    unit = "req/s" if run.kind == "served" else "images/s"
    return _without_empty_columns(["level", unit, *(f"{name} ms" for name in names)], rows)


def stage_table(run: Run) -> tuple[list[str], list[list[str]]]:
    """Return the mean latency by its parts, a row per level that tells them."""
    header = ["level", *(name.replace("_", "+") for name in STAGES), "sum ms", "server queue ms"]
    used = {stage: any(level.stages_ms.get(stage, 0.0) > UNSEEN_MS for level in run.levels) for stage in STAGES}
    rows = []
    for name, level in zip(run.labels, run.levels, strict=True):
        if level.stages_ms:
            parts = [level.stages_ms.get(stage, 0.0) for stage in STAGES]
            cells = [number(part) if used[stage] else NONE for stage, part in zip(STAGES, parts, strict=True)]
            rows.append([name, *cells, number(sum(parts)), number(level.resources.queue_ms)])
    return _without_empty_columns(header, rows)


def error_table(run: Run) -> tuple[list[str], list[list[str]]]:
    """Return the errors by code, a row per level that has any."""
    codes = sorted({code for level in run.levels for code in level.errors})
    rows = [
        [name, str(level.requests), *(str(level.errors.get(code, 0)) for code in codes), f"{level.error_rate:.2%}"]
        for name, level in zip(run.labels, run.levels, strict=True)
        if level.errors
    ]
    return ["level", "requests", *codes, "failed"], rows


def accuracy_table(run: Run) -> tuple[list[str], list[list[str]]]:
    """Return what the answers were worth, a row per level that was scored."""
    header = ["level", "AP answered", "AP50 answered", "AP delivered", "AP50 delivered", "scored", "failed"]
    rows = []
    for name, level in zip(run.labels, run.levels, strict=True):
        if level.accuracy is not None:
            found = level.accuracy
            values = (found.ap_answered, found.ap50_answered, found.ap_delivered, found.ap50_delivered)
            rows.append([name, *(f"{value:.3f}" for value in values), str(found.requests), str(found.failed)])
    return header, rows


def resource_table(run: Run) -> tuple[list[str], list[list[str]]]:
    """Return what the levels cost, a row per level."""
    served = run.kind == "served"
    header = ["level", "measured s", "warm-up s", "client CPU ms/req"]
    header += ["server CPU ms/req" if served else "CPU ms/image", "client core"]
    header += ["machine CPU", "late p99 ms", "loop lag p99 ms", "throttled s", "stolen"]
    header += ["GPU", "GPU MB", "GPU MHz", "GPU W"]
    rows = []
    for name, level in zip(run.labels, run.levels, strict=True):
        used = level.resources
        gpu = level.gpus[0] if level.gpus else None
        share = used.client_cpu_s / used.wall_s if used.wall_s else None
        rows.append(
            [
                name,
                number(level.seconds),
                number(level.warm_up.seconds),
                number(level.client_cpu_ms) if served else NONE,
                number(level.server_cpu_ms if served else level.client_cpu_ms),
                percent(share if served else None),
                percent(used.machine_cpu),
                number(level.late_ms if level.load.loop == "open" else None),
                number(used.loop_lag_ms),
                number(used.cgroup_throttled_s),
                percent(used.steal),
                # nvidia-smi tells per cent.
                NONE if gpu is None or gpu.utilisation is None else f"{gpu.utilisation:.0f} %",
                *map(number, _gpu_values(level)),
            ]
        )
    return _without_empty_columns(header, rows)


def findings(run: Run) -> list[str]:
    """Return what the run says in sentences: what was measured, what ran, the best level, knee, SLO."""
    sentences = [f"Measured: {MEASURED[run.kind]}."]
    if what := what_ran(run.target):
        sentences.append(f"What ran: {what}.")
    if run.best is not None:
        rate = run.levels[run.best].throughput_rps
        unit = "requests" if run.kind == "served" else "images"
        sentences.append(f"Highest throughput: {number(rate.value)} {unit}/s at {run.labels[run.best]}.")
    if run.knee is not None:
        where = "" if run.knee.bracketed else "; it is the sweep's first or last level, so the bend may lie outside"
        sentences.append(f"Knee (most throughput per latency): {run.labels[run.knee.level]}{where}.")
    if run.sustained is not None:
        sentences.append(f"Highest rate answered as fast as it arrives: {run.labels[run.sustained]}.")
    elif any(level.load.loop == "open" for level in run.levels):
        sentences.append("No rate of the sweep is answered as fast as it arrives.")
    if run.slo is not None:
        sentences.append(run.slo.sentence(run.labels))
    return sentences


def what_ran(target: Mapping[str, Any]) -> str:
    """Return the runtime, the provider that it runs on, the device and the precision; empty where nothing is known."""
    runtime = " ".join(str(target[name]) for name in ("runtime", "runtime_version") if target.get(name))
    device = target.get("device_name") if target.get("device") != "cpu" else None
    known = [runtime or target.get("source"), target.get("provider"), target.get("device"), device]
    return ", ".join(str(one) for one in [*known, target.get("precision")] if one)


def to_markdown(run: Run) -> str:
    """Return the run as Markdown to paste into an issue."""
    lines = [f"## {run.title}", "", f"**{run.verdict.stamp}**. {' '.join(findings(run))}", ""]
    lines += [*_markdown(*table(run)), ""]
    header, rows = stage_table(run)
    if rows:
        lines += ["Mean latency by its parts, in ms:", "", *_markdown(header, rows), ""]
    if reasons := shared_reasons(run):
        listed = [f"- {reason.stamp} `{reason.code}` {reason.text} ({reason.where})" for reason in reasons]
        lines += ["Reservations:", "", *listed, ""]
    lines += [f"Images: {run.images.sentence()}.", "", f"Environment: {environment_line(run.environment)}.", ""]
    return "\n".join(lines)


def shared_reasons(run: Run) -> list[SharedReason]:
    """Return every reason once, the gravest first, in the words of the first level that has it."""
    told: list[tuple[str, str, str, str]] = [
        ("the run", *reason) for reason in run.verdict.reasons if not reason[1].startswith("levels_")
    ]
    for name, verdict in zip(run.labels, run.verdicts, strict=True):
        told += [(name, *reason) for reason in verdict.reasons]
    places: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for where, stamp, code, text in told:
        places.setdefault((stamp, code), []).append((where, text))
    found = []
    for (stamp, code), same in places.items():
        others = [where for where, _ in same[1:]]
        also = f"; also at {', '.join(others)}" if others else ""
        found.append(SharedReason(stamp, code, same[0][1], same[0][0] + also))
    return sorted(found, key=lambda reason: reason.stamp != "INVALID")


def environment_line(environment: dict[str, Any]) -> str:
    """Return the machine in one line."""
    cpu = environment.get("cpu") or {}
    gpus = [gpu.get("name") for gpu in environment.get("gpus") or []]
    packages = environment.get("packages") or {}
    versions = [
        f"{name} {packages[name]}" for name in ("detserve", "torch", "onnxruntime", "torchserve") if packages.get(name)
    ]
    parts = [cpu.get("model"), f"{cpu['cores']} cores" if cpu.get("cores") else None, *gpus, environment.get("python")]
    return ", ".join(str(part) for part in [*parts, *versions] if part) or "not recorded"


def to_csv(run: Run) -> str:
    """Return a line per level with every figure unrounded; times are ms, an infinite one ``inf``."""
    rows = []
    for name, level, verdict in zip(run.labels, run.levels, run.verdicts, strict=True):
        row: dict[str, Any] = {
            "level": name,
            "loop": level.load.loop,
            "load": level.load.value,
            "stamp": verdict.stamp,
            "reasons": " ".join(code for _, code, _ in verdict.reasons),
            "seconds": level.seconds,
            "requests": level.requests,
            "measured": level.measured,
            "answered": level.answered,
            "failed": level.failed,
            "errors": " ".join(f"{code}={count}" for code, count in level.errors.items()),
            "offered_rps": level.offered_rps,
            "throughput_rps": level.throughput_rps.value,
            "throughput_low_rps": level.throughput_rps.low,
            "throughput_high_rps": level.throughput_rps.high,
            "mean_ms": level.mean_ms,
        }
        for one in level.percentiles:
            row |= {f"{one.name}_ms": one.ms, f"{one.name}_low_ms": one.low_ms, f"{one.name}_high_ms": one.high_ms}
            row |= {f"{one.name}_strict_ms": one.strict_ms}
        row |= {"max_ms": level.max_ms, "warm_up_s": level.warm_up.seconds, "stable": level.stable}
        row |= {f"{stage}_mean_ms": level.stages_ms.get(stage) for stage in STAGES}
        row |= {"queue_mean_ms": level.resources.queue_ms, "mean_batch": _mean_batch(level)}
        row |= {"client_cpu_ms": level.client_cpu_ms, "server_cpu_ms": level.server_cpu_ms}
        row |= {"machine_cpu": level.resources.machine_cpu}
        if level.accuracy is not None:
            row |= asdict(level.accuracy)
        rows.append(row)
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def number(value: float | None) -> str:
    """Return three significant digits, or all of an integer part; an en dash for None."""
    if value is None:
        return NONE
    if value in (float("inf"), float("-inf")):
        return "∞"
    size = abs(value)
    return f"{value:,.0f}" if size >= 100 else f"{value:.1f}" if size >= 10 else f"{value:.2f}"


def percent(value: float | None) -> str:
    """Return a share as per cent; an en dash for None."""
    return NONE if value is None else f"{value * 100:.0f} %" if value >= 0.1 else f"{value * 100:.1f} %"


def mean_batch(level: LevelSummary) -> str:
    """Return the mean size of the batches that requests were in."""
    return number(_mean_batch(level))


def _with_interval(value: float | None, low: float | None, high: float | None) -> str:
    return number(value) if low is None or high is None else f"{number(value)} [{number(low)}, {number(high)}]"


def _gpu_values(level: LevelSummary) -> tuple[float | None, float | None, float | None]:
    if not level.gpus:
        return None, None, None
    return level.gpus[0].memory_mb, level.gpus[0].sm_clock_mhz, level.gpus[0].power_w


def _mean_batch(level: LevelSummary) -> float | None:
    requests = sum(level.batch_sizes.values())
    return sum(size * count for size, count in level.batch_sizes.items()) / requests if requests else None


def _without_empty_columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    used = [i for i in range(len(header)) if i == 0 or any(row[i] not in (NONE, "") for row in rows)]
    return [header[i] for i in used], [[row[i] for i in used] for row in rows]


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    aligned = ["---", *("---:" for _ in header[1:])]
    lines = ([cell.replace("|", "\\|") for cell in cells] for cells in (header, aligned, *rows))
    return [f"| {' | '.join(cells)} |" for cells in lines]
