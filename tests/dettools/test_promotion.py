"""`detserve models promote` on a real server with the demo model: promoted when it is right, else all as it was."""

import json
import os
import signal
import threading
import zipfile
from pathlib import Path

import pytest
from checkout import ROOT
from dethandlers.artefact import GOLDEN_FILE, SPEC_FILE
from detserve import server
from detserve.archive import build_archive
from detserve.client import Client
from detserve.errors import DetserveError, ServerError
from detserve.instance import Instance
from detserve.mar import MANIFEST_FILE, write_mar
from detserve.signature import signature_path
from detserve.spec import load_spec
from dettools import agreement, promotion
from dettools.cli import main
from dettools.commands import models as models_command

pytestmark = pytest.mark.server
SHAPES = ROOT / "model_store" / "shapes"


def built(folder: Path, version: str, *, moved_px: float = 0.0, **serving: object) -> Path:
    """Return the demo model's archive as another version, with right digests.

    Args:
        moved_px: its first golden detection says so much else than the model.
        serving: what its spec says of serving.
    """
    base = folder / "base.mar"
    if not base.exists():
        build_archive(load_spec(SHAPES / "shapes.yaml"), folder=SHAPES, out=base)
    with zipfile.ZipFile(base) as archive:
        members = {name: archive.read(name) for name in archive.namelist() if name != "SHA256SUMS"}
    manifest, spec, golden = (json.loads(members[name]) for name in (MANIFEST_FILE, SPEC_FILE, GOLDEN_FILE))
    manifest["model"]["modelVersion"] = spec["version"] = version
    spec["serving"].update(serving)
    golden["boxes_xyxy"][0] = [value + moved_px for value in golden["boxes_xyxy"][0]]
    for name, content in ((MANIFEST_FILE, manifest), (SPEC_FILE, spec), (GOLDEN_FILE, golden)):
        members[name] = json.dumps(content).encode()
    path = folder / f"shapes-{version}.mar"
    write_mar(path, members)
    return path


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def instance(store, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETSERVE_STATE_DIR", str(tmp_path_factory.mktemp("state")))
        one = Instance.named("promotion")
        server.start([built(store, "1.0")], server.ServerSettings(ports=None, workers=1, warm_up_s=0), instance=one)
        yield one
        server.stop(one)
        assert one.processes() == []


def promote(instance: Instance, capsys, *words: object) -> tuple[int, dict]:
    code = main(["models", "promote", *map(str, words), "--instance", instance.name, "--json"])
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


def served(instance: Instance) -> dict[str, bool]:
    """Version to whether it is the default, as TorchServe says it; the instance's state says the same."""
    found = {model.version: model.default for model in server.status(instance, ask_workers=False).models}
    assert found == {model.version: model.default for model in instance.read().models}
    return found


def test_promote_and_what_is_not_promoted(instance, store, capsys):
    """One story, since each promotion is about what the one before has left."""
    # What is no image cannot be compared.
    second = built(store, "2.0")
    nothing = store / "nothing.jpg"
    nothing.write_bytes(b"no image")
    code, found = promote(instance, capsys, second, "--images", nothing)
    assert (code, found["promoted"], found["failed"]) == (1, False, "compare")
    assert "served differs from eager on 1 of 1 image" in found["reason"]
    assert (found["golden"], found["default"], found["previous"]) == (True, "1.0", "1.0")
    assert served(instance) == {"1.0": True}

    # Right: with clients that ask all the time.
    answers, failed, over = [], [], threading.Event()

    def ask() -> None:
        image = (SHAPES / "golden.jpg").read_bytes()
        with Client.for_instance(instance.name) as client:
            while not over.is_set():
                try:
                    answers.append(len(client.detect("shapes", image)))
                except DetserveError as error:
                    failed.append(error)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    code, found = promote(instance, capsys, second)
    over.set()
    for thread in threads:
        thread.join()
    assert failed == []
    assert len(set(answers)) == 1
    assert (code, found["promoted"], found["golden"], found["comparison"]["tier"]) == (0, True, True, "bit")
    assert served(instance) == {"1.0": False, "2.0": True}

    # The same version again is a mistake of the user, not of the model.
    assert main(["models", "promote", str(second), "--instance", instance.name]) == 2
    assert "is served already" in capsys.readouterr().err


def test_a_worker_whose_golden_check_fails_is_not_promoted(instance, store, capsys, monkeypatch):
    """The archive is whole, but its golden detections are not its model's: the worker refuses to start."""
    before = served(instance)
    wrong = built(store, "9.0", moved_px=40)
    code, found = promote(instance, capsys, wrong)
    assert (code, found["promoted"], found["failed"]) == (1, False, "start")
    assert "golden check" in found["reason"]
    assert served(instance) == before
    # A worker that only warns is started, and refused by what it answers.
    code, found = promote(instance, capsys, built(store, "9.1", moved_px=40, golden_check="warn"))
    assert (code, found["failed"], found["golden"]) == (1, "golden", False)
    assert "on the golden image" in found["reason"]
    assert served(instance) == before


def test_a_roll_back_outlives_a_dead_worker_of_the_default(instance, store):
    """The default's worker dies while the new version is checked: what failed goes all the same."""
    before = served(instance)
    default = next(version for version, is_default in before.items() if is_default)
    killed = []

    def kill(step: str) -> None:
        if step.startswith("the golden image"):
            models = server.status(instance, ask_workers=False).models
            (worker,) = next(model.workers for model in models if model.default)
            os.kill(worker.pid, signal.SIGKILL)
            killed.append(worker.pid)

    wrong = built(store, "9.2", moved_px=40, golden_check="warn")
    found = promotion.promote(wrong, instance=instance, on_progress=kill)
    assert len(killed) == 1
    assert (found.failed, found.default) == ("golden", default)
    assert served(instance) == before
    with Client.for_instance(instance.name, retries=20) as client:
        assert client.detect("shapes", (SHAPES / "golden.jpg").read_bytes())


def test_a_default_that_somebody_else_chose_meanwhile_stays(instance, store):
    before = served(instance)
    other = next(version for version, is_default in before.items() if not is_default)

    def choose(step: str) -> None:
        if step.startswith("the golden image"):
            server.set_default("shapes", other, instance=instance)

    wrong = built(store, "9.3", moved_px=40, golden_check="warn")
    found = promotion.promote(wrong, instance=instance, on_progress=choose)
    assert (found.failed, found.default) == ("golden", other)
    assert served(instance) == {version: version == other for version in before}
    server.set_default("shapes", next(version for version in before if version != other), instance=instance)


def test_the_other_commands(instance, capsys):
    def run(*words: str) -> tuple[int, dict]:
        code = main(["models", *words, "--instance", instance.name, "--json"])
        return code, json.loads(capsys.readouterr().out.splitlines()[-1])

    code, found = run("list")
    default = next(model["version"] for model in found["models"] if model["default"])
    assert (code, default in served(instance)) == (0, True)
    assert main(["models", "list", "--instance", instance.name]) == 0
    assert "shapes" in capsys.readouterr().out
    code, found = run("scale", "shapes", "--min", "2")
    assert (code, found["min_workers"]) == (0, 2)
    code, found = run("scale", "shapes", "--min", "1")
    assert (code, found["min_workers"]) == (0, 1)
    code, found = run("set-default", "shapes", "1.0")
    assert (code, found) == (0, {"name": "shapes", "default": "1.0", "previous": default})
    code, found = run("unregister", "shapes", default)
    assert (code, found["drained"]) == (0, True)
    assert served(instance) == {"1.0": True}


@pytest.mark.nightly
def test_the_old_version_goes_when_that_is_asked_for(instance, store, capsys):
    code, found = promote(instance, capsys, built(store, "3.0"), "--unregister-old")
    assert (code, found["previous"], found["previous_served"]) == (0, "1.0", False)
    assert served(instance) == {"3.0": True}


@pytest.mark.nightly
def test_register_signed_by_the_command(instance, store, capsys):
    assert main(["keys", "new", str(store / "keys")]) == 0
    archive, public = built(store, "5.0"), store / "keys" / "signing.pub.pem"
    words = ["models", "register", str(archive), "--instance", instance.name, "--require-signature", str(public)]
    assert main(words) == 2
    assert "it is not signed" in capsys.readouterr().err
    assert main(["keys", "sign", str(archive), "--key", str(store / "keys" / "signing.pem")]) == 0
    assert signature_path(archive).is_file()
    assert main(words) == 0
    server.unregister("shapes", "5.0", instance=instance)


def test_without_a_server_the_command_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DETSERVE_STATE_DIR", str(tmp_path))
    for words in (["list"], ["set-default", "shapes", "1.0"], ["unregister", "shapes"], ["scale", "x", "--min", "1"]):
        assert main(["models", *words]) == 2
        assert "detserve serve start" in capsys.readouterr().err
    with pytest.raises(ServerError, match="No server runs"):
        server.register(tmp_path / "x.mar")


def test_the_tiers_are_those_of_compare():
    assert tuple(tier.name for tier in agreement.TIERS) == models_command.TIER_CHOICES
