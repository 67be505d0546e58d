"""The GPU's page: ratios and overheads from known turns, and a machine without a GPU; the run itself needs one."""

import importlib
import subprocess
import sys
from types import ModuleType

import pytest
from checkout import ROOT


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        return importlib.import_module("gpu")


def test_the_ceiling_is_the_fastest_batch_size_and_ratios_are_taken_within_a_round(gpu):
    def turns(*pairs):
        return [gpu.Turn(rate, p50) for rate, p50 in pairs]

    *_, alone, eight, lone, many = gpu.table(
        {
            "in process, batch 1": turns((25, 40.0), (20, 50.0), (30, 33.0)),
            "in process, batch 8": turns((10, 800.0), (9, 850.0), (40, 200.0)),
            "served as it comes, concurrency 1": turns((20, 46.0), (19, 58.0), (21, 47.0)),
            "served as it comes, concurrency 8": turns((5, 900.0), (10, 800.0), (60, 100.0)),
        }
    )
    assert alone.startswith(
        "| in process, batch 1 ← ceiling | 25.0 (20.0–30.0) | 40.0 (33.0–50.0) | 1.00 (1.00–1.00) |"
    )
    assert "| in process, batch 8 | 10.0 (9.0–40.0) |" in eight
    assert "| 0.80 (0.70–0.95) | 8.0 (6.0–14.0) |" in lone
    assert "| 0.50 (0.20–2.00) | – |" in many


def test_without_a_gpu_it_ends_with_what_the_server_says(tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / "gpu.py", "--quick", "--out", tmp_path / "page.md"]
    done = subprocess.run(
        [*command, "--images", ROOT / "model_store" / "shapes"], capture_output=True, text=True, check=False
    )
    if "in process, batch 1" in done.stdout:
        pytest.skip("there is a GPU")
    assert done.returncode == 1
    assert "Got device gpu, but nvidia-smi finds no GPU" in done.stderr
    assert not (tmp_path / "page.md").exists()
