"""Which onnxruntime is installed, and whether it starts on the GPU: two packages provide one module.

``onnxruntime`` (CPU) and ``onnxruntime-gpu`` overwrite each other's files. A module that has the CUDA provider lists it
even where the provider's libraries do not load; only a session tells.
"""

import importlib.metadata
import re
import subprocess
import sys
from dataclasses import dataclass

PACKAGES = ("onnxruntime", "onnxruntime-gpu")
CUDA = "CUDAExecutionProvider"
# An ONNX file of one node, Identity, from x to y, both float32 [1].
_SMALLEST = (
    "08083a370a100a017812017922084964656e746974791201675a0f0a0178120a0a08080112040a020801620f0a0179120a0a08080112040a02"
    "080142040a00100d"
)
# torch comes first, as in a worker: its CUDA libraries are then loaded already.
_PROBE = """
import contextlib, sys
with contextlib.suppress(ImportError):
    import torch
import onnxruntime
if hasattr(onnxruntime, "preload_dlls"):
    onnxruntime.preload_dlls()
session = onnxruntime.InferenceSession(bytes.fromhex(sys.argv[1]), providers=[sys.argv[2]])
if sys.argv[2] not in session.get_providers():
    print("only", ", ".join(session.get_providers()), "started", file=sys.stderr)
    sys.exit(3)
"""
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class OnnxruntimeInstallation:
    """What is installed.

    Attributes:
        packages: of the two, those installed, with their version.
        version: of the module; empty when it does not load.
        providers: that the module lists, without ``ExecutionProvider``.
        broken: why the module does not load; empty when it does.
    """

    packages: dict[str, str]
    version: str
    providers: tuple[str, ...]
    broken: str


def find_onnxruntime() -> OnnxruntimeInstallation:
    """Return what is installed; a module that does not load is a finding, not an error."""
    packages = {}
    for package in PACKAGES:
        try:
            packages[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    try:
        import onnxruntime

        names = tuple(name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers())
        return OnnxruntimeInstallation(packages, str(onnxruntime.__version__), names, "")
    except (
        ImportError,
        OSError,
        AttributeError,
    ) as error:  # AttributeError: an empty module, left by an uninstallation
        return OnnxruntimeInstallation(packages, "", (), f"{type(error).__name__}: {error}")


def why_not_started(provider: str = CUDA, *, timeout_s: float = 120.0) -> str:
    """Start a session of one node on a provider, in a process of its own; return why it did not start, or nothing.

    Args:
        provider: full name, such as ``CUDAExecutionProvider``.
        timeout_s: torch is imported first, which can take long.
    """
    command = [sys.executable, "-c", _PROBE, _SMALLEST, provider]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if answer.returncode == 0:
        return ""
    lines = [_COLOURS.sub("", line).strip() for line in answer.stderr.splitlines()]
    told = [line for line in lines if line]
    # The provider's own words, which name the library, where it has some.
    missing = [line for line in told if "cannot open shared object" in line or "Failed to load" in line]
    return " ".join((missing or told or [f"exit code {answer.returncode}"])[-1:])[:500]
