"""Measure the operators and the whole model, print tables, and write `benchmarks/results/<device>.csv` and pages of it.

    python -m benchmarks.run                                    the rows of the first page, under ten minutes on 2 cores
    python -m benchmarks.run --full                             all shapes and dtypes, kept beside the default run
    python -m benchmarks.run --op ms_deform_attn --device cpu --quick
    python -m benchmarks.run --compare OLD.csv                  names regressions, exit code 1 if there are any

Everything is measured in fresh processes (`benchmarks/worker.py`), one per allocator setting and one per
measurement of memory; this process only starts them and writes reports. If it is interrupted (Ctrl-C, SIGTERM), it
writes the measurements so far to <device>-partial.csv. If the output is not a terminal, each step is one line.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.markup import escape

import benchmarks
from benchmarks import arguments, compare, facts, measure, report, worker
from benchmarks.cases import Row, Scale
from benchmarks.report import BUSY
from m2f_model import bench

#: Peaks of memory are measured this many at once: nothing is timed meanwhile.
MEMORY_PROCESSES = min(2, os.cpu_count() or 1)
TRANSFORMERS = "transformers.models.mask2former.modeling_mask2former"


@dataclass
class Runner:
    """Starts processes that measure, and gathers what they find.

    Attributes:
        only: a part of the names of cases.
        skip: parts of the names of implementations that are left out.
        workspace: a folder for data and floors, which all processes use.
        step: is told each step.
        console: for what makes times unreliable.
    """

    scale: Scale
    ops: Sequence[str]
    only: str
    skip: Sequence[str]
    workspace: Path
    step: Callable[[str], None]
    console: Console
    rows: list[Row] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self) -> None:
        """Measure everything. After an interruption `rows` holds what was measured before."""
        signal.signal(signal.SIGTERM, _interrupt)
        try:
            settings = facts.SETTINGS[self.scale.device]
            # Floors and data do not depend on the allocator; the retained heap only makes them quicker.
            self._phase("preparation", list(settings.values())[-1], worker.prepare)
            for name, environment in settings.items() if not self.failures else ():
                self._phase(f"times, {name}", environment, worker.times, name, self.skip)
            if self.scale.device == "cpu" and self.rows:
                self._peaks()
        except KeyboardInterrupt:
            self.failures.append("interrupted")

    def _found(self, what: str, start: str, task: Callable[..., Any], *arguments: Any) -> Iterator[Any]:
        """Yields what a task finds in a fresh process; its failure is one of the run."""
        try:
            yield from worker.fresh(get_context(start), self.workspace, task, *arguments)
        except RuntimeError as error:
            self.failures.append(f"{what}: {error}")

    def _phase(self, name: str, environment: dict[str, str], task: Callable[..., Any], *arguments: Any) -> None:
        start, given = time.perf_counter(), (self.scale, self.ops, self.only, self.workspace, *arguments)
        with patch.dict(os.environ, facts.environment(environment | {"PYTHONWARNINGS": "ignore"}), clear=True):
            for found in self._found(name, "spawn", task, *given):
                self._take(found)
        self.seconds[name] = time.perf_counter() - start

    def _take(self, found: worker.Found) -> None:
        if isinstance(found, Row):
            self.rows.append(found)
        elif isinstance(found, str):
            self.step(found)
        else:
            self.facts |= found
            warnings = [f"{x}: these are not the kernels' times" for x in found.values() if ": reference (" in x]
            if float(found.get("load average before", 0)) > BUSY:
                warnings.append("this machine is busy: times will not be reliable")
            for warning in warnings:
                self.console.print(f"[bold red]Warning:[/] {warning}")

    def _peak(self, what: str, task: Callable[..., Any], *arguments: Any) -> Any:
        """The only thing that a task yields in a fresh process; None, and a failure, if it ends otherwise.

        The process is forked from one that has imported everything and computed nothing: no thread has been started
        and no tensor made.
        """
        self.step(f"peak memory: {what}")
        found = list(self._found(f"peak memory, {what}", "forkserver", task, *arguments))
        return found[0] if found else None

    def _peaks(self) -> None:
        """Peak memory of what has a time in the first allocator setting, and the check of the method."""
        start, first = time.perf_counter(), next(iter(facts.SETTINGS[self.scale.device]))
        get_context("forkserver").set_forkserver_preload(["benchmarks.report", "benchmarks.worker", TRANSFORMERS])
        measured = {
            (op, case.name)
            for op in self.ops
            for case in benchmarks.load(op).select(self.scale, self.only)
            if case.memory and not (self.scale.quick and case.backward)
        }

        def add_peak(row: Row) -> None:
            who = row.op, row.case, row.implementation
            found = self._peak(", ".join(who), worker.peak, self.scale, self.workspace, *who)
            row.memory_extra_mib, row.memory_total_mib = found or (None, None)

        rows = [row for row in self.rows if row.setting == first and row.status == "ok" and row.key[:2] in measured]
        variables = facts.environment(bench.ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(sys.path)})
        with patch.dict(os.environ, variables, clear=True), ThreadPoolExecutor(MEMORY_PROCESSES) as pool:
            if extra := self._peak("check of the method", measure.calibration):
                self.facts["check of the memory method"] = f"a known temporary of 64 MiB measures as {extra:.1f} MiB"
            list(pool.map(add_peak, rows))
        self.seconds["peak memory"] = time.perf_counter() - start

    def result(self) -> report.Run:
        """The rows and facts, by allocator setting and in the order of the cases."""
        settings = list(facts.SETTINGS[self.scale.device])
        order = [(op, case.name) for op in self.ops for case in benchmarks.load(op).select(self.scale)]
        rows = sorted(self.rows, key=lambda row: (settings.index(row.setting), order.index(row.key[:2])))
        rates = self.workspace / "floors.json"
        return report.Run(self.scale, self.facts, json.loads(rates.read_text()) if rates.exists() else {}, rows)


def _interrupt(*_: object) -> None:
    # `timeout` sends its signal twice, to the process and to its group: the second must not end the writing of results.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def _arguments() -> argparse.Namespace:
    found = arguments(
        __doc__,
        {
            "--op": {
                "action": "append",
                "choices": [*benchmarks.REGISTRY, *benchmarks.OTHERS],
                "help": f"repeatable; default: {', '.join(benchmarks.REGISTRY)}",
            },
            "--device": {"choices": ["cpu", "cuda"], "help": "default: cuda where there is one"},
            "--quick": {"action": "store_true", "help": "small shapes and few rounds, to see that all runs"},
            "--full": {"action": "store_true", "help": "all shapes and dtypes: half an hour on 2 cores"},
            "--case": {"default": "", "help": "only cases whose name contains this; written to <device>-partial"},
            "--skip": {
                "action": "append", "default": [], "metavar": "TEXT",
                "help": "leave out implementations whose name contains this, for example peers that take minutes to "
                "compile; their rows say so; repeatable",
            },
            "--output": {"type": Path, "default": report.RESULTS, "help": "default: benchmarks/results"},
            "--compare": {
                "type": Path, "metavar": "OLD.csv",
                "help": "name regressions against an earlier run's CSV or folder",
            },
        },
    )  # fmt: skip
    if found.quick and found.full:
        found.refuse("--quick: not allowed with --full")
    needed = ("matplotlib", "skimage", "transformers")
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:  # not after minutes
        found.refuse(
            f"{', '.join(missing)}: not installed; pip install -r benchmarks/requirements.txt (make bench does)"
        )
    try:
        found.old = compare.read(found.compare) if found.compare else []  # before the run may overwrite it
    except ValueError as error:
        found.refuse(f"--compare: {error}")
    return found


def main() -> int:
    options, start = _arguments(), time.perf_counter()
    console = Console(width=None if sys.stdout.isatty() else int(os.environ.get("COLUMNS", "160")))
    scale = Scale(options.device or ("cuda" if torch.cuda.is_available() else "cpu"), options.quick, options.full)
    with tempfile.TemporaryDirectory(prefix="m2f-bench-") as workspace, console.status("starting") as status:

        def step(text: str) -> None:
            line = f"{time.perf_counter() - start:6.1f} s  {text}"
            if console.is_terminal:
                status.update(escape(line))
            else:
                console.print(line, soft_wrap=True, markup=False)

        ops = options.op or list(benchmarks.REGISTRY)
        runner = Runner(scale, ops, options.case, options.skip, Path(workspace), step, console)
        runner.run()
        run = runner.result()
    if run.rows:
        phases = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in runner.seconds.items())
        if runner.failures:
            run.facts["failures"] = "; ".join(failure.splitlines()[0] for failure in runner.failures)
        run.facts["wall time of the run"] = f"{time.perf_counter() - start:.0f} s ({phases})"
        # Anything but a whole run goes beside the device's results.
        suffix = ("-quick" if options.quick else "") + (
            "-partial" if options.case or "interrupted" in runner.failures else ""
        )
        table = options.output / f"{facts.device_slug(scale.device, run.facts['device'])}{suffix}.csv"
        report.save(table, run)
        report.pages(table, table.with_suffix(""))
        for op in ops:
            report.show(
                console,
                benchmarks.load(op),
                replace(run, rows=[x for x in run.rows if x.op == op]),
                everything=options.full or bool(options.case),
            )
        console.print(f"Written to {table} in {run.facts['wall time of the run']}; pages: {table.stem}/report.md")
    for failure in runner.failures:
        console.print(f"[bold red]Failed:[/] {escape(failure)}")
    regressions, found = compare.report(options.old, run.rows) if options.compare else ([], 0)
    for line in regressions:
        console.print(f"[bold red]{line}" if found else line, soft_wrap=True)
    return 1 if runner.failures or not run.rows else found


if __name__ == "__main__":
    sys.exit(main())
