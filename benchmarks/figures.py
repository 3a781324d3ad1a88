"""Figures with targets: the target, the measured value, and the verdict."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks import memory
from benchmarks.cases import Benchmark, Figure, Row, Scale
from benchmarks.formats import error, number

HEADER = ["required figure", "setting", "target", "measured", ""]
MET, MISSED, NO_TARGET, NOT_MEASURED = "met", "MISSED", "no target", "not measured"


def settings_of(rows: Iterable[Row]) -> list[str]:
    """The allocator settings that occur, in order."""
    return list(dict.fromkeys(row.setting for row in rows))


def _value(figure: Figure, names: Sequence[str], rows: Sequence[Row], setting: str) -> float | None:
    """Of the rows measured the least value, or the value of the fastest."""
    values = [
        (row.median_ms if figure.of_fastest and row.median_ms is not None else value, value)
        for row in rows
        if row.case == figure.case and row.implementation in names and row.setting == setting
        if (value := getattr(row, figure.field)) is not None and row.status == "ok"
    ]
    return min(values)[1] if values else None


def evaluate(figure: Figure, rows: Sequence[Row], setting: str) -> tuple[float, bool] | None:
    """The figure, and whether it is only a lower bound (memory below what can be resolved); None if not measured."""
    above = _value(figure, figure.above, rows, setting)
    if figure.below is None or above is None:
        return None if above is None else (above, False)
    below = _value(figure, (figure.below,), rows, setting)
    if below is not None and figure.field.startswith("memory") and below < memory.RESOLUTION_MIB:
        return above / memory.RESOLUTION_MIB, True
    return (above / below, False) if below else None


def lines(benchmark: Benchmark, scale: Scale, rows: Sequence[Row]) -> list[list[str]]:
    """A line for each figure and allocator setting, as `HEADER` names them; figures of cases that a run of this scale
    leaves out are not among them. A quick run and an occasional measurement have none."""
    if scale.quick or (rows and rows[0].run not in ("default", "full")):
        return []
    left_out = {case.name for case in benchmark.cases(scale)} - {case.name for case in benchmark.select(scale)}
    found = []
    for figure in benchmark.figures.get(scale.device, ()):
        if figure.case in left_out:
            continue
        settings = settings_of(rows)
        judged = dict(zip(settings, figure.target, strict=False))
        for setting in settings:
            result = evaluate(figure, rows, setting)
            of_one = figure.at_most or figure.field.startswith("memory")
            if setting in judged or not (result is None or of_one):
                found.append([figure.label, setting, *_judged(figure, judged.get(setting), result)])
    return found


def _judged(figure: Figure, target: float | None, result: tuple[float, bool] | None) -> list[str]:
    """Target, measured value and verdict."""
    is_error = figure.field.startswith("error")

    def text(value: float) -> str:
        return error(value) if is_error else f"{number(value)}x" if figure.below else number(value)

    aim = "-" if target is None else f"{'≤' if figure.at_most else '≥'} {text(target)}"
    if result is None:
        return [aim, "-", NOT_MEASURED]
    measured = f"{'> ' if result[1] else ''}{text(result[0])}"
    if target is None:
        return [aim, measured, NO_TARGET]
    return [aim, measured, MET if (result[0] <= target if figure.at_most else result[0] >= target) else MISSED]


def summary(found: Sequence[Sequence[str]]) -> str:
    """One line with the numbers of targets met and missed."""
    verdicts = [line[-1] for line in found if line[-1] != NO_TARGET]
    counts = {verdict: verdicts.count(verdict) for verdict in (MET, MISSED, NOT_MEASURED) if verdict in verdicts}
    if not verdicts:
        return "No targets here."
    return f"{len(verdicts)} targets: " + ", ".join(f"{count} {verdict}" for verdict, count in counts.items()) + "."
