"""Faults seeded into the worker's own code inside real archives: `detserve compare` finds each, with its reason code.

Each archive is the demo model with one fault appended to one module, its golden check off and its digests made new, so
that nothing but the comparison of what is served with eager can notice.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from checkout import ROOT
from detserve.archive import build_archive
from detserve.mar import MANIFEST_FILE, unpacked, write_mar
from detserve.spec import load_spec
from dettools.cli import main
from dettools.datasets.scenes import write_dataset

SPEC = ROOT / "model_store" / "shapes" / "shapes.yaml"

FAULTS = {
    "bgr": (
        "dethandlers/images.py",
        (
            "_decode = decode_image\n"
            "def decode_image(data, **limits):\n"
            "    return _decode(data, **limits).flip(0).contiguous()\n"
        ),
    ),
    "resize": (
        "dethandlers/preprocess.py",
        (
            "def resize(image, size):\n"
            "    return functional.interpolate(image[None], size=size, mode='bicubic', align_corners=False)[0]\n"
        ),
    ),
    "dropped": (
        "dethandlers/detector.py",
        (
            "_all = _select\n"
            "def _select(detections, options):\n"
            "    found = _all(detections, options)\n"
            "    return found.take(np.arange(1, len(found)))\n"
        ),
    ),
    "swapped": (
        "entry.py",
        (
            "_in_order = DetectionHandler.handle\n"
            "def _swapped(self, data, context):\n"
            "    return _in_order(self, data, context)[::-1]\n"
            "DetectionHandler.handle = _swapped\n"
        ),
    ),
}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> list[str]:
    """Four scenes with objects, seeds of their own."""
    annotations = write_dataset(tmp_path_factory.mktemp("scenes"), 4, 70_000)
    return [str(path) for path in sorted((annotations.parent / "images").glob("*.jpg"))]


@pytest.fixture(scope="module")
def instance(tmp_path_factory, serve) -> str:
    """One server with the sound demo model, and with each of its faulty versions."""
    folder = tmp_path_factory.mktemp("store")
    spec = load_spec(SPEC)
    # Requests of one burst share a batch, so that swapped replies have something to swap.
    quiet = replace(spec.serving, golden_check="off", batch_size=4, max_batch_delay_ms=500, threads=1)
    archives = [build_archive(spec, folder=SPEC.parent, out=folder / "sound.mar").path]
    for name, (member, code) in FAULTS.items():
        path = _built(replace(spec, name=name, serving=quiet), folder)
        with unpacked(path) as content:
            members = {
                one.relative_to(content).as_posix(): one.read_bytes() for one in content.rglob("*.*") if one.is_file()
            }
        members[member] += f"\n\n{code}".encode()
        assert MANIFEST_FILE in members
        write_mar(path, members)
        archives.append(path)
    strict = replace(quiet, score_threshold=0.5, min_score_threshold=0.5)
    archives.append(_built(replace(spec, name="threshold", serving=strict), folder))
    return serve(archives, "faults")


def _built(spec, folder: Path) -> Path:
    return build_archive(spec, folder=SPEC.parent, out=folder / f"{spec.name}.mar").path


def compare(instance: str, model: str, scenes: list[str], work_dir: Path, capsys) -> tuple[int, dict]:
    """Run the command as a user does; its exit code and its report."""
    code = main(
        ["compare", model, *scenes, "--spec", str(SPEC), "--instance", instance, "--work-dir", str(work_dir), "--json"]
    )
    capsys.readouterr()
    return code, json.loads((work_dir / "comparison.json").read_text())


@pytest.mark.server
def test_the_sound_model_passes(instance, scenes, tmp_path, capsys):
    code, report = compare(instance, "shapes", scenes, tmp_path, capsys)

    assert code == 0, report
    assert report["passed"]
    assert not set(report["reasons"]) - {"order_only", "threshold_edge"}
    assert len(list(tmp_path.glob("*.png"))) == len(scenes)


@pytest.mark.server
@pytest.mark.parametrize(
    ("model", "reasons", "hint"),
    [
        ("bgr", {"score_drift", "box_drift"}, "preprocessing_differs"),
        ("resize", {"score_drift", "box_drift"}, None),
        ("threshold", {"missing"}, "served_threshold_higher"),
        ("dropped", {"missing"}, None),
        ("swapped", {"swapped_replies"}, "swapped_replies"),
    ],
)
def test_a_fault_fails_with_its_reason(instance, scenes, tmp_path, capsys, model, reasons, hint):
    code, report = compare(instance, model, scenes, tmp_path, capsys)

    assert code == 1, report
    assert not report["passed"]
    assert reasons <= set(report["reasons"]), report["reasons"]
    hints = json.dumps(report["hints"])
    assert hint is None or hint in hints, hints
