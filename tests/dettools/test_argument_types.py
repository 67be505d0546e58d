"""Numbers of the command line within their bounds; what is none is told with what is expected."""

import argparse

import pytest
from dettools.argument_types import at_least, between, fraction


@pytest.mark.parametrize(("read", "text", "value"), [(at_least(1), "1", 1), (fraction, "0", 0.0), (fraction, "1", 1.0)])
def test_the_bounds_are_allowed(read, text, value):
    assert read(text) == value


@pytest.mark.parametrize(
    ("read", "text", "words"),
    [
        (at_least(1), "0", "got 0, expected 1 or more"),
        (at_least(0), "few", "got few, expected 0 or more, a whole number"),
        (at_least(1), "1.5", "got 1.5, expected 1 or more"),
        (fraction, "1.01", "got 1.01, expected a number from 0 to 1"),
        (fraction, "nan", "got nan, expected a number from 0 to 1"),
        (fraction, "half", "got half, expected a number from 0 to 1"),
        (between(0.1, 1), "0.05", "got 0.05, expected a number from 0.1 to 1"),
    ],
)
def test_what_is_beyond_is_told(read, text, words):
    with pytest.raises(argparse.ArgumentTypeError, match=words):
        read(text)
