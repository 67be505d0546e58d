"""What TorchServe is told, without starting it."""

import os
import sys
from pathlib import Path

import pytest
from detserve import server
from detserve.errors import ServerError
from detserve.instance import Instance
from detserve.server import capacity
from detserve.server.archives import ModelSettings, read_archive
from detserve.server.settings import config_properties, server_environment
from throwaway import build


def test_the_archives_own_settings_lose_against_the_servers(tmp_path):
    archive = build(tmp_path, config={"minWorkers": 2, "batchSize": 8, "maxBatchDelay": 0, "responseTimeout": 7})
    facts = read_archive(archive, ModelSettings(startup_timeout_s=99))
    assert facts.settings == ModelSettings(2, 2, 8, 0, 7, 99)
    assert facts.settings.to_torchserve()["maxBatchDelay"] == 1  # TorchServe takes 0 for 100 ms
    assert server.ServerSettings(workers=1, batch_size=3).applied(facts.settings) == ModelSettings(1, 1, 3, 0, 7, 99)


@pytest.mark.parametrize(
    "wrong", [{"workers": 0}, {"max_request_bytes": 0}, {"max_batch_delay_ms": -1}, {"token_minutes": 0}]
)
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ServerError, match="expected"):
        server.ServerSettings(**wrong)


def test_the_configuration_is_escaped_for_java(tmp_path):
    instance = Instance("x", tmp_path / "häuser\\😀")
    text = config_properties(server.ServerSettings(device="cpu"), server.Ports(), instance, [])
    assert "h\\u00e4user\\\\\\ud83d\\ude00" in text
    assert "number_of_gpu=0\n" in text
    assert "disable_token_authorization=false\n" in text


def test_workers_use_this_interpreter_and_their_threads(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.setenv("TS_CONFIG_FILE", "/elsewhere")
    environment = server_environment(server.ServerSettings(threads_per_worker=3), Instance("x", tmp_path), tmp_path)
    assert environment["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    assert environment["OMP_NUM_THREADS"] == "3"
    assert not {"PYTHONPATH", "TS_CONFIG_FILE"} & environment.keys()


def test_a_chosen_port_takes_the_next_four():
    assert server.ports_from(9000) == server.Ports(9000, 9001, 9002, 9003, 9004, 9005)
    with pytest.raises(ServerError, match="65530"):
        server.ports_from(65535)


@pytest.mark.parametrize(
    ("cores", "gpus", "device", "expected"),
    [
        (2, 0, "auto", (2, 1, 1)),
        (1, 0, "cpu", (1, 1, 1)),
        (32, 0, "cpu", (8, 1, 4)),
        (16, 2, "auto", (2, 8, None)),
        (16, 2, "cpu", (8, 1, 2)),
    ],
)
def test_what_is_left_open_suits_the_machine(monkeypatch, cores, gpus, device, expected):
    """One worker a core, with the cores shared out; on GPUs one worker each, and batches."""
    monkeypatch.setattr(capacity, "usable_cores", lambda: cores)
    monkeypatch.setattr(capacity, "gpu_count", lambda: gpus)
    monkeypatch.setattr(capacity, "available_memory", lambda: 64_000_000_000)
    fitting = capacity.capacity(device)

    assert (fitting.workers, fitting.batch_size, fitting.threads(fitting.workers)) == expected
    defaults = server.ServerSettings(device=device).model_defaults()
    assert (defaults.min_workers, defaults.max_workers, defaults.batch_size) == (expected[0], *expected[:2])


def test_threads_are_the_users_else_the_cores_shared_out(monkeypatch, tmp_path):
    monkeypatch.setattr(capacity, "usable_cores", lambda: 8)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)

    def threads(settings, workers):
        return server_environment(settings, Instance("x", tmp_path), tmp_path, workers)["OMP_NUM_THREADS"]

    cpu = server.ServerSettings(device="cpu")
    assert (threads(cpu, 8), threads(cpu, 3), threads(cpu, 1), threads(cpu, 20)) == ("1", "2", "8", "1")
    assert threads(server.ServerSettings(device="cpu", threads_per_worker=5), 8) == "5"
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert threads(cpu, 8) == "7"


def test_a_gpu_hidden_from_cuda_does_not_count(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert capacity.gpu_count() == 0


def test_workers_fit_into_the_memory(monkeypatch):
    monkeypatch.setattr(capacity, "usable_cores", lambda: 8)
    for gigabytes, workers in ((64, 8), (4, 2), (1, 1)):
        monkeypatch.setattr(capacity, "available_memory", lambda size=gigabytes: size * 1_000_000_000)
        assert capacity.capacity("cpu").workers == workers


def test_only_the_gpus_that_cuda_sees_count(monkeypatch, tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\nfor i in 0 1 2 3; do echo "GPU $i: NVIDIA H200"; done\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    for visible, count in ((None, 4), ("2", 1), ("0,3", 2), ("-1", 0)):
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert capacity.gpu_count() == count
