"""The doctor on onnxruntime: exactly one build, the one that the machine needs, and one that starts."""

import json
from pathlib import Path

import onnx
import pytest
from dettools import cli, onnxruntime_installation
from dettools.diagnosis import judge_onnxruntime
from dettools.onnxruntime_installation import OnnxruntimeInstallation, find_onnxruntime, why_not_started

CPU_BUILD = OnnxruntimeInstallation({"onnxruntime": "1.22.0"}, "1.22.0", ("Azure", "CPU"), "")
GPU_BUILD = OnnxruntimeInstallation({"onnxruntime-gpu": "1.22.0"}, "1.22.0", ("CUDA", "CPU"), "")


@pytest.fixture
def gpu_package(tmp_path, monkeypatch):
    """Package data as pip leaves it, of a GPU build that is not there."""
    folder = tmp_path / "onnxruntime_gpu-1.22.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 1.22.0\n")
    monkeypatch.syspath_prepend(tmp_path)


def program(folder: Path, text: str) -> None:
    """Put an nvidia-smi that answers so into a folder."""
    folder.mkdir(exist_ok=True)
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{text}\n")
    (folder / "nvidia-smi").chmod(0o755)


def doctor_on_onnxruntime(capsys, tmp_path):
    cli.main(["doctor", "--json", "--model-store", str(tmp_path)])
    findings = json.loads(capsys.readouterr().out.splitlines()[-1])["findings"]
    (found,) = [finding for finding in findings if finding["subject"] == "onnxruntime"]
    return found


def test_two_builds_side_by_side_fail(gpu_package, capsys, tmp_path):
    assert set(find_onnxruntime().packages) == {"onnxruntime", "onnxruntime-gpu"}
    found = doctor_on_onnxruntime(capsys, tmp_path)
    assert found["state"] == "fail"
    assert "both installed" in found["found"]
    assert "pip uninstall onnxruntime onnxruntime-gpu" in found["remedy"]


def test_the_cpu_build_on_a_machine_with_a_gpu_is_told(monkeypatch, capsys, tmp_path):
    if "CUDA" in find_onnxruntime().providers:
        pytest.skip("this onnxruntime has the CUDA provider")
    program(tmp_path / "bin", 'case "$1" in -L) echo "GPU 0: H200 (UUID: x)";; *) echo "H200";; esac')
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = doctor_on_onnxruntime(capsys, tmp_path)
    assert found["state"] == "warn"
    assert "this machine has H200" in found["found"]
    assert "detserve[onnx-gpu]" in found["remedy"]
    # A GPU that is hidden from CUDA is none.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert doctor_on_onnxruntime(capsys, tmp_path)["state"] == "ok"


def test_the_cpu_build_on_a_machine_without_one_is_fine(monkeypatch, capsys, tmp_path):
    program(tmp_path / "bin", "exit 9")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    found = doctor_on_onnxruntime(capsys, tmp_path)
    assert (found["state"], found["remedy"]) == ("ok", "")
    assert "providers" in found["found"]


def test_a_gpu_build_whose_libraries_do_not_load_fails_with_the_library():
    reason = "libcudnn.so.9: cannot open shared object file"
    found = judge_onnxruntime(GPU_BUILD, gpu="H200", not_started=reason)
    assert found.state == "fail"
    assert reason in found.found
    assert "onnxruntime-gpu[cuda,cudnn]" in found.remedy


def test_a_gpu_build_is_fine_with_a_gpu_that_starts_and_without_any():
    assert judge_onnxruntime(GPU_BUILD, gpu="H200", not_started="").state == "ok"
    without = judge_onnxruntime(GPU_BUILD, gpu="", not_started="")
    assert (without.state, "run on the CPU" in without.found) == ("ok", True)


def test_none_is_told_from_one_that_does_not_load():
    none = OnnxruntimeInstallation({}, "", (), "ModuleNotFoundError: No module named 'onnxruntime'")
    assert (judge_onnxruntime(none, gpu="", not_started="").state) == "warn"
    empty = OnnxruntimeInstallation({"onnxruntime-gpu": "1.22.0"}, "", (), "AttributeError: no attribute")
    found = judge_onnxruntime(empty, gpu="", not_started="")
    assert (found.state, "does not load: AttributeError" in found.found) == ("fail", True)


def test_the_probe_starts_what_starts_and_says_why_another_does_not():
    assert why_not_started("CPUExecutionProvider") == ""
    assert "CPUExecutionProvider" in why_not_started("NoneExecutionProvider")


def test_the_probe_s_network_is_one_identity():
    model = onnx.load_from_string(bytes.fromhex(onnxruntime_installation._SMALLEST))
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["Identity"]
