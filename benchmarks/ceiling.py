"""How much of the in-process ceiling is left when the same artefact is served: ``make ceiling``.

    archive ─► in-process detectors (a process for each number of threads) ─┐
            └► detserve serve start, its defaults                          ─┴► short turns in rounds ─► CEILING.md

Only one of them works at a time, each turn is a few seconds, and the turns go round and round: what the machine does
meanwhile hits all alike. The ratio is taken within a round; medians and spread are over the rounds. What serving adds
to one request is a small difference of two noisy figures: it has short turns of its own, in process and served in turns
(A B B A …), and is taken between neighbours.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BATCH_SIZES = (1, 4, 8)
CONCURRENCY = 8
_PAIRED_S = 2.0


@dataclass(frozen=True)
class Turn:
    """What one turn gave: requests a second, and the median latency."""

    rate: float
    p50_ms: float
    client_cpu_ms: float = 0.0
    failed: int = 0


@dataclass(frozen=True)
class Result:
    """One model.

    Attributes:
        turns: what ran to its turns, in the order of the rounds.
        ceiling: the in-process setting with the highest median rate.
        ratios: served at concurrency 8 ÷ the ceiling, round by round.
        overheads_ms: p50 served at concurrency 1 − p50 in process, batch size 1 and a worker's threads, pair by pair.
    """

    model: str
    runs: str
    workers: int
    threads: int
    turns: dict[str, list[Turn]]
    ceiling: str
    ratios: list[float]
    overheads_ms: list[float]


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("models", nargs="*", metavar="SPEC[=WEIGHTS]", help="default: the demo model's spec")
    made.add_argument("--images", type=Path, help="folder of JPEGs (default: 32 generated scenes)")
    made.add_argument("--rounds", type=int, default=8, help="default: %(default)s")
    made.add_argument("--seconds", type=float, default=4.0, help="of each turn (default: %(default)s)")
    made.add_argument("--pairs", type=int, default=16, help="of neighbouring turns, for the latency (default: 16)")
    made.add_argument("--workers", type=int, help="of the server (default: its own choice)")
    made.add_argument("--threads", type=int, help="of each worker (default: the server's choice)")
    made.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "CEILING.md", help="default: %(default)s")
    made.add_argument("--note", default="", help="a sentence for the head of the page")
    return made


def main() -> int:
    """Measure and write."""
    args = parser().parse_args()
    from dettools.environment import describe_environment

    results = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ceiling-")))
        os.environ["DETSERVE_STATE_DIR"] = str(folder / "state")
        images = read_images(args.images, folder)
        for given in args.models or [str(ROOT / "model_store" / "shapes" / "shapes.yaml")]:
            spec, _, weights = given.partition("=")
            results.append(_measure(args, Path(spec), Path(weights) if weights else None, images, folder))
    environment = describe_environment()
    facts = f"{len(images)} JPEGs, {sum(map(len, images)) / len(images) / 1e3:.0f} KB on average"
    args.out.write_text(to_markdown(results, environment, facts, args), "utf-8")
    document = {"environment": environment, "images": facts, "results": [asdict(result) for result in results]}
    args.out.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    print(to_markdown(results, environment, facts, args))
    return 0


def read_images(folder: Path | None, scratch: Path) -> list[bytes]:
    from dettools.datasets.scenes import write_dataset

    if folder is None:
        write_dataset(scratch / "scenes", count=32, seed=11)
        folder = scratch / "scenes" / "images"
    return [path.read_bytes() for path in sorted(folder.glob("*.jpg"))]


def _measure(
    args: argparse.Namespace, spec_path: Path, weights: Path | None, images: Sequence[bytes], folder: Path
) -> Result:
    from detserve import server
    from detserve.archive import build_archive
    from detserve.instance import Instance
    from detserve.server.capacity import capacity
    from detserve.server.settings import WORKER_DEFAULTS
    from detserve.spec import load_spec

    spec = load_spec(spec_path)
    archive = build_archive(spec, folder=spec_path.parent, out=folder / f"{spec.name}.mar", weights=weights).path
    fitting = capacity("cpu")
    workers = args.workers or fitting.workers
    threads = args.threads or fitting.threads(workers) or 1
    settings = server.ServerSettings(
        ports=None, device="cpu", workers=args.workers, threads_per_worker=args.threads, job_queue_size=100
    )
    instance = Instance.named("ceiling")
    names = {_name(count, size): (count, size) for count, size in _settings(threads, fitting.cores)}
    served = {f"served, concurrency {concurrency}": concurrency for concurrency in (1, CONCURRENCY)}
    turns: dict[str, list[Turn]] = {name: [] for name in [*names, *served]}
    with ExitStack() as stack:
        worker = WORKER_DEFAULTS
        local = {count: stack.enter_context(in_process(archive, count, images, worker)) for count, _ in names.values()}
        state = server.start([archive], settings, instance=instance, timeout_s=300)
        stack.callback(server.stop, instance)
        token = server.token(instance, "inference").value
        served_turn(state.inference_url, spec.name, token, images, CONCURRENCY, args.seconds)  # warm
        for number in range(args.rounds):
            for name, (count, size) in names.items():
                turns[name].append(ask(local[count], size, args.seconds))
            for name, users in served.items():
                turns[name].append(served_turn(state.inference_url, spec.name, token, images, users, args.seconds))
            last = ", ".join(f"{name}: {kept[-1].rate:.1f}/s {kept[-1].p50_ms:.1f} ms" for name, kept in turns.items())
            print(f"{spec.name}, round {number + 1} of {args.rounds}: {last}", file=sys.stderr, flush=True)
        pairs = []
        for number in range(args.pairs):
            turns_of_pair = [
                lambda: ask(local[threads], 1, _PAIRED_S),
                lambda: served_turn(state.inference_url, spec.name, token, images, 1, _PAIRED_S),
            ]
            if number % 2:
                pairs.append(tuple(take() for take in reversed(turns_of_pair))[::-1])
            else:
                pairs.append(tuple(take() for take in turns_of_pair))
    return _result(spec.name, f"{spec.runtime} on the CPU", workers, threads, turns, pairs)


def _settings(threads: int, cores: int) -> list[tuple[int, int]]:
    """A worker's threads, and all cores, with each batch size."""
    return [(count, size) for count in dict.fromkeys((threads, cores)) for size in BATCH_SIZES]


def _name(threads: int, batch_size: int) -> str:
    return f"in process, {threads} thread{'s' if threads > 1 else ''}, batch {batch_size}"


def _result(
    model: str,
    runs: str,
    workers: int,
    threads: int,
    turns: dict[str, list[Turn]],
    pairs: Sequence[Sequence[Turn]],
) -> Result:
    rates = {name: statistics.median(turn.rate for turn in kept) for name, kept in turns.items()}
    ceiling = max((name for name in turns if name.startswith("in process")), key=lambda name: rates[name])
    served = turns[f"served, concurrency {CONCURRENCY}"]
    return Result(
        model,
        runs,
        workers,
        threads,
        turns,
        ceiling,
        [mine.rate / theirs.rate for mine, theirs in zip(served, turns[ceiling], strict=True)],
        [mine.p50_ms - theirs.p50_ms for theirs, mine in pairs],
    )


@contextmanager
def in_process(
    archive: Path, threads: int | None, images: Sequence[bytes], environment: Mapping[str, str], device: str = "cpu"
) -> Iterator[Connection]:
    """A process with the worker's detector that waits to be asked; None leaves the threads to the framework."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    limits = {} if threads is None else {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    wanted = {**limits, **environment}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ |= wanted
    process = context.Process(target=_work, args=(theirs, archive, threads, list(images), device), daemon=True)
    process.start()
    for name, value in before.items():
        os.environ.pop(name, None)
        os.environ |= {} if value is None else {name: value}
    try:
        assert mine.poll(300)
        mine.recv()
        yield mine
    finally:
        mine.send(None)
        process.join(30)
        process.kill()


def _work(connection: Connection, archive: Path, threads: int | None, images: list[bytes], device: str) -> None:
    from dettools.benchmark.subjects import RuntimeSubject
    from dettools.local_detector import open_detector

    with open_detector(archive, model_store=archive.parent, device=device, threads=threads) as detector:
        subject = RuntimeSubject(detector)
        for size in BATCH_SIZES:  # every batch of the turns: a GPU is slow where it meets a shape for the first time
            for place in range(0, len(images), size):
                subject.answer(images[place : place + size])
        connection.send("ready")
        while (asked := connection.recv()) is not None:
            size, seconds = asked
            subject.answer(images[:size])  # the caches are still the server's
            latencies_ms: list[float] = []
            done, begun = 0, time.perf_counter()
            while time.perf_counter() - begun < seconds:
                sent = time.perf_counter()
                subject.answer([images[(done + place) % len(images)] for place in range(size)])
                latencies_ms.append((time.perf_counter() - sent) * 1e3)
                done += size
            connection.send(Turn(done / (time.perf_counter() - begun), statistics.median(latencies_ms)))


def ask(connection: Connection, size: int, seconds: float) -> Turn:
    """Let a process answer batches of ``size`` for so many seconds."""
    connection.send((size, seconds))
    assert connection.poll(seconds + 120)
    turn: Turn = connection.recv()
    return turn


def served_turn(url: str, model: str, token: str, images: Sequence[bytes], concurrency: int, seconds: float) -> Turn:
    from detserve.async_client import Target
    from dettools.benchmark.load import Bounds, Picture, run_load
    from dettools.benchmark.measurement import Load

    pictures = [Picture(str(number), image) for number, image in enumerate(images)]
    with run_load(
        Target.served(url, model, token=token),
        pictures,
        Load("closed", float(concurrency)),
        Bounds(min_time_s=seconds, max_time_s=seconds, window_s=min(1.0, seconds)),
    ) as measured:
        samples = measured.level.samples
        cpu_s = measured.level.resources.client_cpu_s
    good = [sample for sample in samples if sample.ok]
    # As in process: the answers that were there when the time was over, and the time.
    in_time = [sample for sample in good if sample.done_s <= seconds]
    return Turn(
        len(in_time) / seconds,
        statistics.median(sample.latency_ms for sample in good),
        1e3 * cpu_s / len(samples),
        len(samples) - len(good),
    )


def to_markdown(results: Sequence[Result], environment: dict[str, Any], images: str, args: argparse.Namespace) -> str:
    """Return the page."""
    cpu, packages = environment["cpu"], environment["packages"]
    about = (
        f"{environment['date'][:10]}, {cpu['model']}, {cpu['usable_cores']} cores, torch {packages.get('torch')}, "
        f"onnxruntime {packages.get('onnxruntime')}, Java {(environment['java'] or {}).get('version')}"
    )
    lines = [
        "# Served beside the in-process ceiling",
        "",
        "Written by `make ceiling` (benchmarks/ceiling.py). In process: the worker's own code on the same archive,",
        "from decoding to JSON text, in a worker's environment (threads sleep, memory is kept). Served: REST,",
        "JPEG bodies, token, closed loop, the client on the same cores.",
        "",
        *([args.note, ""] if args.note else []),
        f"- {about}",
        f"- {images}; {args.rounds} rounds of {args.seconds:g} s turns; median (least–greatest)",
    ]
    p50 = "p50 served at concurrency 1 − p50 in process with a worker's threads, batch 1"
    for result in results:
        lines += [
            "",
            f"## {result.model}: {result.runs}, {result.workers} workers with {result.threads} threads each",
            "",
            "| | images/s | p50 ms | client CPU ms/request | failed |",
            "|---|---|---|---|---|",
        ]
        for name, turns in result.turns.items():
            mark = " ← ceiling" if name == result.ceiling else ""
            cpu_ms = statistics.median(turn.client_cpu_ms for turn in turns)
            cells = [
                name + mark,
                spread([turn.rate for turn in turns]),
                spread([turn.p50_ms for turn in turns]),
                f"{cpu_ms:.2f}" if cpu_ms else "–",
                str(sum(turn.failed for turn in turns)),
            ]
            lines.append(f"| {' | '.join(cells)} |")
        lines += [
            "",
            f"- served at concurrency {CONCURRENCY} ÷ ceiling: **{spread(result.ratios, 2)}**",
            f"- {p50}, {len(result.overheads_ms)} pairs of {_PAIRED_S:g} s: **{_quartiles(result.overheads_ms)} ms**",
        ]
    return "\n".join(lines) + "\n"


def _quartiles(values: Sequence[float]) -> str:
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return f"{median:.1f} (quartiles {first:.1f} and {third:.1f})"


def spread(values: Sequence[float], digits: int = 1) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


if __name__ == "__main__":
    sys.exit(main())
