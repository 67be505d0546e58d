"""The environment block: complete where it can be, never failing, and naming no machine."""

import json
import os
import platform
import socket
import subprocess
import sys

import pytest
from detserve.errors import ServerError
from dettools import environment
from dettools.environment import cgroup_cpu_limit, cpu_model, describe_environment, parse_gpus


def test_it_says_what_a_figure_was_measured_on():
    described = describe_environment()
    assert described["python"].endswith(platform.python_version())
    assert described["cpu"]["cores"] == os.cpu_count()
    assert described["cpu"]["usable_cores"] == len(os.sched_getaffinity(0))
    assert described["cpu"]["model"]
    assert described["memory_gb"] > 0
    assert {"detserve", "torch", "torchserve"} <= described["packages"].keys()
    assert described["java"]["version"] >= 17
    assert json.loads(json.dumps(described)) == described


def test_it_names_no_machine_no_user_and_no_path():
    text = json.dumps(describe_environment())
    assert socket.gethostname() not in text
    assert str(environment.Path.home()) not in text
    assert sys.prefix not in text


def test_it_does_not_import_torch_for_its_own_sake():
    script = (
        "import sys, json; from dettools.environment import describe_environment as d; "
        "print(json.dumps([d()['threads']['torch'], 'torch' in sys.modules]))"
    )
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(answer.stdout) == [None, False]


def test_it_never_fails(monkeypatch):
    def none(*_, **__):
        raise ServerError("no Java")

    def broken(*_, **__):
        raise OSError

    monkeypatch.setattr("detserve.server.find_java", none)
    monkeypatch.setattr(environment.subprocess, "run", broken)
    monkeypatch.setattr(environment.platform, "freedesktop_os_release", broken)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    described = describe_environment()
    assert described["java"] is None
    assert described["gpus"] == []
    assert described["onnxruntime_providers"] is None
    assert described["os"] == platform.system()


@pytest.mark.parametrize(
    ("files", "membership", "cores"),
    [
        ({"cpu.max": "150000 100000"}, "0::/", 1.5),
        ({"cpu.max": "max 100000"}, "0::/", None),
        ({"a/cpu.max": "50000 100000", "a/b/cpu.max": "max 100000"}, "0::/a/b", 0.5),
        ({"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, "3:cpu:/", 2.0),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "3:cpu:/", None),
        ({"cpu.max": "nonsense"}, "0::/", None),
        ({}, "", None),
    ],
)
def test_the_containers_limit_is_read(tmp_path, files, membership, cores):
    root = tmp_path / "cgroup"
    root.mkdir()
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    (tmp_path / "own").write_text(membership + "\n")
    assert cgroup_cpu_limit(root, tmp_path / "own") == cores


def test_the_processor_is_named_as_the_kernel_does(tmp_path):
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nmodel name\t: Other\n")
    assert cpu_model(tmp_path / "cpuinfo") == "Some CPU @ 2 GHz"
    assert cpu_model(tmp_path / "none")


def test_gpus_are_read_from_nvidia_smi():
    (first, second) = parse_gpus(
        "NVIDIA H200, 560.35.03, 143771, 345, 1980, 700.00\nTesla T4, 535.1, 15360, 300, 1590, [N/A]\nbroken\n"
    )
    assert first["name"] == "NVIDIA H200"
    assert first["max_sm_clock_mhz"] == 1980
    assert first["driver"] == "560.35.03"
    assert second["power_limit_w"] is None
