"""Training logs of each format become the same rows; epochs, steps and resumptions are those of the training."""

import math

import pytest
from dettools.analysis.tensorboard_events import masked_crc32c
from dettools.analysis.training_curves import curve_of
from dettools.analysis.training_log import TrainingLogError
from dettools.analysis.training_log_files import read_resumed_run, read_run
from training_logs import crc32c, event_file, log_2x, log_3x, original_rows, write_lines


def steps(log, *, evaluation=False):
    return [(row.epoch, row.step, row.iterations) for row in log.rows if row.evaluation == evaluation]


def test_2x_counts_within_epochs(tmp_path):
    log = read_run(write_lines(tmp_path / "a.log.json", log_2x(2)))
    assert log.format == "MMDetection 2.x"
    # 5 iterations at the end of each epoch are never logged.
    assert steps(log) == [(1, 50, 50), (1, 100, 50), (2, 155, 50), (2, 205, 50)]
    assert steps(log, evaluation=True) == [(1, 105, 0), (2, 210, 0)]
    assert (log.plan.epochs, log.plan.images_per_gpu, log.plan.epoch_iterations) == (12, 2, 105)


def test_2x_an_evaluations_iter_may_count_other_images(tmp_path):
    """Later 2.x logs give the validation's length there: 5000 images are no iterations of training."""
    log = read_run(write_lines(tmp_path / "a.log.json", log_2x(2, value_iter=5000)))
    assert steps(log, evaluation=True) == [(1, 100, 0), (2, 200, 0)]


def test_2x_by_iterations(tmp_path):
    rows = [
        {"mode": "train", "epoch": epoch, "iter": step, "loss": 1.0, "time": 1.0}
        for epoch, step in ((1, 50), (1, 100), (2, 150))
    ]
    log = read_run(
        write_lines(tmp_path / "a.log.json", [*rows, {"mode": "val", "epoch": 2, "iter": 9, "bbox_mAP": 0.1}])
    )
    assert steps(log) == [(1, 50, 50), (1, 100, 50), (2, 150, 50)]
    assert steps(log, evaluation=True) == [(2, 150, 0)]


def test_3x_each_row_in_its_own_epoch(tmp_path):
    """[REPRO] the original puts the first row of an epoch, and so every row here, into the epoch before."""
    lines = log_3x(3)
    original = {epoch: own["step"] for epoch, own in original_rows(lines).items()}
    assert original == {1: [8, 16], 2: [24]}
    log = read_run(write_lines(tmp_path / "vis_data/scalars.json", lines))
    assert [(row.epoch, row.step) for row in log.rows] == [(1, 8), (2, 16), (3, 24)]


def test_3x_an_evaluation_counts_epochs(tmp_path):
    log = read_run(write_lines(tmp_path / "vis_data/scalars.json", log_3x(12)))
    assert steps(log, evaluation=True) == [(5, 40, 0), (10, 80, 0)]
    # The evaluation's seconds per image are not the training's.
    assert {row.values["time"] for row in log.training} == {0.3}
    assert log.plan.epoch_iterations == 8


def test_3x_by_iterations(tmp_path):
    rows = [{"loss": 1.0, "time": 0.1, "iter": step, "memory": 1, "step": step} for step in (50, 100, 150)]
    log = read_run(write_lines(tmp_path / "scalars.json", [*rows, {"coco/bbox_mAP": 0.5, "time": 1, "step": 150}]))
    assert steps(log) == [(None, 50, 50), (None, 100, 50), (None, 150, 50)]
    assert steps(log, evaluation=True) == [(None, 150, 0)]


def test_a_config_beside_a_3x_log_is_read(tmp_path):
    write_lines(tmp_path / "vis_data/scalars.json", log_3x(2))
    (tmp_path / "vis_data/config.py").write_text(
        "test_dataloader = dict(batch_size=1)\ntrain_cfg = dict(max_epochs=50)\ntrain_dataloader = dict(batch_size=6)"
    )
    assert (read_run(tmp_path).plan.epochs, read_run(tmp_path).plan.images_per_gpu) == (50, 6)


def test_a_resumed_run_is_one_run(tmp_path):
    """Crashed in epoch 3 after its evaluation of epoch 2, resumed from the checkpoint of epoch 2."""
    write_lines(tmp_path / "20210101_000000.log.json", log_2x(3)[:-1])
    write_lines(tmp_path / "20210102_000000.log.json", log_2x(2, start=3, time=0.7))
    log = read_run(tmp_path)
    assert [row.step for row in log.training] == [50, 100, 155, 205, 260, 310, 365, 415]
    assert [row.values["time"] for row in log.training] == [0.5] * 4 + [0.7] * 4
    assert (log.resumed_at, log.superseded) == ((210,), 2)
    assert (
        "resumed after iteration 210; 2 rows of before (260 to 310) were run again: the later run wins" in log.notes[0]
    )
    assert read_resumed_run(sorted(tmp_path.iterdir())).rows == log.rows


def test_a_part_without_an_evaluation_counts_alike(tmp_path):
    """The resumed file ends before its first evaluation: alone, it cannot know that an epoch has 105 iterations."""
    write_lines(tmp_path / "20210101_000000.log.json", log_2x(2))
    write_lines(tmp_path / "20210102_000000.log.json", log_2x(1, start=3)[:2])
    assert [row.step for row in read_run(tmp_path).training] == [50, 100, 155, 205, 260]


def test_a_file_that_starts_over(tmp_path):
    log = read_run(write_lines(tmp_path / "a.log.json", log_2x(2) + log_2x(1, time=0.9)))
    assert [row.values["time"] for row in log.training] == [0.9, 0.9]
    assert "starts over from the beginning; 6 rows of before are left out (name their file)" in log.notes[0]


def test_one_file_of_each_3x_start(tmp_path):
    """3.x writes the same lines into scalars.json and <time>.json."""
    for name in ("20230101_000000/vis_data/scalars.json", "20230101_000000/vis_data/20230101_000000.json"):
        write_lines(tmp_path / name, log_3x(6))
    write_lines(tmp_path / "20230102_000000/vis_data/20230102_000000.json", log_3x(2, start=6))
    log = read_run(tmp_path)
    assert [row.epoch for row in log.training] == [1, 2, 3, 4, 5, 6, 7]
    assert (log.resumed_at, log.superseded, len(log.files)) == ((40,), 1, 2)


def test_damaged_lines_are_told(tmp_path):
    path = write_lines(tmp_path / "a.log.json", log_2x(1))
    path.write_text(path.read_text() + '{"mode": "train", "epo')
    log = read_run(path)
    assert log.notes == ("a.log.json: 1 lines are no JSON objects (line 5) and are left out",)
    assert len(log.rows) == 3


def test_ultralytics(tmp_path):
    """Its padded header, cumulative time, and the row of an epoch that was run again."""
    (tmp_path / "results.csv").write_text(
        "  epoch,   time, train/box_loss, metrics/mAP50-95(B), val/box_loss, lr/pg0\n"
        "      1,   10.0,            1.5,                 0.1,          1.6,   0.01\n"
        "      2,   21.0,            1.2,                 0.2,          nan,   0.01\n"
        "      3,   30.0,            1.1,                 0.3,          1.2,   0.01\n"
        "      3,    9.0,            1.0,                0.31,          1.1,   0.01\n"
        "      4,   19.0,            0.9,                 0.4,          1.0,   0.01\n"
    )
    log = read_run(tmp_path)
    assert log.format == "ultralytics results.csv"
    assert [point.value for point in curve_of(log, "bbox_mAP").points] == [0.1, 0.2, 0.31, 0.4]
    assert [row.values["epoch_time"] for row in log.training] == pytest.approx([10, 11, 9, 10])
    assert [point.epoch for point in curve_of(log, "val/box_loss").lost] == [2]
    with pytest.raises(TrainingLogError, match="box_loss, which may be any of train/box_loss, val/box_loss"):
        curve_of(log, "box_loss")


def test_lightning(tmp_path):
    (tmp_path / "metrics.csv").write_text(
        "epoch,step,train_loss,val_loss\n0,49,1.0,\n0,99,0.9,\n0,99,,0.8\n1,149,0.7,\n1,199,,0.6\n"
    )
    log = read_run(tmp_path)
    assert steps(log) == [(1, 49, 49), (1, 99, 50), (2, 149, 50)]
    assert [(point.epoch, point.value) for point in curve_of(log, "val_loss").points] == [(1, 0.8), (2, 0.6)]
    assert log.notes == ("metrics.csv: counts epochs from 0; shown from 1",)


def test_the_checksum():
    """RFC 3720, B.4."""
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    crc = 0xE3069283
    assert masked_crc32c(b"123456789") == (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


@pytest.mark.parametrize("tensor", [None, "content", "listed"])
def test_tensorboard(tmp_path, tensor):
    """The hook of 2.x: tags train/… and val/…, both by iterations."""
    scalars = [(step, "train/loss", 1 / step) for step in (50, 100, 300)]
    scalars += [(300, "val/bbox_mAP", 0.25), (300, "learning_rate", 0.01)]
    log = read_run(event_file(tmp_path / "events.out.tfevents.1600000000.host", scalars, tensor=tensor))
    assert log.format == "TensorBoard"
    assert [(point.step, point.value) for point in curve_of(log, "loss").points] == [
        (50, pytest.approx(1 / 50)),
        (100, pytest.approx(1 / 100)),
        (300, pytest.approx(1 / 300)),
    ]
    assert curve_of(log, "bbox_mAP").evaluation
    assert steps(log) == [(None, 50, 50), (None, 100, 50), (None, 300, 200)]


def test_tensorboard_of_3x_equals_its_json(tmp_path):
    lines = log_3x(6)
    scalars = [(line["step"], tag, value) for line in lines for tag, value in line.items() if tag != "step"]
    board = read_run(event_file(tmp_path / "events.out.tfevents.1.host", scalars))
    text = read_run(write_lines(tmp_path / "scalars.json", lines))
    assert steps(board) == steps(text)
    assert steps(board, evaluation=True) == steps(text, evaluation=True) == [(5, 40, 0)]
    assert board.metrics() == text.metrics()


def test_a_cut_event_file(tmp_path):
    path = event_file(tmp_path / "events.out.tfevents.1.host", [(1, "loss", 1.0), (2, "loss", 2.0)])
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    log = read_run(path)
    assert [row.step for row in log.rows] == [1]
    assert "the file ends inside a record at byte" in log.notes[0]
    path.write_bytes(whole[:-6] + b"\xff" + whole[-5:])
    assert "a record has a wrong checksum" in read_run(path).notes[0]
    path.write_bytes(b"nothing of the kind, but long enough")
    with pytest.raises(TrainingLogError, match="got no event file of TensorBoard"):
        read_run(path)


def test_tensorboards_own_writer(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(tmp_path)
    for step in range(1, 4):
        writer.add_scalar("train/loss", 1 / step, step)
    writer.close()
    assert [point.value for point in curve_of(read_run(tmp_path), "loss").points] == pytest.approx([1, 1 / 2, 1 / 3])


REFUSED = [
    ("a.json", "", "got an empty file"),
    ("a.log", "2023-01-01 00:00:00,000 - mmdet - INFO", "got the log for people"),
    ("a.json", '{"images": [], "annotations": []}', "got JSON with annotations, images"),
    ("a.csv", "name,value\na,1\n", "got the columns name, value, expected one named epoch, step or iter"),
    ("a.txt", "hello", "got a text file"),
]


@pytest.mark.parametrize(("name", "text", "message"), REFUSED)
def test_what_is_no_log(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(TrainingLogError, match=message):
        read_run(tmp_path / name)


def test_no_log_at_all(tmp_path):
    with pytest.raises(TrainingLogError, match=r"none\.json: cannot be read: No such file"):
        read_run(tmp_path / "none.json")
    with pytest.raises(TrainingLogError, match="got a folder without a log"):
        read_run(tmp_path)


@pytest.mark.shared_data
def test_real_logs(shared_data):
    """Counted by hand in the files."""
    faster = read_run(shared_data / "logs/mmdet2x/faster_rcnn_r50_fpn_1x_coco")
    assert len(faster.files) == 2
    assert (len(faster.training), len(faster.rows)) == (3516, 3528)
    assert faster.rows[-1].step == 12 * 14659
    balloon = read_run(shared_data / "logs/mmdet3x/crazy-winds_balloon")
    assert steps(balloon, evaluation=True) == [(epoch, epoch * 8, 0) for epoch in range(5, 51, 5)]
    ear = curve_of(read_run(shared_data / "logs/mmdet3x/fuyueagain_rtmdet_ear"), "bbox_mAP")
    # Evaluated every 5 epochs, and every one of the last: intervals come from the log.
    assert [point.epoch for point in ear.points] == [*range(5, 180, 5), *range(179, 201)]
    assert all(math.isfinite(point.value) for point in ear.points)
