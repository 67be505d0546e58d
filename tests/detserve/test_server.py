"""The server's life with a real TorchServe: start, ready, drain, stop, and everything that can go wrong between."""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import psutil
import pytest
from detserve import server
from detserve.client import Client
from detserve.errors import DetserveError, ServerError
from detserve.instance import Instance
from detserve.server.worker_log import busy_workers
from dettools.commands import serve as serve_command
from throwaway import build, failing

FREE = server.ServerSettings(ports=None, warm_up_s=0.5)


@pytest.fixture(scope="module")
def state_dir(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("state")
        patch.setenv("DETSERVE_STATE_DIR", str(folder))
        patch.delenv("DETSERVE_INSTANCE", raising=False)
        patch.setenv("PYTHONPATH", "/not/for/workers")
        yield folder


@pytest.fixture(scope="module")
def running(state_dir, tmp_path_factory):
    """One server for the tests that leave it as it is."""
    store = tmp_path_factory.mktemp("store")
    phases = []
    status = server.start([build(store)], FREE, on_progress=phases.append)
    yield status
    assert server.stop().was_running
    assert phases == ["starting TorchServe", "loading echo 1.0", "warming up"]


def nothing_is_left(instance: Instance) -> None:
    assert instance.processes() == []
    assert instance.running() is None
    assert [path.name for path in instance.folder.iterdir()] == ["logs"]


@pytest.mark.server
def test_start_returns_when_a_worker_has_answered(running):
    (model,) = running.models
    assert (model.name, model.version, model.default, model.ready) == ("echo", "1.0", True, True)
    assert model.workers[0].memory_bytes > 0
    assert psutil.pid_exists(model.workers[0].pid)
    assert model.reported["runtime"] == "echo"
    assert Client.for_instance().predict("echo", b"x")[0]["class_name"] == "cat"


@pytest.mark.server
def test_a_worker_sees_only_its_archives_folder(running):
    folder = Instance.named().folder
    paths = [path for path in running.models[0].reported["path"].split(":") if path]
    assert paths
    assert all(Path(path).is_relative_to(folder / "tmp") for path in paths)


@pytest.mark.server
def test_the_files_of_a_run_are_private(running):
    folder = Instance.named().folder
    assert folder.stat().st_mode & 0o777 == 0o700
    for name in ("state.json", "key_file.json", "config.properties"):
        assert (folder / name).stat().st_mode & 0o077 == 0, name


@pytest.mark.server
def test_everything_listens_on_this_machine_only(running):
    listening = {
        connection.laddr.ip.removeprefix("::ffff:")
        for connection in psutil.Process(running.pid).net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening == {"127.0.0.1"}


@pytest.mark.server
def test_a_second_start_is_refused(running, tmp_path):
    with pytest.raises(ServerError, match=f"already runs .pid {running.pid}.*serving echo 1.0"):
        server.start([build(tmp_path)], FREE)
    assert Client.for_instance().ready()


@pytest.mark.server
def test_a_busy_port_names_its_holder(running, tmp_path):
    settings = server.ServerSettings(ports=server.ports_from(running.ports["inference"]))
    with pytest.raises(ServerError, match=r"Port \d+ .inference. is busy: the detserve instance 'default'"):
        server.start([build(tmp_path)], settings, instance=Instance.named("other"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ports = server.Ports(*[server.free_ports().inference, port, *range(port + 1, port + 4)])
        with pytest.raises(ServerError, match=rf"Port {port} .management.*process {os.getpid()}.*--management-port"):
            server.start([build(tmp_path)], server.ServerSettings(ports=ports), instance=Instance.named("other"))
    assert Instance.named("other").running() is None


@pytest.mark.server
def test_tokens_are_read_from_the_key_file(running):
    token = server.token()
    assert token.kind == "inference"
    assert 3000 < token.expires_in_s() <= 3600
    assert server.token(kind="key").expires_at is None
    assert len({server.token(kind=kind).value for kind in ("inference", "management", "key")}) == 3


@pytest.mark.server
def test_logs_are_read(running):
    Client.for_instance().predict("echo", b"x")
    assert any("Torch worker started" in line for line in server.logs(lines=1000))
    assert "POST /predictions/echo" in next(server.logs(which="access", lines=1))
    with pytest.raises(ServerError, match="there are model"):
        list(server.logs(which="nix"))


def serve(*words: str) -> int:
    parser = argparse.ArgumentParser()
    serve_command.add_parser(parser.add_subparsers())
    args = parser.parse_args(["serve", *words])
    return args.run(args)


@pytest.mark.server
def test_the_command_keeps_stdout_for_its_answer(running, capsys):
    assert serve("token") == 0
    out, err = capsys.readouterr()
    assert out == f"{server.token().value}\n"
    assert err == ""
    assert serve("status", "--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["models"][0]["ready"] is True
    assert serve("status") == 0
    assert "echo 1.0" in capsys.readouterr().out
    assert serve("logs", "server", "-n", "3") == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    curl = serve_command.curl_line(running, "echo", None)
    assert curl == (
        f'curl -H "Authorization: Bearer $(detserve serve token)" {running.inference_url}/predictions/echo -T IMAGE'
    )


def test_the_command_without_a_server_says_so(state_dir, tmp_path, capsys):
    assert serve("status", "--instance", "nobody", "--json") == 1
    out, err = capsys.readouterr()
    assert json.loads(out) == {"instance": "nobody", "running": False, "ready": False}
    assert "detserve serve start" in err
    assert serve("stop", "--instance", "nobody") == 0
    build(tmp_path, "shapes").rename(tmp_path / "shapes.mar")
    with pytest.raises(DetserveError, match=r"'nix'.*shapes.*detserve archive"):
        serve("start", "--models", "nix", "--model-store", str(tmp_path))
    with pytest.raises(SystemExit):
        serve("start", "--models", "x", "--port", "many")


@pytest.mark.server
def test_a_life_beside_another_server(running, tmp_path):
    """Two versions, own settings, expired tokens, a crash, a start after it, a drain, a stop that leaves nothing."""
    instance = Instance.named("second")
    archives = [build(tmp_path, version="2.0", config={"batchSize": 4, "maxBatchDelay": 30}), build(tmp_path)]
    settings = server.ServerSettings(ports=None, token_minutes=0.03, threads_per_worker=1, max_request_bytes=1000)
    status = server.start(archives, settings, instance=instance)
    assert {(one.version, one.default, one.batch_size, one.max_batch_delay_ms) for one in status.models} == {
        ("2.0", False, 4, 30),
        ("1.0", True, 1, 1),
    }
    assert set(status.ports.values()).isdisjoint(running.ports.values())

    with Client.for_instance("second") as client:
        before = server.token(instance, renew=False)
        client.predict("echo", b"x", version="2.0")
        time.sleep(max(0.0, before.expires_in_s()) + 0.1)
        client.predict("echo", b"x")  # renewed on the way
        assert server.token(instance, renew=False).value != before.value
        assert client.describe("echo", "2.0")["runtime"] == "echo"

    os.kill(status.pid, signal.SIGKILL)
    psutil.wait_procs([psutil.Process(status.pid)], timeout=5)
    assert instance.running() is None
    with pytest.raises(ServerError, match="No server runs"):
        server.status(instance)

    fresh = server.ServerSettings(ports=None, workers=2, token_auth=False)
    status = server.start([build(tmp_path)], fresh, instance=instance)
    assert [len(model.workers) for model in status.models] == [2]
    with pytest.raises(ServerError, match="without token authorisation"):
        server.token(instance)
    answers = []
    clients = [
        threading.Thread(target=lambda: answers.append(Client.for_instance("second").predict("echo", b"sleep 1.5")))
        for _ in range(3)
    ]
    for one in clients:
        one.start()
    time.sleep(0.5)
    assert len(busy_workers(instance.log_folder)) == 2
    report = server.stop(instance)
    for one in clients:
        one.join()
    assert len(answers) == 3
    assert (report.was_running, report.drained, report.killed) == (True, True, ())
    nothing_is_left(instance)
    assert not server.stop(instance).was_running
    for port in status.ports.values():
        with socket.create_server(("127.0.0.1", port)):
            pass
    assert Client.for_instance().ready()


@pytest.mark.server
def test_a_worker_that_dies_while_loading_is_quoted(state_dir, tmp_path):
    instance = Instance.named("failing")
    source = failing("pass", above="import not_there.at_all")
    with pytest.raises(ServerError) as error:
        server.start([build(tmp_path, "bad", source=source)], FREE, instance=instance)
    assert str(error.value).startswith(
        "Model 'bad' 1.0 did not start; its worker said: ModuleNotFoundError: No module named 'not_there'\n"
        "The server was ended. Install the package of 'not_there' into the environment that serves."
    )
    nothing_is_left(instance)


def interrupted_start(folder: Path) -> tuple[Instance, subprocess.Popen]:
    """Begin a start in another process, and return when Java runs and its worker does not."""
    instance = Instance.named("interrupted")
    archive = build(folder, source=failing("import time; time.sleep(60)"))
    program = (
        "import sys; from pathlib import Path; from detserve import server\n"
        "server.start([Path(sys.argv[1])], server.ServerSettings(ports=None),"
        " instance=server.Instance.named('interrupted'))"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(archive)])
    deadline = time.monotonic() + 30
    while not instance.key_path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(instance.processes()) >= 1
    return instance, process


@pytest.mark.server
def test_sigterm_in_the_middle_of_a_start_leaves_nothing(state_dir, tmp_path):
    instance, process = interrupted_start(tmp_path)
    with pytest.raises(ServerError, match="at work on instance"):
        server.stop(instance)
    process.terminate()
    assert process.wait(timeout=30) == 143
    nothing_is_left(instance)


@pytest.mark.server
def test_what_a_killed_start_leaves_does_not_stand_in_the_way(state_dir, tmp_path):
    instance, process = interrupted_start(tmp_path)
    process.kill()
    process.wait()
    left = instance.running()
    assert not left.ready
    archive = build(tmp_path, "bad", source=failing("raise RuntimeError('started again')"))
    with pytest.raises(ServerError, match="its worker said: RuntimeError: started again"):
        server.start([archive], FREE, instance=instance)
    assert not psutil.pid_exists(left.pid)
    nothing_is_left(instance)


@pytest.mark.server
def test_the_foreground_ends_cleanly_on_ctrl_c(state_dir, tmp_path):
    instance = Instance.named("foreground")
    program = (
        "import sys; from pathlib import Path; from detserve import server\n"
        "server.start([Path(sys.argv[1])], server.ServerSettings(ports=None), foreground=True,"
        " instance=server.Instance.named('foreground'),"
        " on_ready=lambda status: print('ready', flush=True), on_log=lambda line: print(line, flush=True))"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(build(tmp_path))], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    Client.for_instance("foreground").predict("echo", b"x")
    assert "POST /predictions/echo" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    with process.stdout:
        assert process.wait(timeout=40) == 0
    nothing_is_left(instance)


def test_what_cannot_be_served_is_refused_before_anything_starts(state_dir, tmp_path):
    (text := tmp_path / "text.mar").write_text("no zip")
    with zipfile.ZipFile(empty := tmp_path / "empty.mar", "w"):
        pass
    good = build(tmp_path)
    (again := tmp_path / "again.mar").write_bytes(good.read_bytes())
    for archives, expected in (
        ([], "Got no archive"),
        ([tmp_path / "nix.mar"], "no archive .*nix.mar.*detserve archive"),
        ([text], "text.mar is no archive: it is not a zip"),
        ([empty], "MANIFEST.json"),
        ([good, again], "both model 'echo' version 1.0"),
        ([build(tmp_path, "a b")], "model name 'a b'"),
        ([build(tmp_path, "n", config={"batchSize": "four"})], "batchSize to 'four'"),
    ):
        with pytest.raises(ServerError, match=expected):
            server.start(archives, FREE, instance=Instance.named("refused"))
    assert not Instance.named("refused").folder.exists()


def test_a_status_becomes_json(state_dir):
    worker = server.WorkerStatus("9000", "UNLOADING", 1, "cpu", 0, "")
    model = server.ModelStatus("m", "1.0", True, "m.mar", 1, 1, 1, 1, 120, (worker,), 0, 100, {})
    status = server.ServerStatus("x", "/x", 1, 1.0, "25", True, "a", "b", "c", {}, 1, (model,))
    data = json.loads(json.dumps(status.to_json()))
    assert (data["ready"], data["models"][0]["ready"]) == (False, False)
