"""Each operator's kernels before and after a change, in turn on one machine.

    python -m benchmarks.tools.old_new --old DIRECTORY      # a tree of the older commit, with its libraries

Runs `python -m benchmarks.kernels` in the older tree and in this one alternately, each in a process of its own (two
versions of the operators cannot be in one), and prints the medians and their ratio. What only one of them has is shown
without a ratio. `--with NAME=VALUE` adds a run of this tree with an environment variable set, which chooses other
kernels than the default's; its rows end with that.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.formats import markdown

ROOT = Path(__file__).parents[2]
#: Microseconds by operator, then by dtype.
Times = dict[str, dict[str, float]]


def parse(table: str) -> Times:
    """The times of a table that `benchmarks.kernels` wrote."""
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in table.splitlines() if line[:1] == "|"]
    (_, *dtypes), *rows = (row for row in rows if not set("".join(row)) <= set("-: "))
    return {name: dict(zip((d.split(",")[0] for d in dtypes), map(float, cells), strict=True)) for name, *cells in rows}


def measure(tree: Path, parts: list[str], setting: str = "") -> Times:
    """One run of the kernels of a tree; with a setting "NAME=VALUE" of the environment, which the operators' names get.

    Raises:
        RuntimeError: it failed; with the end of what it printed.
    """
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "kernels.md"
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.kernels", "--output", str(output)]
        command += [word for part in parts for word in ("--part", part)]
        search = os.pathsep.join(filter(None, [str(tree), os.environ.get("M2F_SITE", "")]))
        environment = os.environ | {"PYTHONPATH": search}
        if setting:
            name, value = setting.split("=", 1)
            environment[name] = value
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{tree}: benchmarks.kernels ended with {done.returncode}:\n{done.stderr[-2000:]}")
        times = parse(output.read_text())
    return {f"{op}, {setting}": x for op, x in times.items()} if setting else times


def medians(runs: list[Times]) -> Times:
    """Of several runs, by operator and dtype."""
    return {op: {d: statistics.median(run[op][d] for run in runs) for d in runs[0][op]} for op in runs[0]}


def table(old: Times, new: Times) -> str:
    """Markdown: before, after and how many times as fast."""
    lines = []
    for op in [*new, *(op for op in old if op not in new)]:
        for dtype in new.get(op) or old[op]:
            before, after = old.get(op, {}).get(dtype), new.get(op, {}).get(dtype)
            cells = ["" if x is None else f"{x:.1f}" for x in (before, after)]
            ratio = "" if before is None or after is None else f"{before / after:.2f}"
            lines.append([op, dtype, *cells, ratio])
    return markdown(["operator", "dtype", "before, µs", "after, µs", "times as fast"], lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", type=Path, required=True, help="tree of the older commit, with m2f_kernels/lib")
    parser.add_argument("--part", action="append", default=[], help="as of benchmarks.kernels; repeatable")
    parser.add_argument("--with", dest="settings", action="append", default=[], metavar="NAME=VALUE", help="repeatable")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each tree")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no round begins after these")
    parser.add_argument("--output", type=Path, help="folder for old_new.md and measured.json")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds: expected at least 1; got {options.rounds}")
    if wrong := [x for x in options.settings if "=" not in x]:
        parser.error(f"--with: expected NAME=VALUE; got {wrong[0]}")
    if not list((options.old / "benchmarks").rglob("kernels.py")):
        parser.error(f"--old: expected a tree with benchmarks.kernels; got {options.old}")
    start, old, new = time.monotonic(), [], []
    for _ in range(options.rounds):
        begun = time.monotonic()
        if old and begun + (begun - start) / len(old) > start + options.seconds:
            break  # another round would not end in time
        old.append(measure(options.old.resolve(), options.part))
        runs = [measure(ROOT, options.part, setting) for setting in ("", *options.settings)]
        new.append({op: times for run in runs for op, times in run.items()})
        # Written as they come: a run that is cut off keeps its first round.
        shown = table(medians(old), medians(new))
        if options.output is not None:
            options.output.mkdir(parents=True, exist_ok=True)
            heading = f"# Kernels before and after\n\nMedians of {len(old)} interleaved runs.\n\n"
            (options.output / "old_new.md").write_text(heading + shown + "\n")
            (options.output / "measured.json").write_text(json.dumps(medians(new), indent=1) + "\n")
    print(shown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
