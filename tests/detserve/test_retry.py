"""Waiting before a request is sent again: longer each time, never less than the server asked for, never in step."""

import time
from email.utils import formatdate

import pytest
from detserve.retry import asked_s, wait_s


def test_the_waits_grow_to_two_seconds_and_differ():
    for attempt, longest in ((1, 0.2), (2, 0.4), (3, 0.8), (4, 1.6), (5, 2.0), (50, 2.0)):
        waits = [wait_s(attempt) for _ in range(200)]
        assert longest / 2 <= min(waits) < max(waits) <= longest
        assert len(set(waits)) > 100


def test_retry_after_is_obeyed_in_both_of_its_forms():
    waits = [wait_s(1, "3") for _ in range(200)]
    assert 3.0 <= min(waits) < max(waits) <= 3.75
    assert 3.0 < asked_s(formatdate(time.time() + 5, usegmt=True)) <= 5.0


@pytest.mark.parametrize("text", [None, "", "soon", "-5", "0", "nan", formatdate(0, usegmt=True), "Mon, 99 Foo"])
def test_a_retry_after_that_asks_for_nothing(text):
    assert asked_s(text) == 0.0


@pytest.mark.parametrize(
    "text", ["86400", "inf", formatdate(time.time() + 9000, usegmt=True)], ids=["seconds", "for ever", "a date"]
)
def test_nobody_waits_for_hours(text):
    assert asked_s(text) == 30.0
