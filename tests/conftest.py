"""Fixtures for all tests: the real data where it lies beside the checkout, and real servers on free ports."""

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from checkout import ROOT

Serve = Callable[[list[Path], str], str]
"""Starts a server for some archives as the instance of that name, and returns the name."""


_LONGEST = (
    "test_coming_from_mmdetection.py",
    "test_eager_exported.py",
    "test_exported_builders.py",
    "test_readme.py",
    "test_seeded_faults.py",
    "test_served_builders.py",
    "test_served_mmdet.py",
    "test_unknown_classes.py",
)


# Tests of how a server bears load, kills and deadlines: what else runs would count as their finding.
_ALONE = (
    "test_container.py",
    "test_edge.py",
    "test_edge_drain.py",
    "test_edge_side_by_side.py",
    "test_lifecycle.py",
    "test_monitored_server.py",
    "test_promotion.py",
)
_ALONE_FOLDERS = ("faults", "fuzz")


def pytest_configure() -> None:
    """A shell starts what runs in the background deaf to Ctrl-C, and every process that a test starts would be so."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files begin, so that no process is left with one at the end."""
    for item in items:
        if item.path.name in _ALONE or item.path.parent.name in _ALONE_FOLDERS:
            item.add_marker(pytest.mark.alone)
    items.sort(key=lambda item: item.path.name not in _LONGEST)


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory) -> Iterator[None]:
    """A cache of the tests' own, also for the workers of the servers that they start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETSERVE_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real photographs, annotations and detectors; its tests are skipped where there is none."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real photographs and detectors (../shared/data) are not beside this checkout")
    return folder


@pytest.fixture(scope="session")
def cuda() -> str:
    """The CUDA device; its tests are skipped where there is none."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    return "cuda:0"


@pytest.fixture(scope="module")
def serve(tmp_path_factory) -> Iterator[Serve]:
    """Real TorchServes of the test module's own, ended with it; `Client.for_instance(name)` calls them."""
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETSERVE_STATE_DIR", str(tmp_path_factory.mktemp("state")))
        patch.delenv("DETSERVE_INSTANCE", raising=False)
        yield lambda archives, name: stack.enter_context(_served(archives, name))


@contextmanager
def _served(archives: list[Path], name: str) -> Iterator[str]:
    from detserve import server
    from detserve.instance import Instance

    instance = Instance.named(name)
    server.start(archives, server.ServerSettings(ports=None, workers=1, warm_up_s=0), instance=instance, timeout_s=300)
    try:
        yield name
    finally:
        assert server.stop(instance).was_running
        assert instance.processes() == []
