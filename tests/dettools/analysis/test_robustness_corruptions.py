"""Corruptions: the benchmark's own, the same for an image whatever its order or process, and files that keep pixels."""

import io
import sys

import numpy as np
import pytest
from dethandlers.images import decode_image
from detserve.eager_image import decode_rgb
from dettools.analysis.corruptions import (
    BENCHMARK,
    GROUPS,
    PICTORIAL,
    CorruptionError,
    chosen_corruptions,
    corrupted,
    image_seed,
    png,
    severities_of,
)
from dettools.analysis.corruptions_files import Corruptor
from dettools.analysis.corruptions_transport import LOSSLESS, TRANSPORT_LEVELS, level_name
from dettools.ground_truth import ImageEntry
from PIL import Image


def photograph(width=72, height=48, seed=1) -> bytes:
    """A JPEG with smooth colours and an edge."""
    random = np.random.default_rng(seed)
    small = Image.fromarray(random.integers(0, 255, (6, 9, 3), np.uint8))
    stream = io.BytesIO()
    small.resize((width, height), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=95)
    return stream.getvalue()


def served(data: bytes) -> np.ndarray:
    return decode_image(data, max_pixels=10**7, min_side=1).permute(1, 2, 0).numpy()


def test_the_names_are_the_benchmarks_in_its_order():
    library = pytest.importorskip("imagecorruptions", reason="pip install 'detserve[robustness]'")
    assert list(BENCHMARK) == library.get_corruption_names("common")
    assert list(PICTORIAL) == library.get_corruption_names("all")
    for group in ("noise", "blur", "weather"):
        assert set(GROUPS[group]) >= set(library.get_corruption_names(group))


@pytest.mark.parametrize("corruption", PICTORIAL)
def test_an_image_has_its_own_noise_whatever_was_corrupted_before(corruption):
    pytest.importorskip("imagecorruptions", reason="pip install 'detserve[robustness]'")
    body = photograph()
    np.random.seed(7)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    first = corrupted(body, corruption, 3, image_id=5, seed=0)
    assert np.array_equal(np.random.get_state()[1], before)  # noqa: NPY002
    corrupted(body, "gaussian_noise", 1, image_id=9, seed=0)
    np.random.seed(99)  # noqa: NPY002
    assert corrupted(body, corruption, 3, image_id=5, seed=0) == first
    assert served(first).shape == (48, 72, 3)
    assert not np.array_equal(served(first), served(body))
    if corruption in (*GROUPS["noise"], "glass_blur", "elastic_transform", "spatter", "snow"):
        assert corrupted(body, corruption, 3, image_id=6, seed=0) != first
        assert corrupted(body, corruption, 3, image_id=5, seed=1) != first


def test_seeds_differ_in_everything_that_they_are_made_of():
    seeds = {
        image_seed(seed, image, name, severity)
        for seed in (0, 1)
        for image in (1, 11)
        for name in ("fog", "snow")
        for severity in (1, 2)
    }
    assert len(seeds) == 16
    assert all(0 <= one < 2**32 for one in seeds)


def test_the_bytes_do_not_depend_on_the_number_of_processes(tmp_path):
    pytest.importorskip("imagecorruptions", reason="pip install 'detserve[robustness]'")
    entries, files = [], {}
    for number in (1, 2, 3):
        files[number] = tmp_path / f"{number}.jpg"
        files[number].write_bytes(photograph(seed=number))
        entries.append(ImageEntry(number, f"{number}.jpg", 72, 48))
    files[4] = tmp_path / "4.jpg"
    files[4].write_bytes(b"no image")
    entries.append(ImageEntry(4, "4.jpg", 72, 48))
    bodies = []
    for processes, order in ((1, entries), (2, entries[::-1])):
        folder = tmp_path / str(processes)
        folder.mkdir()
        with Corruptor(3, processes) as corruptor:
            made = corruptor.write(order, files, folder, "shot_noise", 2)
        assert set(made.failures) == {4}
        bodies.append({number: path.read_bytes() for number, path in made.files.items()})
    assert bodies[0] == bodies[1]
    assert set(bodies[0]) == {1, 2, 3}


@pytest.mark.parametrize("corruption", LOSSLESS)
def test_a_lossless_corruption_keeps_every_pixel_for_the_worker_and_for_eager(corruption):
    body = photograph()
    for severity in severities_of(corruption):
        sent = corrupted(body, corruption, severity, image_id=1, seed=0)
        assert np.array_equal(served(sent), decode_rgb(body))
        assert np.array_equal(decode_rgb(sent), decode_rgb(body))
        with Image.open(io.BytesIO(sent)) as stored:
            if corruption == "exif_orientation":
                tag = TRANSPORT_LEVELS[corruption][severity - 1]
                assert stored.getexif()[0x0112] == tag
                assert stored.size == ((72, 48) if tag == 3 else (48, 72))
            else:
                assert sent[24] == 16  # bits a channel


def test_files_are_cut_off_subsampled_and_of_lower_quality():
    body = photograph(160, 120)
    assert corrupted(body, "truncation", 5, image_id=1, seed=0) == body[: len(body) // 2]
    sizes = [len(corrupted(body, "jpeg_quality", one, image_id=1, seed=0)) for one in range(1, 6)]
    assert sizes == sorted(sizes, reverse=True)
    samplings = []
    for severity in severities_of("chroma_subsampling"):
        with Image.open(io.BytesIO(corrupted(body, "chroma_subsampling", severity, image_id=1, seed=0))) as stored:
            samplings.append(next(layer[1:3] for layer in stored.layer))
    assert samplings == [(1, 1), (2, 1), (2, 2)]
    assert level_name("truncation", 5) == "50 % arrive"
    assert level_name("fog", 1) == ""


def test_what_cannot_be_corrupted_says_why(monkeypatch, tmp_path):
    pytest.importorskip("imagecorruptions", reason="pip install 'detserve[robustness]'")
    with pytest.raises(CorruptionError, match="20×40 pixels, expected at least 32"):
        corrupted(png(np.zeros((40, 20, 3), np.uint8)), "fog", 1, image_id=1, seed=0)
    with pytest.raises(CorruptionError, match="cannot decode"):
        corrupted(b"no image", "jpeg_quality", 1, image_id=1, seed=0)
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    with pytest.raises(CorruptionError, match=r"pip install 'detserve\[robustness\]'"):
        corrupted(photograph(), "fog", 1, image_id=1, seed=0)
    with Corruptor(0) as corruptor, pytest.raises(CorruptionError, match="not installed"):
        corruptor.write([], {}, tmp_path, "fog", 1)


def test_groups_and_names_are_chosen_in_the_benchmarks_order():
    assert chosen_corruptions(["benchmark"]) == BENCHMARK
    assert len(chosen_corruptions(["all"])) == 19
    assert chosen_corruptions(["fog", "noise", "shot_noise"]) == (*GROUPS["noise"], "fog")
    assert chosen_corruptions(["None"]) == ()
    with pytest.raises(CorruptionError, match="got 'rain', expected benchmark, all"):
        chosen_corruptions(["rain"])
