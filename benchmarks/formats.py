"""Formatting of measured numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from benchmarks.measure import RESOLUTION_MIB


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits without an exponent; a dash for nothing."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    decimals = max(0, digits - len(str(int(abs(value)))) if abs(value) >= 1 else digits)
    return f"{value:.{decimals}f}"


def mebibytes(value: float | None) -> str:
    """A measured amount of memory; what is below the resolution of the method is not stated to the byte."""
    small = value is not None and value < RESOLUTION_MIB
    return f"< {RESOLUTION_MIB:.0f}" if small else number(value)


def error(value: float | None) -> str:
    """An error, or a share that is next to nothing."""
    return "-" if value is None or math.isnan(value) else "0" if value == 0 else f"{value:.1e}"


def markdown(header: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    out = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(out + ["| " + " | ".join(str(cell).replace("|", "/") for cell in line) + " |" for line in lines])
