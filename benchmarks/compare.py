"""Regressions between two runs: `python -m benchmarks.compare OLD NEW`, each a CSV or a folder of them.

Exit status 1 if there is any. Times are compared after the machine's own drift is taken out: in a case that is slower
for every peer too, by the least that a peer's time grew.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import arguments
from benchmarks.cases import Row, read_csv
from benchmarks.formats import number
from benchmarks.measure import RESOLUTION_MIB

#: A time is a regression if it grew by more than this share and by more than both interquartile ranges together.
SHARE = 0.10


def read(path: Path) -> list[Row]:
    """The rows of a CSV, or of every benchmark's CSV in a folder; of older versions' files, too.

    Raises:
        ValueError: there is none, or it is not a benchmark's.
    """
    rows = []
    for file in sorted(path.glob("*.csv")) if path.is_dir() else [path] if path.is_file() else []:
        records = read_csv(file)
        missing = {"op", "case", "implementation", "setting", "median_ms"} - set(records[0] if records else ())
        if not missing:
            # Older versions had a folder for each device, and "full" in it.
            older = {"run": "full"} if file.parent.name == "full" else {}
            rows += [Row.from_strings(older | record) for record in records]
        elif not path.is_dir():
            raise ValueError(f"{file}: expected the columns of a benchmark's CSV; {', '.join(sorted(missing))} missing")
    if not rows:
        raise ValueError(f"{path}: expected a CSV that a benchmark wrote, or a folder of them; found none")
    return rows


def devices(path: Path) -> set[str]:
    """The devices that the facts beside a CSV, or in a folder, name."""
    files = path.glob("*.json") if path.is_dir() else [path.with_suffix(".json")]

    def named(about: dict[str, Any]) -> set[str]:
        return {about["facts"]["device"]} if "facts" in about else set().union(*map(named, about.values()))

    return set().union(*(named(json.loads(file.read_text())) for file in files if file.is_file()))


Pairs = Sequence[tuple[Row, Row]]


def pairs(old: Sequence[Row], new: Sequence[Row]) -> Pairs:
    """Each new row after the old one, where that has a time: of the same run, or of any if the new rows are of one."""
    timed = [row for row in old if row.median_ms is not None]
    same = {(row.run, *row.key): row for row in timed}
    others = {row.key: row for row in timed} if len({row.run for row in new}) == 1 else {}
    found = [(same.get((row.run, *row.key)) or others.get(row.key), row) for row in new]
    return [(was, row) for was, row in found if was is not None]


def _drift(both: Pairs, row: Row) -> float:
    """The factor by which the machine was slower in this case: the least growth among the peers' times, at least 1."""
    factors = [
        other.median_ms / was.median_ms
        for was, other in both
        if (other.run, other.op, other.case, other.setting) == (row.run, row.op, row.case, row.setting)
        and not other.ours
        and other.median_ms
    ]
    return max(1.0, min(factors, default=1.0))


def _changes(both: Pairs, was: Row, row: Row) -> Iterator[str]:
    """Yields what has become worse in a row."""
    if row.median_ms is None:
        yield f"was {number(was.median_ms)} ms, now {row.status}"
        return
    drift = _drift(both, row)
    expected = was.median_ms * drift
    if row.median_ms - expected > max(SHARE * expected, (row.iqr_ms or 0) + (was.iqr_ms or 0) * drift):
        drifted = f" (the peers are {number(drift)}x slower too)" if drift > 1 else ""
        yield f"{number(was.median_ms)} -> {number(row.median_ms)} ms{drifted}"
    before, after = was.memory_extra_mib, row.memory_extra_mib
    if None not in (before, after) and after - before > max(SHARE * before, 2 * RESOLUTION_MIB):
        yield f"{number(before)} -> {number(after)} MiB extra"
    if None not in (was.kernels, row.kernels) and row.kernels > was.kernels:
        yield f"{was.kernels} -> {row.kernels} kernels launched"


def report(old: Sequence[Row], new: Sequence[Row]) -> tuple[list[str], int]:
    """Lines to print, and the exit status: 1 for regressions, 2 where there is nothing to compare.

    Regressions are this package's rows that became slower beyond noise, need more memory or no longer work.
    """
    both = pairs(old, new)
    count = sum(row.ours for _, row in both)
    if not count:
        return ["Nothing to compare: the runs have no row of this package in common"], 2
    found = [
        f"Regression: {row.op}: {row.case}, {row.implementation}, {row.setting}: {change}"
        for was, row in both
        if row.ours
        for change in _changes(both, was, row)
    ]
    return found or [f"No regression beyond noise in {count} rows"], int(bool(found))


def main() -> int:
    options = arguments(__doc__, {"old": {"type": Path}, "new": {"type": Path}})
    try:
        lines, status = report(read(options.old), read(options.new))
    except ValueError as error:
        options.refuse(str(error))
    between = devices(options.old) | devices(options.new)
    if len(between) > 1:
        lines.insert(0, f"Warning: these runs are of different devices: {', '.join(sorted(between))}")
    print("\n".join(lines))
    return status


if __name__ == "__main__":
    sys.exit(main())
