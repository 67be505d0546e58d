"""The detector on a GPU: served beside eager, and beside the in-process ceiling: ``make results``; RESULTS.md.

    archive (a precision) ─┬► in process, on the GPU ───────────────────┐
                           └► `detserve serve start --device gpu`,      ├► short turns in rounds ─► speed
                              as it comes and in other settings ────────┘
                                └► `detserve compare`, `detserve evaluate --against eager` ─► the same detections, AP

Eager runs on the CPU. Only one is asked at a time, each turn is a second or two, and the turns go round and round. Each
ratio is taken within a round. A model with a section keeps it until it is measured again.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.section import write_section
from ceiling import BATCH_SIZES, ROOT, Turn, ask, in_process, read_images, served_turn, spread

HEAD = "# On a GPU\n\nEach section is written by `make results` (benchmarks/gpu.py) where there is a GPU.\n"
CONCURRENCIES = (1, 8, 32)
SETTINGS = {
    "as it comes": [],
    "batch delay 1 ms": ["--max-batch-delay-ms", "1"],
    "2 workers": ["--workers", "2"],
}
PACKAGES = ("torch", "torchvision", "torchserve", "onnxruntime-gpu")
REPORTED = ("runtime", "provider", "device_name", "precision", "jpeg_decoder")
Server = tuple[str, str, dict[str, Any]]
_ALONE = "in process, batch 1"


@dataclass(frozen=True)
class Subject:
    """A model in one precision.

    Attributes:
        packing: arguments of ``detserve archive``.
        spec: for the eager side of ``detserve compare``; None where only the speed is measured.
        annotations: of ``images``, for AP; None without.
    """

    title: str
    name: str
    packing: Sequence[str]
    images: Path
    spec: Sequence[str] | None = None
    annotations: Path | None = None


def main() -> int:
    """Measure and write."""
    args = parser().parse_args()
    with tempfile.TemporaryDirectory(prefix="gpu-") as name:
        folder = Path(name)
        os.environ["DETSERVE_STATE_DIR"] = str(folder / "state")
        read_images(None, folder)
        for subject in subjects(args, folder):
            lines = measure(subject, args, folder)
            print("\n".join([f"## {subject.title}", "", *lines, ""]), flush=True)
            if not args.quick:
                write_section(subject.title, lines, args.out, HEAD)
    return 0


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("models", nargs="*", metavar="SPEC[=WEIGHTS]", help="default: the demo model's spec")
    made.add_argument("--images", type=Path, help="folder of JPEGs (default: generated scenes, and AP on 200 of them)")
    made.add_argument("--random", nargs="*", default=[], metavar="BUILDER", help="of torchvision, for the speed alone")
    made.add_argument("--precisions", nargs="+", default=["fp32", "fp16"], choices=["fp32", "fp16", "bf16"])
    made.add_argument("--rounds", type=int, default=4, help="default: %(default)s")
    made.add_argument("--seconds", type=float, default=2.0, help="of each turn (default: %(default)s)")
    made.add_argument("--device", choices=["gpu", "cpu"], default="gpu", help="cpu: only to see that it runs")
    made.add_argument("--quick", action="store_true", help="one round of short turns, nothing is written")
    made.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "RESULTS.md", help="default: %(default)s")
    return made


def subjects(args: argparse.Namespace, folder: Path) -> Iterator[Subject]:
    """Yield what is measured, in turn."""
    scenes = folder / "scenes" / "images"
    validation = folder / "validation"
    given = args.models or ([] if args.random else [str(ROOT / "model_store" / "shapes" / "shapes.yaml")])
    if given and args.images is None:
        detserve("scenes", "--out", validation, "--count", 20 if args.quick else 200, "--seed", 1)
    for model in given:
        spec, _, weights = model.partition("=")
        packing = [spec, *(["--weights", weights] if weights else [])]
        for precision in args.precisions:
            yield Subject(
                f"{Path(spec).stem} {precision}",
                Path(spec).stem,
                [*packing, "--serving", f"precision={precision}"],
                args.images or validation / "images",
                ["--spec", *packing],
                None if args.images else validation / "annotations.json",
            )
    for builder in args.random:
        weights, classes = random_weights(builder, folder)
        packing = [
            "--torchvision",
            builder,
            "--weights",
            str(weights),
            "--categories",
            str(classes),
            "--name",
            "random",
        ]
        for precision in args.precisions:
            title = f"{builder} {precision}, random weights"
            serving_options = ["--serving", f"precision={precision}", "--serving", "golden_check=warn"]
            yield Subject(title, "random", [*packing, *serving_options], args.images or scenes)


def random_weights(builder: str, folder: Path) -> tuple[Path, Path]:
    """Write a builder's freshly initialised weights and the names of 90 classes."""
    import torch
    from torchvision.models import get_model

    torch.manual_seed(0)
    state = get_model(builder, weights=None, weights_backbone=None, num_classes=91).state_dict()
    weights, classes = folder / f"{builder}.pth", folder / "classes.json"
    torch.save(state, weights)
    categories = [{"id": number, "name": f"class {number}"} for number in range(1, 91)]
    classes.write_text(json.dumps({"images": [], "annotations": [], "categories": categories}), "utf-8")
    return weights, classes


def measure(subject: Subject, args: argparse.Namespace, folder: Path) -> list[str]:
    """Pack, serve in all settings, compare and measure one model; return its section's lines."""
    from detserve.server.settings import WORKER_DEFAULTS

    archive = folder / f"{subject.name}.mar"
    detserve("archive", *subject.packing, "--out", archive, "--model-store", folder, "--force")
    images = [path.read_bytes() for path in sorted(subject.images.glob("*.jpg"))[:32]]
    seconds = 0.3 if args.quick else args.seconds
    device = "cuda" if args.device == "gpu" else "cpu"
    with serving(archive, args.device) as servers, ExitStack() as stack:
        lines = [*about(servers["as it comes"]), *equality(subject, folder)]
        local = stack.enter_context(in_process(archive, None, images, WORKER_DEFAULTS, device))
        turns: dict[str, list[Turn]] = {}
        for _ in range(1 if args.quick else args.rounds):
            for size in BATCH_SIZES:
                turns.setdefault(f"in process, batch {size}", []).append(ask(local, size, seconds))
            for setting, (url, token, _) in servers.items():
                for users in CONCURRENCIES:
                    turn = served_turn(url, subject.name, token, images, users, seconds)
                    turns.setdefault(f"served {setting}, concurrency {users}", []).append(turn)
    size_kb = sum(map(len, images)) / len(images) / 1e3
    return [
        *lines,
        f"- {len(images)} JPEGs, {size_kb:.0f} KB on average; the client on the same machine",
        f"- {len(turns[_ALONE])} rounds of {seconds:g} s turns; median (least–greatest)",
        "",
        *table(turns),
    ]


@contextmanager
def serving(archive: Path, device: str) -> Iterator[dict[str, Server]]:
    """Serve the archive in every setting, all at once; yield the servers by the setting's words."""
    instances = {setting: f"gpu{number}" for number, setting in enumerate(SETTINGS)}
    with ThreadPoolExecutor(len(instances)) as threads:
        started = [threads.submit(start, archive, device, instances[one], options) for one, options in SETTINGS.items()]
        wait(started)
        try:
            yield {setting: one.result() for setting, one in zip(SETTINGS, started, strict=True)}
        finally:
            list(
                threads.map(lambda one: detserve("serve", "stop", "--instance", one, codes=(0, 2)), instances.values())
            )


def start(archive: Path, device: str, instance: str, options: Sequence[str]) -> Server:
    """Start a server; return its address, a token, and what the worker says of itself."""
    place = ["--instance", instance]
    detserve("serve", "start", "--models", archive, *place, "--port", "free", "--device", device, *options)
    status = json.loads(detserve("serve", "status", *place, "--json").splitlines()[-1])
    token = detserve("serve", "token", *place).strip()
    return status["inference_url"], token, status["models"][0]["reported"]


def about(server: Server) -> list[str]:
    """Say where it ran."""
    from dettools.environment import describe_environment

    environment, model = describe_environment(), server[2]
    cpu, packages = environment["cpu"], environment["packages"]
    gpu = next(iter(environment["gpus"]), {"name": "no GPU", "driver": None})
    versions = [f"{name} {version}" for name, version in packages.items() if name in PACKAGES]
    java = f"Java {(environment['java'] or {}).get('version')}"
    machine = [gpu["name"], f"driver {gpu['driver']}", cpu["model"], f"{cpu['usable_cores']} cores"]
    return [
        f"- {', '.join([environment['date'][:10], *machine, environment['python'], java, *versions])}",
        f"- the worker: {', '.join(f'{key} {model[key]}' for key in REPORTED if key in model)}",
    ]


def equality(subject: Subject, folder: Path) -> list[str]:
    """Compare what is served with eager on the CPU, image by image and in AP."""
    if subject.spec is None:
        return ["- random weights, which find as many boxes as may be, of no use: detections were not compared"]
    precision = subject.title.rsplit(" ", 1)[1]
    tier = "numeric" if precision == "fp32" else "reduced-precision"
    chosen = sorted(subject.images.glob("*.jpg"))[:32]
    asked = ["--instance", "gpu0", *subject.spec, "--tier", tier, "--json"]
    found = json.loads(detserve("compare", subject.name, *chosen, *asked, codes=(0, 1)).splitlines()[-1])
    counts = f"{found['matched']} detections matched of {found['eager']} eager and {found['served']} served"
    largest = f"max |Δbox| {found['max_box_delta_px']:.3g} px, max |Δscore| {found['max_score_delta']:.2g}"
    passed = f"{found['images_passed']} of {found['images']} images reach the tier {tier}"
    lines = [f"- served beside eager on the CPU, threshold {found['score_threshold']}: {passed}; {counts}, {largest}"]
    if subject.annotations is not None:
        out = folder / "evaluated"
        shutil.rmtree(out, ignore_errors=True)
        files = ["--images", subject.images, "--annotations", subject.annotations, "--against", "eager", "--out", out]
        answer = detserve("evaluate", subject.name, *files, *asked, codes=(0, 1))
        certificate = json.loads(answer.splitlines()[-1])["certificate"]
        lines.append(f"- {certificate['outcome']}: {certificate['sentence']}")
    return lines


def table(turns: dict[str, list[Turn]]) -> list[str]:
    """Return the speed: each setting beside the in-process ceiling, the fastest batch size, of the same round."""
    local = [name for name in turns if name.startswith("in process")]
    ceiling = max(local, key=lambda name: statistics.median(turn.rate for turn in turns[name]))
    lines = [
        "| | images/s | p50 ms | ÷ ceiling | p50 − in process, batch 1, ms | client CPU ms/request | failed |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, kept in turns.items():
        ratios = [mine.rate / theirs.rate for mine, theirs in zip(kept, turns[ceiling], strict=True)]
        added = [mine.p50_ms - theirs.p50_ms for mine, theirs in zip(kept, turns[_ALONE], strict=True)]
        cpu_ms = statistics.median(turn.client_cpu_ms for turn in kept)
        cells = [
            f"{name} ← ceiling" if name == ceiling else name,
            spread([turn.rate for turn in kept]),
            spread([turn.p50_ms for turn in kept]),
            spread(ratios, 2),
            spread(added) if name.endswith("concurrency 1") else "–",
            f"{cpu_ms:.2f}" if cpu_ms else "–",
            str(sum(turn.failed for turn in kept)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def detserve(*arguments: object, codes: Sequence[int] = (0,)) -> str:
    """Run the command and return its output; end with its messages where it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "dettools.cli", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    if done.returncode not in codes:
        raise SystemExit(
            f"detserve {' '.join(map(str, arguments))}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        )
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
