"""Numbers on a command line, within their bounds: argparse's ``type`` for the commands.

argparse alone takes any number, and says of words only that their type is wrong.
"""

import argparse
import math
from collections.abc import Callable


def at_least(least: int) -> Callable[[str], int]:
    """Return what reads a whole number that is not below ``least``."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"got {text}, expected {least} or more, a whole number")
        return value

    return read


def between(least: float, most: float) -> Callable[[str], float]:
    """Return what reads a number from ``least`` to ``most``, both allowed."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"got {text}, expected a number from {least:g} to {most:g}")
        return value

    return read


fraction = between(0, 1)
