"""Each peer's own environment: a virtual environment with its pinned packages, and the project's torch for all.

    .peers/NAME/   its own packages first ─► then, by a .pth file, the site-packages of the Python that runs this

torch is several GB and must be the same for everybody anyway. The requirements list everything a peer needs, so that
pip is told to resolve nothing. What lies in the project's site-packages is visible too, but a peer's own comes first.
"""

import hashlib
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from detserve.errors import DetserveError

_LINK = "shared_torch.pth"
_READY = ".ready"


def environment_of(name: str, folder: Path, requirements: Path) -> Path:
    """Return the Python of a peer's environment; it is made when it is not there, or its requirements have changed.

    Raises:
        DetserveError: pip could not install them.
    """
    home = folder / name
    python = home / "bin" / "python"
    wanted = hashlib.sha256(requirements.read_bytes() + sys.version.encode()).hexdigest()
    ready = home / _READY
    if python.exists() and ready.is_file() and ready.read_text("utf-8") == wanted:
        return python
    shutil.rmtree(home, ignore_errors=True)
    venv.create(home, with_pip=False, symlinks=True)
    packages = home / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    # The running Python's pip installs for the other one: no pip in each environment.
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--disable-pip-version-check"]
    answer = subprocess.run(
        [*pip, "--no-deps", "--requirement", str(requirements)],
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    if answer.returncode != 0:
        shutil.rmtree(home, ignore_errors=True)
        raise DetserveError(
            f"{name}: pip could not install {requirements.name} ({answer.stderr.strip()[-500:]}). "
            "Check the network, or leave this peer out with --servers."
        )
    (packages / _LINK).write_text(sysconfig.get_paths()["purelib"] + "\n", "utf-8")
    ready.write_text(wanted, "utf-8")
    return python
