import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from dettools.benchmark.knee import Slo
from dettools.benchmark.measurement import Accuracy
from dettools.benchmark.run import RunFileError
from dettools.benchmark.summary import to_markdown, what_ran
from dettools.reports import curves
from dettools.reports.benchmark_page import render_page, write_page
from dettools.reports.benchmark_tables import print_run
from rich.console import Console
from synthetic_levels import ENVIRONMENT, open_loop, run_of, steady


@pytest.fixture(scope="module")
def levels():
    scored = Accuracy(0.312, 0.455, 0.298, 0.431, 1200, 60)
    return [
        steady(1200, 0.02, value=1),
        steady(1200, 0.03, value=2),
        replace(steady(1200, 0.05, value=4, failed=range(0, 1200, 20)), accuracy=scored),
    ]


@pytest.fixture(scope="module")
def samples(levels):
    return [level.samples for level in levels]


@pytest.fixture(scope="module")
def sweep(levels):
    return run_of(levels, title="<b>shapes</b> & friends", slo=Slo(99, 40))


@pytest.fixture(scope="module")
def page(sweep, samples):
    return render_page(sweep, samples)


class Tags(HTMLParser):
    """Checks that what is opened is closed, and keeps every id and every address."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.addresses, self.names = [], [], [], set()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)
        if tag not in {"meta", "link", "br", "img"}:
            self.open.append(tag)
        for name, value in attrs:
            self.ids += [value] if name == "id" else []
            self.addresses += [value] if name in {"src", "href", "xlink:href"} else []

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def words(page):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)))


def test_the_page_is_whole_and_needs_nothing_else(page):
    tags = Tags(page)
    assert tags.open == []
    assert "script" not in tags.names
    assert all(address.startswith("#") for address in tags.addresses)
    assert not re.search(r"@import|url\((?!#)", page)


def test_ids_are_unique_over_all_pictures_and_every_reference_has_one(page):
    tags = Tags(page)
    assert len(set(tags.ids)) == len(tags.ids) > 100
    references = set(re.findall(r"url\(#([^)]+)\)", page)) | {address[1:] for address in tags.addresses}
    assert references <= set(tags.ids)


def test_the_same_run_gives_the_same_bytes(sweep, samples, page):
    assert render_page(sweep, samples) == page


def test_names_are_text_not_markup(page):
    assert "<b>shapes</b>" not in page
    assert "&lt;b&gt;shapes&lt;/b&gt; &amp; friends" in page
    hostile = run_of([steady(100, failed=[1], error="<script>alert(1)</script>")], settings={"x": "<i>"})
    assert "<script>" not in render_page(hostile, [()])


def test_the_stamp_the_figures_and_the_reasons_are_on_it(page):
    text = words(page)
    assert "WARN to be quoted with the reservations below" in text
    assert "60 of 1200 requests failed (5.00%; queue_full ×60)" in text
    assert "p99 ≤ 40 ms: met up to concurrency 2" in text
    assert "highest throughput: requests per second at concurrency 1" in text
    assert "0.312 0.455 0.298 0.431 1200 60" in text
    for title in ("Where the time goes", "Latency over time", "Errors by code", "Accuracy under load", "Environment"):
        assert title in text
    assert "a processor" in text


def test_an_invalid_run_says_so_large():
    refused = steady(200, failed=range(200))
    text = words(render_page(run_of([refused]), [refused.samples]))
    assert "INVALID not to be quoted" in text
    assert "Why these figures may not be quoted" in text


def test_in_process_the_page_speaks_of_batches(levels, samples):
    text = words(render_page(run_of(levels[:2], kind="runtime"), samples[:2]))
    assert "includes decode, pre- and postprocessing" in text
    assert "Throughput by batch size" in text
    assert "concurrency" not in text
    assert "Knee" not in text


def test_without_the_raw_samples_the_page_says_what_is_missing(sweep):
    text = words(render_page(sweep, [(), (), ()]))
    assert "The raw samples are not beside this run" in text
    assert "Latency over time" not in text


def test_a_run_without_levels_is_a_page_too():
    assert "No level was measured" in words(render_page(run_of([]), []))


def test_the_page_is_written_or_told_why_not(sweep, samples, page, tmp_path):
    write_page(sweep, samples, tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text("utf-8") == page
    with pytest.raises(RunFileError, match="Cannot write"):
        write_page(sweep, samples, tmp_path / "missing" / "report.html")


@pytest.mark.parametrize(
    "draw", [curves.latency_throughput, curves.throughput_bars, curves.stage_bars, curves.batch_bars]
)
def test_pictures_of_the_summary_are_svg(draw, sweep):
    root = ElementTree.fromstring(draw(sweep))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "viewBox" in root.attrib


@pytest.mark.parametrize("draw", [curves.tails, curves.histograms, curves.over_time])
def test_pictures_of_the_samples_are_svg_of_bounded_size(draw, sweep, samples):
    many = steady(20_000, 0.02)
    svg = draw(run_of([many], resamples=0), [many.samples])
    ElementTree.fromstring(svg)
    assert len(svg) < 150_000
    ElementTree.fromstring(draw(sweep, samples))


def test_the_curve_shows_knee_slo_and_the_loads(sweep):
    texts = ["".join(node.itertext()) for node in ElementTree.fromstring(curves.latency_throughput(sweep)).iter()]
    assert "SLO p99 ≤ 40 ms" in texts
    assert {"p50", "p95", "p99"} <= set(texts)
    assert {"1", "2", "4"} <= set(texts)


def test_a_sweep_into_overload_is_drawn_too():
    levels = [open_loop(rate, [0.02] * 400) for rate in (10, 20)]
    levels.append(open_loop(40, [0.02 + index * 0.01 for index in range(800)]))
    page = render_page(run_of(levels, slo=Slo(99, 250)), [level.samples for level in levels])
    assert "highest rate that is answered as fast as it arrives" in words(page)
    assert "overloaded" in page


@pytest.mark.parametrize("width", [80, 200])
def test_the_table_fits_the_terminal(sweep, width):
    console = Console(file=io.StringIO(), width=width)
    print_run(sweep, console)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    first = next(line for line in text.splitlines() if line.startswith(" concurrency 4"))
    assert "…" not in text
    assert first.rstrip().endswith("INVALID")
    assert ("p75" in text) == (width == 200)
    assert "WARN <b>shapes</b> & friends" in text


ON_ONNX = {
    "runtime": "onnx",
    "runtime_version": "1.22.0",
    "provider": "CUDAExecutionProvider",
    "device": "cuda:0",
    "device_name": "a GPU",
    "precision": "fp16",
}


def test_every_report_says_on_which_provider_the_model_ran():
    level = steady(100)
    run = run_of([level], target=ON_ONNX)
    sentence = "What ran: onnx 1.22.0, CUDAExecutionProvider, cuda:0, a GPU, fp16."
    console = Console(file=io.StringIO(), width=200)
    print_run(run, console)
    assert sentence in console.file.getvalue()
    assert sentence in to_markdown(run)
    assert "provider CUDAExecutionProvider" in words(render_page(run, [level.samples]))
    assert run.to_json()["target"]["provider"] == "CUDAExecutionProvider"


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ({"runtime": "torch", "device": "cpu", "device_name": "CPU", "precision": "fp32"}, "torch, cpu, fp32"),
        ({"source": "a checkpoint", "provider": "CPUExecutionProvider"}, "a checkpoint, CPUExecutionProvider"),
        ({"url": "http://127.0.0.1:8080"}, ""),
    ],
    ids=["torch", "eager", "a foreign server"],
)
def test_what_is_not_known_of_what_ran_is_left_out(target, said):
    assert what_ran(target) == said


def test_the_environment_of_a_gpu_is_listed():
    environment = {**ENVIRONMENT, "gpus": [{"name": "a GPU", "driver": "1.2"}]}
    level = steady(100)
    assert "gpus.0.name a GPU" in words(render_page(run_of([level], environment=environment), [level.samples]))
