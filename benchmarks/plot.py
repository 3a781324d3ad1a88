"""The pictures: bars of time and memory with ratios, curves over points and image size, and stages stacked."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases import REST, Benchmark, Row
from benchmarks.formats import mebibytes, number
from benchmarks.memory import RESOLUTION_MIB

_OURS, _OURS_OTHERS = "#d1495b", ("#e8a0aa", "#8c2f3d", "#e9a23b", "#f3d6a4", "#4a1942")
_PEERS = ("#30638e", "#8fb8de", "#7a9e7e", "#b8b8d1", "#9a8c98", "#c9c9c9", "#5f6c7b", "#1b998b", "#2d3142")
_BAR = 0.8
#: Fields of `Row` that are drawn.
UNITS = {"median_ms": "ms", "memory_extra_mib": "MiB"}


def _pyplot() -> Any:
    """matplotlib without a display, in the style of all pictures here."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.titlesize": 11, "axes.titlelocation": "left", "legend.frameon": False})
    return plt


def _saved(figure: Any, path: Path) -> list[str]:
    figure.savefig(path, dpi=130)
    _pyplot().close(figure)
    return [path.name]


def _bare(axes: Any, *sides: str) -> None:
    axes.spines[list(sides)].set_visible(False)
    axes.tick_params(labelsize=8, colors="#555555")


def _colours(rows: Sequence[Row]) -> dict[str, str]:
    """A colour for each implementation, this package's red and yellow; no two have one colour."""
    names = {row.implementation: row.ours for row in rows}
    ours, peers = ([name for name, own in names.items() if own is kind] for kind in (True, False))
    colours = dict(zip(ours, (_OURS, *_OURS_OTHERS), strict=False)) | dict(zip(peers, _PEERS, strict=False))
    return {name: colours[name] for name in names}


def _groups(rows: Sequence[Row], gap: float) -> Iterator[tuple[str, list[tuple[float, Row]]]]:
    """Yields each case and its rows with their places on the axis."""
    start = 0.0
    for case in dict.fromkeys(row.case for row in rows):
        group = [row for row in rows if row.case == case]
        yield case, [(start + i, row) for i, row in enumerate(group)]
        start += len(group) + gap


def _horizontal(axes: Any, ticks: Sequence[tuple[float, str]], end: float, title: str, unit: str) -> None:
    """Axes of horizontal bars, the first on top."""
    axes.set_yticks(*zip(*ticks, strict=True), fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, end or 1)
    axes.set_title(title)
    axes.set_xlabel(unit, fontsize=9)
    _bare(axes, "top", "right", "left")
    axes.tick_params(axis="y", length=0, labelsize=9, colors="black")


def _panel(axes: Any, rows: Sequence[Row], title: str, field: str, colours: dict[str, str]) -> None:
    """Horizontal bars grouped by case; every bar carries its value and its ratio to the case's first row."""
    unit = UNITS[field]
    text, least = (number, 0.0) if unit == "ms" else (mebibytes, RESOLUTION_MIB)
    ticks, longest = [], 0.0
    for case, group in _groups(rows, 0.7):
        (begin, head), (end, _) = group[0], group[-1]
        first = getattr(head, field)
        for position, row in group:
            measured = getattr(row, field)
            if measured is None:
                axes.text(0, position, f" {row.implementation}: {row.status}", va="center", fontsize=8, color="#777777")
                continue
            axes.barh(position, measured, _BAR, color=colours[row.implementation])
            related = first and row is not head and min(first, measured) >= least
            label = f" {text(measured)} {unit}" + (f"  {measured / first:.1f}x" if related else "")
            weight = "bold" if row is head else "normal"
            axes.text(measured, position, label, va="center", fontsize=8, weight=weight)
            longest = max(longest, measured)
        ticks.append(((begin + end) / 2, case.replace(" forward", "\nforward", 1)))
        if unit == "ms" and head.floor_ms is not None:
            axes.plot([head.floor_ms] * 2, [begin - 0.5, end + 0.5], color="#999999", lw=1, ls=":", zorder=0)
    _horizontal(axes, ticks, longest * 1.32, title, unit)


def _title(what: str, setting: str) -> str:
    """The allocator is named where there are several, which is on a CPU."""
    return what if setting == "cuda" else f"{what}, allocator: {setting}"


def draw(directory: Path, benchmark: Benchmark, rows: Sequence[Row], facts: dict[str, str]) -> list[str]:
    """Draw the headline cases to `<op>.png`; returns its name where there was anything to draw."""
    headline = {row.case for row in rows if row.headline}
    shown = [row for row in rows if row.case in headline]
    if not any(row.median_ms for row in shown):
        return []
    from matplotlib.patches import Patch

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
    figure, axes = _pyplot().subplots(
        len(panels), 1, figsize=(8, 1.2 + sum(heights)), height_ratios=heights, squeeze=False, layout="constrained"
    )
    for axis, panel in zip(axes[:, 0], panels, strict=True):
        _panel(axis, *panel, colours)
    handles = [Patch(color=colour) for colour in colours.values()]
    figure.legend(handles, colours, loc="outside lower center", ncols=min(3, len(colours)), fontsize=9)
    figure.suptitle(f"{benchmark.title} on {facts['device']}, torch {facts['torch']}", fontsize=11, weight="bold")
    return _saved(figure, directory / f"{benchmark.op}.png")


# ---------------------------------------------------------------- curves


def _curve(
    axis: Any, rows: Sequence[Row], of: Callable[[Row], int], what: str, field: str, colours: dict[str, str]
) -> bool:
    """A line per implementation over `of` a row, in the first allocator setting; the highest carries at its end how
    many times the lowest it is. False, and nothing drawn, where nothing was measured."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in sorted(rows, key=of):
        if row.setting == rows[0].setting and getattr(row, field) is not None:
            lines.setdefault(row.implementation, []).append((of(row), getattr(row, field)))
    for name, points in lines.items():
        axis.plot(*zip(*points, strict=True), marker="o", ms=4, color=colours[name], label=name)
    ticks = sorted({x for points in lines.values() for x, _ in points})
    ends = [y for points in lines.values() for x, y in points if x == ticks[-1]]
    if len(ends) > 1 and min(ends) > 0:
        axis.annotate(f" {max(ends) / min(ends):.1f}x", (ticks[-1], max(ends)), fontsize=9, weight="bold", va="center")
    axis.set_ylim(bottom=0)
    axis.margins(x=0.12)
    axis.set_xticks(ticks, map(str, ticks))
    axis.minorticks_off()
    axis.set(xlabel=what, ylabel=UNITS[field])
    _bare(axis, "top", "right")
    return bool(lines)


def draw_points(
    directory: Path, curve: Sequence[Row], whole: Sequence[Row], points: Callable[[Row], int], case: str
) -> list[str]:
    """Time and peak memory of the loss over the number of points K, and where full masks are.

    Args:
        curve: rows at other numbers of points.
        whole: rows of the case at the usual number, `case`.
        points: of a row.
    """
    names = {row.implementation for row in curve}
    curve = [*curve, *(row for row in whole if row.implementation in names)]
    others = [row for row in whole if row.implementation not in names and not row.ours]
    figure, axes = _pyplot().subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    colours = _colours([*curve, *whole])
    titles = (f"{case[0].upper()}{case[1:]}, forward + backward", "Peak memory above inputs and outputs")
    for axis, title, (field, unit) in zip(axes, titles, UNITS.items(), strict=True):
        axis.set_title(title)
        axis.set_xscale("log", base=4)
        if not _curve(axis, curve, points, "points K", field, colours):
            axis.set_axis_off()
            continue
        known = {row.implementation: getattr(row, field) for row in others if getattr(row, field) is not None}
        # A line far above would flatten all others.
        near = [name for name, measured in known.items() if measured <= 1.5 * axis.get_ylim()[1]]
        for name in near:
            axis.axhline(known[name], color=colours[name], ls="--", lw=1.2, label=name)
        note = "\n".join(f"beyond: {name}: {number(known[name])} {unit}" for name in known if name not in near)
        axis.text(0.02, 0.98, note, transform=axis.transAxes, va="top", fontsize=8)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return _saved(figure, directory / "point_loss_curve.png")


def draw_sizes(directory: Path, rows: Sequence[Row], side: Callable[[Row], int], title: str) -> list[str]:
    """Time over the side of the image.

    Args:
        rows: the cases of one curve, all sizes and implementations.
        side: of a row's image, in pixels.
    """
    if len({side(row) for row in rows}) < 2:
        return []
    figure, axis = _pyplot().subplots(figsize=(5.4, 3.8), layout="constrained")
    _curve(axis, rows, side, "side of the image, pixels", "median_ms", _colours(rows))
    axis.set_title(title)
    axis.legend()
    return _saved(figure, directory / "end_to_end_sizes.png")


# ---------------------------------------------------------------- stages

STAGES = ("#30638e", "#8fb8de", "#d1495b", "#e0a458", "#cfcfcf")


def draw_stages(directory: Path, rows: Sequence[Row]) -> list[str]:
    """Draws the stages of each call as a stacked bar, this package below its peer; returns the files' names."""
    shown = [r for r in rows if r.headline and r.stages and r.median_ms and r.setting == rows[0].setting]
    if not shown:
        return []
    figure, axis = _pyplot().subplots(figsize=(9, 1.4 + 0.42 * len(shown)), layout="constrained")
    groups = _groups(sorted(shown, key=lambda row: row.ours), 0.6)  # before and after
    places, shown = zip(*[pair for _, group in groups for pair in group], strict=True)
    parts = [row.stage_ms | {REST: row.rest_ms} for row in shown]
    longest, left = max(row.median_ms for row in shown), [0.0] * len(shown)
    stages = [*dict.fromkeys(stage for row in shown for stage in row.stage_ms), REST]
    for stage, colour in zip(stages, STAGES, strict=False):
        widths = [part.get(stage, 0.0) for part in parts]
        bars = axis.barh(places, widths, _BAR, left=left, color=colour, label=stage)
        texts = [number(width) if width > 0.06 * longest else "" for width in widths]
        axis.bar_label(bars, texts, label_type="center", fontsize=8)
        left = [x + width for x, width in zip(left, widths, strict=True)]
    for place, row, end in zip(places, shown, left, strict=True):
        axis.text(
            end, place, f" {number(row.median_ms)} ms", va="center", fontsize=8, weight="bold" if row.ours else None
        )
    ticks = [(place, f"{row.case}, {row.implementation}") for place, row in zip(places, shown, strict=True)]
    _horizontal(axis, ticks, longest * 1.15, _title("Where the time goes", shown[0].setting), "ms")
    figure.legend(loc="outside lower center", ncols=len(stages))
    return _saved(figure, directory / "end_to_end_stages.png")


# ---------------------------------------------------------------- training

#: Steps over which a curve is averaged before curves are compared and drawn.
WINDOW = 50


def smooth(values: Sequence[float]) -> list[float]:
    """The mean of every full window."""
    return [statistics.fmean(values[i : i + WINDOW]) for i in range(0, len(values) - WINDOW + 1, WINDOW)]


def draw_learning(directory: Path, curves: dict[str, list[float]]) -> list[str]:
    """Draws losses over steps and over seconds, of curves named "<backend>_loss" and "<backend>_seconds"."""
    figure, panels = _pyplot().subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
    backends = [name.removesuffix("_loss") for name in curves if name.endswith("_loss")]
    for backend, colour in zip(backends, (_OURS, _PEERS[0]), strict=False):
        losses, seconds = smooth(curves[f"{backend}_loss"]), curves[f"{backend}_seconds"]
        steps = [WINDOW * (i + 1) for i in range(len(losses))]
        panels[0].plot(steps, losses, color=colour, label=backend)
        panels[1].plot([sum(seconds[:step]) for step in steps], losses, color=colour)
    for axes, label in zip(panels, ("step", "seconds"), strict=True):
        axes.set_xlabel(label)
        _bare(axes, "top", "right")
    panels[0].set_ylabel(f"training loss, mean of {WINDOW} steps")
    panels[0].legend()
    return _saved(figure, directory / "learning.png")
