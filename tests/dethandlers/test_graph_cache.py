"""Optimised graphs kept between starts: the same answers, never a reason to fail, and never somebody else's file."""

import hashlib
import os
import stat
import threading
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from dethandlers import graph_cache
from dethandlers.detections import Category
from dethandlers.families import Batch, Limits, load_family
from dethandlers.graph_cache import cache_folder, graph_key, open_with_cache
from dethandlers.runtimes.onnx_runtime import OnnxRuntime
from dethandlers.spec import Serving, Spec
from onnx import TensorProto, helper, numpy_helper
from small_networks import witness, write_graph


@pytest.fixture(autouse=True)
def base(tmp_path, monkeypatch):
    """An empty cache for each test."""
    monkeypatch.setenv("DETSERVE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def weights(tmp_path):
    """A network that onnxruntime has something to optimise in: convolutions with normalisations."""
    rng = np.random.default_rng(0)
    values = {"kernel": rng.normal(0, 0.1, (16, 3, 3, 3)), "scale": rng.random(16), "bias": rng.normal(0, 1, 16)}
    values |= {"mean": rng.normal(0, 1, 16), "variance": 0.5 + rng.random(16)}
    nodes = [
        helper.make_node("Conv", ["images", "kernel"], ["raw"], pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["raw", "scale", "bias", "mean", "variance"], ["normal"]),
        helper.make_node("Relu", ["normal"], ["maps"]),
    ]
    constants = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in values.items()]
    inputs = [("images", TensorProto.FLOAT, ["batch", 3, 16, 16])]
    outputs = [("maps", TensorProto.FLOAT, ["batch", 16, 16, 16])]
    return write_graph(tmp_path / "model.onnx", nodes, inputs, outputs, constants)


def runtime_of(weights, **serving):
    spec = Spec("small", "yolox", (Category(1, "one", 0),), runtime="onnx", serving=Serving(**serving))
    return OnnxRuntime(spec, load_family(spec), weights, torch.device("cpu"))


def answer_of(runtime):
    pixels = torch.rand((2, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    return torch.stack([one["maps"] for one in runtime.run(Batch(pixels, ((16, 16),) * 2, Limits(0.1, 10)))])


def kept(base):
    return sorted(path.name for path in (base / "graphs").iterdir())


def age(path, seconds):
    then = time.time() - seconds
    os.utime(path, (then, then))


# The runtime with the cache


def test_the_second_start_takes_the_graph_of_the_first_and_answers_the_same_bits(weights, base):
    first, second = runtime_of(weights), runtime_of(weights)
    assert (first.optimisation, second.optimisation) == ("fresh", "cached")
    assert second.describe()["optimisation"] == "cached"
    assert len(kept(base)) == 1
    assert torch.equal(answer_of(first), answer_of(second))


def test_answers_without_a_cache_are_the_same(weights, base, monkeypatch):
    runtime_of(weights)
    cached = runtime_of(weights)
    monkeypatch.setenv("DETSERVE_CACHE_DIR", "/proc/none")
    without = runtime_of(weights)
    assert (cached.optimisation, without.optimisation) == ("cached", "not cached")
    assert torch.equal(answer_of(cached), answer_of(without))


def test_what_is_kept_is_the_optimised_graph(weights, base):
    import onnxruntime

    runtime_of(weights)
    (graph,) = (base / "graphs").iterdir()
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_profiling, options.profile_file_prefix = True, str(base / "profile")
    session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    session.run(None, {"images": np.zeros((1, 3, 16, 16), np.float32)})
    text = Path(session.end_profiling()).read_text("utf-8")
    assert "Conv" in text
    assert "BatchNormalization" not in text


def test_another_file_has_a_graph_of_its_own(weights, base, tmp_path):
    runtime_of(weights)
    model = onnx.load(weights)
    model.doc_string = "changed"
    other = tmp_path / "other.onnx"
    other.write_bytes(model.SerializeToString())
    assert runtime_of(other).optimisation == "fresh"
    assert len(kept(base)) == 2


def test_a_network_replaced_in_an_unpacked_archive_is_the_one_that_runs(weights, base):
    """Its SHA256SUMS still tells the digest of the one before."""
    sums = weights.with_name("SHA256SUMS")
    sums.write_text(f"{hashlib.sha256(weights.read_bytes()).hexdigest()}  {weights.name}\n")
    assert answer_of(runtime_of(weights)).any()
    model = onnx.load(weights)
    for constant in model.graph.initializer:
        if constant.name in ("scale", "bias"):
            constant.CopyFrom(numpy_helper.from_array(np.zeros(16, np.float32), constant.name))
    weights.write_bytes(model.SerializeToString())
    replaced = runtime_of(weights)
    assert replaced.optimisation == "fresh"
    assert not answer_of(replaced).any()


@pytest.mark.parametrize("damage", ["cut", "a changed byte", "empty"])
def test_a_damaged_graph_is_dropped_and_built_again(weights, base, damage):
    expected = answer_of(runtime_of(weights))
    (graph,) = (base / "graphs").iterdir()
    content = bytearray(graph.read_bytes())
    if damage == "a changed byte":
        content[len(content) // 2] ^= 1
    graph.write_bytes({"cut": content[: len(content) // 2], "empty": b""}.get(damage, bytes(content)))
    again = runtime_of(weights)
    assert again.optimisation == "fresh"
    assert torch.equal(answer_of(again), expected)
    assert runtime_of(weights).optimisation == "cached"
    assert len(kept(base)) == 1


def test_a_whole_graph_that_does_not_load_is_not_tried_again(weights, base):
    """As when onnxruntime saves what it does not read: no start may be slower than without the cache."""
    runtime_of(weights)
    (graph,) = (base / "graphs").iterdir()
    key = graph.name.partition("-")[0]
    graph.unlink()
    garbage = b"a whole file, but no graph"
    graph.with_name(f"{key}-{hashlib.sha256(garbage).hexdigest()}.ort").write_bytes(garbage)
    (base / "graphs" / f"{key}-{hashlib.sha256(garbage).hexdigest()}.ort").chmod(0o600)
    assert runtime_of(weights).optimisation == "not cached"
    assert kept(base) == [f"{key}.refused"]
    assert runtime_of(weights).optimisation == "not cached"


def test_a_mark_lasts_a_day(weights, base):
    """What kept a graph from loading may have been the machine, as when it was short of memory."""
    runtime_of(weights)
    (graph,) = (base / "graphs").iterdir()
    mark = graph.with_name(f"{graph.name.partition('-')[0]}.refused")
    mark.touch()
    age(mark, 23 * 3600)
    assert runtime_of(weights).optimisation == "not cached"
    age(mark, 25 * 3600)
    assert runtime_of(weights).optimisation == "cached"


def test_nothing_is_marked_when_the_original_does_not_load_either(base):
    open_with_cache("key", saving(), loaded)
    before = kept(base)

    def short_of_memory(path):
        raise MemoryError("bad allocation")

    with pytest.raises(MemoryError):
        open_with_cache("key", short_of_memory, short_of_memory)
    assert kept(base) == before
    assert open_with_cache("key", saving(), loaded) == (b"graph", "cached")


# The folder


def test_the_folder_is_its_user_s_alone(base):
    folder = cache_folder()
    assert folder == base / "graphs"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_the_folder_is_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.delenv("DETSERVE_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg/detserve/graphs"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == tmp_path / "home/.cache/detserve/graphs"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == tmp_path / "home/.cache/detserve/graphs"


@pytest.mark.parametrize("mode", [0o770, 0o702])
def test_a_folder_that_others_may_write_is_not_used(weights, base, mode):
    runtime_of(weights)
    (base / "graphs").chmod(mode)
    assert runtime_of(weights).optimisation == "not cached"


def test_a_folder_of_another_user_is_not_used(weights, base):
    runtime_of(weights)
    try:
        os.chown(base / "graphs", 12345, 12345)
    except PermissionError:
        pytest.skip("only root may give a folder away")
    assert runtime_of(weights).optimisation == "not cached"


def test_a_link_in_place_of_the_folder_is_not_followed(weights, base, tmp_path):
    runtime_of(weights)
    (base / "graphs").rename(tmp_path / "elsewhere")
    (base / "graphs").symlink_to(tmp_path / "elsewhere")
    assert runtime_of(weights).optimisation == "not cached"


def test_a_graph_that_others_may_write_is_dropped(weights, base):
    runtime_of(weights)
    (graph,) = (base / "graphs").iterdir()
    graph.chmod(0o666)
    assert runtime_of(weights).optimisation == "fresh"
    (graph,) = (base / "graphs").iterdir()
    assert stat.S_IMODE(graph.stat().st_mode) == 0o600


def test_a_folder_that_cannot_be_made_costs_nothing_but_the_cache(weights, base):
    base.write_text("a file in its place")
    assert runtime_of(weights).optimisation == "not cached"


# Keeping


def saving(content=b"graph"):
    """An optimiser that saves this content."""

    def optimise(path):
        if path is not None:
            path.write_bytes(content)
        return "optimised"

    return optimise


def loaded(path):
    return path.read_bytes()


def test_two_workers_that_start_at_once_both_start(base):
    barrier, results = threading.Barrier(2, timeout=30), []

    def start(content):
        def optimise(path):
            barrier.wait()
            path.write_bytes(content)
            return "optimised"

        results.append(open_with_cache("key", optimise, loaded))

    # Not the same bytes: onnxruntime does not write a graph twice in the same order.
    workers = [threading.Thread(target=start, args=(content,)) for content in (b"one", b"other")]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert results == [("optimised", "fresh")] * 2
    content, origin = open_with_cache("key", saving(), loaded)
    assert origin == "cached"
    assert content in (b"one", b"other")


def test_the_first_of_several_workers_keeps_its_graph(base):
    def optimise(path):
        open_with_cache("key", saving(b"first"), loaded)  # a worker that is quicker
        path.write_bytes(b"second")
        return "optimised"

    assert open_with_cache("key", optimise, loaded) == ("optimised", "fresh")
    assert len(kept(base)) == 1
    assert open_with_cache("key", saving(), loaded) == (b"first", "cached")


def test_a_graph_that_cannot_be_saved_is_no_reason_to_fail(base):
    def optimise(path):
        if path is not None:
            raise RuntimeError("protobuf is over 2 GB")
        return "optimised"

    assert open_with_cache("key", optimise, loaded) == ("optimised", "not cached")
    assert kept(base) == []


def test_an_optimiser_that_saves_nothing_is_no_reason_to_fail(base):
    assert open_with_cache("key", lambda path: "optimised", loaded) == ("optimised", "not cached")


def test_what_keeps_the_original_from_loading_is_said():
    def optimise(path):
        raise ValueError("no network")

    with pytest.raises(ValueError, match="no network"):
        open_with_cache("key", optimise, loaded)


def test_the_least_recently_used_go_first(base, monkeypatch):
    monkeypatch.setattr(graph_cache, "MOST_FILES", 3)
    for place, key in enumerate("abc"):
        open_with_cache(key, saving(), loaded)
        (graph,) = (base / "graphs").glob(f"{key}-*")
        age(graph, 100 - place)
    assert open_with_cache("a", saving(), loaded)[1] == "cached"
    open_with_cache("d", saving(), loaded)
    assert [name[0] for name in kept(base)] == ["a", "c", "d"]


def test_the_bytes_are_bounded_too_but_the_newest_stays(base, monkeypatch):
    monkeypatch.setattr(graph_cache, "MOST_BYTES", 25)
    for place, key in enumerate("abc"):
        open_with_cache(key, saving(bytes(10)), loaded)
        (graph,) = (base / "graphs").glob(f"{key}-*")
        age(graph, 100 - place)
    assert [name[0] for name in kept(base)] == ["b", "c"]
    open_with_cache("d", saving(bytes(30)), loaded)
    assert [name[0] for name in kept(base)] == ["d"]


def test_what_a_killed_worker_left_is_cleared(base):
    folder = cache_folder()
    for name, seconds in (("old", 7200), ("new", 10)):
        (left := folder / f".building-{name}").mkdir()
        (left / "graph.ort").write_bytes(b"half")
        age(left, seconds)
    open_with_cache("key", saving(), loaded)
    assert [name for name in kept(base) if name.startswith(".")] == [".building-new"]


# Keys


def test_a_key_depends_on_the_file_and_on_everything_that_made_the_graph(tmp_path):
    weights = witness(tmp_path / "model.onnx")
    made_by = {"onnxruntime": "1.0", "provider": "CPU", "options": {"use_tf32": "0"}}
    changed = [{"onnxruntime": "1.1"}, {"provider": "CUDA"}, {"options": {"use_tf32": "1"}}, {"gpu": "H200"}]
    keys = [graph_key(weights, made_by | change) for change in ({}, *changed)]
    weights.write_bytes(weights.read_bytes() + b"\n")
    keys.append(graph_key(weights, made_by))
    assert None not in keys
    assert len(set(keys)) == len(keys)
    assert graph_key(weights, made_by) == keys[-1]


def test_a_list_of_digests_beside_the_file_does_not_count(tmp_path):
    weights = witness(tmp_path / "model.onnx")
    alone = graph_key(weights, {})
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  model.onnx\n")
    assert graph_key(weights, {}) == alone


def test_a_file_that_is_too_large_to_gain_by_it_is_not_cached(weights, base, monkeypatch):
    monkeypatch.setattr(graph_cache, "LARGEST_FILE", weights.stat().st_size - 1)
    assert [runtime_of(weights).optimisation for _ in range(2)] == ["not cached"] * 2
    assert not base.exists()


def test_a_file_with_its_weights_in_another_is_not_cached(tmp_path, base):
    values = np.arange(8 * 3 * 64, dtype=np.float32).reshape(8, 3, 8, 8)
    nodes = [helper.make_node("Conv", ["images", "kernel"], ["maps"])]
    inputs = [("images", TensorProto.FLOAT, ["batch", 3, 16, 16])]
    outputs = [("maps", TensorProto.FLOAT, ["batch", 8, 9, 9])]
    path = write_graph(tmp_path / "whole.onnx", nodes, inputs, outputs, [numpy_helper.from_array(values, "kernel")])
    onnx.save(onnx.load(path), tmp_path / "split.onnx", save_as_external_data=True, location="split.bin")
    assert (tmp_path / "split.bin").stat().st_size >= values.nbytes
    assert graph_key(tmp_path / "split.onnx", {}) is None
    first, second = runtime_of(tmp_path / "split.onnx"), runtime_of(tmp_path / "split.onnx")
    assert (first.optimisation, second.optimisation) == ("not cached", "not cached")
    assert torch.equal(answer_of(first), answer_of(runtime_of(path)))
