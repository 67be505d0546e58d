"""The README's commands run as they stand, in its order; those that cannot run here are marked with the reason.

A block ```bash is run; one that follows the comment `<!-- not run: reason -->` is not. The server's ports are the only
thing changed, so that a taken 8080 does not matter.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import ROOT

BLOCK = re.compile(r"(?:<!-- not run: (?P<reason>[^>]+) -->\n)?```bash\n(?P<text>.*?)```", re.DOTALL)
README = (ROOT / "README.md").read_text("utf-8")


def blocks() -> list[tuple[str | None, str]]:
    return [(match["reason"], match["text"]) for match in BLOCK.finditer(README)]


def test_every_block_that_is_not_run_says_why():
    reasons = [reason for reason, _ in blocks() if reason is not None]

    assert all(len(reason) > 10 for reason in reasons)
    assert len(reasons) < len(blocks())


def test_links_to_files_lead_somewhere():
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", README)

    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.server
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="the README calls curl, which is not installed")
def test_the_commands_run(tmp_path):
    from detserve.server import free_ports

    for name in ("model_store", "README.md"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("*.mar"))
        else:
            shutil.copy(source, tmp_path / name)
    ports = free_ports()
    lines = "\n".join(text for reason, text in blocks() if reason is None)
    lines = lines.replace(":8080", f":{ports.inference}").replace(
        "detserve serve start", f"detserve serve start --port {ports.inference}"
    )
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "DETSERVE_STATE_DIR": str(tmp_path / "state"),
        "COLUMNS": "120",
    }
    try:
        answer = subprocess.run(
            ["bash", "-euxo", "pipefail", "-c", lines],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )
    finally:
        subprocess.run(["detserve", "serve", "stop"], cwd=tmp_path, env=environment, capture_output=True, check=False)

    assert answer.returncode == 0, f"{answer.stdout[-3000:]}\n{answer.stderr[-3000:]}"
