"""Estimates the duration of a run from the times of an earlier one: `python -m benchmarks.budget CSV... [--full]`.

It adds timed calls and one call per peak of memory. Other work (inputs, float64 references, starting processes) is not
in a CSV. The wall time of each phase is among the facts of every run.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import benchmarks
from benchmarks import timing
from benchmarks.cases import Benchmark, Row, Scale
from benchmarks.compare import read


def timed(benchmark: Benchmark, scale: Scale, rows: Sequence[Row]) -> float:
    """Seconds of the checked and timed calls of a run of this scale, of the cases that `rows` has times for."""
    settings = list(dict.fromkeys(row.setting for row in rows))
    plan = timing.plan(benchmark.budget_s, scale.quick, scale.full, benchmark.long_ms)
    total = 0.0
    for case in benchmark.select(scale):
        for setting in settings:
            if case.one_setting and setting != settings[0] and not scale.full:
                continue
            here = [
                row.median_ms
                for row in rows
                if (row.op, row.case, row.setting) == (benchmark.op, case.name, setting) and row.median_ms is not None
            ]
            in_turn = sum(ms for ms in here if ms <= plan.long_ms)
            total += sum(ms * (1 + timing.calls(ms, in_turn, plan)) for ms in here) / 1e3
    return total


def remembered(benchmark: Benchmark, scale: Scale, rows: Sequence[Row]) -> float:
    """Seconds of the calls whose peak of memory is measured, one after the other."""
    wanted = {case.name for case in benchmark.select(scale) if case.memory}
    return sum(
        row.median_ms / 1e3
        for row in rows
        if row.op == benchmark.op
        and row.case in wanted
        and row.setting == rows[0].setting
        and row.median_ms is not None
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="+")
    parser.add_argument("--full", action="store_true")
    options = parser.parse_args()
    scale, total = Scale("cpu", False, options.full), 0.0
    for folder in options.folder:
        rows = read(folder)
        rows = [row for row in rows if row.run == "full"] or rows
        for op in benchmarks.REGISTRY:
            if any(row.op == op for row in rows):
                seconds = timed(benchmarks.load(op), scale, rows), remembered(benchmarks.load(op), scale, rows)
                total += sum(seconds)
                print(f"{op}: {seconds[0]:.0f} s timed, {seconds[1]:.0f} s for memory")
    print(f"together {total:.0f} s, and what comes on top")


if __name__ == "__main__":
    main()
