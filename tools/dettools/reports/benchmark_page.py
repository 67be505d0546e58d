"""A benchmark as one HTML page that can be passed on: no script, nothing loaded, the same bytes from the same run."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from dettools.benchmark.run import Run, RunFileError
from dettools.benchmark.summary import (
    MEASURED,
    accuracy_table,
    error_table,
    number,
    percentile_table,
    resource_table,
    shared_reasons,
    stage_table,
    table,
)
from dettools.reports import curves

PAGE = "report.html"
TEMPLATE = "templates/benchmark.html.j2"
STAMP_WORDS = {
    "VALID": "nothing speaks against these figures",
    "WARN": "to be quoted with the reservations below",
    "INVALID": "not to be quoted",
}
_Table = tuple[list[str], list[list[str]]]


@dataclass(frozen=True)
class Section:
    """A heading with its text, pictures and tables."""

    title: str
    text: str = ""
    pictures: tuple[Markup, ...] = ()
    tables: tuple[_Table, ...] = ()


def write_page(run: Run, samples: curves.Samples, path: Path) -> None:
    """Write the page.

    Args:
        samples: the requests of each level, as `StoredRun.samples` or ``[level.samples for level in levels]``.

    Raises:
        RunFileError: the file cannot be written.
    """
    try:
        path.write_text(render_page(run, samples), "utf-8")
    except OSError as error:
        raise RunFileError(f"Cannot write {path}: {error.strerror}. Name another --out.") from error


def render_page(run: Run, samples: curves.Samples) -> str:
    """Return the page's HTML."""
    template = files("dettools.reports").joinpath(TEMPLATE).read_text("utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(template).render(
        run=run,
        measured=f"Measured{_date(run)}: {MEASURED[run.kind]}.",
        stamp_words=STAMP_WORDS[run.verdict.stamp],
        cards=list(_cards(run)),
        reasons=shared_reasons(run),
        sections=list(_sections(run, samples)),
        method=list(_method(run)),
        blocks=[
            ("Images", [("sent", run.images.sentence()), ("digest", run.images.digest[:16])]),
            ("What ran", _pairs(run.target)),
            ("Settings", _pairs(run.settings)),
            ("Environment", _pairs(run.environment)),
        ],
    )


def _cards(run: Run) -> Iterator[tuple[str, str]]:
    unit = "requests" if run.kind == "served" else "images"
    if run.best is not None:
        rate = run.levels[run.best].throughput_rps
        interval = "" if rate.low is None else f", {number(rate.low)} to {number(rate.high)} at 95 %"
        yield f"{number(rate.value)} /s", f"highest throughput: {unit} per second at {run.labels[run.best]}{interval}"
    if run.knee is not None:
        level = run.levels[run.knee.level]
        yield (
            run.labels[run.knee.level],
            f"knee: {number(level.throughput_rps.value)} /s with a mean latency of {number(level.mean_ms)} ms"
            + ("" if run.knee.bracketed else "; at an end of the sweep"),
        )
    if run.sustained is not None:
        yield run.labels[run.sustained], "highest rate that is answered as fast as it arrives"
    if run.slo is not None:
        best = run.slo.highest
        yield "missed" if best is None else run.labels[best], run.slo.sentence(run.labels)
    lightest = min(range(len(run.levels)), key=lambda index: run.levels[index].load.value, default=None)
    if lightest is not None and (median := run.levels[lightest].percentile(50)) and median.ms is not None:
        yield f"{number(median.ms)} ms", f"median latency at {run.labels[lightest]}"
    requests = sum(level.requests for level in run.levels)
    failed = sum(level.failed for level in run.levels)
    yield f"{failed:,} failed", f"of {requests:,} {unit} in {len(run.levels)} level{'s' * (len(run.levels) != 1)}"


def _sections(run: Run, samples: curves.Samples) -> Iterator[Section]:
    if not run.levels:
        return
    if run.kind == "served":
        text = "A point per level, named by its load; bars: 95 % intervals; hollow: INVALID levels."
        yield Section("Latency and throughput", text, _pictures(curves.latency_throughput(run)), (table(run),))
    else:
        text = "A level is a batch size; an image's latency is that of its batch."
        yield Section("Throughput by batch size", text, _pictures(curves.throughput_bars(run)), (table(run),))
    if any(level.accuracy for level in run.levels):
        text = "COCO AP of the answers; delivered: a failed request counts as an image in which nothing was found."
        yield Section("Accuracy under load", text, tables=(accuracy_table(run),))
    if any(level.errors for level in run.levels):
        yield Section("Errors by code", "Over the whole level, warm-up included.", tables=(error_table(run),))
    if any(level.stages_ms for level in run.levels):
        text = "Mean over the images. wait: for the other images of the batch."
        if run.kind == "served":
            text = (
                "Mean over the answers. network+queue: all between the client and the handler, waiting for a batch "
                "included; wait: in the handler, for the other images of the batch."
            )
        yield Section("Where the time goes", text, _pictures(curves.stage_bars(run)), (stage_table(run),))
    percentiles = percentile_table(run)
    if any(samples):
        yield Section(
            "How latencies are distributed",
            "The tail: which share of the requests was slower. Then each level's histogram.",
            _pictures(curves.tails(run, samples), curves.histograms(run, samples)),
            (percentiles,),
        )
        yield Section(
            "Latency over time",
            "Line and area: median and range of short stretches, or every request; yellow: warm-up, not counted; "
            "red: failed requests.",
            _pictures(curves.over_time(run, samples)),
        )
    else:
        text = "The raw samples are not beside this run; the pictures drawn from them are left out."
        yield Section("How latencies are distributed", text, tables=(percentiles,))
    if any(level.batch_sizes for level in run.levels) and run.kind == "served":
        yield Section("Batches that the worker formed", "", _pictures(curves.batch_bars(run)))
    yield Section("What it cost", "", tables=(resource_table(run),))


def _method(run: Run) -> Iterator[str]:
    yield (
        "Warm-up: found in the latencies by MSER-5 (White 1997) and not counted. Throughput: answers per second from "
        "there until the last request was due."
    )
    yield (
        "Percentiles: over the answered requests, linear between ranks. One is shown when a distribution-free 95 % "
        "interval for it exists (72 answers for p95, 368 for p99, 3,688 for p99.9), and called rough with fewer than "
        "ten answers beyond it. Intervals: circular block bootstrap, which respects that slow requests come together."
    )
    if run.kind == "served":
        yield (
            "Closed loop (concurrency): so many requests in flight; a stalled server is not sent more, so stalls hide. "
            "Open loop (req/s): requests are sent when they are due, and latency counts from then."
        )
        yield "SLO: judged with failed requests as taking for ever. Knee: the level with the most throughput / latency."
    yield "The intervals know what varied inside this run; what varies from run to run, only repeating it shows."


def _date(run: Run) -> str:
    date = run.environment.get("date")
    return f" on {str(date)[:10]}" if date else ""


def _pairs(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested values as lines; what is not known is left out."""
    found: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            found += _pairs(value, f"{prefix}{name}.")
        elif isinstance(value, Sequence) and not isinstance(value, str):
            for index, one in enumerate(value if any(isinstance(one, Mapping) for one in value) else []):
                found += _pairs(one, f"{prefix}{name}.{index}.")
            if value and not any(isinstance(one, Mapping) for one in value):
                found.append((prefix + str(name), ", ".join(map(str, value))))
        elif value is not None:
            found.append((prefix + str(name), str(value)))
    return found


def _pictures(*svgs: str) -> tuple[Markup, ...]:
    # Our own drawings; the names in them are escaped by matplotlib.
    return tuple(Markup(svg) for svg in svgs)  # noqa: S704
