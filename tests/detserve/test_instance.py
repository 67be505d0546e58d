import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from detserve.errors import ServerError
from detserve.instance import FOLDER_VARIABLE, Instance, InstanceState, Ports, ServedModel, instances, is_alive


@pytest.fixture
def instance(tmp_path, monkeypatch) -> Instance:
    monkeypatch.setenv("DETSERVE_STATE_DIR", str(tmp_path))
    monkeypatch.delenv("DETSERVE_INSTANCE", raising=False)
    return Instance.named()


@pytest.fixture
def sleeper():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


def state_of(pid: int, created: float | None = None, temp_folder: str = "/nonexistent") -> InstanceState:
    return InstanceState(
        pid=pid,
        created=psutil.Process(pid).create_time() if created is None else created,
        started_at=time.time(),
        host="0.0.0.0",
        ports=Ports(1, 2, 3, 4, 5),
        models=(ServedModel("shapes", "1.0", "/store/shapes.mar", True, 1),),
        token_auth=True,
        max_request_bytes=100,
        temp_folder=temp_folder,
    )


def test_the_folder_is_named_by_argument_then_environment_then_default(tmp_path, monkeypatch, instance):
    assert instance.folder == tmp_path / "default"
    monkeypatch.setenv("DETSERVE_INSTANCE", "second")
    assert Instance.named().folder == tmp_path / "second"
    assert Instance.named("third").folder == tmp_path / "third"


def test_without_a_state_dir_it_lies_in_the_users_state_home(tmp_path, monkeypatch):
    monkeypatch.delenv("DETSERVE_STATE_DIR", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert Instance.named("x").folder == tmp_path / "detserve" / "x"
    monkeypatch.delenv("XDG_STATE_HOME")
    assert Instance.named("x").folder == Path.home() / ".local" / "state" / "detserve" / "x"


@pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", "x" * 65, "a b"])
def test_a_name_that_could_leave_the_folder_is_refused(name, instance):
    with pytest.raises(ServerError, match="instance name"):
        Instance.named(name)


def test_the_state_survives_writing_and_is_private(instance):
    instance.prepare()
    state = state_of(os.getpid())
    instance.write(state)
    assert instance.read() == state
    assert instance.state_path.stat().st_mode & 0o777 == 0o600
    assert instance.folder.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in instance.folder.glob(".state*")] == []
    assert state.inference_url == "http://127.0.0.1:1"


def test_a_damaged_state_is_no_state(instance):
    instance.prepare()
    for text in ("", "{", "[]", json.dumps({"pid": 1})):
        instance.state_path.write_text(text)
        assert instance.read() is None
    with pytest.raises(ServerError, match="detserve serve start"):
        instance.require_running()


def test_a_process_is_alive_until_it_ends(instance, sleeper):
    instance.prepare()
    state = state_of(sleeper.pid)
    instance.write(state)
    assert instance.running() == state
    sleeper.kill()
    deadline = time.monotonic() + 5
    while is_alive(state) and time.monotonic() < deadline:  # a zombie counts as dead
        time.sleep(0.01)
    assert instance.running() is None


def test_a_pid_that_was_used_again_is_not_our_server(sleeper):
    assert is_alive(state_of(sleeper.pid))
    assert not is_alive(state_of(sleeper.pid, created=time.time() - 3600))


def test_clean_removes_the_run_and_keeps_the_logs(instance):
    temp_folder = instance.prepare()
    (temp_folder / "models").mkdir()
    (instance.log_folder / "ts_log.log").write_text("x")
    instance.key_path.write_text("{}")
    instance.write(state_of(os.getpid(), temp_folder=str(temp_folder)))
    instance.clean()
    assert [path.name for path in instance.folder.iterdir()] == ["logs"]


def test_prepare_keeps_the_logs_of_the_run_before(instance):
    for run in ("first", "second", "third"):
        instance.prepare()
        (instance.log_folder / "ts_log.log").write_text(run)
    assert (instance.log_folder / "previous" / "ts_log.log").read_text() == "second"


def test_a_path_too_long_for_a_socket_moves_the_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DETSERVE_STATE_DIR", str(tmp_path / ("long" * 25)))
    instance = Instance.named()
    temp_folder = instance.prepare()
    assert not temp_folder.is_relative_to(tmp_path)
    assert len(str(temp_folder)) < 40
    instance.write(state_of(os.getpid(), temp_folder=str(temp_folder)))
    instance.clean()
    assert not temp_folder.exists()


def test_only_one_start_or_stop_at_a_time(instance):
    with instance.lock(), pytest.raises(ServerError, match="at work"), instance.lock():
        pass
    with instance.lock():
        pass


def test_processes_are_found_by_their_mark(instance):
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    with subprocess.Popen(command, env={**os.environ, FOLDER_VARIABLE: str(instance.folder)}) as process:
        deadline = time.monotonic() + 5
        while not (found := [one.pid for one in instance.processes()]) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()
    assert found == [process.pid]


def test_instances_are_listed(instance):
    assert instances() == []
    instance.prepare()
    Instance.named("other").prepare()
    assert [one.name for one in instances()] == ["default", "other"]


def test_a_folder_that_cannot_be_made_names_the_remedy(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DETSERVE_STATE_DIR", str(tmp_path / "file"))
    with pytest.raises(ServerError, match="DETSERVE_STATE_DIR"), Instance.named().lock():
        pass
