"""What is read from the logs of TorchServe."""

import pytest
from detserve.server.worker_log import StartupWatch, worker_error

CHAINED = """Backend worker process died.
Traceback (most recent call last):
  File "model_loader.py", line 108, in load
ModuleNotFoundError: No module named 'onnxruntime'

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "model_service_worker.py", line 301, in <module>
ModuleNotFoundError: No module named 'ts.torch_handler.entry'"""
LOADED = """Failed to load model x, exception size mismatch
Traceback (most recent call last):
  File "model_loader.py", line 143, in load
RuntimeError: Error(s) in loading state_dict:
	size mismatch for head.weight
Backend worker process died.
Traceback (most recent call last):
  File "model_service_worker.py", line 201, in handle_connection
RuntimeError: 500 - Unknown exception"""


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (CHAINED, ("ModuleNotFoundError", "No module named 'onnxruntime'")),
        (LOADED, ("RuntimeError", "Error(s) in loading state_dict:\n\tsize mismatch for head.weight")),
        (f'DETSERVE_STARTUP_ERROR {{"type": "golden_drift", "message": "3 px"}}\n{LOADED}', ("golden_drift", "3 px")),
        ("DETSERVE_STARTUP_ERROR cut off", ("", "cut off")),
    ],
)
def test_the_workers_own_error_is_found(said, expected):
    assert worker_error(said.splitlines()) == expected


def test_a_worker_that_was_killed_is_quoted_with_its_last_words():
    kind, message = worker_error(["Torch worker started.", "loading 3 GB"])
    assert kind == ""
    assert "out of memory?" in message
    assert message.endswith("Torch worker started. / loading 3 GB")


def ended(time: str, stream: str) -> str:
    return f"{time} [INFO ] {stream} org.pytorch.serve.wlm.WorkerLifeCycle - Stopped Scanner - {stream}"


def test_a_start_watches_each_line_once(tmp_path):
    watch = StartupWatch(tmp_path)
    assert watch.failure() is None
    lines = [ended("2026-11-22T17:52:11,305", f"W-9001-my_net_1.0-{stream}") for stream in ("stdout", "stderr")]
    log = tmp_path / "ts_log.log"
    log.write_text(f"{lines[0]}\n{lines[1]}")
    assert watch.failure() is None  # the line is not whole yet, and a traceback may follow on the other stream
    said = "2026-11-22T17:52:11,304 [WARN ] W-9001-my_net_1.0-stderr MODEL_LOG - "
    (tmp_path / "model_log.log").write_text(f"{said}Traceback (most recent call last):\n{said}ValueError: why\n")
    log.write_text(f"{lines[0]}\n{lines[1]}\n")
    failure = watch.failure()
    assert (failure.worker, failure.model, failure.version) == ("9001", "my_net", "1.0")
    assert (failure.type, failure.message) == ("ValueError", "why")
    assert watch.failure() is None


def test_a_worker_that_was_ended_for_being_slow_says_so(tmp_path):
    watch = StartupWatch(tmp_path)
    thread = "2026-11-22T18:22:28,583 [ERROR] W-9000-slow_1.0 org.pytorch.serve.wlm.WorkerThread - Backend worker error"
    cause = "org.pytorch.serve.wlm.WorkerInitializationException: Backend worker did not respond in given time"
    ends = [ended("2026-11-22T18:22:28,583", f"W-9000-slow_1.0-{stream}") for stream in ("stderr", "stdout")]
    (tmp_path / "ts_log.log").write_text("\n".join([thread, cause, *ends, ""]))
    assert "longer than its startup timeout" in watch.failure().message
