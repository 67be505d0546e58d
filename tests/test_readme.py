"""The README's commands run as they stand, in its order; those that cannot run here are marked with the reason."""

import re
import shutil

import pytest
from checkout import ROOT
from documented_commands import blocks, run_commands

README = (ROOT / "README.md").read_text("utf-8")


def test_every_block_that_is_not_run_says_why():
    reasons = [reason for reason, _ in blocks(README) if reason is not None]

    assert all(len(reason) > 10 for reason in reasons)
    assert len(reasons) < len(blocks(README))


def test_links_to_files_lead_somewhere():
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", README)

    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.server
@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.skipif(shutil.which("curl") is None, reason="the README calls curl, which is not installed")
def test_the_commands_run(tmp_path):
    for name in ("model_store", "README.md"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("*.mar"))
        else:
            shutil.copy(source, tmp_path / name)
    answer = run_commands(README, tmp_path)

    assert answer.returncode == 0, f"{answer.stdout[-3000:]}\n{answer.stderr[-3000:]}"
