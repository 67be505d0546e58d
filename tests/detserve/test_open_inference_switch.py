"""The protocol is served only where every archive's handler speaks it: ModelInfer ends any other's worker."""

import zipfile

import pytest
from detserve import server
from detserve.instance import Instance, ServedModel
from detserve.server.archives import ModelSettings, speaks_open_inference
from detserve.server.settings import config_properties
from throwaway import build

ON = "ts_open_inference_protocol=true\n"


@pytest.fixture
def instance(tmp_path) -> Instance:
    instance = Instance("x", tmp_path / "x")
    instance.model_store.mkdir(parents=True)
    return instance


def served(instance, *names):
    return [(ServedModel(name, "1.0", name, default=True, min_workers=1), name, ModelSettings()) for name in names]


def test_one_archive_of_another_make_switches_it_off(instance):
    foreign = build(instance.model_store)
    own = instance.model_store / "own.mar"
    with zipfile.ZipFile(own, "w") as archive:
        archive.writestr("dethandlers/open_inference.py", "")
    settings, ports = server.ServerSettings(), server.Ports()
    assert ON in config_properties(settings, ports, instance, served(instance, "own.mar"))
    assert ON not in config_properties(settings, ports, instance, served(instance, "own.mar", foreign.name))


def test_what_is_no_archive_does_not_speak_it(tmp_path):
    (tmp_path / "text.mar").write_text("text")
    assert not speaks_open_inference(tmp_path / "text.mar")
    assert not speaks_open_inference(tmp_path / "none.mar")
