"""The ceiling's page: ratios and overheads from known turns; the run itself needs a quiet machine."""

import importlib
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
from checkout import ROOT


@pytest.fixture(scope="module")
def ceiling() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        return importlib.import_module("ceiling")


@pytest.fixture
def result(ceiling):
    def turns(*pairs):
        return [ceiling.Turn(rate, p50) for rate, p50 in pairs]

    return ceiling._result(
        "shapes",
        "torch on the CPU",
        2,
        1,
        {
            "in process, 1 thread, batch 1": turns((20, 50.0), (22, 45.0), (18, 55.0)),
            "in process, 2 threads, batch 4": turns((30, 130.0), (25, 160.0), (40, 100.0)),
            "served, concurrency 1": turns((19, 52.0), (21, 48.5), (17, 58.0)),
            "served, concurrency 8": turns((27, 300.0), (30, 290.0), (36, 280.0)),
        },
        [turns((20, 50.0), (19, 52.0)), turns((22, 45.0), (21, 48.5)), turns((18, 55.0), (17, 58.0))],
    )


def test_the_ceiling_is_the_best_median_and_ratios_are_taken_within_a_round(result):
    assert result.ceiling == "in process, 2 threads, batch 4"
    assert result.ratios == pytest.approx([0.9, 1.2, 0.9])
    assert result.overheads_ms == pytest.approx([2.0, 3.5, 3.0])


def test_the_page_says_it(ceiling, result):
    environment = {
        "date": "2026-01-02T03:04:05Z",
        "cpu": {"model": "EPYC", "usable_cores": 2},
        "packages": {"torch": "2.14.1", "onnxruntime": "1.32.0"},
        "java": None,
    }
    page = ceiling.to_markdown([result], environment, "32 JPEGs", SimpleNamespace(rounds=3, seconds=2.0, note="Noted."))

    assert "| in process, 2 threads, batch 4 ← ceiling | 30.0 (25.0–40.0) | 130.0 (100.0–160.0) |" in page
    assert "served at concurrency 8 ÷ ceiling: **0.90 (0.90–1.20)**" in page
    assert "3 pairs of 2 s: **3.0 (quartiles 2.5 and 3.2) ms**" in page
    assert "Noted." in page


def test_the_help_answers():
    answer = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "ceiling.py", "--help"], capture_output=True, text=True, check=True
    )
    assert "--rounds" in answer.stdout
