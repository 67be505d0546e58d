"""The page of torch beside onnx: the best settings and the ratios from known turns; the run needs a quiet machine."""

import importlib
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
from checkout import ROOT


@pytest.fixture(scope="module")
def runtimes() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        return importlib.import_module("runtimes")


@pytest.fixture
def result(runtimes):
    def turns(*rates):
        return [runtimes.Turn(rate, 1e3 * 8 / rate) for rate in rates]

    search = {
        "torch": {"2 workers": turns(20, 40, 21), "1 worker": turns(25, 24, 26)},
        "onnx": {"2 workers": turns(50, 60, 55), "1 worker": turns(30, 31, 90)},
    }
    best = {runtime: runtimes.best_of(ways) for runtime, ways in search.items()}
    return runtimes.Result("shapes", search, best, list(zip(turns(25, 20, 40), turns(50, 50, 60), strict=True)))


def test_the_best_setting_has_the_highest_median_not_the_luckiest_turn(result):
    assert result.best == {"torch": "1 worker", "onnx": "2 workers"}


def test_ratios_are_taken_between_neighbours(result):
    assert result.ratios() == [2.0, 2.5, 1.5]


def test_the_page_shows_ratio_with_spread_and_marks_the_best(runtimes, result):
    environment = {
        "date": "2026-11-23T10:00:00+00:00",
        "cpu": {"model": "a CPU", "usable_cores": 2},
        "packages": {"torch": "2.14.1", "onnxruntime": "1.32.0"},
        "java": {"version": "25"},
    }
    args = SimpleNamespace(rounds=3, pairs=3, seconds=5.0)
    page = runtimes.to_markdown([result], environment, "32 JPEGs", args)
    assert "onnx ÷ torch, throughput: **2.00 (1.50–2.50)**" in page
    assert "| 1 worker | 25.0 (24.0–26.0) ← best | 31.0 (30.0–90.0) |" in page
    assert "0 failed" in page


def test_one_core_is_not_shared_out_and_two_are(runtimes):
    assert {(way.workers, way.threads) for way in runtimes.settings(1)} == {(1, 1)}
    assert {(way.workers, way.threads) for way in runtimes.settings(2)} == {(2, 1), (1, 2), (1, 1)}


def test_it_tells_how_it_is_called():
    answer = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "runtimes.py"), "--help"], capture_output=True, text=True, check=True
    )
    assert "--pairs" in answer.stdout
