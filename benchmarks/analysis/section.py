"""A benchmark's own section of a page: it replaces the one of the same title and keeps the others."""

import platform
import statistics
from collections.abc import Sequence
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent / "ANALYSIS.md"
HEAD = (
    "# The analysis commands beside the original algorithms\n\nEach section is written by its program in `analysis/`.\n"
)


def write_section(title: str, lines: Sequence[str], page: Path | None = None, head: str = HEAD) -> None:
    """Write a section below ``## title`` of a page (default: ANALYSIS.md); ``head`` begins a new one."""
    page = page or PAGE
    sections = page.read_text(encoding="utf-8").split("\n## ") if page.exists() else [head]
    body = "\n".join([title, "", *lines]).rstrip() + "\n"
    place = next((at for at, one in enumerate(sections) if at and one.partition("\n")[0] == title), None)
    if place is None:
        sections.append(body)
    else:
        sections[place] = body
    page.write_text("\n## ".join(one.rstrip("\n") + "\n" for one in sections), encoding="utf-8")


def spread(values: Sequence[float], unit: str, digits: int = 2) -> str:
    """Return the median with the smallest and the largest."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}{unit}"
    return f"{statistics.median(values):.{digits}f}{unit} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def machine() -> str:
    """Return the line that says what it was measured on."""
    name = platform.processor() or platform.machine()
    cpu = Path("/proc/cpuinfo")
    if cpu.exists():
        models = [
            line.partition(":")[2].strip() for line in cpu.read_text().splitlines() if line.startswith("model name")
        ]
        name = models[0] if models else name
    return f"Measured on: {name}, Python {platform.python_version()}, one thread of ours at a time."
