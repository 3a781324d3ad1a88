"""Measure the operators and the whole model, print tables, and write `benchmarks/results/<device>.csv` and pages of it.

    python -m benchmarks.run                                    the rows of the first page, under ten minutes on 2 cores
    python -m benchmarks.run --full                             all shapes and dtypes, kept beside the default run
    python -m benchmarks.run --op ms_deform_attn --device cpu --quick
    python -m benchmarks.run --compare OLD.csv                  names regressions, exit code 1 if there are any

Everything is measured in fresh subprocesses (`benchmarks/worker.py`), one per allocator setting and one per
measurement of memory; this process only starts them and writes reports. If it is interrupted (Ctrl-C, SIGTERM), it
writes the measurements so far to <device>-partial.csv. If the output is not a terminal, each step is one line.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

import benchmarks
from benchmarks import compare, facts, memory, report
from benchmarks.arguments import arguments
from benchmarks.cases import Benchmark, Case, Row, Scale
from benchmarks.report import BUSY

ROOT = Path(__file__).parent


class Runner:
    """Starts workers, follows their events and gathers what they measured."""

    def __init__(
        self, scale: Scale, ops: list[str], case: str, skip: list[str], workspace: Path, console: Console
    ) -> None:
        self.scale, self.case, self.skip, self.workspace, self.console = scale, case, skip, workspace, console
        self.benchmarks: list[Benchmark] = [benchmarks.load(op) for op in ops]
        self.rows: list[Row] = []
        self.facts: dict[str, str] = {}
        self.floors: dict[str, dict[str, float]] = {}
        self.slug = scale.device
        self.failures: list[str] = []
        self.seconds: dict[str, float] = {}
        self.interrupted = False
        self._start = time.perf_counter()

    def _worker(self, task: str, environment: dict[str, str], *arguments: str) -> Iterator[dict[str, Any]]:
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.worker", task, "--device", self.scale.device]
        flags = [f"--{name}" for name in ("quick", "full") if getattr(self.scale, name)]
        flags += [part for text in self.skip for part in ("--skip", text)]
        command += ["--workspace", str(self.workspace), *flags, *arguments]
        errors = self.workspace / "stderr.txt"
        with errors.open("w") as stderr:
            variables = facts.environment(environment)
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=variables, cwd=ROOT.parent
            )
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    yield json.loads(line)
                code = process.wait()
            except BaseException:
                process.kill()
                process.wait()
                raise
        if code != 0:
            last = "\n".join(errors.read_text().strip().splitlines()[-15:])
            self.failures.append(f"worker '{task} {' '.join(arguments)}' ended with code {code}:\n{last}")

    def run(self, progress: Progress) -> None:
        """Measure everything. After an interruption `rows` holds what was measured before."""
        signal.signal(signal.SIGTERM, _interrupt)
        try:
            self._run(progress)
        except KeyboardInterrupt:
            self.interrupted = True
            self.failures.append("interrupted")

    def _run(self, progress: Progress) -> None:
        settings = facts.settings(self.scale.device)
        self._progress, self._task = progress, progress.add_task("starting", total=self._steps())
        ops = ("--op", ",".join(b.op for b in self.benchmarks), "--case", self.case)
        # Floors and data do not depend on the allocator; the retained heap only makes them quicker.
        fastest = list(settings.values())[-1]
        self._phase("preparation", self._worker("prepare", fastest, *ops))
        if self.failures:
            return
        for name, environment in settings.items():
            self._phase(f"times, {name}", self._worker("time", environment, *ops, "--setting", name))
        if self.scale.device == "cpu":
            jobs = self._memory_jobs()
            (self.workspace / "memory.json").write_text(json.dumps(jobs))
            self._phase("peak memory", self._worker("memory", memory.ENVIRONMENT, *ops))

    def _steps(self) -> int:
        """The approximate number of progress events that the workers will send."""
        chosen = [[case for case in b.select(self.scale) if self.case in case.name] for b in self.benchmarks]
        steps = 1 + sum(len({case.data for case in cases}) for cases in chosen)
        for i, _ in enumerate(facts.settings(self.scale.device)):
            steps += sum(i == 0 or self.scale.full or not case.one_setting for cases in chosen for case in cases)
        if self.scale.device == "cpu":
            steps += sum(len(case.implementations) for cases in chosen for case in cases if self._with_memory(case))
        return steps

    def _with_memory(self, case: Case) -> bool:
        return case.memory and not (self.scale.quick and case.backward)

    def _phase(self, name: str, events: Iterator[dict[str, Any]]) -> None:
        start = time.perf_counter()
        for event in events:
            self._handle(event)
        self.seconds[name] = time.perf_counter() - start

    def _memory_jobs(self) -> list[tuple[str, str, str]]:
        """The jobs for peak memory on CPU: the rows of the first allocator setting that have a time."""
        setting = next(iter(facts.settings(self.scale.device)))
        cases = {(b.op, case.name): case for b in self.benchmarks for case in b.select(self.scale)}
        return [
            (row.op, row.case, row.implementation)
            for row in self.rows
            if row.setting == setting and row.status == "ok" and self._with_memory(cases[row.op, row.case])
        ]

    def _handle(self, event: dict[str, Any]) -> None:
        match event["event"]:
            case "progress":
                self._progress.update(self._task, description=event["text"], advance=1)
                if not self.console.is_terminal:
                    seconds = time.perf_counter() - self._start
                    self.console.print(f"{seconds:6.1f} s  {event['text']}", soft_wrap=True, markup=False)
            case "failure":
                self.failures.append(event["text"])
            case "calibration":
                measured = f"a known temporary of 64 MiB measures as {event['extra_mib']:.1f} MiB"
                self.facts["check of the memory method"] = measured
            case "memory":
                first = next(iter(facts.settings(self.scale.device)))
                row = next(row for row in self.rows if row.key == (*event["job"], first))
                row.memory_extra_mib, row.memory_total_mib = event["extra_mib"], event["total_mib"]
            case "facts":
                self.facts, self.slug = event["facts"], event["slug"]
                if float(self.facts["load average before"]) > BUSY:
                    self.console.print("[bold red]Warning:[/] this machine is busy: times will not be reliable")
            case "backend":
                self.facts[f"backend of {event['op']}"] = event["text"]
                if ": reference (" in event["text"]:
                    self.console.print(f"[bold red]Warning:[/] {event['text']}: these are not the kernels' times")
            case "floors":
                self.floors = event["floors"]
            case "row":
                self.rows.append(Row(**event["row"]))

    def result(self) -> report.Run:
        order = {(b.op, c.name): i for b in self.benchmarks for i, c in enumerate(b.select(self.scale))}
        settings = list(facts.settings(self.scale.device))
        rows = sorted(self.rows, key=lambda row: (settings.index(row.setting), order[row.op, row.case]))
        rows = [replace(row, run="full" if self.scale.full else "default") for row in rows]
        return report.Run(self.scale, self.facts, self.floors, rows)


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
            "--output": {"type": Path, "default": ROOT / "results", "help": "default: benchmarks/results"},
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
    return found


def _table(options: argparse.Namespace, slug: str, interrupted: bool) -> Path:
    """The CSV of the results: the device's; another beside it for anything but a whole run."""
    suffix = ("-quick" if options.quick else "") + ("-partial" if options.case or interrupted else "")
    found: Path = options.output / f"{slug}{suffix}.csv"
    return found


def main() -> int:
    options = _arguments()
    console = Console(width=None if sys.stdout.isatty() else int(os.environ.get("COLUMNS", "160")))
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        # Before the run may overwrite it.
        old = compare.read(options.compare) if options.compare else []
    except ValueError as error:
        console.print(f"[bold red]--compare:[/] {error}", soft_wrap=True)
        return 2
    start = time.perf_counter()
    columns = (
        SpinnerColumn(), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"),
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="m2f-bench-") as workspace:
        ops = options.op or list(benchmarks.REGISTRY)
        scale = Scale(device, options.quick, options.full)
        runner = Runner(scale, ops, options.case, options.skip, Path(workspace), console)
        with Progress(*columns, console=console, transient=True) as progress:
            runner.run(progress)
    run = runner.result()
    if run.rows:
        phases = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in runner.seconds.items())
        if runner.failures:
            run.facts["failures"] = "; ".join(failure.splitlines()[0] for failure in runner.failures)
        run.facts["wall time of the run"] = f"{time.perf_counter() - start:.0f} s ({phases})"
        table = _table(options, runner.slug, runner.interrupted)
        report.save(table, run)
        report.pages(table, table.with_suffix(""))
        for benchmark in runner.benchmarks:
            report.show(console, benchmark, run, everything=options.full or bool(options.case))
        console.print(f"Written to {table} in {run.facts['wall time of the run']}; pages: {table.stem}/report.md")
    for failure in runner.failures:
        console.print(f"[bold red]Failed:[/] {failure}")
    status = 1 if runner.failures or not run.rows else 0
    if options.compare:
        lines, found = compare.report(old, run.rows)
        for line in lines:
            console.print(f"[bold red]{line}" if found else line, soft_wrap=True)
        status = status or found
    return status


if __name__ == "__main__":
    sys.exit(main())
