"""The picture of an operator: bars of time with ratios per allocator setting, and bars of peak memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases import Benchmark, Row
from benchmarks.formats import mebibytes, number
from benchmarks.memory import RESOLUTION_MIB

_OURS, _OURS_OTHER = "#d1495b", "#e8a0aa"
_PEERS = ("#30638e", "#8fb8de", "#7a9e7e", "#b8b8d1", "#9a8c98", "#c9a66b", "#5f6c7b")
_BAR = 0.8


def _colours(rows: Sequence[Row]) -> dict[str, str]:
    colours: dict[str, str] = {}
    for row in rows:
        if row.implementation not in colours:
            if row.ours:
                colours[row.implementation] = _OURS if not any(r in (_OURS,) for r in colours.values()) else _OURS_OTHER
            else:
                used = sum(c in _PEERS for c in colours.values())
                colours[row.implementation] = _PEERS[used % len(_PEERS)]
    return colours


def _panel(
    axes: Any,
    rows: Sequence[Row],
    title: str,
    value: Callable[[Row], float | None],
    unit: str,
    colours: dict[str, str],
) -> None:
    """Horizontal bars grouped by case; every bar carries its value and its ratio to the case's first row."""
    position, ticks, labels, longest = 0.0, [], [], 0.0
    for case in dict.fromkeys(row.case for row in rows):
        group = [row for row in rows if row.case == case]
        first = value(group[0])
        start = position
        for row in group:
            measured = value(row)
            if measured is None:
                axes.text(0, position, f" {row.implementation}: {row.status}", va="center", fontsize=8, color="#777777")
            else:
                axes.barh(position, measured, _BAR, color=colours[row.implementation])
                ratio = f"  {measured / first:.1f}x" if first and row is not group[0] else ""
                label = f" {number(measured)} {unit}{ratio}"
                if unit == "MiB":
                    label = f" {mebibytes(measured)} MiB" + (
                        ratio if first and min(first, measured) >= RESOLUTION_MIB else ""
                    )
                weight = "bold" if row is group[0] else "normal"
                axes.text(measured, position, label, va="center", fontsize=8, weight=weight)
                longest = max(longest, measured)
            position += 1
        ticks.append((start + position - 1) / 2)
        labels.append(case.replace(" forward", "\nforward", 1))
        if unit == "ms" and group[0].floor_ms is not None:
            axes.plot([group[0].floor_ms] * 2, [start - 0.5, position - 0.5], color="#999999", lw=1, ls=":", zorder=0)
        position += 0.7
    axes.set_yticks(ticks, labels, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, longest * 1.32 if longest else 1)
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8, colors="#777777")


def draw(path: Path, benchmark: Benchmark, rows: Sequence[Row], facts: dict[str, str]) -> bool:
    """Draw the headline cases; returns whether there was anything to draw."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    headline = {case for case in (row.case for row in rows) if any(r.headline and r.case == case for r in rows)}
    shown = [row for row in rows if row.case in headline]
    settings = list(dict.fromkeys(row.setting for row in shown))
    memory = [row for row in rows if row.memory_extra_mib is not None]
    if not any(row.median_ms for row in shown):
        return False
    panels = len(settings) + bool(memory)
    height = 1.6 + 0.3 * max(sum(row.setting == s for row in shown) for s in settings)
    size = (5.4 * panels, max(4.0, height))
    figure, axes = plt.subplots(1, panels, figsize=size, squeeze=False, layout="constrained")
    colours = _colours([*shown, *memory])
    for panel, setting in zip(axes[0], settings, strict=False):
        chosen = [row for row in shown if row.setting == setting]
        title = f"Time, allocator: {setting} (dotted: floor)"
        _panel(panel, chosen, title, lambda row: row.median_ms, "ms", colours)
    if memory:
        title = "Peak memory above inputs and outputs"
        _panel(axes[0][-1], memory, title, lambda row: row.memory_extra_mib, "MiB", colours)
    handles = [Patch(color=colour) for colour in colours.values()]
    figure.legend(handles, colours, loc="outside lower center", ncols=min(4, len(colours)), frameon=False, fontsize=9)
    figure.suptitle(f"{benchmark.title} on {facts['device']}, torch {facts['torch']}", fontsize=13, weight="bold")
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True
