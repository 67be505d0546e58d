"""The image and the manifests, run: the Dockerfile's own lines, and the pods as they are rendered.

`container_image` says what stands in for a container engine and for what it would download.
"""

import http.client
import json
import math
import os
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest
import yaml
from checkout import ROOT
from container_image import Stage, build, why_not
from custom_resources import metric_names
from manifests import K8S, Document, entry, flags, one
from running_container import Container, run_once, running

pytestmark = [
    pytest.mark.server,
    pytest.mark.slow,
    pytest.mark.skipif(bool(why_not()), reason=why_not() or "-"),
]

TOKEN = "a-token-of-the-tests-0123456789"
PHOTO = (ROOT / "model_store" / "shapes" / "golden.jpg").read_bytes()


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


def ask(
    port: int, path: str, *, body: bytes | None = None, token: str | None = None, method: str | None = None
) -> Answer:
    """Send a request to this thread's network."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        connection.request(method or ("GET" if body is None else "POST"), path, body=body, headers=headers)
        answer = connection.getresponse()
        return Answer(answer.status, {key.lower(): value for key, value in answer.getheaders()}, answer.read())
    finally:
        connection.close()


def is_ready(port: int, path: str) -> bool:
    try:
        return ask(port, path).status == 200
    except OSError:
        return False


def listening(container: Container) -> dict[int, set[str]]:
    """Return the ports that the container listens on, each with its addresses."""
    found: dict[int, set[str]] = {}
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/{container.pid}/net/{name}").read_text().splitlines()[1:]:
            address, state = line.split()[1], line.split()[3]
            if state == "0A":
                host, port = address.split(":")
                found.setdefault(int(port, 16), set()).add("any" if set(host) == {"0"} else "loopback")
    return found


def exposed(container: Container) -> set[int]:
    """Return the ports that can be reached from outside the container."""
    return {port for port, addresses in listening(container).items() if "any" in addresses}


def execute(container: Container, image: Stage, command: list[str]) -> "subprocess.CompletedProcess[str]":
    """Run a command in a running container, as an engine's exec."""
    user, _, group = image.user.partition(":")
    inside = [
        "nsenter",
        "--target",
        str(container.pid),
        "--mount",
        "--net",
        "--pid",
        "--root",
        "--setuid",
        user,
        "--setgid",
        group,
    ]
    pairs = [f"{key}={value}" for key, value in image.environment.items()]
    return subprocess.run(
        [*inside, "env", "-i", *pairs, *command], capture_output=True, text=True, check=False, timeout=60
    )


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Stage:
    return build(tmp_path_factory.mktemp("image"))


@pytest.fixture(scope="module")
def by_itself(image, tmp_path_factory) -> Iterator[Container]:
    """`docker run` without any option but those of the Dockerfile's head."""
    with running(image, tmp_path_factory.mktemp("run") / "log") as container:
        container.wait_for(lambda: is_ready(8083, "/ready"), 120)
        yield container


def test_the_image_is_what_the_dockerfile_says(image):
    assert image.apt_get == [["update"], ["install", "--yes", "--no-install-recommends", "nginx-light"]]
    assert (image.user, image.ports, image.stop_signal) == ("10001:10001", [8080, 7070, 8083], "SIGTERM")
    assert image.entry_point == ["/opt/detserve/bin/detserve"]
    assert not (image.root / "src").exists()
    assert [path.name for path in (image.root / "models").iterdir()] == ["shapes.mar"]
    # What COPY brought is what was installed, and nothing of the checkout is reached.
    packages = next(image.root.glob("opt/detserve/lib/python3*/site-packages"))
    for name in ("detserve/edge/nginx.conf.j2", "dethandlers/entry.py", "dettools/cli.py"):
        assert (packages / name).is_file()


@pytest.mark.nightly
def test_it_answers_by_itself(by_itself, image):
    token = execute(by_itself, image, ["detserve", "serve", "token"])
    assert token.returncode == 0, token.stderr

    answer = by_itself.inside(lambda: ask(8080, "/predictions/shapes", body=PHOTO, token=token.stdout.strip()))
    assert answer.status == 200, answer.body
    assert {"class_label", "class_name", "bbox", "score"} <= json.loads(answer.body)[0].keys()
    assert by_itself.inside(lambda: ask(8080, "/predictions/shapes", body=PHOTO)).status == 401
    assert exposed(by_itself) == set(image.ports)


def test_the_manifest_says_what_the_image_does_without_it(image):
    """And more: where the tokens are, and how many workers; so that a pod tests the image's own command too."""
    (container,) = one(entry("overlays/cpu"), "Deployment")["spec"]["template"]["spec"]["containers"]
    assert container["args"][: len(image.command)] == image.command


class Pod(NamedTuple):
    """The server of the cpu overlay."""

    container: Container
    spec: Document
    arguments: dict[str, str]
    scratch: list[str]
    documents: list[Document]

    def port(self, name: str | int) -> int:
        """Return a container port by its name."""
        return (
            name
            if isinstance(name, int)
            else next(one["containerPort"] for one in self.spec["ports"] if one["name"] == name)
        )


def how_to_run(pod: Document, container: Document, folders: dict[str, Path]) -> dict[str, Any]:
    """Return what a kubelet would do with the container: its arguments, environment and mounts."""
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    given, scratch = {}, []
    for mount in container["volumeMounts"]:
        if "emptyDir" in volumes[mount["name"]]:
            scratch.append(mount["mountPath"])
        else:
            assert mount["readOnly"] is True
            given[mount["mountPath"]] = folders[mount["name"]]
    how: dict[str, Any] = {"volumes": given, "scratch": scratch}
    if "command" in container:
        how |= {"entry_point": container["command"], "arguments": container.get("args", [])}
    else:
        how |= {"arguments": container["args"]}
    return how | {"environment": {one["name"]: one["value"] for one in container.get("env", [])}}


@pytest.fixture(scope="module")
def folders(image, tmp_path_factory) -> dict[str, Path]:
    """The volumes that a cluster would have: the claim with the models, the secret with the tokens."""
    base = tmp_path_factory.mktemp("volumes")
    tokens = base / "tokens"
    tokens.mkdir()
    (tokens / "tokens").write_text(TOKEN + "\n")
    os.chown(tokens / "tokens", 0, 10001)
    (tokens / "tokens").chmod(0o440)
    return {"models": image.root / "models", "tokens": tokens}


@pytest.fixture(scope="module")
def pod(image, folders, tmp_path_factory) -> Iterator[Pod]:
    documents = entry("overlays/monitored")
    spec = one(documents, "Deployment")["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    how = how_to_run(spec, container, folders)
    startup = container["startupProbe"]
    with running(image, tmp_path_factory.mktemp("pod") / "log", **how) as it:
        here = Pod(it, container, flags(container["args"]), how["scratch"], documents)
        port, path = here.port(startup["httpGet"]["port"]), startup["httpGet"]["path"]
        it.wait_for(lambda: is_ready(port, path), startup["periodSeconds"] * startup["failureThreshold"])
        yield here


def test_the_init_container_lets_a_good_archive_through_and_no_damaged_one(image, folders, tmp_path):
    spec = one(entry("overlays/cpu"), "Deployment")["spec"]["template"]["spec"]
    (verify,) = spec["initContainers"]
    models = tmp_path / "models"
    models.mkdir()
    content = bytearray((folders["models"] / "shapes.mar").read_bytes())
    (models / "a.mar").write_bytes(content)
    content[len(content) // 2] ^= 1
    (models / "b.mar").write_bytes(content)

    code, printed = run_once(image, tmp_path / "log", **how_to_run(spec, verify, {**folders, "models": models}))
    assert code == 2, printed
    good, _, bad = printed.partition("b.mar")
    assert "a.mar" in good
    assert "error" not in good.lower()
    assert bad


def test_the_images_health_check_passes(pod, image):
    health = execute(pod.container, image, image.health_check)
    assert health.returncode == 0, health.stderr


def test_no_process_has_rights_or_writes_outside(pod, image):
    processes = pod.container.processes()
    assert {process.uids().real for process in processes} == {10001}
    assert len([process for process in processes if "java" in process.name()]) == 1
    for process in processes:
        status = Path(f"/proc/{process.pid}/status").read_text()
        assert "CapEff:\t0000000000000000" in status
        assert "NoNewPrivs:\t1" in status
    refused = execute(pod.container, image, ["/bin/sh", "-c", "touch /x /opt/x /models/x /etc/x"])
    assert refused.stderr.count("Read-only file system") == 4


def test_every_probe_of_the_manifest_answers(pod):
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        probe = pod.spec[name]["httpGet"]
        begun = time.monotonic()
        answer = pod.container.inside(lambda probe=probe: ask(pod.port(probe["port"]), probe["path"]))
        assert answer.status == 200, (name, answer.body)
        assert time.monotonic() - begun < pod.spec[name]["timeoutSeconds"]


def test_what_the_manifest_names_is_where_it_listens(pod):
    by_flag = {"http": "--port", "grpc": "--edge-grpc-port", "monitor": "--monitor-port"}
    heard = listening(pod.container)
    for port in pod.spec["ports"]:
        assert str(port["containerPort"]) == pod.arguments[by_flag[port["name"]]]
        assert "any" in heard[port["containerPort"]]
    assert exposed(pod.container) == {port["containerPort"] for port in pod.spec["ports"]}
    for service in (document for document in pod.documents if document["kind"] == "Service"):
        for port in service["spec"]["ports"]:
            assert pod.port(port["targetPort"]) in heard


def test_it_serves_the_volumes_models_for_the_secrets_token(pod):
    answer = pod.container.inside(lambda: ask(pod.port("http"), "/predictions/shapes", body=PHOTO, token=TOKEN))
    assert answer.status == 200, answer.body
    assert json.loads(answer.body)
    ready = json.loads(pod.container.inside(lambda: ask(pod.port("monitor"), "/ready")).body)
    (model,) = ready["models"]
    assert (model["name"], len(model["workers"])) == ("shapes", int(pod.arguments["--workers"]))


def test_grpc_goes_where_the_service_sends_it(pod):
    def ping() -> bytes:
        with grpc.insecure_channel(f"127.0.0.1:{pod.port('grpc')}") as channel:
            call = channel.unary_unary("/org.pytorch.serve.grpc.inference.InferenceAPIsService/Ping")
            return call(b"", timeout=20, metadata=[("authorization", f"Bearer {TOKEN}")])

    assert b"Healthy" in pod.container.inside(ping)


def test_the_metrics_that_are_scaled_on_and_scraped_are_there(pod):
    scraped = one(pod.documents, "ServiceMonitor")["spec"]
    service = one(pod.documents, "Service", "detserve-monitor")
    assert scraped["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    (endpoint,) = scraped["endpoints"]
    (port,) = [port for port in service["spec"]["ports"] if port["name"] == endpoint["port"]]
    pod.container.inside(lambda: ask(pod.port("http"), "/predictions/shapes", body=PHOTO, token=TOKEN))
    time.sleep(2)  # the monitor reads the queue's times once a second
    answer = pod.container.inside(lambda: ask(pod.port(port["targetPort"]), endpoint["path"]))
    names = set(re.findall(r"^([a-zA-Z_:][\w:]*)", answer.body.decode(), re.MULTILINE))

    (rule,) = yaml.safe_load((K8S / "prometheus-adapter" / "values.yaml").read_text())["rules"]["custom"]
    queries = [rule["seriesQuery"], rule["metricsQuery"]]
    queries.append(one(entry("overlays/keda"), "ScaledObject")["spec"]["triggers"][0]["metadata"]["query"])
    asked = set().union(*map(metric_names, queries))
    assert asked == {"detserve_queue_seconds_sum", "detserve_queue_seconds_count"}
    assert asked <= names
    for relabeling in endpoint["metricRelabelings"]:
        dropped = {name for name in names if re.fullmatch(relabeling["regex"], name)}
        assert dropped
        assert not {name for name in dropped if name.startswith(("detserve_", "ts_"))}


def test_its_environment_is_what_the_code_reads(image):
    """A variable that is misspelt would be set for nobody."""
    code = "".join(
        path.read_text() for folder in ("handlers", "serving", "tools") for path in (ROOT / folder).rglob("*.py")
    )
    ours = {name for name in image.environment if name.startswith("DETSERVE_")}
    assert len(ours) == 3
    assert {name for name in ours if f'"{name}"' in code} == ours


@pytest.mark.nightly
def test_a_shard_of_the_evaluation_job_and_its_merge(image, folders, tmp_path):
    from dettools.datasets.scenes import write_dataset

    data, results = tmp_path / "data", tmp_path / "results"
    write_dataset(data, count=2, seed=3)
    results.mkdir()
    results.chmod(0o777)
    for name, changed in (("detserve-evaluate", "--limit=2"), ("detserve-evaluate-merge", None)):
        job = one(entry("evaluate-job"), "Job", name)["spec"]
        spec = job["template"]["spec"]
        (container,) = spec["containers"]
        # A data set of eight shards would take a minute here: two images, in two.
        arguments = [
            argument.replace("$(JOB_COMPLETION_INDEX)/8", "{index}/2").replace("--wait=86400", "--wait=1")
            for argument in container["args"]
        ]
        for index in range(2 if changed else 1):
            given = [argument.format(index=index) for argument in arguments]
            mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
            code, printed = run_once(
                image,
                tmp_path / "log",
                arguments=given,
                volumes={mounts["dataset"]: data} | ({"/models": folders["models"]} if changed else {}),
                writable={mounts["evaluation"]: results},
            )
            assert code == 0, printed
    told = json.loads(printed.splitlines()[-1])
    assert (told["images"], told["answered"]) == (2, 2)


def test_sigterm_drains(pod):
    """The last test of the pod: requests in flight are answered, none is accepted after, and it ends with 0 in time."""
    seen: list[tuple[float, object]] = []
    stop = threading.Event()

    def client() -> None:
        while not stop.is_set():
            begun = time.monotonic()
            try:
                answer = ask(pod.port("http"), "/predictions/shapes", body=PHOTO, token=TOKEN)
            except ConnectionRefusedError:
                return
            except OSError as error:
                seen.append((begun, error))
                return
            seen.append((begun, answer))

    def load() -> float:
        threads = [threading.Thread(target=client) for _ in range(6)]
        for thread in threads:
            thread.start()
        time.sleep(3)
        pod.container.terminate()
        told = time.monotonic()
        for thread in threads:
            thread.join(60)
        return told

    told = pod.container.inside(load)
    stop.set()
    grace = one(pod.documents, "Deployment")["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    code = pod.container.wait(grace)

    assert code == 0, pod.container.output()
    before = [answer for begun, answer in seen if begun < told]
    assert len(before) > 6
    assert {answer.status for answer in before if isinstance(answer, Answer)} == {200}
    assert not [answer for answer in before if isinstance(answer, OSError)]
    late = [(begun, answer) for begun, answer in seen if begun > told + 1.0]
    # What waits to be accepted while the listening socket closes is reset by the kernel: a refusal, after which no
    # connection is accepted.
    closed = min((begun for begun, answer in late if isinstance(answer, ConnectionResetError)), default=math.inf)
    for begun, answer in late:
        if begun >= closed:
            assert isinstance(answer, ConnectionResetError), (begun - closed, answer)
            continue
        assert isinstance(answer, Answer), answer
        assert answer.status == 503
        assert answer.headers["retry-after"] == "1"
        assert json.loads(answer.body)["code"] == 503
