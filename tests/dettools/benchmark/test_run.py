import csv
import io
import json
from dataclasses import replace

import pytest
from dettools.benchmark.images import describe_images
from dettools.benchmark.knee import Slo
from dettools.benchmark.measurement import Accuracy
from dettools.benchmark.run import Run, RunFileError, load_run, make_run, write_run
from dettools.benchmark.summary import (
    findings,
    number,
    percentile_table,
    shared_reasons,
    stage_table,
    table,
    to_markdown,
)
from PIL import Image
from synthetic_levels import IMAGES, open_loop, run_of, steady


@pytest.fixture(scope="module")
def levels():
    return [
        steady(1200, 0.02, value=1),
        steady(1200, 0.03, value=2, failed=range(0, 1200, 40)),
        steady(300, 0.05, value=4),
    ]


@pytest.fixture(scope="module")
def sweep(levels):
    return run_of(levels, slo=Slo(99, 40))


def test_a_run_comes_back_from_disk_as_it_was(levels, sweep, tmp_path):
    write_run(sweep, levels, tmp_path)
    for path in (tmp_path, tmp_path / "run.json"):
        stored = load_run(path)
        assert stored.run == sweep
        assert stored.samples == tuple(level.samples for level in levels)


def test_the_figures_can_be_computed_again_from_what_is_on_disk(levels, sweep, tmp_path):
    write_run(sweep, levels, tmp_path)
    stored = load_run(tmp_path)
    again = [replace(level, samples=samples) for level, samples in zip(levels, stored.samples, strict=True)]
    assert run_of(again, slo=Slo(99, 40)) == stored.run


def test_the_samples_are_json_lines_with_the_name_of_their_level(levels, sweep, tmp_path):
    write_run(sweep, levels, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == 2700
    assert {(line["level"], line["load"]) for line in lines} == {
        (0, "concurrency 1"),
        (1, "concurrency 2"),
        (2, "concurrency 4"),
    }
    assert sum(line["error"] == "queue_full" for line in lines) == 30


def test_the_document_is_strict_json(sweep):
    document = json.loads(json.dumps(sweep.to_json(), allow_nan=False))
    assert document["format"] == "detserve benchmark run"
    assert document["best"] == 0
    assert Run.from_json(document) == sweep


def test_the_samples_may_be_missing(levels, sweep, tmp_path):
    write_run(sweep, levels, tmp_path)
    (tmp_path / "samples.jsonl").unlink()
    assert load_run(tmp_path).samples == ((), (), ())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "Cannot read .*run.json: No such file"),
        ("{", "is not a benchmark's run.json"),
        ("[]", "it has no format"),
        ('{"format": "detserve benchmark run", "version": 99}', "it is version 99, this detserve reads version 1"),
        ('{"format": "detserve benchmark run", "version": 1}', "KeyError: 'kind'"),
    ],
)
def test_what_is_no_run_is_refused(text, message, tmp_path):
    if text is not None:
        (tmp_path / "run.json").write_text(text)
    with pytest.raises(RunFileError, match=message):
        load_run(tmp_path)


def test_a_damaged_figure_is_refused(levels, sweep, tmp_path):
    write_run(sweep, levels, tmp_path)
    document = json.loads((tmp_path / "run.json").read_text())
    document["levels"][0]["throughput_rps"] = "fast"
    (tmp_path / "run.json").write_text(json.dumps(document))
    with pytest.raises(RunFileError, match=r"is not a benchmark's run\.json: 1 validation error"):
        load_run(tmp_path)


def test_a_damaged_line_of_samples_is_named(levels, sweep, tmp_path):
    write_run(sweep, levels, tmp_path)
    file = tmp_path / "samples.jsonl"
    lines = file.read_text().splitlines()
    lines[6] = lines[6][:20]
    file.write_text("\n".join(lines))
    with pytest.raises(RunFileError, match=r"samples.jsonl, line 7 is not a sample"):
        load_run(tmp_path)


def test_a_folder_that_cannot_be_written_is_told(levels, sweep, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunFileError, match=r"Cannot write the benchmark to .*: .*Name another --out"):
        write_run(sweep, levels, tmp_path / "file")


def test_levels_that_are_invalid_are_neither_best_nor_knee(levels):
    fast_but_refused = steady(1200, 0.001, value=8, failed=range(0, 1200, 2))
    found = run_of([*levels, fast_but_refused])
    assert found.levels[3].throughput_rps.value > found.levels[0].throughput_rps.value
    assert found.verdicts[3].stamp == "INVALID"
    assert found.best == 0


def test_an_slo_on_a_rare_percentile_is_computed(levels):
    found = run_of(levels, slo=Slo(97, 40))
    assert found.levels[0].percentile(97).ms == pytest.approx(22, abs=1)
    # At concurrency 2 a fortieth fails: the strict p97 is finite, the strict p99 is not.
    assert found.slo.highest == 1


def test_in_process_a_level_is_a_batch_size(levels):
    found = run_of(levels, kind="runtime")
    assert found.labels == ("batch size 1", "batch size 2", "batch size 4")
    assert (found.knee, found.sustained) == (None, None)
    assert "includes decode, pre- and postprocessing" in findings(found)[0]
    assert "images/s" in table(found)[0]


def test_csv_has_every_figure_unrounded(levels, sweep, tmp_path):
    write_run(sweep, levels, tmp_path)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "summary.csv").read_text("utf-8"))))
    assert [row["level"] for row in rows] == list(sweep.labels)
    assert float(rows[0]["p99_ms"]) == sweep.levels[0].percentile(99).ms
    assert rows[0]["p99.9_ms"] == ""
    assert (rows[1]["errors"], rows[1]["p99_strict_ms"]) == ("queue_full=30", "inf")


def test_markdown_says_the_stamp_the_figures_and_the_reservations(sweep):
    text = to_markdown(sweep)
    assert text.startswith("## shapes, served\n\n**WARN**.")
    assert "| concurrency 2 | 32." in text
    assert "- INVALID `errors` 30 of 1200 requests failed" in text
    assert "p99 ≤ 40 ms: met up to concurrency 1" in text
    lengths = {line.count("|") for line in text.splitlines() if line.startswith("| concurrency 1 ")}
    assert text.count("| level ") == len(lengths)


def test_columns_that_nothing_fills_are_left_out(levels):
    header, rows = table(run_of(levels[:1]))
    assert not {"AP", "offered", "errors", "p99.9 ms"} & set(header)
    assert all(len(row) == len(header) for row in rows)
    scored = replace(levels[0], accuracy=Accuracy(0.31, 0.45, 0.30, 0.44, 1200, 0))
    header, rows = table(run_of([scored]))
    assert rows[0][header.index("AP")] == "0.300"
    header, rows = table(run_of([open_loop(20, [0.02] * 400)]))
    assert rows[0][header.index("offered")] == "20.0"


def test_the_parts_add_up_in_the_table(sweep):
    header, rows = stage_table(sweep)
    values = dict(zip(header, rows[0], strict=True))
    assert float(values["forward"]) == pytest.approx(10, abs=0.1)
    assert float(values["sum ms"]) == pytest.approx(20, abs=0.1)
    # The synthetic worker tells no decode.
    assert "decode" not in values


def test_intervals_stand_beside_their_figures(sweep):
    header, rows = percentile_table(sweep)
    assert header[:3] == ["level", "req/s", "p50 ms"]
    assert rows[0][2].startswith("20.0 [1")


def test_a_reason_is_told_once_with_its_levels():
    found = shared_reasons(run_of([steady(100, value=value) for value in (1, 2, 4)]))
    few = next(reason for reason in found if reason.code == "too_few_samples")
    assert few.where == "concurrency 1; also at concurrency 2, concurrency 4"


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (float("inf"), "∞"), (0.123, "0.12"), (12.34, "12.3"), (1234.5, "1,234")]
)
def test_numbers_have_the_digits_that_mean_something(value, text):
    assert number(value) == text


def test_images_are_described_by_content():
    def picture(width, height, colour):
        file = io.BytesIO()
        Image.new("RGB", (width, height), colour).save(file, "PNG")
        return file.getvalue()

    bodies = [picture(100, 80, "red"), picture(100, 80, "blue"), picture(100, 80, "red"), b"no picture"]
    facts = describe_images(bodies)
    assert (facts.count, facts.distinct, facts.sizes) == (4, 3, {"100x80": 3})
    assert facts.megapixels_max == pytest.approx(0.008)
    assert facts.bytes_total == sum(map(len, bodies))
    assert describe_images(bodies[::-1]).digest == facts.digest
    assert describe_images(bodies[:3]).digest != facts.digest
    assert describe_images([]).count == 0
    assert IMAGES.sentence() == "20 images (20 different), 0.0 MB, 1 KB each"


def test_the_title_is_the_model_unless_one_is_given(levels):
    values = {"images": IMAGES, "target": {}, "settings": {}, "environment": {}, "resamples": 0}
    assert make_run("eager", "shapes", levels[:1], **values).title == "shapes, eager"
    assert make_run("eager", "shapes", levels[:1], **values, title="Before").title == "Before"
