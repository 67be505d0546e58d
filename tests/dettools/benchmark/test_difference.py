import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from dettools.benchmark.difference import DifferenceError, compare_runs, holm
from dettools.benchmark.images import describe_images
from dettools.benchmark.measurement import Accuracy
from dettools.benchmark.run import StoredRun
from dettools.reports.benchmark_tables import print_difference
from rich.console import Console
from synthetic_levels import ENVIRONMENT, run_of, steady


def stored(*levels, **options):
    return StoredRun(run_of(levels, **options), tuple(level.samples for level in levels), Path("run.json"))


def words(difference):
    return {figure.figure: figure.word for figure in difference.figures}


@pytest.fixture(scope="module")
def before():
    return stored(steady(1500, 0.020, seed=1), steady(1500, 0.030, seed=2, value=2))


def test_a_run_does_not_differ_from_itself(before):
    found = compare_runs(before, before)
    assert {figure.word for figure in found.figures} == {"no difference shown"}
    assert all(figure.ratio == 1 for figure in found.figures)
    assert found.mismatches == ()
    assert found.regressions == ()


def test_a_slower_run_is_slower_in_every_figure(before):
    after = stored(steady(1500, 0.022, seed=3), steady(1500, 0.033, seed=4, value=2))
    found = compare_runs(before, after)
    assert {figure.word for figure in found.figures} == {"slower"}
    assert len(found.regressions) == len(found.figures) == 14
    by_name = {figure.figure: figure for figure in found.figures if figure.level == "concurrency 1"}
    assert by_name["p50"].ratio == pytest.approx(1.1, rel=0.01)
    assert by_name["throughput"].ratio == pytest.approx(1 / 1.1, rel=0.01)
    assert all(figure.low < figure.ratio < figure.high for figure in found.figures)
    assert {figure.word for figure in compare_runs(after, before).figures} == {"faster"}


def test_the_tail_alone_can_be_slower():
    """Every thirtieth takes three times as long: the median does not see it."""
    rng = np.random.default_rng(0)
    plain = steady(3000, 0.02, seed=1)
    slow = set(rng.choice(3000, 100, replace=False).tolist())
    after = replace(
        plain,
        samples=tuple(
            replace(one, done_s=one.done_s + 0.04 * (index in slow)) for index, one in enumerate(plain.samples)
        ),
    )
    found = words(compare_runs(stored(plain), stored(after)))
    assert (found["p50"], found["p99"]) == ("no difference shown", "slower")


def test_what_is_sure_but_small_is_negligible(before):
    after = stored(steady(1500, 0.0206, seed=3), steady(1500, 0.0309, seed=4, value=2))
    found = compare_runs(before, after)
    assert words(found)["mean"] == "negligible"
    assert found.regressions == ()
    assert words(compare_runs(before, after, tolerance=0.01))["mean"] == "slower"


def test_chance_alone_shows_no_difference():
    """Twenty pairs of the same server, fourteen figures each: without Holm's correction some would differ."""
    shown = uncorrected = 0
    for seed in range(20):
        one, two = (stored(steady(400, 0.02, seed=2 * seed + k), resamples=0) for k in (100, 101))
        found = compare_runs(one, two, tolerance=0.0, resamples=200, seed=seed)
        shown += sum(figure.word != "no difference shown" for figure in found.figures)
        uncorrected += sum(not figure.low <= 1 <= figure.high for figure in found.figures)
    assert uncorrected >= 2
    assert shown <= 2


def test_holms_correction_is_that_of_the_paper():
    assert holm([0.01, 0.04, 0.03, None, 0.005]) == pytest.approx([0.03, 0.06, 0.06, None, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_more_errors_are_worse_and_less_accuracy_is_worse(before):
    lossy = steady(1500, 0.020, seed=1, failed=range(0, 1500, 30))
    good = replace(steady(1500, 0.020, seed=1), accuracy=Accuracy(0.31, 0.45, 0.31, 0.45, 1500, 0))
    shed = replace(lossy, accuracy=Accuracy(0.31, 0.45, 0.28, 0.41, 1500, 50))
    found = compare_runs(stored(good), stored(shed))
    assert words(found)["error rate"] == "more errors"
    assert words(found)["AP"] == "AP lost"
    assert {figure.figure for figure in found.regressions} >= {"error rate", "AP"}
    back = words(compare_runs(stored(shed), stored(good)))
    assert (back["error rate"], back["AP"]) == ("fewer errors", "AP won")


def test_levels_are_matched_by_name_and_the_others_named(before):
    after = stored(steady(1500, 0.030, seed=3, value=2), steady(300, 0.05, value=4))
    found = compare_runs(before, after)
    assert {figure.level for figure in found.figures} == {"concurrency 2"}
    assert (found.only_a, found.only_b) == (("concurrency 1",), ("concurrency 4",))


def test_a_level_measured_twice_is_matched_in_turn():
    twice = stored(steady(500, 0.02, seed=1), steady(500, 0.04, seed=2))
    found = compare_runs(twice, twice)
    assert {figure.ratio for figure in found.figures} == {1.0}


def test_what_else_differs_is_named(before):
    environment = {**ENVIRONMENT, "cpu": {"model": "another processor", "cores": 2}, "date": "2026-11-24"}
    after = stored(
        steady(1500, 0.020, seed=1),
        environment=environment,
        target={"runtime": "onnx"},
        settings={"seed": 0, "out": "b"},
    )
    found = compare_runs(before, after)
    assert {mismatch.name for mismatch in found.mismatches} >= {"environment.cpu.model", "target.runtime"}
    assert not {"environment.date", "settings.out"} & {mismatch.name for mismatch in found.mismatches}


def test_other_images_are_refused_unless_allowed(before):
    after = stored(steady(1500, 0.02), images=describe_images([b"other"] * 3))
    with pytest.raises(DifferenceError, match=r"did not send the same images: got 20 images .* and 3 images"):
        compare_runs(before, after)
    found = compare_runs(before, after, allow_different_images=True)
    assert "images.digest" in {mismatch.name for mismatch in found.mismatches}


def test_runs_without_a_common_level_or_without_samples_are_refused(before):
    with pytest.raises(DifferenceError, match="No level in common: got concurrency 1, concurrency 2 and concurrency 8"):
        compare_runs(before, stored(steady(300, value=8)))
    with pytest.raises(DifferenceError, match=r"raw samples of .* are missing"):
        compare_runs(before, replace(before, samples=((), ())))


def test_runs_of_two_kinds_are_compared_where_a_level_means_the_same():
    eager, runtime, served = (stored(steady(500, 0.02), kind=kind) for kind in ("eager", "runtime", "served"))
    found = compare_runs(eager, runtime)
    assert any("Run a measures eager, run b runtime" in note for note in found.notes)
    with pytest.raises(DifferenceError, match="No level in common: got batch size 1 and concurrency 1"):
        compare_runs(runtime, served)


def test_the_difference_is_json_and_a_table(before):
    after = stored(steady(1500, 0.022, seed=3), steady(1500, 0.030, seed=4, value=2), target={"runtime": "onnx"})
    found = compare_runs(before, after)
    document = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert document["regressions"] == len(found.regressions) > 0
    console = Console(file=io.StringIO(), width=120)
    print_difference(found, console)
    text = console.file.getvalue()
    assert "SLOWER OR WORSE" in text
    assert "differs target.runtime: torch in a, onnx in b" in text
    assert "14 figures tested" in text
    assert "95 % interval" in text
    narrow = Console(file=io.StringIO(), width=80)
    print_difference(found, narrow)
    assert "…" not in narrow.file.getvalue()
    assert "no difference shown" in narrow.file.getvalue()
