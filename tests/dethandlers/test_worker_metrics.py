"""The worker's own metrics, in processes of their own: prometheus-client chooses where to count when it is imported."""

import json
import os
import subprocess
import sys
from collections import Counter

import pytest
from dethandlers.worker_metrics import SECONDS
from prometheus_client.multiprocess import MultiProcessCollector

PREAMBLE = """
import json, resource, sys
from dethandlers.request_log import RequestRecord
from dethandlers.worker_metrics import open_worker_metrics

def answered(detections, images, batch, /, **stages):
    return RequestRecord("id", "f", 200, "ok", batch, 10, (4, 3), detections, images, stages)

def refused(status, word, batch=1):
    return RequestRecord("id", "f", status, word, batch)
"""


def run(body, folder, **environment):
    """Run a worker's life, return what it printed as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + body],
        env=os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(folder)} | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout or "null"), done.stderr


def samples_in(folder):
    """Return every sample: name and labels, but for the model's, to its value."""
    found = {}
    for family in MultiProcessCollector.merge([str(path) for path in folder.glob("*.db")]):
        for sample in family.samples:
            labels = {key: value for key, value in sample.labels.items() if key not in ("model_name", "model_version")}
            found[sample.name, *sorted(labels.items())] = sample.value
    return found


def test_a_worker_counts_what_it_did(tmp_path):
    run(
        """
metrics = open_worker_metrics("shapes", "1.0")
metrics.started("ready", golden_passed=True)
metrics.observe([
    answered(2, 2, 4, decode=1.0, preprocess=2.0, forward=30.0, postprocess=1.5, serialise=0.1, handler=40.0),
    answered(7, 2, 4, decode=3.0, preprocess=2.0, forward=30.0, postprocess=1.5, serialise=0.1, handler=41.0),
    answered(0, 1, 4, decode=1.0, preprocess=2.0, forward=600.0, postprocess=1.5, serialise=0.1, handler=700.0),
    refused(415, "not_an_image", 4),
])
metrics.observe([refused(507, "inference_failed")])
metrics.observe([])
""",
        tmp_path,
    )
    found = samples_in(tmp_path)
    assert found["detserve_images_total",] == 3
    assert found["detserve_rejected_inputs_total", ("reason", "not_an_image")] == 1
    assert found["detserve_rejected_inputs_total", ("reason", "empty_body")] == 0
    assert found["detserve_failed_requests_total", ("reason", "inference_failed")] == 1
    assert found["detserve_worker_starts_total", ("outcome", "ready")] == 1
    assert found["detserve_golden_check_passed",] == 1
    assert (found["detserve_batch_size_count",], found["detserve_batch_size_sum",]) == (2, 5)
    # Two passes: one of two images, one of one.
    assert (found["detserve_forward_size_count",], found["detserve_forward_size_sum",]) == (2, 3)
    assert (found["detserve_detections_per_image_count",], found["detserve_detections_per_image_sum",]) == (3, 9)
    forward = {
        key[1][1]: value
        for key, value in found.items()
        if key[0] == "detserve_stage_seconds_bucket" and key[2] == ("stage", "forward")
    }
    assert forward == {**{str(bound): (0 if bound < 0.03 else 2 if bound < 0.6 else 3) for bound in SECONDS}, "+Inf": 3}
    assert found["detserve_stage_seconds_sum", ("stage", "forward")] == pytest.approx(0.66)
    assert found["detserve_handler_seconds_sum",] == pytest.approx(0.781)


def test_workers_add_up_and_each_says_when_it_began(tmp_path):
    for passed in (True, False):
        run(f'open_worker_metrics("a", "1").started("ready", golden_passed={passed})', tmp_path)
    found = samples_in(tmp_path)
    assert found["detserve_worker_starts_total", ("outcome", "ready")] == 2
    assert found["detserve_golden_check_passed",] == 0  # one that drifts is one too many
    assert len([key for key in found if key[0] == "detserve_worker_start_time_seconds"]) == 2


def test_the_memory_of_a_worker_on_a_cpu_is_its_own(tmp_path):
    (resident, _) = run(
        """
import torch
metrics = open_worker_metrics("a", "1")
metrics.started("ready", device=torch.device("cpu"))
print(json.dumps(next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmRSS"))))
""",
        tmp_path,
    )
    assert samples_in(tmp_path)["detserve_device_memory_bytes", ("device", "cpu")] == pytest.approx(resident, rel=0.1)


def test_words_that_somebody_makes_up_are_not_each_a_series_for_ever(tmp_path):
    run(
        """
metrics = open_worker_metrics("a", "1")
metrics.observe([refused(400, f"word_{number}") for number in range(500)])
""",
        tmp_path,
    )
    rejected = {key[1][1]: value for key, value in samples_in(tmp_path).items() if "rejected" in key[0]}
    assert sum(rejected.values()) == 500
    assert rejected["other"] > 400
    assert len(rejected) < 100


NOTHING = """
metrics = open_worker_metrics("a", "1")
metrics.started("ready", golden_passed=True)
metrics.observe([refused(400, "x")])
print(json.dumps(metrics.active))
"""


def test_without_prometheus_client_nothing_is_counted_and_nothing_fails(tmp_path):
    active, _ = run('sys.modules["prometheus_client"] = None' + NOTHING, tmp_path)
    assert not active
    assert list(tmp_path.iterdir()) == []


def test_without_a_folder_nothing_is_counted_and_prometheus_client_is_not_even_imported(tmp_path):
    active, _ = run(NOTHING + 'assert "prometheus_client" not in sys.modules', tmp_path, PROMETHEUS_MULTIPROC_DIR="")
    assert not active


@pytest.mark.parametrize("where", ["missing", "file too large"])
def test_without_a_place_to_write_the_worker_serves_on(tmp_path, where):
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))" if where == "file too large" else ""
    active, said = run(limit + NOTHING, tmp_path / "missing" if where == "missing" else tmp_path)
    assert not active
    assert "no metrics: " in said


def test_every_machine_word_of_the_worker_has_its_series_from_the_start(tmp_path):
    """Read from the sources: a word that is not in the table is counted, but its first rejection is no increase."""
    import re
    from pathlib import Path

    import dethandlers
    from dethandlers.worker_metrics import REASONS

    sources = [path.read_text("utf-8") for path in Path(dethandlers.__file__).parent.rglob("*.py")]
    words = Counter(word for text in sources for word in re.findall(r'\btype(?:: str)? ?= ?"(\w+)"', text))
    others = {"ok", "internal_error", "invalid_artefact", "golden_drift", "missing_operator", "inference_failed"}
    assert set(words) - others <= set(REASONS)
