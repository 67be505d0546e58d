"""The in-process benchmark: true stage splits, all of a request's work, turns, seeds, and what it refuses."""

import functools
import itertools
import json
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from checkout import ROOT
from dethandlers.detector import Detector, Request
from dethandlers.families import Batch, Limits
from dethandlers.images import decode_image
from dethandlers.options import Options
from dethandlers.responses import to_json_text
from detserve.archive import build_archive
from detserve.errors import DetserveError
from detserve.spec import load_spec
from dettools.benchmark import in_process
from dettools.benchmark.in_process import benchmark_in_process, measure
from dettools.benchmark.subjects import InProcessError, Outcome, RuntimeSubject
from random_detectors import random_images

SHAPES = ROOT / "model_store" / "shapes" / "shapes.yaml"
SLOW_S = 0.2


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images")
    paths = []
    for number, image in enumerate(random_images()[:3]):
        paths.append(folder / f"{number}.jpg")
        paths[-1].write_bytes(image)
    return paths


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    return build_archive(
        load_spec(SHAPES), folder=SHAPES.parent, out=tmp_path_factory.mktemp("archive") / "shapes.mar"
    ).path


@pytest.fixture
def detector(archive) -> Detector:
    from dethandlers.artefact import load_artefact
    from detserve.mar import unpacked

    with unpacked(archive) as folder:
        detector = Detector(load_artefact(folder), torch.device("cpu"))
    yield detector
    detector.close()


class Slow:
    """Wraps one function of the detector's and makes it slow."""

    def __init__(self, function, seconds: float = SLOW_S) -> None:
        self.function = function
        self.seconds = seconds

    def __call__(self, *arguments):
        time.sleep(self.seconds)
        return self.function(*arguments)


def loaded(paths: list[Path]) -> list[tuple[str, bytes]]:
    return [(path.name, path.read_bytes()) for path in paths]


def batch_of(detector: Detector, paths: list[Path]) -> Batch:
    """Return the batch of one image, as the detector makes it."""
    with torch.inference_mode():
        one = detector.family.prepare(decode_image(paths[0].read_bytes(), max_pixels=10**8, min_side=8))
    return Batch(one.pixels[None], (one.resized_size,), Limits(0.05, 100))


def means(samples) -> dict[str, float]:
    return {stage: float(np.mean([one.stages_ms[stage] for one in samples])) for stage in samples[0].stages_ms}


def test_an_archive_is_measured_per_batch_size(archive, images):
    told, described = [], {}
    levels = benchmark_in_process(
        "runtime",
        archive,
        images,
        batch_sizes=(1, 3),
        min_time_s=0.2,
        repeats=2,
        on_progress=told.append,
        on_loaded=described.update,
    )
    assert [level.load.value for level in levels] == [1, 3]
    assert {level.load.loop for level in levels} == {"closed"}
    assert [line.partition(":")[0] for line in told] == [
        "turn 1 of 2, batch size 1",
        "turn 1 of 2, batch size 3",
        "turn 2 of 2, batch size 1",
        "turn 2 of 2, batch size 3",
    ]
    assert described["runtime"] == "torch"
    assert "postprocess" in described["includes"]
    assert "JSON" in described["includes"]
    for level in levels:
        assert level.stopped == "time"
        assert all(one.ok and one.batch_size == level.load.value for one in level.samples)
        assert len(level.samples) % level.load.value == 0
        assert level.samples[-1].done_s == pytest.approx(level.resources.wall_s)
        assert level.resources.wall_s >= 0.2
        assert level.resources.server_cpu_s > 0
        assert level.resources.client_cpu_s == 0
        assert 0 <= level.resources.machine_cpu <= 1
        assert {one.image for one in level.samples} <= {path.name for path in images}
    json.dumps(described)


def test_the_stages_make_up_the_latency_and_include_everything_but_loading(detector, images):
    (level,) = measure(RuntimeSubject(detector), loaded(images), [1], min_time_s=0.5, repeats=1)
    for sample in level.samples:
        stages = dict(sample.stages_ms)
        handler = stages.pop("handler")
        assert list(stages) == ["decode", "preprocess", "forward", "postprocess", "serialise"]
        assert handler == pytest.approx(sample.latency_ms)
        assert sum(stages.values()) <= handler
        assert sample.response_bytes > 2
    told = [sum(one.stages_ms.values()) / one.latency_ms - 1 for one in level.samples]
    assert max(told) >= 0.8  # the stages' share of the latency; a busy machine may interrupt between two of them


def test_the_answers_are_the_workers_own_json(detector, images):
    serving = detector.spec.serving
    options = Options(score_threshold=serving.score_threshold, max_detections=serving.max_detections)
    image = images[0].read_bytes()
    (answer,) = detector.detect([Request(image, options)])
    (outcome,) = RuntimeSubject(detector).answer([image])
    assert outcome.response_bytes == len(to_json_text(answer, options, detector.spec.categories))


@pytest.mark.parametrize("stage", ["postprocess", "preprocess", "forward"])
def test_a_slow_stage_shows_in_its_place_and_nowhere_else(detector, images, monkeypatch, stage):
    # The network's outputs from memory: no other stage comes near 0.2 s then, on a busy machine neither.
    outputs = functools.cache(lambda _: run(batch_of(detector, images)))
    run = detector.runtime.run
    monkeypatch.setattr(detector.runtime, "run", lambda batch: outputs(batch.pixels.shape))
    where, name = {
        "postprocess": (detector.family, "decode"),
        "preprocess": (detector.family, "prepare"),
        "forward": (detector.runtime, "run"),
    }[stage]
    monkeypatch.setattr(where, name, Slow(getattr(where, name)))
    (level,) = measure(RuntimeSubject(detector), loaded(images), [1], min_time_s=0.5, repeats=1)
    least = {stage: min(one.stages_ms[stage] for one in level.samples) for stage in level.samples[0].stages_ms}
    slow = {name for name, ms in least.items() if ms >= SLOW_S * 1e3}
    assert slow == {stage, "handler"}
    # Throughput counts every stage: what takes at least 0.2 s an image cannot exceed 5 images/s.
    assert len(level.samples) / level.resources.wall_s <= 1 / SLOW_S


def test_an_image_waits_for_its_batch(images):
    class Sleeping:
        def answer(self, batch):
            time.sleep(0.01 * len(batch))
            return [Outcome() for _ in batch]

    one, four = measure(Sleeping(), loaded(images), [1, 4], min_time_s=0.1, repeats=2)
    assert min(sample.latency_ms for sample in one.samples) >= 10
    assert min(sample.latency_ms for sample in four.samples) >= 40
    assert len({sample.done_s for sample in four.samples[:4]}) == 1
    assert len(four.samples) / four.resources.wall_s <= 100


def test_sizes_take_turns_and_a_levels_clock_stands_still_meanwhile(images, monkeypatch):
    asked, now = [], [0.0]

    class Noting:
        def answer(self, batch):
            asked.append(len(batch))
            now[0] += 0.01
            return [Outcome() for _ in batch]

    monkeypatch.setattr(in_process, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    levels = measure(Noting(), loaded(images), [1, 2], min_time_s=0.055, repeats=3)
    turns = [(size, len(list(batches))) for size, batches in itertools.groupby(asked)]
    # Three batches to warm up; then three turns, of one batch to warm up again and two that fill 0.055 / 3 s.
    assert turns == [(1, 3), (2, 3)] + [(1, 3), (2, 3)] * 3
    for level in levels:
        starts = sorted({sample.sent_s for sample in level.samples})
        assert starts == pytest.approx([0.0, 0.01, 0.02, 0.03, 0.04, 0.05])
        assert level.resources.wall_s == pytest.approx(0.06)


def test_images_come_in_a_seeded_order_once_per_pass_the_same_for_every_size(images):
    class Counting:
        def answer(self, batch):
            return [Outcome() for _ in batch]

    pictures = [(str(number), b"") for number in range(6)]
    orders = [
        [[sample.image for sample in level.samples] for level in measure(Counting(), pictures, [1, 2], **how)]
        for how in ({"min_time_s": 0.01, "repeats": 1, "seed": seed} for seed in (3, 3, 4))
    ]
    (first, _), (again, _), (other, _) = orders
    assert first[:60] == again[:60] != other[:60]
    # 3 + 1 batches warmed up: the third of the passes of six is the first whole one.
    assert sorted(first[2:8]) == list("012345")
    assert first[2:8] != first[8:14]


def test_ctrl_c_keeps_what_there_is(images):
    class Interrupted:
        def __init__(self):
            self.left = 12

        def answer(self, batch):
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt
            return [Outcome() for _ in batch]

    (level,) = measure(Interrupted(), loaded(images), [1], min_time_s=60, repeats=1)
    assert level.stopped == "interrupted"
    assert len(level.samples) == 7  # 11 answers, of which 3 and 1 warmed up


def test_a_broken_image_is_an_error_and_no_answer(detector, images):
    pictures = [*loaded(images), ("broken.jpg", b"no image")]
    (level,) = measure(RuntimeSubject(detector), pictures, [4], min_time_s=0.1, repeats=1)
    failed = [sample for sample in level.samples if not sample.ok]
    assert {sample.image for sample in failed} == {"broken.jpg"}
    assert len(failed) * 4 == len(level.samples)
    assert {(sample.status, sample.error) for sample in failed} == {(415, "not_an_image")}


def test_eager_takes_one_image_at_a_time_and_says_so(images):
    told, described = [], {}
    (level,) = benchmark_in_process(
        "eager",
        SHAPES,
        images,
        batch_sizes=(1, 4),
        min_time_s=0.2,
        repeats=1,
        threads=1,
        on_progress=told.append,
        on_loaded=described.update,
    )
    assert level.load.value == 1
    assert any("one image at a time" in line for line in told)
    assert described["threads"] == 1
    assert "no JSON" in described["includes"]
    assert all(sample.ok and sample.stages_ms is None for sample in level.samples)


def test_threads_reach_torch_and_are_put_back(archive, images):
    before = torch.get_num_threads()
    described = {}
    benchmark_in_process(
        "runtime", archive, images, batch_sizes=[1], threads=1, min_time_s=0.01, repeats=1, on_loaded=described.update
    )
    assert described["threads"] == 1
    assert torch.get_num_threads() == before


@pytest.mark.shared_data
def test_an_onnx_spec_with_its_weights_is_packed_and_measured(shared_data):
    described = {}
    levels = benchmark_in_process(
        "runtime",
        ROOT / "model_store" / "yolox_nano" / "yolox_nano.yaml",
        sorted((shared_data / "coco" / "liz50").rglob("*.jpg"))[:4],
        weights=shared_data / "models" / "yolox_nano" / "yolox_nano.onnx",
        batch_sizes=(1, 2),
        threads=1,
        min_time_s=0.3,
        repeats=1,
        on_loaded=described.update,
    )
    assert described["provider"] == "CPUExecutionProvider"
    assert described["threads"] == 1
    assert all(sample.ok for level in levels for sample in level.samples)


@pytest.mark.shared_data
def test_the_provider_of_an_onnx_reference_is_told(shared_data):
    described = {}
    benchmark_in_process(
        "eager",
        ROOT / "model_store" / "yolox_nano" / "yolox_nano.yaml",
        sorted((shared_data / "coco" / "liz50").rglob("*.jpg"))[:1],
        weights=shared_data / "models" / "yolox_nano" / "yolox_nano.onnx",
        min_time_s=0.1,
        repeats=1,
        on_loaded=described.update,
    )
    assert described["provider"] == "CPUExecutionProvider"


@pytest.mark.shared_data
def test_eager_refuses_threads_that_it_cannot_set(shared_data):
    with pytest.raises(InProcessError, match="onnxruntime's own choice"):
        benchmark_in_process(
            "eager",
            ROOT / "model_store" / "yolox_nano" / "yolox_nano.yaml",
            sorted((shared_data / "coco" / "liz50").rglob("*.jpg"))[:1],
            weights=shared_data / "models" / "yolox_nano" / "yolox_nano.onnx",
            threads=1,
        )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch_sizes": ()}, "batch sizes: got"),
        ({"batch_sizes": (0,)}, "batch sizes: got"),
        ({"threads": 0}, "threads: got 0"),
        ({"repeats": 0}, "repeats: got 0"),
        ({"min_time_s": 0.0}, "min_time_s: got 0"),
        ({"device": "toaster"}, "device: got 'toaster'"),
        ({"device": "cuda:99"}, "CUDA devices here"),
        ({"weights": Path("w.safetensors")}, "whose weights are inside"),
    ],
)
def test_what_makes_no_sense_is_refused(archive, images, changes, said):
    with pytest.raises(DetserveError, match=said):
        benchmark_in_process("runtime", archive, images, **changes)


def test_no_images_and_unreadable_images_are_refused(archive, tmp_path):
    with pytest.raises(InProcessError, match="images: got none"):
        benchmark_in_process("runtime", archive, [])
    with pytest.raises(InProcessError, match="cannot be read"):
        benchmark_in_process("runtime", archive, [tmp_path / "gone.jpg"])


@pytest.mark.gpu
def test_a_gpu_is_measured_too(cuda, archive, images):
    described = {}
    (level,) = benchmark_in_process(
        "runtime", archive, images, batch_sizes=[2], device=cuda, min_time_s=0.5, repeats=1, on_loaded=described.update
    )
    assert described["device"].startswith("cuda")
    stages = means(level.samples)
    # Synchronised: the network's time is in its own stage, not in the copy of the boxes that follows it.
    assert stages["forward"] > stages["postprocess"]
