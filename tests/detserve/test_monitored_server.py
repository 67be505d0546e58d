"""Real servers and their monitor, scraped by a real Prometheus: what is counted and logged, what the probes say."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import psutil
import pytest
import requests
import yaml
from checkout import ROOT
from detserve import server
from detserve.archive import build_archive
from detserve.client import Client
from detserve.errors import EndpointError
from detserve.grpc_client import GrpcClient
from detserve.instance import Instance
from detserve.mar import write_mar
from detserve.spec import load_spec
from prometheus_client.parser import text_string_to_metric_families
from prometheus_server import prometheus, wait_for
from throwaway import build

pytestmark = pytest.mark.server

SPEC = ROOT / "model_store" / "shapes" / "shapes.yaml"
IMAGE = (SPEC.parent / "golden.jpg").read_bytes()
MONITORING = ROOT / "k8s" / "monitoring"


@pytest.fixture(scope="module")
def state_folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETSERVE_STATE_DIR", str(tmp_path_factory.mktemp("state")))
        patch.delenv("DETSERVE_INSTANCE", raising=False)
        yield


@pytest.fixture(scope="module")
def monitored(state_folder, tmp_path_factory):
    """A server of the demo model and of a foreign handler, which knows nothing of ours. The last test ends it."""
    folder = tmp_path_factory.mktemp("archives")
    shapes = build_archive(load_spec(SPEC), folder=SPEC.parent, out=folder / "shapes.mar").path
    instance = Instance.named("monitored")
    settings = server.ServerSettings(ports=None, workers=1, warm_up_s=0)
    try:
        server.start([shapes, build(folder)], settings, instance=instance)
        yield instance
    finally:
        server.stop(instance)


def ask(instance, path, timeout=10):
    return requests.get(f"{instance.require_running().monitor_url}{path}", timeout=timeout)


def values(instance):
    """Return the samples of /metrics: name and labels, without the model's, to value. Those of ``shapes`` only."""
    time.sleep(0.6)  # what the monitor answers may be half a second old
    found = {}
    for family in text_string_to_metric_families(ask(instance, "/metrics").text):
        for sample in family.samples:
            if sample.labels.get("model_name", "shapes") == "shapes":
                labels = {key: value for key, value in sample.labels.items() if not key.startswith("model_")}
                found[sample.name, *sorted(labels.items())] = sample.value
    return found


def lines(instance):
    return [json.loads(line) for line in server.logs(instance, "requests", lines=1000)]


def workers(instance, name="shapes"):
    (model,) = (model for model in server.status(instance, ask_workers=False).models if model.name == name)
    return [psutil.Process(worker.pid) for worker in model.workers]


def test_the_server_is_ready_and_alive(monitored):
    ready, live = ask(monitored, "/ready"), ask(monitored, "/live")
    assert (ready.status_code, live.status_code) == (200, 200), ready.text
    assert (ready.json()["reasons"], live.json()) == ([], {"live": True, "reason": ""})
    assert {model["name"] for model in ready.json()["models"]} == {"shapes", "echo"}
    assert ask(monitored, "/other").status_code == 404
    assert ask(monitored, "/ready?x=1").status_code == 200
    assert requests.head(f"{monitored.require_running().monitor_url}/live", timeout=5).content == b""
    assert requests.post(f"{monitored.require_running().monitor_url}/live", timeout=5).status_code == 501


def test_what_is_asked_is_counted_and_logged_under_the_client_s_id(monitored):
    before, logged = values(monitored), len(lines(monitored))
    with Client.for_instance(monitored.name) as client:
        for number in range(3):
            found = client.predict("shapes", IMAGE, request_id=f"good-{number}")
        with pytest.raises(EndpointError) as refused:
            client.predict("shapes", b"this is no image", request_id="bad-1")
        with pytest.raises(EndpointError) as unnamed:
            client.predict("shapes", IMAGE, options={"treshold": 1})
    with GrpcClient.for_instance(monitored.name) as client:
        assert client.predict("shapes", IMAGE, options={"request_id": "grpc-1"}) == found
        with pytest.raises(EndpointError) as over_grpc:
            client.predict("shapes", b"neither", options={"request_id": "grpc-2"})
    assert (refused.value.request_id, over_grpc.value.request_id) == ("bad-1", "grpc-2")

    after = values(monitored)
    added = {key: value - before.get(key, 0.0) for key, value in after.items()}
    assert added["detserve_images_total",] == 4
    assert added["detserve_rejected_inputs_total", ("reason", "not_an_image")] == 2
    assert added["detserve_rejected_inputs_total", ("reason", "unknown_option")] == 1
    assert added["detserve_batch_size_count",] == 7
    assert added["detserve_detections_per_image_sum",] == 4 * len(found)
    for stage in ("decode", "preprocess", "forward", "postprocess", "serialise"):
        assert added["detserve_stage_seconds_count", ("stage", stage)] == 4
        assert added["detserve_stage_seconds_sum", ("stage", stage)] > 0
    assert (after["detserve_golden_check_passed",], after["detserve_ready",], after["detserve_workers_ready",]) == (
        1,
        1,
        1,
    )

    new = {line["request_id"]: line for line in lines(monitored)[logged:]}
    assert len(new) == 7
    assert set(new) >= {"good-0", "good-1", "good-2", "bad-1", "grpc-1", "grpc-2"}
    # A request without an id of its own is called what TorchServe calls it, and so the client sees it too.
    assert new[unnamed.value.request_id]["type"] == "unknown_option"
    assert new[unnamed.value.request_id]["frontend_id"] == unnamed.value.request_id
    good = new["good-0"]
    assert (good["status"], good["type"], good["detections"]) == (200, "ok", len(found))
    assert (good["model"], good["version"], good["body_bytes"]) == ("shapes", "1.0", len(IMAGE))
    assert good["stages_ms"].keys() == {"decode", "preprocess", "forward", "postprocess", "serialise", "handler"}
    assert (new["bad-1"]["status"], new["bad-1"]["type"], new["bad-1"]["image_size"]) == (415, "not_an_image", None)


def test_torchserve_s_own_id_is_in_the_line_of_a_request_that_the_client_named(monitored):
    state = monitored.require_running()
    answer = requests.post(
        f"{state.inference_url}/predictions/shapes",
        data=IMAGE,
        headers={
            "Authorization": f"Bearer {server.token(monitored).value}",
            "Content-Type": "application/octet-stream",
            "X-Request-Id": "mine-1",
        },
        timeout=30,
    )
    (line,) = (line for line in lines(monitored) if line["request_id"] == "mine-1")
    # TorchServe puts its own id over the handler's; an edge before it answers the client's.
    assert answer.headers["X-Request-Id"] == line["frontend_id"]


def test_the_queue_s_time_is_a_histogram(monitored):
    with Client.for_instance(monitored.name) as client:
        client.predict("shapes", IMAGE)
    counted = ("detserve_queue_seconds_count",)
    wait_for(lambda: values(monitored).get(counted, 0) >= 1)
    found = values(monitored)
    assert found["detserve_queue_seconds_bucket", ("le", "+Inf")] == found[counted]


def test_a_worker_that_is_killed_takes_no_count_with_it_and_leaves_no_file(monitored):
    before = values(monitored)
    (victim,) = workers(monitored)
    victim.kill()
    wait_for(lambda: ask(monitored, "/ready").status_code == 503)
    assert ask(monitored, "/live").status_code == 200
    wait_for(lambda: ask(monitored, "/ready").status_code == 200)
    after = values(monitored)
    of_the_worker = re.compile(r"detserve_(?!queue|worker_starts).*_(total|count|sum)")
    kept = [key for key in before if of_the_worker.fullmatch(key[0])]
    assert len(kept) > 20
    assert {key: after[key] for key in kept} == {key: before[key] for key in kept}
    starts = ("detserve_worker_starts_total", ("outcome", "ready"))
    assert after[starts] == before[starts] + 1
    pids = {("pid", str(process.pid)) for process in workers(monitored)}
    assert {key[1] for key in after if key[0] == "detserve_worker_start_time_seconds"} == pids
    wait_for(lambda: not list(monitored.worker_metrics.glob(f"*_{victim.pid}.db")))


NAME = re.compile(r"(?<![\w.])[a-zA-Z_:][a-zA-Z0-9_:]*")
GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)")
WORDS = {"and", "or", "unless", "offset", "bool"}


def names_in(expression):
    """Return the names of the metrics in a PromQL expression: what is no label, function, duration or keyword."""
    bare = re.sub(r'"[^"]*"', "", GROUPING.sub("", expression))
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]", " ", bare)
    bare = re.sub(r"\b\d+[smhdwy]\b", "", bare)
    return {
        found.group()
        for found in NAME.finditer(bare)
        if found.group() not in WORDS and not re.match(r"\s*\(", bare[found.end() :])
    }


def test_names_are_found_in_expressions():
    assert names_in('sum without (reason) (rate(a_total{m=~"$m"}[5m])) > 0.01 * (b or 0 * c) unless d offset 15m') == {
        "a_total",
        "b",
        "c",
        "d",
    }
    assert names_in("histogram_quantile(0.95, sum by (le) (rate(x_bucket[$__rate_interval]))) > 5e3") == {"x_bucket"}


def expressions():
    """Every expression of the alerts and of the dashboard, by its place."""
    rules = yaml.safe_load((MONITORING / "alerts.yaml").read_text())
    found = {rule["alert"]: rule["expr"] for group in rules["groups"] for rule in group["rules"]}
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            found[f"{panel['title']} {target['refId']}"] = target["expr"]
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            metric, _ = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["definition"]).groups()
            found[variable["name"]] = metric
    return found


def test_alerts_and_dashboard_use_what_a_real_prometheus_finds_on_this_server(monitored, tmp_path):
    with Client.for_instance(monitored.name) as client:
        client.predict("shapes", IMAGE)
        with pytest.raises(EndpointError):
            client.predict("shapes", b"no image")
        with pytest.raises(EndpointError) as failed:  # TorchServe has no counter of 5xx before the first one
            client.predict("echo", b"boom")
        assert failed.value.status == 503
    wait_for(lambda: "detserve_queue_seconds_count" in ask(monitored, "/metrics").text)
    target = monitored.require_running().monitor_url.removeprefix("http://")
    found = expressions()
    assert len(found) > 40
    with prometheus(tmp_path, target, MONITORING / "alerts.yaml") as scraper:
        time.sleep(2.5)  # a rate needs two scrapes
        missing = {}
        for place, expression in found.items():
            for name in names_in(expression):
                if not scraper.query(f'count({{__name__="{name}", job="detserve"}})'):
                    missing.setdefault(name, []).append(place)
            # The expression itself is valid, the dashboard's variables filled in.
            scraper.query(expression.replace("$__rate_interval", "1m").replace("$model", ".*"))
        assert missing == {}
        rules = [rule for group in scraper.get("rules")["groups"] for rule in group["rules"]]
        assert {rule["health"] for rule in rules} == {"ok"}
        firing = {rule["name"] for rule in rules if rule["state"] == "firing"}
        assert firing <= {"DetserveWorkerRestarts"}
        (target,) = scraper.get("targets")["activeTargets"]
        assert (target["health"], target["lastError"]) == ("up", "")
        # Panels show something: each has an answer but where nothing has happened.
        empty = {
            place
            for place, expression in found.items()
            if not place.startswith("Detserve")
            and not scraper.query(expression.replace("$__rate_interval", "1m").replace("$model", ".*"))
        }
        assert empty <= {"Rejected inputs by reason A"}


def test_a_frontend_that_hangs_is_not_alive_and_the_monitor_still_answers(monitored):
    frontend = psutil.Process(monitored.require_running().pid)
    frontend.suspend()
    try:
        time.sleep(0.6)  # the last answer may be half a second old
        live = ask(monitored, "/live")
        assert live.status_code == 503
        assert live.json() == {"live": False, "reason": "the frontend does not answer within 3 s"}
        assert ask(monitored, "/ready").status_code == 503
        found = values(monitored)
        assert found["detserve_frontend_up",] == 0
        assert found["detserve_images_total",] > 0
    finally:
        frontend.resume()
    wait_for(lambda: ask(monitored, "/live").status_code == 200)
    wait_for(lambda: ask(monitored, "/ready").status_code == 200)


def test_clients_that_stay_silent_do_not_keep_the_probes_waiting(monitored):
    import socket

    state = monitored.require_running()
    silent = [socket.create_connection(("127.0.0.1", state.ports.monitor)) for _ in range(20)]
    try:
        assert ask(monitored, "/live").status_code == 200
    finally:
        for one in silent:
            one.close()


def test_in_the_foreground_the_monitor_is_started_again_and_ends_with_the_server(state_folder, tmp_path):
    command = [sys.executable, "-m", "dettools.cli", "serve", "start", "--models", str(build(tmp_path))]
    command += ["--port", "free", "--warm-up", "0", "--foreground", "--instance", "foreground", "--no-request-log"]
    with (tmp_path / "said").open("wb") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, env=dict(os.environ))
    instance = Instance.named("foreground")
    try:
        wait_for(lambda: (state := instance.running()) is not None and state.ready, 60)
        state = instance.require_running()

        def monitors():
            return [one for one in instance.processes() if "detserve.monitor" in one.cmdline()]

        wait_for(lambda: requests.get(f"{state.monitor_url}/ready", timeout=5).status_code == 200)
        (first,) = monitors()
        first.kill()
        wait_for(lambda: requests.get(f"{state.monitor_url}/ready", timeout=5).status_code == 200)
        (second,) = monitors()
        assert second.pid != first.pid
        with Client.for_instance("foreground") as client:
            assert client.predict("echo", b"x")[0]["class_name"] == "cat"
        assert not (instance.log_folder / "requests.log").exists()

        # The frontend is killed and its parent stopped: nobody is left to end the monitor.
        process.send_signal(signal.SIGSTOP)
        psutil.Process(state.pid).kill()
        wait_for(lambda: requests.get(f"{state.monitor_url}/live", timeout=5).status_code == 503)
        # Its parent cannot take note of its end.
        wait_for(lambda: not second.is_running() or second.status() == psutil.STATUS_ZOMBIE)
    finally:
        process.send_signal(signal.SIGCONT)
        process.terminate()
        process.wait(60)
    assert instance.processes() == []


@pytest.mark.nightly
def test_the_monitor_does_not_grow(monitored):
    """Half a minute of scrapes and probes: no more memory than at its beginning."""
    (monitor,) = (one for one in monitored.processes() if "detserve.monitor" in one.cmdline())
    for _ in range(50):
        ask(monitored, "/metrics")
    before = monitor.memory_info().rss
    end = time.monotonic() + 30
    while time.monotonic() < end:
        for path in ("/metrics", "/ready", "/live"):
            ask(monitored, path)
        time.sleep(1)
    assert monitor.memory_info().rss < before * 1.05


def test_a_stop_makes_the_server_not_ready_before_the_last_answer(monitored):
    state = monitored.require_running()
    answers, seen = [], []
    with Client.for_instance(monitored.name) as client:
        asking = threading.Thread(target=lambda: answers.append(client.predict("echo", b"sleep 2")))
        asking.start()
        time.sleep(0.5)
        stopping = threading.Thread(target=server.stop, args=(monitored,))
        stopping.start()
        while asking.is_alive():
            seen.append(requests.get(f"{state.monitor_url}/ready", timeout=5))
            time.sleep(0.05)
        asking.join()
        stopping.join()
    assert answers[0][0]["class_name"] == "cat"
    drained = [answer.json() for answer in seen if answer.status_code == 503]
    assert len(drained) > 5
    assert all(answer["draining"] and answer["reasons"] == ["the server is being stopped"] for answer in drained)
    assert monitored.processes() == []
    assert [path.name for path in monitored.folder.iterdir()] == ["logs"]


def drifted(archive: Path, out: Path, golden_check: str) -> Path:
    """Copy an archive with golden boxes that no model finds, its digests made to fit."""
    with zipfile.ZipFile(archive) as file:
        members = {name: file.read(name) for name in file.namelist()}
    members.pop("SHA256SUMS")
    for name, change in (
        (
            "golden/golden.json",
            lambda golden: golden.update(boxes_xyxy=[[x + 9, *b] for x, *b in golden["boxes_xyxy"]]),
        ),
        ("spec.json", lambda spec: spec["serving"].update(golden_check=golden_check)),
    ):
        value = json.loads(members[name])
        change(value)
        members[name] = json.dumps(value).encode()
    write_mar(out, members)
    return out


@pytest.mark.nightly
def test_a_worker_that_drifts_and_serves_all_the_same_is_not_ready(state_folder, tmp_path):
    shapes = build_archive(load_spec(SPEC), folder=SPEC.parent, out=tmp_path / "shapes.mar").path
    instance = Instance.named("drifted")
    settings = server.ServerSettings(ports=None, workers=1, warm_up_s=0)
    try:
        server.start([drifted(shapes, tmp_path / "drifted.mar", "warn")], settings, instance=instance)
        answer = ask(instance, "/ready")
        assert answer.status_code == 503
        assert answer.json()["reasons"] == ["shapes 1.0: a worker does not reproduce its golden image"]
        found = values(instance)
        assert (found["detserve_golden_check_passed",], found["detserve_ready",]) == (0, 0)
        with Client.for_instance("drifted") as client:
            assert client.predict("shapes", IMAGE)
    finally:
        server.stop(instance)
