"""Measure the operators, print tables, and write `benchmarks/results/<device>/`.

    python -m benchmarks.run                                    every operator on the best device here
    python -m benchmarks.run --op ms_deform_attn --device cpu --quick
    python -m benchmarks.run --compare OLD.csv                  names regressions, exit code 1 if there are any

Everything is measured in fresh subprocesses (`benchmarks/worker.py`), one per allocator setting and one per
measurement of memory; this process only starts them and writes reports.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

import benchmarks
from benchmarks import facts, memory, report
from benchmarks.cases import Benchmark, Row, Scale

ROOT = Path(__file__).parent
#: Load average above which the machine is not idle enough for times to be trusted.
BUSY = 0.5


class Runner:
    """Starts workers, follows their events and gathers what they measured."""

    def __init__(self, scale: Scale, ops: list[str], case: str, workspace: Path, console: Console) -> None:
        self.scale, self.case, self.workspace, self.console = scale, case, workspace, console
        self.benchmarks: list[Benchmark] = [benchmarks.load(op) for op in ops]
        self.rows: list[Row] = []
        self.facts: dict[str, str] = {}
        self.floors: dict[str, dict[str, float]] = {}
        self.slug = scale.device
        self.failures: list[str] = []

    def _worker(self, task: str, environment: dict[str, str], *arguments: str) -> Iterator[dict[str, Any]]:
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.worker", task, "--device", self.scale.device]
        command += ["--workspace", str(self.workspace), *(["--quick"] if self.scale.quick else []), *arguments]
        errors = self.workspace / "stderr.txt"
        with errors.open("w") as stderr:
            variables = facts.environment(environment)
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=variables, cwd=ROOT.parent
            )
            assert process.stdout is not None
            for line in process.stdout:
                yield json.loads(line)
            code = process.wait()
        if code != 0:
            last = "\n".join(errors.read_text().strip().splitlines()[-15:])
            self.failures.append(f"worker '{task} {' '.join(arguments)}' ended with code {code}:\n{last}")

    def run(self, progress: Progress) -> None:
        self._progress, self._task = progress, progress.add_task("starting", total=None)
        ops = ("--op", ",".join(b.op for b in self.benchmarks), "--case", self.case)
        settings = facts.settings(self.scale.device)
        # Floors and data do not depend on the allocator; the retained heap only makes them quicker.
        fastest = list(settings.values())[-1]
        for event in self._worker("prepare", fastest, *ops):
            self._handle(event)
        if self.failures:
            return
        for name, environment in settings.items():
            for event in self._worker("time", environment, *ops, "--setting", name):
                self._handle(event)
        if self.scale.device == "cpu":
            self._memory(next(iter(settings)))

    def _memory(self, setting: str) -> None:
        """Peak memory on CPU, reported in the rows of the given allocator setting."""
        self._progress.update(self._task, description="peak memory: check of the method")
        for event in self._worker("calibrate", memory.ENVIRONMENT):
            measured = f"a known temporary of 64 MiB measures as {event['extra_mib']:.1f} MiB"
            self.facts["check of the memory method"] = measured
        if self.failures:
            return
        cases = {(b.op, case.name): case for b in self.benchmarks for case in b.cases(self.scale)}
        for row in self.rows:
            case = cases[row.op, row.case]
            if row.setting != setting or row.status != "ok" or not case.memory or (self.scale.quick and case.backward):
                continue
            self._progress.update(self._task, description=f"peak memory: {row.case}, {row.implementation}")
            chosen = ("--op", row.op, "--case", row.case, "--implementation", row.implementation)
            for event in self._worker("memory", memory.ENVIRONMENT, *chosen):
                row.memory_extra_mib, row.memory_total_mib = event["extra_mib"], event["total_mib"]

    def _handle(self, event: dict[str, Any]) -> None:
        match event["event"]:
            case "progress":
                self._progress.update(self._task, description=event["text"])
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
        order = {(b.op, c.name): i for b in self.benchmarks for i, c in enumerate(b.cases(self.scale))}
        settings = list(facts.settings(self.scale.device))
        rows = sorted(self.rows, key=lambda row: (settings.index(row.setting), order[row.op, row.case]))
        return report.Run(self.scale, self.facts, self.floors, rows)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", choices=list(benchmarks.REGISTRY), help="repeatable; default: all")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument("--quick", action="store_true", help="small shapes and few rounds, under a minute")
    parser.add_argument("--case", default="", help="only cases whose name contains this; written to <device>-partial")
    parser.add_argument("--output", type=Path, default=ROOT / "results", help="default: benchmarks/results")
    parser.add_argument("--compare", type=Path, metavar="OLD.csv", help="name regressions against an earlier run")
    return parser.parse_args()


def main() -> int:
    arguments = _arguments()
    device = arguments.device
    if device is None:
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    console = Console(width=None if sys.stdout.isatty() else int(os.environ.get("COLUMNS", "160")))
    start = time.perf_counter()
    old = report.read_csv(arguments.compare) if arguments.compare else []  # before the run may overwrite it
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with tempfile.TemporaryDirectory(prefix="m2f-bench-") as workspace:
        ops = arguments.op or list(benchmarks.REGISTRY)
        runner = Runner(Scale(device, arguments.quick), ops, arguments.case, Path(workspace), console)
        with Progress(*columns, console=console, transient=True) as progress:
            runner.run(progress)
    run = runner.result()
    if run.rows:
        run.facts["wall time of the run"] = f"{time.perf_counter() - start:.0f} s"
        suffix = ("-quick" if arguments.quick else "") + ("-partial" if arguments.case else "")
        directory = arguments.output / (runner.slug + suffix)
        report.write(directory, runner.benchmarks, run)
        for benchmark in runner.benchmarks:
            report.show(console, benchmark, run)
        console.print(f"Written to {directory} in {run.facts['wall time of the run']}")
    for failure in runner.failures:
        console.print(f"[bold red]Failed:[/] {failure}")
    found = report.regressions(old, run.rows)
    for line in found:
        console.print(f"[bold red]Regression:[/] {line}")
    if arguments.compare and not found:
        console.print("No regression beyond noise")
    return 1 if found or runner.failures else 0


if __name__ == "__main__":
    sys.exit(main())
