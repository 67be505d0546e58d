"""`detserve analyze-logs cal_train_time`: against hand-computed times, beside the original's of the same logs."""

import json
import math
import re
import statistics

import numpy as np
import pytest
from dettools.analysis.train_time import speed_ratio, train_time, weighted_quantile
from dettools.cli import main
from dettools.reports.train_time_tables import duration
from training_logs import log_2x, log_3x, original_average, original_rows, run_of, write_lines

BLOCK = """\
-----Analyze train time of {log}-----
slowest epoch {slowest}, average time is {slow:.4f} s/iter
fastest epoch {fastest}, average time is {fast:.4f} s/iter
time std over epochs is {std:.4f}
average iter time: {mean:.4f} s/iter
"""


def test_one_value_per_epoch(tmp_path):
    """[REPRO] the original drops the first value of every epoch, also the only one: NaN."""
    lines = log_3x(4, times=[0.4, 0.2, 0.3, 0.1])
    time = train_time(run_of(tmp_path, lines))
    assert math.isnan(original_average(lines))
    assert time.mean_s == pytest.approx(0.25)
    assert ((time.slowest.epoch, time.slowest.mean_s), (time.fastest.epoch, time.fastest.mean_s)) == (
        (1, 0.4),
        (4, 0.1),
    )


def test_every_iteration_counts_once(tmp_path):
    """[REPRO] the original counts an epoch that has just begun as much as a whole one."""
    lines = log_3x(2, per_epoch=8, times=[9, *[0.2] * 7, 9, *[0.8] * 7])
    lines = [line for line in lines if line["step"] <= 11]
    # Besides the first values, seven of 0.2 and two of 0.8.
    ours = train_time(run_of(tmp_path, lines))
    assert [(one.iterations, one.mean_s) for one in ours.epochs] == [(7, pytest.approx(0.2)), (2, pytest.approx(0.8))]
    assert statistics.fmean(one.mean_s for one in ours.epochs) == pytest.approx(0.5)
    assert ours.mean_s == pytest.approx((7 * 0.2 + 2 * 0.8) / 9)
    # The original also takes the 9 s with which epoch 2 begins for the end of epoch 1, where nothing drops it.
    assert original_average(lines) == pytest.approx(((7 * 0.2 + 9) / 8 + 0.8) / 2)
    assert train_time(run_of(tmp_path, lines), include_outliers=True).mean_s == pytest.approx((9 + 1.4 + 9 + 1.6) / 11)


def test_the_original_moves_the_first_value_of_an_epoch(tmp_path):
    """[REPRO] the slow start of each epoch is the epoch before's last value, so that dropping the first keeps it."""
    lines = log_3x(3, per_epoch=4, times=[5, 0.1, 0.1, 0.1] * 3)
    assert original_rows(lines)[1]["time"] == [5, 0.1, 0.1, 0.1, 5]
    assert original_average(lines) == pytest.approx(((0.3 + 5) / 4 + (0.2 + 5) / 3 + 0.1) / 3)
    assert train_time(run_of(tmp_path, lines)).mean_s == pytest.approx(0.1)


def test_weights_are_iterations(tmp_path):
    rows = [(50, 1.0), (100, 1.0), (105, 3.0)]
    lines = [
        {"mode": "train", "epoch": 1, "iter": step, "loss": 1.0, "time": time, "data_time": time / 2}
        for step, time in rows
    ]
    time = train_time(run_of(tmp_path, lines), batch_size=6)
    assert time.mean_s == pytest.approx((50 * 1 + 5 * 3) / 55)
    assert (time.median_s, time.p95_s, time.iterations, time.left_out) == (1.0, 3.0, 55, 1)
    assert time.total_s == pytest.approx(50 + 50 + 15)
    assert time.images_per_s == pytest.approx(6 * 55 / 65)
    assert time.data_time_share == pytest.approx(0.5)


def test_weighted_quantile():
    values, weights = np.array([3.0, 1.0, 2.0]), np.array([1.0, 1.0, 8.0])
    assert [weighted_quantile(values, weights, share) for share in (0.1, 0.11, 0.5, 0.9, 0.95)] == [1, 2, 2, 2, 3]


def test_what_is_left(tmp_path):
    """12 epochs by the config, 3 done: 9 of 105 iterations of half a second."""
    log = run_of(tmp_path, log_2x(3))
    assert train_time(log).remaining_s == pytest.approx(9 * 105 * 0.5)
    assert train_time(log, max_epochs=3).remaining_s == 0
    assert train_time(log, max_epochs=4, epoch_iterations=200).remaining_s == pytest.approx((800 - 315) * 0.5)
    started = run_of(tmp_path, log_2x(1)[:-1])
    assert train_time(started).remaining_s is None
    assert train_time(started, epoch_iterations=105).remaining_s == pytest.approx((12 * 105 - 100) * 0.5)


def test_the_speed_of_two_runs(tmp_path):
    random = np.random.default_rng(0)
    logs = [
        run_of(tmp_path, log_3x(20, per_epoch=10, length=100, times=(random.gamma(50, mean / 50, 200)).tolist()))
        for mean in (0.4, 0.2)
    ]
    slow, fast = (train_time(log) for log in logs)
    assert slow.low_s < 0.4 < slow.high_s
    ratio, low, high = speed_ratio(slow, fast)
    assert low < 2 < high
    assert ratio == pytest.approx(2, rel=0.05)


def test_times_per_epoch_need_the_iterations(tmp_path, capsys):
    (tmp_path / "results.csv").write_text(
        "epoch,time,metrics/mAP50-95(B),train/box_loss\n1,10,.1,1\n2,20,.2,1\n3,32,.3,1\n"
    )
    assert main(["analyze-logs", "cal_train_time", str(tmp_path)]) == 2
    assert "times epochs, not iterations (10.7 s per epoch): give --epoch-iters" in capsys.readouterr().err
    assert main(["analyze-logs", "cal_train_time", str(tmp_path), "--epoch-iters", "100"]) == 0
    assert "average iter time: 0.1067 s/iter" in capsys.readouterr().out


def test_the_text_block(tmp_path, capsys):
    path = write_lines(tmp_path / "a.log.json", log_3x(2, per_epoch=4, times=[9, 0.2, 0.2, 0.2, 9, 0.4, 0.4, 0.4]))
    arguments = ["analyze-logs", "cal_train_time", str(path), "--batch-size", "4", "--csv", str(tmp_path / "t.csv")]
    assert main([*arguments, "--json"]) == 0
    printed = capsys.readouterr()
    block = BLOCK.format(log=path, slowest=2, slow=0.4, fastest=1, fast=0.2, std=0.1, mean=0.3)
    assert block in printed.err
    document = json.loads(printed.out.splitlines()[-1])["times"][0]
    assert (document["mean_s"], document["images_per_s"]) == pytest.approx((0.3, 4 / 0.3))
    assert document["slowest_epoch"] == {"epoch": 2, "iterations": 6, "mean_s": pytest.approx(0.4)}
    assert len((tmp_path / "t.csv").read_text().splitlines()) == 1 + 2
    assert main(arguments) == 0
    assert block in capsys.readouterr().out


def test_durations():
    assert [duration(s) for s in (5, 59.9, 600, 3599, 3600, 90000)] == [
        "5.0 s",
        "59.9 s",
        "10 min",
        "1 h 00 min",
        "1 h 00 min",
        "1 d 1 h",
    ]


@pytest.mark.shared_data
@pytest.mark.parametrize("name", ["faster_rcnn_r50_fpn_1x_coco/20210112_114254", "coco_mask_r50/20210113_153932"])
def test_real_times(shared_data, capsys, name):
    """Taken from the text by a pattern, row after row."""
    path = shared_data / f"logs/mmdet2x/{name}.log.json"
    epochs = {}
    for line in path.read_text().splitlines()[1:]:
        if '"mode": "train"' in line:
            epoch, time = re.search(r'"epoch": (\d+)', line)[1], re.search(r'"time": ([\d.]+)', line)[1]
            epochs.setdefault(int(epoch), []).append(float(time))
    means = {epoch: statistics.fmean(times[1:]) for epoch, times in epochs.items()}
    slowest, fastest = max(means, key=means.get), min(means, key=means.get)
    assert main(["analyze-logs", "cal_train_time", str(path)]) == 0
    assert (
        BLOCK.format(
            log=path,
            slowest=slowest,
            slow=means[slowest],
            fastest=fastest,
            fast=means[fastest],
            std=statistics.pstdev(means.values()),
            # 292 values in each epoch: the weights are alike.
            mean=statistics.fmean(means.values()),
        )
        in capsys.readouterr().out
    )


@pytest.mark.shared_data
def test_real_3x(shared_data, tmp_path, capsys):
    """[REPRO] balloon logs one value an epoch: the original's average is NaN."""
    path = shared_data / "logs/mmdet3x/crazy-winds_balloon/vis_data/scalars.json"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    times = [line["time"] for line in lines if "epoch" in line]
    assert math.isnan(original_average(lines))
    assert main(["analyze-logs", "cal_train_time", str(path)]) == 0
    printed = capsys.readouterr()
    assert f"average iter time: {statistics.fmean(times):.4f} s/iter" in printed.out
    assert f"slowest epoch 1, average time is {times[0]:.4f} s/iter" in printed.out
    assert "logs a moving average of the time" in printed.err
