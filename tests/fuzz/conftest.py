"""One real server for the fuzzed requests, with a small network: what is tested is around it."""

from collections.abc import Iterator

import pytest
from colour_squares import squares_spec, write_detector, write_pictures
from detserve import server
from detserve.archive import build_archive
from detserve.instance import Instance


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory) -> Iterator[Instance]:
    folder = tmp_path_factory.mktemp("squares")
    pictures, _ = write_pictures(folder, count=1)
    archive = build_archive(
        squares_spec(),
        folder=folder,
        out=folder / "squares.mar",
        weights=write_detector(folder / "squares.onnx"),
        golden_image=pictures / "001.png",
    ).path
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETSERVE_STATE_DIR", str(tmp_path_factory.mktemp("state")))
        patch.delenv("DETSERVE_INSTANCE", raising=False)
        instance = Instance.named("fuzz")
        settings = server.ServerSettings(ports=server.free_ports(), workers=1, batch_size=4, warm_up_s=0)
        server.start([archive], settings, instance=instance, timeout_s=300)
        try:
            yield instance
        finally:
            server.stop(instance)
            assert instance.processes() == []
