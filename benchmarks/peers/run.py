"""Our server beside stock TorchServe, LitServe, mosec and BentoML, in one run: ``make peers``.

    environments ─► weights, archive, images ─► rounds (contest) ─► standings ─► PEERS.md, peers.json

The same model, client, images and cores for all. It takes minutes, and the network once; it is no part of CI.
"""

import argparse
import contextlib
import functools
import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_FOREIGN = ("torchserve", "litserve", "mosec", "bentoml")
NAMES = ("detserve", *(f"{name}{variant}" for name in _FOREIGN for variant in ("", "-tuned")))


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks", help="PEERS.md and peers.json (default: benchmarks)"
    )
    made.add_argument("--samples", type=Path, default=ROOT / "out" / "peers", help="raw samples (default: out/peers)")
    made.add_argument(
        "--environments", type=Path, default=ROOT / ".peers", help="virtual environments (default: .peers)"
    )
    made.add_argument("--servers", default=",".join(NAMES), help="default: %(default)s")
    made.add_argument("--concurrency", default="1,8,16", help="default: %(default)s")
    made.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    made.add_argument("--seconds", type=float, default=10.0, help="of each level (default: %(default)s)")
    made.add_argument("--images", type=int, default=32, help="generated scenes to send (default: %(default)s)")
    made.add_argument("--cores", type=int, default=2, help="server and client share them (default: %(default)s)")
    made.add_argument("--note", default="", help="a sentence for the head of the page")
    made.add_argument("--quick", action="store_true", help="one round of 3 s levels: only to see that all of it runs")
    made.add_argument("--json", action="store_true", help="print the JSON document as the last line")
    return made


def main() -> int:
    """Measure and write; exit code 1 when a server could not be measured, or answers other detections."""
    args = parser().parse_args()
    names = [name.strip() for name in args.servers.split(",")]
    if unknown := set(names) - set(NAMES):
        parser().error(f"--servers: got {', '.join(sorted(unknown))}, expected some of {', '.join(NAMES)}")
    if hasattr(os, "sched_setaffinity"):  # everything that is started inherits it
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])

    from detserve.errors import DetserveError

    try:
        document = _measured(args, names)
    except DetserveError as error:
        print(error, file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    page = document.pop("page")
    (args.out / "PEERS.md").write_text(page, "utf-8")
    (args.out / "peers.json").write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    print(page, file=sys.stderr if args.json else sys.stdout)
    if args.json:
        print(json.dumps(document))
    return 1 if any(one["failure"] or one["difference"] for one in document["servers"]) else 0


def _measured(args: argparse.Namespace, names: list[str]) -> dict[str, Any]:
    from contest import Plan, contest
    from detserve.archive import build_archive
    from detserve.eager import load_eager
    from detserve.spec import load_spec
    from dettools.benchmark.images import describe_images
    from dettools.benchmark.load import Picture
    from dettools.benchmark.measurement import Level
    from dettools.datasets.scenes import write_dataset
    from dettools.environment import describe_environment
    from environments import environment_of
    from page import markdown_page
    from peers import HERE, PEERS
    from safetensors.torch import load_file
    from servers import OURS, ours, running
    from standings import standings
    from torch import save

    concurrencies = tuple(int(value) for value in args.concurrency.split(","))
    plan = Plan(1, concurrencies, 3.0, 2.0) if args.quick else Plan(args.rounds, concurrencies, args.seconds, 4.0)
    spec_path = ROOT / "model_store" / "shapes" / "shapes.yaml"
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="detserve-peers-")))
        _say("archive, weights and scenes")
        archive = build_archive(load_spec(spec_path), folder=spec_path.parent, out=work / "shapes.mar").path
        weights = work / "shapes.pth"
        save(load_file(spec_path.parent / "shapes.safetensors"), weights)
        write_dataset(work / "scenes", args.images, 2026)
        files = sorted((work / "scenes" / "images").glob("*.jpg"))
        pictures = [Picture(file.name, file.read_bytes()) for file in files]
        openers = {}
        for name in names:
            if name == OURS:
                openers[name] = lambda turn: ours(archive, work / turn)
                continue
            (peer,) = (one for one in PEERS if one.name == name)
            _say(f"environment of {name}")
            python = environment_of(peer.folder, args.environments, HERE / peer.folder / "requirements.txt")
            openers[name] = functools.partial(_opened, running, peer, python, weights, work, pictures[0].body)
        args.samples.mkdir(parents=True, exist_ok=True)
        raw = stack.enter_context((args.samples / "samples.jsonl").open("w", encoding="utf-8"))

        def keep(name: str, turn: int, level: Level) -> None:
            for sample in level.samples:
                line = {"server": name, "round": turn, "concurrency": level.load.value, **asdict(sample)}
                raw.write(json.dumps(line) + "\n")

        eager = load_eager(spec_path, model_store=ROOT / "model_store")
        entrants, figures = contest(openers, pictures, eager, plan, on_progress=_say, on_level=keep)
        rows = standings(figures, OURS)
        environment = describe_environment()
        facts = describe_images([picture.body for picture in pictures])
        return {
            "page": markdown_page(entrants, rows, plan, environment, facts.sentence(), args.note),
            "environment": environment,
            "images": asdict(facts),
            "plan": asdict(plan),
            "servers": [asdict(one) for one in entrants],
            "standings": [row.to_json() for row in rows],
        }


def _opened(running: Any, peer: Any, python: Path, weights: Path, work: Path, probe: bytes, turn: str) -> Any:
    return running(peer, python, weights, work / turn, probe)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
