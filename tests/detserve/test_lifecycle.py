"""Models in and out of a running TorchServe, with clients that ask all the time."""

import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import requests
from detserve import server
from detserve.client import Client
from detserve.errors import ClientError, ServerError
from detserve.instance import Instance
from detserve.server.archives import ModelSettings
from detserve.server.lull import drain_version
from detserve.server.management import Management
from detserve.server.serving_wish import LEFT_OPEN, ServingWish
from detserve.server.worker_log import busy_workers
from throwaway import ECHO, build, failing

pytestmark = pytest.mark.server
# Each answers with its version, and takes 20 ms for it.
NAMED = ECHO.replace('found["calls"] = self.calls', 'found["calls"] = "VERSION"').replace(
    "self.calls += 1", "self.calls += 1; time.sleep(0.02)"
)


def versioned(folder: Path, version: str, name: str = "echo") -> Path:
    return build(folder, name, version=version, source=NAMED.replace("VERSION", version))


@pytest.fixture(scope="module")
def instance(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETSERVE_STATE_DIR", str(tmp_path_factory.mktemp("state")))
        one = Instance.named("lifecycle")
        archive = versioned(tmp_path_factory.mktemp("store"), "1.0")
        server.start([archive], server.ServerSettings(ports=None, workers=1, warm_up_s=0), instance=one)
        yield one
        report = server.stop(one)
        assert (report.was_running, report.drained, report.killed) == (True, True, ())
        assert one.processes() == []


@pytest.fixture
def beside(instance, tmp_path):
    """Version 2.0 beside the default 1.0, and everything as before at the end."""
    server.register(versioned(tmp_path, "2.0"), instance=instance, foreign=True)
    yield instance
    if "2.0" in versions(instance):
        server.set_default("echo", "1.0", instance=instance)
        server.unregister("echo", "2.0", instance=instance)
    assert recorded(instance) == {("echo", "1.0"): (True, 1)}


def versions(instance: Instance) -> dict[str, bool]:
    """The versions that TorchServe serves; whether each is the default."""
    found = server.status(instance, ask_workers=False).models
    return {model.version: model.default for model in found if model.name == "echo"}


def recorded(instance: Instance) -> dict[tuple[str, str], tuple[bool, int]]:
    """What the instance's state says."""
    return {(model.name, model.version): (model.default, model.min_workers) for model in instance.read().models}


@dataclass
class Load:
    """What clients got that ask without a pause; ``failed`` is what reached the caller after the client's retries."""

    answers: Counter[str] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)


@contextmanager
def load(instance: Instance, version: str | None = None, clients: int = 4, retries: int = 0) -> Iterator[Load]:
    found, over = Load(), threading.Event()

    def ask() -> None:
        with Client.for_instance(instance.name, retries=retries, timeout_s=20) as client:
            while not over.is_set():
                try:
                    found.answers[client.predict("echo", b"x", version=version)[0]["calls"]] += 1
                except ClientError as error:
                    found.failed.append(f"{error.type}: {error}")

    threads = [threading.Thread(target=ask) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        await_(lambda: sum(found.answers.values()) >= clients)
        yield found
    finally:
        over.set()
        for thread in threads:
            thread.join()


def await_(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_default_switches_under_load_without_a_failed_request(beside):
    """No retries: the first answer is the answer, and it is one of the two versions'."""
    with load(beside) as found:
        for _ in range(8):
            for version in ("2.0", "1.0"):
                before = found.answers[version]
                server.set_default("echo", version, instance=beside)
                await_(lambda: found.answers[version] > before + 2)  # noqa: B023 - awaited at once
    assert found.failed == []
    assert set(found.answers) == {"1.0", "2.0"}
    assert sum(found.answers.values()) > 50
    assert recorded(beside) == {("echo", "1.0"): (True, 1), ("echo", "2.0"): (False, 1)}


def test_a_default_that_was_replaced_goes_under_load_without_a_failed_request(beside):
    with load(beside) as found:
        server.set_default("echo", "2.0", instance=beside)
        gone = server.unregister("echo", "1.0", instance=beside)
        await_(lambda: found.answers["2.0"] > 5)
    assert found.failed == []
    assert gone.drained
    assert versions(beside) == {"2.0": True}
    assert [path.name for path in beside.model_store.iterdir()] == ["echo-2.0.mar"]
    # And back, from the archive's own place.
    server.register(versioned(beside.folder.parent, "1.0"), instance=beside, foreign=True)


def test_a_version_that_is_asked_for_by_its_name_stays_and_so_does_the_default(beside):
    with load(beside, version="2.0") as found:
        with pytest.raises(ServerError, match="still being asked after 1 s, so it stays"):
            server.unregister("echo", "2.0", instance=beside, drain_timeout_s=1)
        before = found.answers["2.0"]
        await_(lambda: found.answers["2.0"] > before + 2)
    assert found.failed == []
    with pytest.raises(ServerError, match=r"is the default version.*set-default echo VERSION \(there are: 2\.0\)"):
        server.unregister("echo", "1.0", instance=beside)
    with pytest.raises(ServerError, match=r"in the versions 1\.0, 2\.0; say which one"):
        server.unregister("echo", instance=beside)
    assert versions(beside) == {"1.0": True, "2.0": False}


def test_an_unregistering_that_is_interrupted_leaves_the_version_its_workers(beside):
    class Interrupted(Management):
        def scale(self, model: str, version: str, min_workers: int, max_workers: int) -> None:
            super().scale(model, version, min_workers, max_workers)
            if max_workers == 0:
                raise KeyboardInterrupt

    state = beside.require_running()
    with Interrupted(beside, state) as management:
        described = management.describe("echo", "2.0")
        with pytest.raises(KeyboardInterrupt):
            drain_version(management, beside, state, described, time.monotonic() + 10)
        await_(lambda: management.answers("echo", "2.0", 1))
        assert len(management.describe("echo", "2.0")["workers"]) == 1


def test_scaling_under_load_loses_nothing(instance):
    """A worker that is taken away may cut one request off; the client sends it again."""
    with load(instance, retries=5) as found:
        assert server.scale("echo", 3, instance=instance).min_workers == 3
        assert recorded(instance) == {("echo", "1.0"): (True, 3)}
        assert len(workers(instance)) == 3
        server.scale("echo", 1, instance=instance)
        before = sum(found.answers.values())
        await_(lambda: sum(found.answers.values()) > before + 5)
    assert found.failed == []
    assert len(workers(instance)) == 1
    assert recorded(instance) == {("echo", "1.0"): (True, 1)}
    # Workers that were taken away in the middle of a request are not thought busy for ever.
    await_(lambda: not busy_workers(instance.log_folder))


def test_the_server_stays_ready_while_models_come_and_go(instance, tmp_path):
    """A replica that takes a new version in must not lose its requests for it: nor must all of them at once."""
    url, answers, over = f"{instance.read().monitor_url}/ready", [], threading.Event()

    def look() -> None:
        while not over.wait(0.05):
            answer = requests.get(url, timeout=10)
            answers.append((answer.status_code, answer.text))

    await_(lambda: requests.get(url, timeout=10).status_code == 200)
    thread = threading.Thread(target=look)
    thread.start()
    try:
        server.register(versioned(tmp_path, "2.0"), instance=instance, foreign=True)
        server.scale("echo", 2, version="2.0", instance=instance)
        server.unregister("echo", "2.0", instance=instance)
    finally:
        over.set()
        thread.join()
    assert len(answers) > 10
    assert [text for code, text in answers if code != 200] == []


def workers(instance: Instance) -> list[str]:
    (model,) = server.status(instance, ask_workers=False).models
    return [worker.id for worker in model.workers]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (
            failing("raise RuntimeError('no weights')"),
            "RuntimeError: no weights\nWhat was served before is served still",
        ),
        pytest.param(
            failing("pass", above="import not_there"),
            "No module named 'not_there'.*Install the package of 'not_there",
            marks=pytest.mark.nightly,
        ),
    ],
    ids=["initialize", "import"],
)
def test_what_does_not_start_is_told_and_leaves_nothing(instance, tmp_path, source, said):
    with pytest.raises(server.NotStartedError, match=f"(?s){said}") as caught:
        server.register(build(tmp_path, "bad", source=source), instance=instance, foreign=True)
    assert (caught.value.name, caught.value.version) == ("bad", "1.0")
    assert [model.name for model in server.status(instance, ask_workers=False).models] == ["echo"]
    assert [path.name for path in instance.model_store.iterdir()] == ["echo-1.0.mar"]
    assert Client.for_instance(instance.name).ready()


def test_what_does_not_fit_is_refused(instance, tmp_path):
    with pytest.raises(ServerError, match=r"'echo' 1\.0 is served already.*another version"):
        server.register(versioned(tmp_path, "1.0"), instance=instance, foreign=True)
    with pytest.raises(ServerError, match="There is no archive"):
        server.register(tmp_path / "nowhere.mar", instance=instance)
    with pytest.raises(ServerError, match="does not serve 'nobody'; it serves: echo"):
        server.scale("nobody", 2, instance=instance)
    with pytest.raises(ServerError, match=r"does not serve 'echo' 9\.0; there are the versions 1\.0"):
        server.set_default("echo", "9.0", instance=instance)
    with pytest.raises(ServerError, match="--min 0"):
        server.scale("echo", 0, instance=instance)
    with pytest.raises(ServerError, match="--min 3 --max 2"):
        server.scale("echo", 3, 2, instance=instance)
    assert recorded(instance) == {("echo", "1.0"): (True, 1)}


def test_torchserve_gets_no_path_but_would_take_one(instance, tmp_path):
    """Its ``allowed_urls`` does not hold for a folder: nothing of ours hands it one."""
    outside = versioned(tmp_path, "1.0", name="outside")
    folder = tmp_path / "unpacked"
    with zipfile.ZipFile(outside) as archive:
        archive.extractall(folder)
    with Management(instance, instance.require_running()) as management:
        for url in (str(outside), f"file://{outside}", "../outside-1.0.mar", "outside-1.0.mar", str(folder), ""):
            with pytest.raises(ServerError, match="expected an archive in the instance's own model store"):
                management.register(url, ModelSettings())
    token = server.token(instance, "management").value
    answer = requests.post(
        f"{instance.read().management_url}/models",
        params={"url": str(folder), "initial_workers": 0},
        headers={"Authorization": f"Bearer {token}"},
        timeout=30,
    )
    assert answer.status_code == 200, "TorchServe has learned: say so in lifecycle and SECURITY"
    server.unregister("outside", instance=instance)


def test_without_a_token_nobody_registers(instance, tmp_path):
    url = f"{instance.read().management_url}/models"
    for headers in ({}, {"Authorization": f"Bearer {server.token(instance, 'inference').value}"}):
        answer = requests.post(url, params={"url": "echo-1.0.mar"}, headers=headers, timeout=30)
        assert answer.status_code == 400, answer.text
        assert "Token Authorization failed" in answer.text
    # The inference API knows no models to register.
    token = server.token(instance, "inference").value
    answer = requests.post(
        f"{instance.read().inference_url}/models",
        params={"url": "echo-1.0.mar"},
        headers={"Authorization": f"Bearer {token}"},
        timeout=30,
    )
    assert answer.status_code >= 400


@pytest.mark.parametrize("settings", [{"token_auth": False}, {"model_api": False}], ids=["no tokens", "no model API"])
def test_the_model_api_is_off_where_it_must_be(settings, tmp_path):
    """Of the configuration: without tokens everybody on this machine could register."""
    from detserve.server.settings import config_properties

    ports = server.Ports()
    text = config_properties(server.ServerSettings(**settings), ports, Instance("x", tmp_path), [])
    assert "enable_model_api=false" in text
    assert "enable_model_api=true" in config_properties(server.ServerSettings(), ports, Instance("x", tmp_path), [])


def test_how_a_registered_model_is_served_comes_from_the_nearest_place():
    archive = ModelSettings(3, 4, 8, 7, 60, 50)
    current = ModelSettings(2, 2, 1, 1, 30, 20)
    assert ServingWish(5, 16, 0).settled(archive, current) == ModelSettings(5, 5, 16, 0, 60, 50)
    assert ServingWish().settled(archive, current) == ModelSettings(2, 2, 8, 7, 60, 50)
    assert ServingWish().settled(LEFT_OPEN, current) == current
    alone = ServingWish().settled(LEFT_OPEN, None)
    assert alone.min_workers == alone.max_workers >= 1
    assert (alone.response_timeout_s, alone.startup_timeout_s) == (120, 120)


@pytest.mark.nightly
def test_a_second_change_waits_for_the_first(beside):
    """Twenty changes from four threads: each is done, and the state says what TorchServe serves."""
    errors = []

    def flip(version: str) -> None:
        try:
            for _ in range(5):
                server.set_default("echo", version, instance=beside)
        except ServerError as error:
            errors.append(error)

    threads = [threading.Thread(target=flip, args=(version,)) for version in ("1.0", "2.0") * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert versions(beside) == {version: default for (_, version), (default, _) in recorded(beside).items()}
    # The lock leaves no file.
    assert sorted(path.name for path in beside.model_store.iterdir()) == ["echo-1.0.mar", "echo-2.0.mar"]
