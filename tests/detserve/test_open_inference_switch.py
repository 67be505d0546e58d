"""The protocol is served only where every archive's handler speaks it: ModelInfer ends any other's worker."""

import json
import zipfile
from functools import partial
from pathlib import Path

import pytest
from detserve import server
from detserve.errors import ServerError
from detserve.instance import Instance, ServedModel
from detserve.server.archives import ModelSettings, read_archive
from detserve.server.settings import config_properties
from throwaway import build

ON = "ts_open_inference_protocol=true\n"


@pytest.fixture
def instance(tmp_path) -> Instance:
    instance = Instance("x", tmp_path / "x")
    instance.model_store.mkdir(parents=True)
    return instance


def archive(path: Path, handler: str) -> Path:
    manifest = {"model": {"modelName": path.stem, "modelVersion": "1.0", "handler": "entry.py"}}
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("MAR-INF/MANIFEST.json", json.dumps(manifest))
        file.writestr(handler, "")
    return path


def test_an_archive_speaks_it_when_its_handler_has_the_file_for_it(tmp_path):
    assert read_archive(archive(tmp_path / "own.mar", "dethandlers/open_inference.py"), ModelSettings()).open_inference
    assert not read_archive(build(tmp_path), ModelSettings()).open_inference


def test_the_server_is_told_only_when_all_do(instance):
    model = ServedModel("own", "1.0", "own", default=True, min_workers=1)
    told = partial(
        config_properties, server.ServerSettings(), server.Ports(), instance, [(model, "own.mar", ModelSettings())]
    )
    assert ON in told(open_inference=True)
    assert ON not in told(open_inference=False)


@pytest.mark.server
def test_what_does_not_speak_it_is_not_registered_where_it_is_on(tmp_path, monkeypatch):
    """Its worker would die of the first ModelInfer, and with it every request that it holds."""
    monkeypatch.setenv("DETSERVE_STATE_DIR", str(tmp_path / "state"))
    instance = Instance.named("switch")
    speaks = build(tmp_path, "speaks")
    with zipfile.ZipFile(speaks, "a") as file:
        file.writestr("dethandlers/open_inference.py", "")
    server.start([speaks], server.ServerSettings(ports=None, workers=1, warm_up_s=0), instance=instance)
    try:
        with pytest.raises(ServerError, match="would die of a ModelInfer"):
            server.register(build(tmp_path, "foreign"), instance=instance, foreign=True)
        assert [model.name for model in instance.read().models] == ["speaks"]
    finally:
        server.stop(instance)
