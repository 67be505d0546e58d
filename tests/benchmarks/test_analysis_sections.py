"""The benchmarks of the analysis commands: each replaces its own section of the page, and runs on a small set."""

import importlib
import subprocess
import sys
from types import ModuleType

import pytest
from checkout import ROOT


@pytest.fixture
def section(tmp_path, monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks/analysis"))
    module = importlib.import_module("section")
    monkeypatch.setattr(module, "PAGE", tmp_path / "ANALYSIS.md")
    return module


def test_a_section_replaces_its_own_and_keeps_the_others(section):
    section.write_section("first", ["one"])
    section.write_section("second", ["two", "", "| a |"])
    section.write_section("first", ["three"])
    page = section.PAGE.read_text(encoding="utf-8")
    assert page.startswith("# The analysis commands beside the original algorithms\n")
    assert page.split("\n## ")[1:] == ["first\n\nthree\n", "second\n\ntwo\n\n| a |\n"]


def test_the_median_is_shown_with_its_spread(section):
    assert section.spread([3.0, 1.0, 2.0], " s") == "2.00 s (1.00 to 3.00)"
    assert section.spread([0.5], "", 4) == "0.5000"


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["confusion_matrix", "error_analysis", "occluded_recall", "optimize_anchors"])
def test_it_runs(name):
    program = ROOT / "benchmarks/analysis" / f"{name}.py"
    done = subprocess.run([sys.executable, program, "--quick"], capture_output=True, text=True, check=True)
    assert "original" in done.stdout
