"""Who can run a graph: onnxruntime's CPU provider, which is asked and tried, and CUDA and TensorRT, by their pages."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dettools.onnx_graph.model_file import OnnxFile, import_onnx, numbered_nodes
from dettools.onnx_graph.provider_operators import (
    CUDA,
    CUDA_MICROSOFT,
    CUDA_SOURCE,
    TENSORRT,
    TENSORRT_CONDITIONS,
    TENSORRT_OPSETS,
    TENSORRT_SOURCE,
)


@dataclass(frozen=True)
class ProviderSupport:
    """What a provider does with a graph.

    Attributes:
        provider: ``CPU``, ``CUDA`` or ``TensorRT``.
        missing: operators that it does not take, with the number of their nodes.
        consequence: what happens to those.
        conditions: what it asks of operators that it takes.
        problem: why the graph as a whole is refused; empty when it is not, or when nobody tried.
        source: where this is known from.
    """

    provider: str
    missing: dict[str, int]
    consequence: str
    conditions: dict[str, str]
    problem: str
    source: str


def check_providers(file: OnnxFile) -> tuple[ProviderSupport, ...]:
    """Check the operators against the three providers; for the CPU a session is really made."""
    opsets = {entry.domain or "ai.onnx": entry.version for entry in file.proto.opset_import}
    used = Counter((node.domain or "ai.onnx", node.op_type) for node in numbered_nodes(file.proto.graph))
    opset = opsets.get("ai.onnx", 0)
    low, high = TENSORRT_OPSETS
    return (
        _cpu(file, used, opsets),
        ProviderSupport(
            "CUDA",
            _missing(used, lambda domain, name: _on_cuda(domain, name, opset)),
            "run on the CPU, with copies to it and back",
            {},
            "",
            CUDA_SOURCE,
        ),
        ProviderSupport(
            "TensorRT",
            _missing(used, lambda domain, name: domain == "ai.onnx" and name in TENSORRT),
            "refused by TensorRT alone; as onnxruntime's provider it leaves them to CUDA or the CPU",
            {name: TENSORRT_CONDITIONS[name] for _, name in sorted(used) if name in TENSORRT_CONDITIONS},
            "" if low <= opset <= high else f"opset {opset} is outside of {low} to {high}",
            TENSORRT_SOURCE,
        ),
    )


def _missing(used: Counter[tuple[str, str]], takes: Callable[[str, str], bool]) -> dict[str, int]:
    return {
        (name if domain == "ai.onnx" else f"{domain}.{name}"): count
        for (domain, name), count in sorted(used.items())
        if not takes(domain, name)
    }


def _on_cuda(domain: str, name: str, opset: int) -> bool:
    if domain == "com.microsoft":
        return name in CUDA_MICROSOFT
    # Constants are folded; an operator that is a function of others is taken apart into them.
    return domain == "ai.onnx" and (name in CUDA or name == "Constant" or _is_function(name, opset))


def _is_function(name: str, opset: int) -> bool:
    onnx = import_onnx()
    try:
        schema = onnx.defs.get_schema(name, opset, "")
    except Exception:  # noqa: BLE001 - onnx's own class for an operator that it does not know
        return False
    return bool(schema.has_function or schema.has_context_dependent_function)


def _cpu(file: OnnxFile, used: Counter[tuple[str, str]], opsets: dict[str, int]) -> ProviderSupport:
    try:
        import onnxruntime
        from onnxruntime.capi.onnxruntime_pybind11_state import get_all_opkernel_def
    except ImportError:
        return ProviderSupport(
            "CPU", {}, "", {}, "not tried: onnxruntime is not installed (pip install 'detserve[onnx]')", "nobody asked"
        )
    kernels: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for kernel in get_all_opkernel_def():
        if kernel.provider == "CPUExecutionProvider":
            kernels.setdefault((kernel.domain or "ai.onnx", kernel.op_name), []).append(kernel.version_range)

    def takes(domain: str, name: str) -> bool:
        since = _since(domain, name, opsets.get(domain, 1))
        ranges = kernels.get((domain, name), [])
        known = name == "Constant" or (domain == "ai.onnx" and _is_function(name, opsets.get(domain, 1)))
        return known or any(first <= since <= last for first, last in ranges)

    return ProviderSupport(
        "CPU",
        _missing(used, takes),
        "the file does not load",
        {},
        _session_problem(file, onnxruntime),
        f"the kernels of the installed onnxruntime {onnxruntime.__version__}, and a session made with it",
    )


def _since(domain: str, name: str, opset: int) -> int:
    """Return the opset in which the operator got the form that it has in ``opset``."""
    onnx = import_onnx()
    try:
        return int(onnx.defs.get_schema(name, opset, "" if domain == "ai.onnx" else domain).since_version)
    except Exception:  # noqa: BLE001 - onnx's own class; onnxruntime's operators are all of version 1
        return 1


def _session_problem(file: OnnxFile, onnxruntime: Any) -> str:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        onnxruntime.InferenceSession(str(file.path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001 - each of its errors has a class of its own
        return " ".join(str(error).split())[:400]
    return ""
