"""kill -9 under load: the worker, again and again, and the frontend. No image is lost, no answer is another."""

import os
import signal
import time

import psutil
import pytest
from detserve import server
from detserve.client import Client
from detserve.instance import Instance
from fault_load import answers_of, asking, tell

BACK_WITHIN_S = 15.0


def worker_of(instance: Instance) -> int:
    """The pid of the one worker that is ready."""
    (model,) = server.status(instance, ask_workers=False).models
    (worker,) = model.workers
    return worker.pid


def kill_worker(instance: Instance) -> tuple[int, float]:
    """Kill the worker that is at work; return its pid, and when."""
    pid = worker_of(instance)
    os.kill(pid, signal.SIGKILL)
    return pid, time.monotonic()


def load_with_kills(instance, images, *, seconds: float, kills_at: tuple[float, ...]):
    with Client.for_instance(instance.name) as client:
        expected = answers_of(client, "shapes", images)

    def patient() -> Client:
        return Client.for_instance(instance.name, retries=30, timeout_s=60)

    with asking(patient, "shapes", expected, clients=8) as load:
        begun, killed = time.monotonic(), []
        for moment in kills_at:
            time.sleep(max(0.0, begun + moment - time.monotonic()))
            killed.append(kill_worker(instance))
            load.wait_for(1)
        time.sleep(max(0.0, begun + seconds - time.monotonic()))
        figures = load.figures()
        back = [load.back_after(moment) for _, moment in killed]
        # An answer from before a kill may come after it: the last worker is asked for at the end. Each was another.
        pids = {*(pid for pid, _ in killed), worker_of(instance)}
    shown = ", ".join(f"{one:.1f}" for one in back)
    tell(f"8 clients, {seconds:g} s, {len(killed)} × kill -9 of the worker: {figures}; back after {shown} s")
    assert len(pids) == len(kills_at) + 1
    return figures, back


@pytest.mark.server
def test_two_killed_workers_lose_no_image(run, shapes, scenes):
    instance = run("killed", shapes)
    figures, back = load_with_kills(instance, scenes, seconds=18, kills_at=(1.0, 10.0))
    assert (figures.lost, figures.wrong) == ({}, 0)
    assert figures.answered == figures.sent >= 8
    assert max(back) <= 2 * BACK_WITHIN_S  # other tests share the cores


@pytest.mark.server
@pytest.mark.nightly
def test_a_minute_with_a_kill_every_twenty_seconds(run, shapes, scenes):
    instance = run("killed-long", shapes)
    figures, back = load_with_kills(instance, scenes, seconds=60, kills_at=(1.0, 20.0, 40.0))
    assert (figures.lost, figures.wrong) == ({}, 0)
    assert figures.answered == figures.sent > 16
    assert max(back) <= BACK_WITHIN_S


@pytest.mark.server
def test_a_killed_frontend_that_is_started_again_loses_no_image(run, squares, square_pictures):
    ports = server.free_ports()
    instance = run("frontend", squares, ports=ports)
    with Client.for_instance("frontend") as client:
        expected = answers_of(client, "squares", square_pictures)
    source = instance.key_path

    def patient() -> Client:
        return Client.for_instance("frontend", retries=40, timeout_s=30)

    with asking(patient, "squares", expected, clients=4) as load:
        load.wait_for(50)
        old = instance.require_running().pid
        os.kill(old, signal.SIGKILL)
        killed = time.monotonic()
        psutil.wait_procs([psutil.Process(old)] if psutil.pid_exists(old) else [], timeout=10)
        run("frontend", squares, ports=ports)  # what Kubernetes or systemd does
        load.wait_for(50)
        figures = load.figures()
    tell(f"4 clients, kill -9 of the frontend: {figures}; back after {load.back_after(killed):.1f} s")
    assert source.exists()
    assert instance.require_running().pid != old
    assert (figures.lost, figures.wrong) == ({}, 0)
    assert figures.answered == figures.sent
