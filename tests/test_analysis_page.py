"""docs/analysis.md: its commands run as they stand, its links lead somewhere."""

import re
import shutil

import pytest
from checkout import ROOT
from documented_commands import run_commands

PAGE = (ROOT / "docs" / "analysis.md").read_text("utf-8")


def test_links_to_files_lead_somewhere():
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", PAGE)
    assert links
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []


@pytest.mark.slow
def test_the_commands_run(tmp_path):
    shutil.copytree(ROOT / "model_store", tmp_path / "model_store", ignore=shutil.ignore_patterns("*.mar"))
    answer = run_commands(PAGE, tmp_path)
    assert answer.returncode == 0, f"{answer.stdout[-3000:]}\n{answer.stderr[-3000:]}"
    pages = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.html")}
    assert {
        "report.html",
        "errors/index.html",
        "confusion/index.html",
        "results/index.html",
        "browse/index.html",
    } <= pages
