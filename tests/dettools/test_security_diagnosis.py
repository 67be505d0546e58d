"""doctor --security: what a running server leaves open is found on its sockets and files, with the remedy."""

import json

import pytest
from detserve import server
from detserve.errors import ServerError
from detserve.instance import Instance
from dettools.cli import main
from dettools.security_diagnosis import _is_local, diagnose_security
from throwaway import build


@pytest.fixture(scope="module")
def state_dir(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETSERVE_STATE_DIR", str(tmp_path_factory.mktemp("state")))
        patch.delenv("DETSERVE_INSTANCE", raising=False)
        yield


def found(instance: Instance) -> dict[str, str]:
    findings = diagnose_security(instance)
    assert all(bool(finding.remedy) == (finding.state == "fail") for finding in findings)
    return {finding.subject: finding.state for finding in findings}


@pytest.mark.server
def test_an_open_server_is_told_what_is_open(state_dir, tmp_path, capsys):
    instance = Instance.named("open")
    settings = server.ServerSettings(
        ports=server.free_ports(), host="0.0.0.0", token_auth=False, workers=1, warm_up_s=0
    )
    archive = build(tmp_path)
    server.start([archive], settings, instance=instance)
    try:
        first = found(instance)
        instance.key_path.touch(mode=0o644)
        instance.key_path.chmod(0o644)
        tmp_path.chmod(0o777)
        archive.chmod(0o666)
        second = found(instance)
        code = main(["doctor", "--security", "--instance", "open", "--json"])
    finally:
        server.stop(instance)
    document = json.loads(capsys.readouterr().out.splitlines()[-1])

    opened = {
        "edge",
        "TLS",
        "tokens",
        "inference port",
        "grpc inference port",
        "metrics port",
        "signatures",
        "echo 1.0",
    }
    assert {name for name, state in first.items() if state == "fail"} >= opened
    assert "management port" not in first
    assert first["files"] == "ok"
    assert (second["key_file.json"], second["model store"], second[archive.name]) == ("fail", "fail", "fail")
    assert (code, document["ok"]) == (1, False)
    assert {finding["subject"] for finding in document["findings"]} == set(second)


def test_without_a_server_there_is_nothing_to_look_at(state_dir, capsys):
    with pytest.raises(ServerError, match="No server runs"):
        diagnose_security(Instance.named("nobody"))
    assert main(["doctor", "--security", "--instance", "nobody"]) == 2
    assert "detserve serve start" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("127.0.0.1", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("example.org", False),
    ],
)
def test_addresses_of_this_machine(address, local):
    assert _is_local(address) == local
