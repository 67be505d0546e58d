"""Real servers to be broken: each on ports of its own, with the state in a folder of its own."""

import io
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from checkout import ROOT
from colour_squares import NAMES, squares_spec, write_detector, write_pictures
from detserve import server
from detserve.archive import build_archive
from detserve.instance import Instance
from detserve.spec import load_spec
from dettools.datasets.scenes import render_scene

Run = Callable[..., Instance]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Iterator[Run]:
    """Start a server of some archives, with settings; it is ended with the module."""
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETSERVE_STATE_DIR", str(tmp_path_factory.mktemp("state")))
        patch.delenv("DETSERVE_INSTANCE", raising=False)

        def start(name: str, *archives: Path, **settings: object) -> Instance:
            instance = Instance.named(name)
            chosen = server.ServerSettings(**{"ports": server.free_ports(), "workers": 1, "warm_up_s": 0, **settings})
            server.start(list(archives), chosen, instance=instance, timeout_s=300)
            stack.callback(end, instance)
            return instance

        yield start


def end(instance: Instance) -> None:
    server.stop(instance)
    assert instance.processes() == []


@pytest.fixture(scope="session")
def squares(tmp_path_factory) -> Path:
    """The archive of the detector of coloured squares: a small network in an ONNX file."""
    folder = tmp_path_factory.mktemp("squares")
    pictures, _ = write_pictures(folder, count=1)
    return build_archive(
        squares_spec(names=NAMES),
        folder=folder,
        out=folder / "squares.mar",
        weights=write_detector(folder / "squares.onnx"),
        golden_image=pictures / "001.png",
    ).path


@pytest.fixture(scope="session")
def square_pictures(tmp_path_factory) -> list[bytes]:
    folder, _ = write_pictures(tmp_path_factory.mktemp("pictures"), count=6, seed=5)
    return [path.read_bytes() for path in sorted(folder.iterdir())]


@pytest.fixture(scope="session")
def shapes(tmp_path_factory) -> Path:
    """The archive of the demo detector."""
    path = ROOT / "model_store" / "shapes" / "shapes.yaml"
    spec = load_spec(path)
    spec = replace(spec, serving=replace(spec.serving, threads=1))
    return build_archive(spec, folder=path.parent, out=tmp_path_factory.mktemp("shapes") / "shapes.mar").path


@pytest.fixture(scope="session")
def scenes() -> list[bytes]:
    """Pictures of shapes, as JPEG."""
    found = []
    for seed in range(70_001, 70_007):
        buffer = io.BytesIO()
        render_scene(seed).image.save(buffer, "JPEG", quality=92)
        found.append(buffer.getvalue())
    return found
