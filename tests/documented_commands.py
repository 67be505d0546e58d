"""The commands of a page, as its readers run them: in its order, in one shell, in an empty folder.

A block ```bash is run; one that follows the comment `<!-- not run: reason -->` is not. The server's ports are the only
thing changed, so that a taken 8080 does not matter.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

BLOCK = re.compile(r"(?:<!-- not run: (?P<reason>[^>]+) -->\n)?```bash\n(?P<text>.*?)```", re.DOTALL)


def blocks(page: str) -> list[tuple[str | None, str]]:
    """The blocks, each with the reason why it is not run."""
    return [(match["reason"], match["text"]) for match in BLOCK.finditer(page)]


def code_blocks(page: str, language: str) -> list[str]:
    """The texts of the blocks in that language."""
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


def run_commands(page: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a page's commands in a folder; the server that they start is stopped whatever happens."""
    from detserve.server import free_ports
    from detserve.server.settings import ports_from

    ports = free_ports()
    lines = "\n".join(text for reason, text in blocks(page) if reason is None)
    lines = lines.replace(":8080", f":{ports.inference}").replace(":8083", f":{ports_from(ports.inference).monitor}")
    lines = lines.replace("detserve serve start", f"detserve serve start --port {ports.inference}")
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "DETSERVE_STATE_DIR": str(folder / "state"),
        "COLUMNS": "120",
    }
    try:
        return subprocess.run(
            ["bash", "-euxo", "pipefail", "-c", lines],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=1200,
            check=False,
        )
    finally:
        subprocess.run(["detserve", "serve", "stop"], cwd=folder, env=environment, capture_output=True, check=False)
