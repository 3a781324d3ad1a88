"""The pictures: bars of time and memory with ratios, curves over points and image size, and stages stacked."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from benchmarks.cases import REST, Benchmark, Row
from benchmarks.formats import mebibytes, number
from benchmarks.measure import RESOLUTION_MIB

_OURS, _OURS_OTHERS = "#d1495b", ("#e8a0aa", "#8c2f3d", "#e9a23b", "#f3d6a4", "#4a1942")
_PEERS = ("#30638e", "#8fb8de", "#7a9e7e", "#b8b8d1", "#9a8c98", "#c9c9c9", "#5f6c7b", "#1b998b", "#2d3142")
_STYLE = {"font.size": 9, "axes.titlesize": 11, "axes.titlelocation": "left", "legend.frameon": False}
_BAR = 0.8
#: Fields of `Row` that are drawn.
UNITS = {"median_ms": "ms", "memory_extra_mib": "MiB"}


@contextmanager
def _picture(path: Path, rows: int, columns: int, size: tuple[float, float], **options: Any) -> Iterator[Any]:
    """A figure and its axes [rows, columns], which are saved when they are drawn."""
    with rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        yield figure, figure.subplots(rows, columns, squeeze=False, **options)
        figure.savefig(path, dpi=130)


def _bare(axes: Any, *sides: str) -> None:
    axes.spines[list(sides)].set_visible(False)
    axes.tick_params(labelsize=8, colors="#555555")


def _colours(rows: Sequence[Row]) -> dict[str, str]:
    """A colour for each implementation, this package's red and yellow; no two have one colour."""
    left = {True: iter((_OURS, *_OURS_OTHERS)), False: iter(_PEERS)}
    return {name: next(left[ours]) for name, ours in {row.implementation: row.ours for row in rows}.items()}


def _groups(rows: Sequence[Row], gap: float) -> Iterator[tuple[str, list[tuple[float, Row]]]]:
    """Yields each case and its rows with their places on the axis."""
    start = 0.0
    for case in dict.fromkeys(row.case for row in rows):
        group = [row for row in rows if row.case == case]
        yield case, [(start + i, row) for i, row in enumerate(group)]
        start += len(group) + gap


def _horizontal(axes: Any, ticks: Sequence[tuple[float, str]], end: float, title: str, unit: str) -> None:
    """Axes of horizontal bars, the first on top."""
    axes.set_yticks(*zip(*ticks, strict=True))
    axes.invert_yaxis()
    axes.set(xlim=(0, end or 1), title=title, xlabel=unit)
    _bare(axes, "top", "right", "left")
    axes.tick_params(axis="y", length=0, labelsize=9, colors="black")


def _panel(axes: Any, rows: Sequence[Row], title: str, field: str, colours: dict[str, str]) -> None:
    """Horizontal bars grouped by case; every bar carries its value and its ratio to the case's first row."""
    unit = UNITS[field]
    text, least = (number, 0.0) if unit == "ms" else (mebibytes, RESOLUTION_MIB)
    ticks, longest = [], max(getattr(row, field) or 0.0 for row in rows)
    for case, group in _groups(rows, 0.7):
        (begin, head), (end, _) = group[0], group[-1]
        first = getattr(head, field)
        for position, row in group:
            measured = getattr(row, field)
            label, style = f" {row.implementation}: {row.status}", {"color": "#777777"}
            if measured is not None:
                axes.barh(position, measured, _BAR, color=colours[row.implementation])
                related = first and row is not head and min(first, measured) >= least
                label = f" {text(measured)} {unit}" + (f"  {measured / first:.1f}x" if related else "")
                style = {"weight": "bold" if row is head else "normal"}
            axes.text(measured or 0, position, label, va="center", fontsize=8, **style)
        ticks.append(((begin + end) / 2, case.replace(" forward", "\nforward", 1)))
        if unit == "ms" and head.floor_ms is not None:
            axes.vlines(head.floor_ms, begin - 0.5, end + 0.5, color="#999999", lw=1, ls=":", zorder=0)
    _horizontal(axes, ticks, longest * 1.32, title, unit)


def _title(what: str, setting: str) -> str:
    """The allocator is named where there are several, which is on a CPU."""
    return what if setting == "cuda" else f"{what}, allocator: {setting}"


def draw(directory: Path, benchmark: Benchmark, rows: Sequence[Row], facts: dict[str, str]) -> list[str]:
    """Draw the headline cases to `<op>.png`; returns its name where there was anything to draw."""
    shown = [row for row in rows if row.headline]
    if not any(row.median_ms for row in shown):
        return []
    panels = []
    for setting in dict.fromkeys(row.setting for row in shown):
        chosen = [row for row in shown if row.setting == setting]
        floor = " (dotted: floor)" if any(row.floor_ms is not None for row in chosen) else ""
        panels.append((chosen, f"{_title('Time', setting)}{floor}", "median_ms"))
    if memory := [row for row in shown if row.memory_extra_mib is not None]:
        what = "weights" if benchmark.peak else "inputs and outputs"
        panels.append((memory, f"Peak memory above {what}", "memory_extra_mib"))
    heights, colours = [1.0 + 0.24 * len(chosen) for chosen, *_ in panels], _colours(shown)
    # One panel below the other, as wide as a page, so that the text is legible at the size shown there.
    path, size = directory / f"{benchmark.op}.png", (8, 1.2 + sum(heights))
    with _picture(path, len(panels), 1, size, height_ratios=heights) as (figure, axes):
        for axis, panel in zip(axes[:, 0], panels, strict=True):
            _panel(axis, *panel, colours)
        handles = [Patch(color=colour) for colour in colours.values()]
        figure.legend(handles, colours, loc="outside lower center", ncols=min(3, len(colours)))
        figure.suptitle(f"{benchmark.title} on {facts['device']}, torch {facts['torch']}", fontsize=11, weight="bold")
    return [path.name]


# ---------------------------------------------------------------- curves


def draw_curves(
    path: Path,
    rows: Sequence[Row],
    of: Callable[[Row], int],
    what: str,
    titles: Mapping[str, str],
    across: Sequence[Row] = (),
    log: bool = False,
) -> list[str]:
    """Draws a line per implementation, in the first allocator setting; returns the file's name where there is a curve.

    The highest line carries at its end how many times the lowest it is. Nothing is shown where nothing was measured.

    Args:
        rows: the cases of one curve, all implementations.
        of: the number that `rows` are drawn over, of a row.
        what: that number's name.
        titles: by the field of `Row` that is drawn.
        across: rows that have no such number: lines across the picture.
        log: whether both axes are logarithmic.
    """
    if len({of(row) for row in rows}) < 2:
        return []
    colours = _colours([*rows, *across])
    with _picture(path, 1, len(titles), (5.2 * len(titles), 3.8)) as (figure, axes):
        for axis, (field, title) in zip(axes[0], titles.items(), strict=True):
            lines: dict[str, dict[int, float]] = {}
            for row in sorted(rows, key=of):
                if row.setting == rows[0].setting and getattr(row, field) is not None:
                    lines.setdefault(row.implementation, {})[of(row)] = getattr(row, field)
            for name, points in lines.items():
                axis.plot(points.keys(), points.values(), marker="o", ms=4, color=colours[name], label=name)
            for row in across:
                if row.setting == rows[0].setting and getattr(row, field) is not None:
                    options = {"color": colours[row.implementation], "label": row.implementation}
                    axis.axhline(getattr(row, field), ls="--", lw=1.2, **options)
            ticks = sorted({x for points in lines.values() for x in points})
            ends = [points[ticks[-1]] for points in lines.values() if ticks[-1] in points]
            if len(ends) > 1 and min(ends) > 0:
                axis.annotate(f" {max(ends) / min(ends):.1f}x", (ticks[-1], max(ends)), weight="bold", va="center")
            axis.set(title=title, xmargin=0.12, xlabel=what, ylabel=UNITS[field], visible=bool(lines))
            if log:
                axis.set_yscale("log")
                axis.set_xscale("log", base=4)
            else:
                axis.set_ylim(0)
            axis.set_xticks(ticks, map(str, ticks))
            axis.minorticks_off()
            _bare(axis, "top", "right")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return [path.name]


# ---------------------------------------------------------------- stages

STAGES = ("#30638e", "#8fb8de", "#d1495b", "#e0a458", "#cfcfcf")


def draw_stages(directory: Path, rows: Sequence[Row]) -> list[str]:
    """Draws the stages of each call as a stacked bar, this package below its peer; returns the files' names."""
    shown = [r for r in rows if r.headline and r.stages and r.median_ms and r.setting == rows[0].setting]
    if not shown:
        return []
    groups = _groups(sorted(shown, key=lambda row: row.ours), 0.6)  # before and after
    places, shown = zip(*[pair for _, group in groups for pair in group], strict=True)
    stages = [*dict.fromkeys(stage for row in shown for stage in row.stage_ms), REST]
    longest, left = max(row.median_ms for row in shown), [0.0] * len(shown)
    path = directory / "end_to_end_stages.png"
    with _picture(path, 1, 1, (9, 1.4 + 0.42 * len(shown))) as (figure, axes):
        for stage, colour in zip(stages, STAGES, strict=False):
            widths = [(row.stage_ms | {REST: row.rest_ms}).get(stage, 0.0) for row in shown]
            bars = axes[0, 0].barh(places, widths, _BAR, left=left, color=colour, label=stage)
            texts = [number(width) if width > 0.06 * longest else "" for width in widths]
            axes[0, 0].bar_label(bars, texts, label_type="center", fontsize=8)
            left = [x + width for x, width in zip(left, widths, strict=True)]
        totals = [f" {number(row.median_ms)} ms" for row in shown]
        axes[0, 0].bar_label(bars, totals, fontsize=8, weight="bold")
        ticks = [(place, f"{row.case}, {row.implementation}") for place, row in zip(places, shown, strict=True)]
        _horizontal(axes[0, 0], ticks, longest * 1.15, _title("Where the time goes", shown[0].setting), "ms")
        figure.legend(loc="outside lower center", ncols=len(stages))
    return [path.name]


# ---------------------------------------------------------------- training

#: Steps over which a curve is averaged before curves are compared and drawn.
WINDOW = 50


def smooth(values: Sequence[float]) -> list[float]:
    """The mean of every full window."""
    return [statistics.fmean(values[i : i + WINDOW]) for i in range(0, len(values) - WINDOW + 1, WINDOW)]


def draw_learning(directory: Path, curves: dict[str, list[float]]) -> list[str]:
    """Draws losses over steps and over seconds, of curves named "<backend>_loss" and "<backend>_seconds"."""
    path = directory / "learning.png"
    with _picture(path, 1, 2, (10, 3.6), sharey=True) as (_, ((left, right),)):
        backends = [name.removesuffix("_loss") for name in curves if name.endswith("_loss")]
        for backend, colour in zip(backends, (_OURS, _PEERS[0]), strict=False):
            losses, seconds = smooth(curves[f"{backend}_loss"]), curves[f"{backend}_seconds"]
            steps = [WINDOW * (i + 1) for i in range(len(losses))]
            left.plot(steps, losses, color=colour, label=backend)
            right.plot([sum(seconds[:step]) for step in steps], losses, color=colour)
        left.set(xlabel="step", ylabel=f"training loss, mean of {WINDOW} steps")
        right.set(xlabel="seconds")
        for axes in (left, right):
            _bare(axes, "top", "right")
        left.legend()
    return [path.name]
