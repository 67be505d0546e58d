"""Small logs in each format, and MMDetection's own reading of them, for the tests of analyze-logs."""

import json
import struct
from collections import defaultdict

import numpy as np
from dettools.analysis.training_log_files import read_run


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def run_of(tmp_path, lines, name="a.log.json"):
    return read_run(write_lines(tmp_path / name, lines))


def log_2x(epochs, *, length=105, interval=50, time=0.5, start=1, value_iter=None, **more):
    """Lines of MMDetection 2.x: a row every `interval` iterations, an evaluation after each epoch."""
    config = "data = dict(samples_per_gpu=2)\ntotal_epochs = 12\n"
    lines = [{"env_info": "sys.platform: linux", "config": config, "seed": None, "exp_name": "x.py"}]
    for epoch in range(start, start + epochs):
        for step in range(interval, length + 1, interval):
            row = {"mode": "train", "epoch": epoch, "iter": step, "lr": 0.01, "memory": 1000 + epoch}
            lines.append(row | {"data_time": time / 4, "loss": 1 / (epoch + step / length), "time": time, **more})
        lines.append(
            {"mode": "val", "epoch": epoch, "iter": value_iter or length, "lr": 0.01, "bbox_mAP": epoch / 100}
            | {"bbox_mAP_copypaste": "0.1 0.2"}
        )
    return lines


def log_3x(epochs, *, per_epoch=1, length=8, every=5, times=None, start=1):
    """Lines of MMDetection 3.x: `per_epoch` rows an epoch, an evaluation every `every` epochs, its step the epoch."""
    lines = []
    for epoch in range(start, start + epochs):
        for row in range(1, per_epoch + 1):
            step = (epoch - 1) * length + row * length // per_epoch
            time = times[len([line for line in lines if "epoch" in line])] if times else 0.3
            lines.append({"lr": 1e-3, "data_time": 0.1, "loss": 1 / step, "time": time, "epoch": epoch, "memory": 2663})
            lines[-1]["step"] = step
        if epoch % every == 0:
            lines.append({"coco/bbox_mAP": epoch / 100, "coco/bbox_mAP_s": -1.0, "data_time": 0.2, "time": 9.0})
            lines[-1]["step"] = epoch
    return lines


def original_rows(lines):
    """What MMDetection 3.3.0 makes of the lines: epoch → name → values."""
    found = {}
    epoch = 1
    for line in lines:
        if len(line) <= 1:
            continue
        own = found.setdefault(epoch, defaultdict(list))
        late = False
        for key, value in line.items():
            if "/" in key:
                own[key.split("/")[-1]].append(value)
                late = True
            elif not late:
                own[key].append(value)
        epoch = line.get("epoch", epoch)
    return found


def original_average(lines):
    """MMDetection 3.3.0's `average iter time`: the mean of the epochs' means, each without its first value."""
    with np.errstate(invalid="ignore"):
        means = [np.mean(own["time"][1:]) if own["time"][1:] else np.nan for own in original_rows(lines).values()]
    return float(np.mean(means))


def crc32c(data):
    """The checksum bit by bit, as RFC 3720 defines it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def _masked(data):
    crc = crc32c(data)
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)


def _varint(number):
    parts = []
    while number > 127:
        parts.append(number & 127 | 128)
        number >>= 7
    return bytes([*parts, number])


def _field(number, data):
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def record(data):
    length = struct.pack("<Q", len(data))
    return length + _masked(length) + data + _masked(data)


def event(step, tag, value, *, tensor=None):
    """One event, its scalar written as TensorFlow 1 and PyTorch do, or as a tensor ("content" or "listed")."""
    if tensor == "content":
        shaped = b"\x08\x01" + _field(4, struct.pack("<f", value))
        scalar = _field(8, shaped)
    elif tensor == "listed":
        scalar = _field(8, b"\x08\x01" + _field(5, struct.pack("<f", value)))
    else:
        scalar = b"\x15" + struct.pack("<f", value)
    summary = _field(1, _field(1, tag.encode()) + scalar)
    return record(b"\x09" + struct.pack("<d", 1.6e9) + b"\x10" + _varint(step) + _field(5, summary))


def event_file(path, scalars, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    first = record(b"\x09" + struct.pack("<d", 1.6e9) + _field(3, b"brain.Event:2"))
    path.write_bytes(first + b"".join(event(step, tag, value, **options) for step, tag, value in scalars))
    return path
