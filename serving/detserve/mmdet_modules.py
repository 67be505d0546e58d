"""The user's own modules that an MMDetection config imports: packed whole, and proven to be enough by themselves.

spec.modules ─► members under modules/, data files included        custom_imports of nothing packed ─► a note
members ─► folder ─► a fresh process that knows only this folder ─► golden detections reproduced?

Where an archive is built, the modules' own folder is on the path; in the worker only the archive's is.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from dethandlers.mmdet_model import MODULES_FOLDER
from dethandlers.spec import Spec

from detserve.errors import ArchiveError, SpecError

_PICKLES = (".pth", ".pt", ".ckpt", ".pkl", ".pickle")
"""An archive holds none: loading one runs what is in it."""
_REQUIRED = ("mmdet", "mmcv", "mmengine")
"""Packages that every worker of such a model has."""
_MARK = "golden drift: "
_FRESH = """
import json, sys
from pathlib import Path
folder, here = sys.argv[1:]
sys.path.insert(0, folder)
sys.path.append(here)
from detserve.golden_drift import golden_drift
from dethandlers.artefact import load_artefact
from dethandlers.errors import DetectorError
try:
    drift = golden_drift(load_artefact(Path(folder), check_digests=False))
except DetectorError as error:
    drift = f"the archive would not load: {error}"
print("golden drift: " + json.dumps(drift))
"""


def packed_modules(spec: Spec, folder: Path, imports: Sequence[str]) -> tuple[dict[str, bytes], list[str]]:
    """Return the members that a spec's own modules become, and notes for people.

    Args:
        spec: whose ``modules`` are files or packages.
        folder: what they are relative to.
        imports: what the config imports.

    Raises:
        SpecError: one is neither, or two have one name.
    """
    members: dict[str, bytes] = {}
    notes = []
    taken: dict[str, Path] = {}
    for name in spec.modules:
        path = (folder / name).resolve()
        other = taken.setdefault(path.stem if path.is_file() else path.name, path)
        if other != path:
            raise SpecError(
                f"modules: got {other} and {path}, which would be packed and imported by one name. Rename one of them."
            )
        files, left = _files(path)
        if not any(file.suffix == ".py" for file in files):
            raise SpecError(f"modules: got {name}, expected a .py file or a folder with some. Correct --module.")
        for file in files:
            members[f"{MODULES_FOLDER}/{file.relative_to(path.parent).as_posix()}"] = file.read_bytes()
        if left:
            names = ", ".join(file.name for file in left[:3]) + (", …" if len(left) > 3 else "")
            notes.append(f"left out of {name}: {names}, since an archive holds no pickles")
    tops = dict.fromkeys(name.partition(".")[0] for name in imports)
    notes += [
        f"{name} is not packed: it has to be installed where the worker runs. Pack it with --module"
        for name in tops
        if name not in taken and name not in _REQUIRED
    ]
    return members, notes


def module_folders(spec: Spec, folder: Path) -> list[Path]:
    """Return the folders in which a spec's own modules are found by their names."""
    return list(dict.fromkeys((folder / name).resolve().parent for name in spec.modules))


def drift_by_itself(folder: Path) -> str:
    """Reproduce an unpacked archive's golden detections in a process that finds modules in that folder alone.

    Returns:
        How they differ; empty when they do not.

    Raises:
        ArchiveError: the process failed, most often since a module imports what is not packed.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    here = Path(__file__).resolve().parent.parent
    with tempfile.TemporaryDirectory(prefix="detserve-") as elsewhere:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", _FRESH, str(folder), str(here)],
            cwd=elsewhere,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    for line in reversed(done.stdout.splitlines()):
        if line.startswith(_MARK):
            return str(json.loads(line.removeprefix(_MARK)))
    reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    raise ArchiveError(
        f"the archive would not load in a process of its own: {reason[:300]}. Pack what its modules need with --module."
    )


def _files(path: Path) -> tuple[list[Path], list[Path]]:
    """Return a module's files that are packed, and those that are left out for what they are."""
    if path.is_file():
        return [path], []
    found = [
        file
        for file in sorted(path.rglob("*"))
        if file.is_file()
        and file.suffix != ".pyc"
        and not any(part == "__pycache__" or part.startswith(".") for part in file.relative_to(path).parts)
    ]
    return [one for one in found if one.suffix not in _PICKLES], [one for one in found if one.suffix in _PICKLES]
