"""Images that would take all the memory: refused by their header, or answered with 507; the worker lives on."""

import io
import os
import resource
import struct
import zlib

import numpy as np
import psutil
import pytest
from detserve import server
from detserve.client import Client
from detserve.errors import EndpointError
from fault_load import tell
from PIL import Image


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, rows: int) -> bytes:
    """A PNG of that size in its header, with ``rows`` black rows in it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    data = b"".join(packer.compress(bytes(1 + 3 * width)) for _ in range(rows)) + packer.flush()
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", data)
        + chunk(b"IEND", b"")
    )


def many_scans() -> bytes:
    """Half a megabyte that would take a decoder half a minute: a large progressive JPEG with 400 scans more."""
    data = encoded(Image.new("RGB", (8000, 8000), (90, 120, 30)), "JPEG", progressive=True)
    return data[:-2] + data[data.rfind(b"\xff\xda") : -2] * 400 + data[-2:]


BOMBS = {
    "a PNG of 3 GB in 3 MB": (png(32_000, 32_000, 300), 413, "image_too_large"),
    "a PNG that says 2³¹ a side": (png(2**31 - 1, 2**31 - 1, 0), (413, 415), ("image_too_large", "not_an_image")),
    "a BMP that says 100,000 a side": (
        b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, 100_000, 100_000, 1, 24, *[0] * 6),
        413,
        "image_too_large",
    ),
    "a JPEG of 510 scans": (many_scans(), 413, "image_too_costly"),
    "a line of 64 million pixels": (encoded(Image.new("1", (60_000_000, 1)), "PNG"), 400, "image_too_small"),
}


def worker_of(instance) -> psutil.Process:
    (model,) = server.status(instance, ask_workers=False).models
    return psutil.Process(model.workers[0].pid)


@pytest.fixture(scope="module")
def instance(run, squares):
    return run("huge", squares)


@pytest.mark.server
def test_bombs_are_refused_and_cost_nothing(instance, square_pictures):
    worker = worker_of(instance)
    with Client.for_instance("huge", timeout_s=60) as client:
        expected = client.predict("squares", square_pictures[0])
        before = worker.memory_info().rss
        for name, (body, status, word) in BOMBS.items():
            with pytest.raises(EndpointError) as error:
                client.predict("squares", body)
            told = (error.value.status, error.value.type)
            assert told in ({(status, word)} if isinstance(status, int) else set(zip(status, word, strict=True))), name
            assert client.predict("squares", square_pictures[0]) == expected
        grown = worker.memory_info().rss - before
    tell(
        f"\n{len(BOMBS)} bombs: all refused with 4xx, {len(BOMBS)} images after them answered; {grown / 2**20:.0f} MiB"
    )
    assert worker.is_running()
    assert worker_of(instance).pid == worker.pid
    assert grown < 100 * 2**20


@pytest.mark.server
def test_no_memory_for_one_image_is_a_507_for_it_alone(instance, square_pictures):
    worker = worker_of(instance)
    if not hasattr(resource, "prlimit") or os.geteuid():
        pytest.skip("limiting another process's memory needs Linux and root")
    noise = np.random.default_rng(0).integers(0, 256, (1000, 1000, 3), np.uint8)
    huge = encoded(Image.fromarray(np.tile(noise, (7, 8, 1))), "JPEG", quality=40)
    with Client.for_instance("huge", timeout_s=60) as client:
        expected = client.predict("squares", square_pictures[0])
        old = resource.prlimit(worker.pid, resource.RLIMIT_AS)
        # 56 million pixels are 168 MB decoded, and more than twice that on the way to the network.
        resource.prlimit(worker.pid, resource.RLIMIT_AS, (worker.memory_info().vms + (150 << 20), old[1]))
        refused = []
        try:
            for _ in range(3):
                with pytest.raises(EndpointError) as error:
                    client.predict("squares", huge)
                refused.append((error.value.status, error.value.type))
                assert client.predict("squares", square_pictures[0]) == expected
        finally:
            resource.prlimit(worker.pid, resource.RLIMIT_AS, old)
        client.predict("squares", huge)
    tell(f"3 images without memory for them: {refused}; 3 images between them answered, none lost")
    assert set(refused) == {(507, "inference_failed")}
    assert worker_of(instance).pid == worker.pid
