"""The scalars of TensorBoard's event files, read without TensorBoard or TensorFlow.

A file is a row of records, each `length (8 bytes), its checksum (4), data, checksum of the data (4)`; the data is one
protobuf `Event`. Only the fields of it that carry scalars are declared here, with the numbers that they have in
TensorFlow's event.proto, summary.proto and tensor.proto.
"""

import struct
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from dettools.analysis.training_log import Row, Segment, TrainingLogError
from dettools.analysis.training_log_csv import is_evaluation
from dettools.analysis.training_log_mmdet import segment_3x

_HEADER, _FOOTER = 12, 4
# Pictures and graphs are never scalars: their checksums need not be computed, byte after byte.
_LONGEST_CHECKED = 1 << 16
_CASTAGNOLI = 0x82F63B78


class Scalar(NamedTuple):
    """One logged value."""

    tag: str
    step: int
    value: float


def segment_tensorboard(path: Path, data: bytes) -> Segment:
    """Return the rows of an event file, of MMDetection 3.x by its own counting, of others by step.

    Raises:
        TrainingLogError: it is no event file.
    """
    scalars, notes = read_scalars(path, data)
    if any(one.tag == "epoch" for one in scalars):
        return segment_3x(path, _lines(scalars), notes, form="TensorBoard (MMDetection 3.x)")
    by_step: dict[int, dict[str, float]] = {}
    for one in scalars:
        by_step.setdefault(one.step, {})[one.tag] = one.value
    rows: list[Row] = []
    before = 0
    for step, values in sorted(by_step.items()):
        trained = {tag: value for tag, value in values.items() if not is_evaluation(tag)}
        if trained:
            rows.append(Row(step, None, trained, iterations=step - before))
            before = step
        if evaluated := {tag: value for tag, value in values.items() if tag not in trained}:
            rows.append(Row(step, None, evaluated, evaluation=True))
    return Segment(path, "TensorBoard", tuple(rows), notes=notes)


def read_scalars(path: Path, data: bytes) -> tuple[list[Scalar], tuple[str, ...]]:
    """Return the scalars in the order of writing, and what is wrong with the file's end.

    Raises:
        TrainingLogError: it is no event file.
    """
    event = _event_class()
    found: list[Scalar] = []
    try:
        for record in _records(data):
            message = event.FromString(record)
            for value in message.summary.value:
                number = _number(value)
                if number is not None:
                    found.append(Scalar(value.tag, int(message.step), number))
    except _DamagedError as damage:
        if damage.offset == 0:
            raise TrainingLogError(f"{path}: got no event file of TensorBoard: {damage}") from None
        return found, (f"{path.name}: {damage} at byte {damage.offset} of {len(data)}: what follows is left out",)
    return found, ()


class _DamagedError(Exception):
    def __init__(self, what: str, offset: int) -> None:
        super().__init__(what)
        self.offset = offset


def _records(data: bytes) -> Iterator[bytes]:
    offset = 0
    while offset < len(data):
        if offset + _HEADER > len(data):
            raise _DamagedError("the file ends inside a record", offset)
        length, checksum = struct.unpack_from("<QI", data, offset)
        if masked_crc32c(data[offset : offset + 8]) != checksum:
            raise _DamagedError("a record's length has a wrong checksum", offset)
        start, end = offset + _HEADER, offset + _HEADER + length
        if end + _FOOTER > len(data):
            raise _DamagedError("the file ends inside a record", offset)
        record = data[start:end]
        if length <= _LONGEST_CHECKED and masked_crc32c(record) != struct.unpack_from("<I", data, end)[0]:
            raise _DamagedError("a record has a wrong checksum", offset)
        yield record
        offset = end + _FOOTER


def masked_crc32c(data: bytes) -> int:
    """Return the checksum of TFRecord files: CRC-32C (RFC 3720), rotated and offset so that it can be nested."""
    table = _crc_table()
    crc = 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


@cache
def _crc_table() -> tuple[int, ...]:
    table = []
    for number in range(256):
        for _ in range(8):
            number = (number >> 1) ^ (_CASTAGNOLI if number & 1 else 0)
        table.append(number)
    return tuple(table)


def _number(value: Any) -> float | None:
    """Return a scalar that is written as such, or as a tensor of one number, as TensorFlow 2 does."""
    if value.HasField("simple_value"):
        return float(value.simple_value)
    if not value.HasField("tensor"):
        return None
    tensor = value.tensor
    for listed in (tensor.float_val, tensor.double_val):
        if len(listed) == 1:
            return float(listed[0])
    kind = {1: "<f", 2: "<d"}.get(tensor.dtype)
    if kind and len(tensor.tensor_content) == struct.calcsize(kind):
        return float(struct.unpack(kind, tensor.tensor_content)[0])
    return None


@cache
def _event_class() -> Any:
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="detserve/scalars.proto", package="detserve", syntax="proto2")

    def declare(name: str, *fields: tuple[str, int, int, bool, str]) -> None:
        message = file.message_type.add(name=name)
        for field, number, kind, repeated, type_name in fields:
            label = kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL
            named = {"type_name": f".detserve.{type_name}"} if type_name else {}
            message.field.add(name=field, number=number, type=kind, label=label, **named)

    declare(
        "Tensor",
        ("dtype", 1, kinds.TYPE_INT32, False, ""),
        ("tensor_content", 4, kinds.TYPE_BYTES, False, ""),
        ("float_val", 5, kinds.TYPE_FLOAT, True, ""),
        ("double_val", 6, kinds.TYPE_DOUBLE, True, ""),
    )
    declare(
        "Value",
        ("tag", 1, kinds.TYPE_STRING, False, ""),
        ("simple_value", 2, kinds.TYPE_FLOAT, False, ""),
        ("tensor", 8, kinds.TYPE_MESSAGE, False, "Tensor"),
    )
    declare("Summary", ("value", 1, kinds.TYPE_MESSAGE, True, "Value"))
    declare(
        "Event",
        ("wall_time", 1, kinds.TYPE_DOUBLE, False, ""),
        ("step", 2, kinds.TYPE_INT64, False, ""),
        ("summary", 5, kinds.TYPE_MESSAGE, False, "Summary"),
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("detserve.Event"))


def _lines(scalars: list[Scalar]) -> list[dict[str, float]]:
    """Return one line per call of MMDetection's logger, which writes a line's values one after the other."""
    lines: list[dict[str, float]] = []
    for one in scalars:
        line = lines[-1] if lines else None
        if line is None or line["step"] != one.step or one.tag in line or ("/" in one.tag and "epoch" in line):
            line = {"step": one.step}
            lines.append(line)
        line[one.tag] = one.value
    return lines
