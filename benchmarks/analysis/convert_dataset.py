"""convert-dataset by one and by two processes, on 200,000 Cityscapes-like instances and 100,000 VOC files.

    .venv/bin/python benchmarks/analysis/convert_dataset.py            about 10 minutes; benchmarks/ANALYSIS.md
    .venv/bin/python benchmarks/analysis/convert_dataset.py --quick    small, writes nothing: only to see that it runs

Each run is a process of its own, as a user starts it; its memory is that of the largest of its processes. A tenth of
the data is converted too: memory that is bounded does not grow with it.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from section import machine, spread, write_section

PICTURES, INSTANCES, FILES = 4_000, 50, 100_000
# Different pictures; the others are links to them.
DRAWN, SIZE = 50, (1024, 2048)

# Linux counts what a process had before it became another: run by this one, Python would begin with our memory.
MEASURED = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
code = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
wall_s = time.perf_counter() - start
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([code, wall_s, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024]))
"""
HEADER = (
    "| data | 1 process | 2 processes | speed-up | processor time, 1 and 2 | largest process, 1 and 2 | of a tenth, 2 |"
)


@dataclass(frozen=True)
class Run:
    """Seconds of wall clock and of processors, largest process in MiB, and the digest of what was written."""

    wall_s: float
    cpu_s: float
    memory_mib: float
    sha256: str


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    pictures, files = (80, 2_000) if args.quick else (PICTURES, FILES)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind, what, build, count, pairs in (
            ("cityscapes", "{:,} pictures of 2048 × 1024 with {:,} instances", cityscapes, pictures, 1),
            ("voc", "{:,} XML files with {:,} objects", voc, files, 3),
        ):
            objects = INSTANCES if kind == "cityscapes" else 2
            small = build(folder / f"{kind}-small", count // 10)
            whole = build(folder / kind, count)
            tenth = converted(kind, small, folder, 2)
            runs = [(converted(kind, whole, folder, 1), converted(kind, whole, folder, 2)) for _ in range(pairs)]
            ones, twos = zip(*runs, strict=True)
            if len({run.sha256 for run in (*ones, *twos)}) > 1:
                raise SystemExit(f"{kind}: one process and two wrote different files")
            rows.append(
                f"| {what.format(count, count * objects)} | {spread([one.wall_s for one in ones], ' s', 1)} "
                f"| {spread([two.wall_s for two in twos], ' s', 1)} "
                f"| {spread([one.wall_s / two.wall_s for one, two in runs], '')} "
                f"| {spread([one.cpu_s for one in ones], ' s', 1)}, {spread([two.cpu_s for two in twos], ' s', 1)} "
                f"| {max(one.memory_mib for one in ones):.0f}, {max(two.memory_mib for two in twos):.0f} MiB "
                f"| {tenth.memory_mib:.0f} MiB |"
            )
    load = os.getloadavg()[1]
    goal = (
        f"Goal: a speed-up of 1.6. {os.cpu_count()} cores, load average of the last five minutes {load:.1f}: beyond "
        "the number of cores, others took part of it."
    )
    text = [
        "To COCO, in turns; all write the same bytes. Median (smallest to largest), or one run.",
        "Starting Python and its processes is part of the time.",
        "",
        HEADER,
        "|---|---|---|---|---|---|---|",
        *rows,
        "",
        goal,
        "",
        machine().replace("one thread of ours at a time", "one thread a process"),
    ]
    if args.quick:
        print("\n".join(text))
    else:
        write_section("convert-dataset", text)
    return 0


def converted(kind: str, source: Path, folder: Path, processes: int) -> Run:
    out = folder / "out.json"
    command = ["convert-dataset", kind, source, "-o", out, "--split", "train", "--nproc", processes]
    words = [sys.executable, "-c", MEASURED, sys.executable, "-m", "dettools.cli", *map(str, command)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    told = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, env=environment).stdout
    code, wall_s, cpu_s, memory_mib = json.loads(told)
    if code:
        raise SystemExit(f"{kind}: exit code {code}")
    with out.open("rb") as stream:
        return Run(wall_s, cpu_s, memory_mib, hashlib.file_digest(stream, "sha256").hexdigest())


def cityscapes(root: Path, count: int) -> Path:
    """Streets with ellipses for objects, by their numbers."""
    photographs, truth = root / "leftImg8bit/train/x", root / "gtFine/train/x"
    photographs.mkdir(parents=True)
    truth.mkdir(parents=True)
    random = np.random.default_rng(0)
    rows, columns = np.ogrid[: SIZE[0], : SIZE[1]]
    for number in range(count):
        picture = truth / f"{number:06}_gtFine_instanceIds.png"
        photograph = photographs / f"{number:06}_leftImg8bit.png"
        if number >= DRAWN:
            picture.hardlink_to(truth / f"{number % DRAWN:06}_gtFine_instanceIds.png")
            photograph.hardlink_to(photographs / "000000_leftImg8bit.png")
            continue
        numbers = np.full(SIZE, 7, np.uint16)
        for place in range(INSTANCES):
            # A grid keeps them apart, so that none is hidden.
            y, x = 60 + place // 10 * 200 + random.integers(0, 60), 100 + place % 10 * 200
            height, width = random.integers(8, 60), random.integers(8, 80)
            label = (24, 25, 26, 27, 28, 31, 32, 33)[random.integers(8)]
            numbers[((rows - y) / height) ** 2 + ((columns - x) / width) ** 2 < 1] = label * 1000 + place
        Image.fromarray(numbers).save(picture)
        if number:
            photograph.hardlink_to(photographs / "000000_leftImg8bit.png")
        else:
            Image.new("RGB", SIZE[::-1]).save(photograph)
    return root


def voc(root: Path, count: int) -> Path:
    """XML files as VOC's own are, without photographs."""
    (root / "Annotations").mkdir(parents=True)
    (root / "ImageSets/Main").mkdir(parents=True)
    entry = (
        "<object><name>{}</name><pose>Left</pose><truncated>0</truncated><difficult>0</difficult><bndbox><xmin>{}</xmin>"
        "<ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
    )
    random = np.random.default_rng(0)
    corners = random.integers(1, 250, (count, 2, 4))
    for number in range(count):
        objects = "".join(
            entry.format(f"class{x % 20}", x, y, x + width, y + height)
            for x, y, width, height in corners[number].tolist()
        )
        (root / "Annotations" / f"{number:06}.xml").write_text(
            f"<annotation><folder>VOC</folder><filename>{number:06}.jpg</filename><source><database>VOC</database></source>"
            f"<size><width>500</width><height>500</height><depth>3</depth></size><segmented>0</segmented>{objects}</annotation>"
        )
    (root / "ImageSets/Main/train.txt").write_text("".join(f"{number:06}\n" for number in range(count)))
    return root


if __name__ == "__main__":
    sys.exit(main())
