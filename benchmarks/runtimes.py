"""What the export gains when it is served: ``make runtimes``.

    spec ─► archive (torch) ────────────┐  each behind servers of several settings, all up at once,
         └► export ─► archive (onnx) ───┴► one asked at a time, in rounds ─► the best setting of each
                                            the two best in turns (A B B A …) ─► ratios ─► RUNTIMES.md

The load is that of ``detserve benchmark served``: JPEG bodies, token, closed loop, the client on the same cores. The
ratio is taken between neighbouring turns, so that what the machine does meanwhile hits both alike.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ceiling import ROOT, Turn, read_images, served_turn, spread

CONCURRENCY = 8
RUNTIMES = ("torch", "onnx")


@dataclass(frozen=True)
class Setting:
    """A way to serve: worker processes, torch or onnxruntime threads of each, most requests in one batch."""

    workers: int
    threads: int
    batch_size: int

    def words(self) -> str:
        """Name it."""
        workers = "1 worker" if self.workers == 1 else f"{self.workers} workers"
        return f"{workers} × {self.threads} thread{'s' if self.threads > 1 else ''}, batch {self.batch_size}"


@dataclass(frozen=True)
class Result:
    """One model.

    Attributes:
        search: per runtime and setting, the turns of the search.
        best: per runtime, the setting with the highest median rate.
        pairs: neighbouring turns of the two best, torch then onnx.
    """

    model: str
    search: dict[str, dict[str, list[Turn]]]
    best: dict[str, str]
    pairs: list[tuple[Turn, Turn]]

    def ratios(self) -> list[float]:
        """Throughput of onnx ÷ torch, pair by pair."""
        return [onnx.rate / torch.rate for torch, onnx in self.pairs]


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("specs", nargs="*", type=Path, help="default: the demo model's spec")
    made.add_argument("--images", type=Path, help="folder of JPEGs (default: 32 generated scenes)")
    made.add_argument("--nms", choices=("host", "graph"), help="of the export (default: the exporter's)")
    made.add_argument("--rounds", type=int, default=3, help="of the search (default: %(default)s)")
    made.add_argument("--pairs", type=int, default=8, help="of the comparison (default: %(default)s)")
    made.add_argument("--seconds", type=float, default=5.0, help="of each turn (default: %(default)s)")
    made.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "RUNTIMES.md", help="default: %(default)s")
    return made


def main() -> int:
    """Measure and write."""
    args = parser().parse_args()
    from dettools.environment import describe_environment

    results: list[Result] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="runtimes-")))
        os.environ["DETSERVE_STATE_DIR"] = str(folder / "state")
        images = read_images(args.images, folder)
        specs = args.specs or [ROOT / "model_store" / "shapes" / "shapes.yaml"]
        results += [_measure(args, spec, images, folder) for spec in specs]
    environment = describe_environment()
    facts = f"{len(images)} JPEGs, {sum(map(len, images)) / len(images) / 1e3:.0f} KB on average"
    page = to_markdown(results, environment, facts, args)
    args.out.write_text(page, "utf-8")
    document = {"environment": environment, "images": facts, "results": [asdict(result) for result in results]}
    args.out.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    print(page)
    return 0


def settings(cores: int) -> list[Setting]:
    """Return the ways to serve that are tried: the cores as workers, as threads, and both with batches."""
    ways = [(cores, 1), (1, cores), (1, 1)] if cores > 1 else [(1, 1)]
    return [Setting(workers, threads, size) for workers, threads in ways for size in (1, 4)]


def _measure(args: argparse.Namespace, spec_path: Path, images: Sequence[bytes], folder: Path) -> Result:
    from detserve import server
    from detserve.archive import build_archive
    from detserve.export.exporters import ExportOptions
    from detserve.export.model import export_model
    from detserve.export.onnx_file import require_described
    from detserve.instance import Instance
    from detserve.server.capacity import capacity
    from detserve.spec import load_spec

    spec = load_spec(spec_path)
    exported = export_model(
        spec, folder=spec_path.parent, out=folder / f"{spec.name}.onnx", options=ExportOptions(nms=args.nms)
    )
    archives = {
        "torch": build_archive(spec, folder=spec_path.parent, out=folder / "torch" / f"{spec.name}.mar").path,
        "onnx": build_archive(
            exported.spec,
            folder=folder,
            weights=exported.path,
            golden=require_described(exported.path).golden,
            out=folder / "onnx" / f"{spec.name}.mar",
        ).path,
    }
    ways = settings(capacity("cpu").cores)
    asked: dict[tuple[str, str], tuple[str, str]] = {}
    with ExitStack() as stack:
        for runtime, archive in archives.items():
            for number, way in enumerate(ways):
                instance = Instance.named(f"{runtime}{number}")
                state = server.start(
                    [archive],
                    server.ServerSettings(
                        ports=None,
                        device="cpu",
                        workers=way.workers,
                        threads_per_worker=way.threads,
                        batch_size=way.batch_size,
                        job_queue_size=100,
                    ),
                    instance=instance,
                    timeout_s=300,
                )
                stack.callback(server.stop, instance)
                asked[runtime, way.words()] = (state.inference_url, server.token(instance, "inference").value)
                print(f"{runtime}: {way.words()} is up", file=sys.stderr, flush=True)

        def turn(runtime: str, way: str) -> Turn:
            url, token = asked[runtime, way]
            kept = served_turn(url, spec.name, token, images, CONCURRENCY, args.seconds)
            print(f"{runtime}, {way}: {kept.rate:.1f}/s, {kept.p50_ms:.0f} ms", file=sys.stderr, flush=True)
            return kept

        search: dict[str, dict[str, list[Turn]]] = {name: {way.words(): [] for way in ways} for name in RUNTIMES}
        for _ in range(args.rounds):
            for runtime, way in asked:
                search[runtime][way].append(turn(runtime, way))
        best = {runtime: best_of(search[runtime]) for runtime in RUNTIMES}
        pairs = []
        for number in range(args.pairs):
            order = RUNTIMES if number % 2 == 0 else RUNTIMES[::-1]
            both = {runtime: turn(runtime, best[runtime]) for runtime in order}
            pairs.append((both["torch"], both["onnx"]))
    return Result(spec.name, search, best, pairs)


def best_of(search: dict[str, list[Turn]]) -> str:
    """Return the setting with the highest median rate."""
    return max(search, key=lambda way: statistics.median(turn.rate for turn in search[way]))


def to_markdown(results: Sequence[Result], environment: dict[str, Any], images: str, args: argparse.Namespace) -> str:
    """Return the page."""
    cpu, packages = environment["cpu"], environment["packages"]
    how = f"REST, JPEG bodies, token, closed loop at concurrency {CONCURRENCY},"
    about = (
        f"{environment['date'][:10]}, {cpu['model']}, {cpu['usable_cores']} cores, torch {packages.get('torch')}, "
        f"onnxruntime {packages.get('onnxruntime')}, Java {(environment['java'] or {}).get('version')}"
    )
    lines = [
        "# The exported model beside the torch runtime, both served",
        "",
        f"Written by `make runtimes` (benchmarks/runtimes.py): {how}",
        "the client on the same cores, each runtime at its own best setting.",
        "",
        f"- {about}",
        f"- {images}; {args.rounds} rounds and {args.pairs} pairs of {args.seconds:g} s turns; median (least–greatest)",
    ]
    for result in results:
        lines += ["", f"## {result.model}", "", "| | torch req/s | onnx req/s |", "|---|---|---|"]
        for way in result.search["torch"]:
            cells = [
                spread([turn.rate for turn in result.search[runtime][way]])
                + (" ← best" if result.best[runtime] == way else "")
                for runtime in RUNTIMES
            ]
            lines.append(f"| {way} | {cells[0]} | {cells[1]} |")
        sides = dict(zip(RUNTIMES, zip(*result.pairs, strict=True), strict=True))
        failed = sum(turn.failed for turns in sides.values() for turn in turns)
        told = "; ".join(
            f"{runtime} {spread([turn.rate for turn in turns])} req/s, "
            f"p50 {spread([turn.p50_ms for turn in turns], 0)} ms"
            for runtime, turns in sides.items()
        )
        lines += [
            "",
            f"- the best of each, {len(result.pairs)} pairs: {told}; {failed} failed",
            f"- onnx ÷ torch, throughput: **{spread(result.ratios(), 2)}**",
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
