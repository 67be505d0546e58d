"""What is watched while a level runs: real processes that work, a loop that is late, files as kernels write them."""

import asyncio
import subprocess
import sys
import time

import psutil
import pytest
from dettools.benchmark.gpu_watch import GpuWatch, parse_look
from dettools.benchmark.monitor import MachineTimes, Monitor, ProcessesCpu, cgroup_throttled_s

WORK = "import time\nwhile time.process_time() < {}: pass\n"


def test_the_cpu_of_a_server_and_of_its_children_counts_from_the_start():
    """The parent works 0.3 s before anybody looks, then a child works 0.7 s and ends.

    The system tells a process's time in hundredths, rounded down: one that has worked 0.6 s may read as 0.58 s.
    """
    script = (
        WORK.format(0.3) + "print('ready', flush=True)\ninput()\nimport subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {WORK.format(0.7) + 'input()'!r}], stdin=subprocess.PIPE)\n"
        "print('child', flush=True)\ninput()\nchild.communicate(b'\\n')\nprint('done', flush=True)\ninput()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout.readline() == "ready\n"
        cpu = ProcessesCpu(lambda: [psutil.Process(process.pid)])
        assert cpu.used_s == 0
        print(file=process.stdin, flush=True)
        assert process.stdout.readline() == "child\n"
        deadline = time.monotonic() + 30
        while cpu.used_s < 0.6 and time.monotonic() < deadline:
            time.sleep(0.1)
            cpu.look()
        print(file=process.stdin, flush=True)
        assert process.stdout.readline() == "done\n"
        cpu.look()  # the child is gone: what it used stays counted
        assert 0.6 <= cpu.used_s < 1.2
        print(file=process.stdin, flush=True)
    cpu.look()  # all are gone
    assert cpu.used_s >= 0.6


def test_a_level_has_its_clock_its_cpu_and_its_queue():
    def begin():
        return lambda: 12.5

    monitor = Monitor(lambda: [psutil.Process()], begin, interval_s=0.05)
    for _ in range(2):  # one monitor, level after level: nothing is carried over
        monitor.start()
        until = time.process_time() + 0.32
        while time.process_time() < until:
            pass
        found = monitor.stop()
        assert 0.3 <= found.client_cpu_s < 0.6
        assert found.server_cpu_s == pytest.approx(found.client_cpu_s, abs=0.15)
        assert found.client_cpu_s <= found.wall_s + 0.1 < 10
        assert 0 < found.machine_cpu <= 1
        assert found.steal is None or 0 <= found.steal <= 1
        assert (found.queue_ms, found.loop_lag_ms) == (12.5, None)


def test_a_server_elsewhere_has_no_cpu_and_no_queue():
    monitor = Monitor()
    monitor.start()
    found = monitor.stop()
    assert (found.server_cpu_s, found.queue_ms) == (None, None)


def test_a_loop_that_is_held_up_is_told():
    async def run(held_s):
        monitor = Monitor()
        monitor.start()
        watching = asyncio.create_task(monitor.watch_loop())
        for _ in range(3):
            await asyncio.sleep(0.15)
            time.sleep(held_s)
        await asyncio.sleep(0.15)
        watching.cancel()
        return monitor.stop().loop_lag_ms

    assert asyncio.run(run(0.3)) > 100
    # A busy machine holds up a loop too, so the quietest of five tells what the monitor itself adds.
    assert min(asyncio.run(run(0.0)) for _ in range(5)) < 100


def test_a_process_that_cannot_be_found_counts_nothing():
    def gone():
        raise psutil.NoSuchProcess(1)

    assert ProcessesCpu(gone).used_s == 0


def test_busy_and_stolen_are_shares_of_all_cores():
    before, after = MachineTimes(100.0, 50.0, 1.0), MachineTimes(103.0, 56.0, 2.0)
    assert after.busy_since(before) == pytest.approx(0.3)
    assert after.stolen_since(before) == pytest.approx(0.1)
    assert before.busy_since(before) is None
    assert MachineTimes(2.0, 2.0, None).stolen_since(MachineTimes(1.0, 1.0, None)) is None
    assert MachineTimes.now().busy > 0


@pytest.mark.parametrize(
    ("membership", "file", "text", "seconds"),
    [
        ("0::/pod/a\n", "pod/a/cpu.stat", "usage_usec 9\nnr_throttled 3\nthrottled_usec 2500000\n", 2.5),
        ("0::/\n", "cpu.stat", "throttled_usec 500000\n", 0.5),
        ("0::/outside/of/this/mount\n", "cpu.stat", "throttled_usec 500000\n", 0.5),
        ("4:cpu,cpuacct:/docker/b\n0::/\n", "cpu,cpuacct/docker/b/cpu.stat", "throttled_time 1500000000\n", 1.5),
        ("1:cpu:/docker/b\n0::/\n", "cpu/cpu.stat", "nr_periods 0\nthrottled_time 0\n", 0.0),
        ("0::/\n", "cpu.stat", "usage_usec 9\n", None),
        ("0::/\n", "other", "", None),
    ],
)
def test_throttling_is_read_in_both_versions_of_cgroups(tmp_path, membership, file, text, seconds):
    (path := tmp_path / "cgroup" / file).parent.mkdir(parents=True)
    path.write_text(text)
    (own := tmp_path / "own").write_text(membership)
    assert cgroup_throttled_s(tmp_path / "cgroup", own) == seconds


def test_a_machine_without_cgroups(tmp_path):
    assert cgroup_throttled_s(tmp_path, tmp_path / "nothing") is None


class TestGpu:
    def test_a_line_of_nvidia_smi(self):
        look = parse_look("1, 87, 14321, 1980, 412.55, 61, 0x0000000000000004\n", 2.5)
        assert (look.index, look.at_s, look.utilisation, look.memory_mb) == (1, 2.5, 87, 14321)
        assert (look.sm_clock_mhz, look.power_w, look.temperature_c, look.throttled) == (1980, 412.55, 61, True)

    def test_what_is_not_told_is_none(self):
        look = parse_look("0, [N/A], 10, 210, [Not Supported], 30, [N/A]", 0.0)
        assert (look.utilisation, look.power_w, look.throttled) == (None, None, None)

    @pytest.mark.parametrize(("reasons", "throttled"), [("0x0", False), ("0x1", False), ("0x3", False), ("0x48", True)])
    def test_an_idle_gpu_is_not_throttled(self, reasons, throttled):
        assert parse_look(f"0, 1, 2, 3, 4, 5, {reasons}", 0.0).throttled is throttled

    @pytest.mark.parametrize("line", ["", "index, utilization", "Field is not valid", "a, 1, 2, 3, 4, 5, 0x0"])
    def test_other_lines_are_no_looks(self, line):
        assert parse_look(line, 0.0) is None

    def test_a_driver_that_knows_only_the_old_name_is_asked_again(self, tmp_path):
        script = (
            "#!/bin/sh\n"
            'case "$1" in *event_reasons*) echo "Field clocks_event_reasons.active is not valid"; exit 2;; esac\n'
            'while true; do echo "0, 50, 100, 1000, 200.5, 40, 0x0"; sleep 0.1; done\n'
        )
        (program := tmp_path / "nvidia-smi").write_text(script)
        program.chmod(0o755)
        watch = GpuWatch(str(program))
        begun = time.monotonic()
        watch.start()
        time.sleep(0.6)
        looks = watch.stop(begun)
        assert len(looks) >= 2
        assert all(look.utilisation == 50 and 0 <= look.at_s < 5 for look in looks)
        children = [child for child in psutil.Process().children(recursive=True) if "nvidia-smi" in child.name()]
        assert children == []

    def test_without_a_gpu_nothing_is_seen(self):
        watch = GpuWatch("no-such-program")
        watch.start()
        assert watch.stop(0.0) == ()
