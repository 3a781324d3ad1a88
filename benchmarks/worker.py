"""The measuring processes. The runner starts each fresh, with the allocator setting in its environment.

Protocol: one JSON object per line on standard output, with an "event": progress, facts, floors, row, ...
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import benchmarks
from benchmarks import facts, floors, memory, timing
from benchmarks.cases import Benchmark, Case, Data, Implementation, Row, Scale

#: Least number of rounds of interleaved timing per case; and seconds of it in a quick run.
FULL_ROUNDS, QUICK_ROUNDS, QUICK_BUDGET = 5, 3, 0.2
_OUT = sys.stdout


def emit(event: str, **content: Any) -> None:
    print(json.dumps({"event": event} | content), file=_OUT, flush=True)


def _save(data: Data, workspace: Path, name: str) -> None:
    parts = {f.name: getattr(data, f.name) for f in fields(Data)}
    torch.save(parts.pop("truth"), workspace / f"{name}.truth.pt")
    torch.save(parts, workspace / f"{name}.inputs.pt")


def _load(workspace: Path, name: str, device: str, with_truth: bool = True) -> Data:
    truth: dict[str, Tensor] = torch.load(workspace / f"{name}.truth.pt") if with_truth else {}
    return Data(truth=truth, **torch.load(workspace / f"{name}.inputs.pt")).to(device)


def prepare(benchmark: Benchmark, scale: Scale, cases: list[Case], workspace: Path) -> None:
    """Build each case's data with its fp64 reference, once for all settings."""
    needed = {case.data for case in cases}
    for name, build in benchmark.data(scale).items():
        if name in needed:
            emit("progress", text=f"{benchmark.op}: inputs and fp64 reference of {name}")
            _save(build(), workspace, name)


def _failure(error: Exception) -> str:
    return f"failed: {type(error).__name__}: {str(error).strip().splitlines()[0][:160] if str(error).strip() else ''}"


def _row(benchmark: Benchmark, case: Case, implementation: Implementation, setting: str) -> Row:
    threads = case.threads or torch.get_num_threads()
    return Row(
        benchmark.op, case.name, implementation.name, setting, case.direction, case.distribution, case.dtype, threads,
        ours=implementation.ours, headline=case.headline,
    )  # fmt: skip


def _measure_case(
    benchmark: Benchmark, case: Case, data: Data, setting: str, scale: Scale, rates: floors.Floors
) -> list[Row]:
    rows, runs, timed = [], [], []
    for implementation in case.implementations:
        row = _row(benchmark, case, implementation, setting)
        rows.append(row)
        reason = implementation.unavailable()
        if reason is not None:
            row.status = reason
            continue
        try:
            run = case.bind(implementation, data)
            results, row.written_mib = memory.written(partial(run, collect=True), implementation.counts_writes)
            verdict = benchmark.check(case, implementation, data, implementation.decode(results, data))
            del results
        except Exception as error:  # a peer may fail in any way; the row says how
            row.status = _failure(error)
            continue
        row.error_output, row.error_gradients = verdict.output, verdict.gradients
        if not verdict.right:
            row.status = "wrong result"
            continue
        runs.append(run)
        timed.append(row)
    budget, rounds = (QUICK_BUDGET, QUICK_ROUNDS) if scale.quick else (benchmark.budget_s, FULL_ROUNDS)
    floor_ms, kind = floors.floor(benchmark.work(case, data), rates)
    for row, result in zip(timed, timing.interleaved(runs, scale.device, budget, rounds), strict=True):
        row.median_ms, row.iqr_ms, row.rounds, row.page_faults = (
            result.median_ms, result.iqr_ms, result.rounds, result.page_faults,
        )  # fmt: skip
        row.floor_ms, row.floor_kind, row.floor_share = floor_ms, kind, floor_ms / result.median_ms
    subject = rows[0].median_ms
    for row in rows:
        if subject is not None and row.median_ms is not None:
            row.subject_speedup = row.median_ms / subject
    if scale.device == "cuda" and case.memory:
        for row, run in zip(timed, runs, strict=True):
            row.memory_extra_mib, row.memory_total_mib = memory.measure(run, data.inputs.values(), "cuda")
    return rows


def time_cases(benchmark: Benchmark, scale: Scale, cases: list[Case], workspace: Path, setting: str) -> None:
    """Check and time every case under this process's allocator setting."""
    for op in benchmark.measured_operators:
        emit("backend", op=op, text=facts.backend_of(op, scale.device))
    rates = json.loads((workspace / "floors.json").read_text())
    all_threads = torch.get_num_threads()
    loaded: tuple[str, Data] | None = None
    for case in sorted(cases, key=lambda c: c.data):  # each data set is loaded once
        emit("progress", text=f"{benchmark.op}, {setting}: {case.title}")
        if loaded is None or loaded[0] != case.data:
            loaded = None  # free the former before the next is there
            loaded = case.data, _load(workspace, case.data, scale.device)
        torch.set_num_threads(case.threads or all_threads)
        rate = rates[str(case.threads or all_threads)]
        for row in _measure_case(benchmark, case, loaded[1], setting, scale, rate):
            emit("row", row=asdict(row))
    torch.set_num_threads(all_threads)


def measure_floors(scale: Scale, cases: list[Case], workspace: Path) -> None:
    """Measure the floors for one thread and every number of threads that occurs."""
    emit("progress", text="rates of memory, gathers and matrix products")
    counts = {case.threads or torch.get_num_threads() for case in cases} | {1, torch.get_num_threads()}
    rates = floors.measure_all(scale.device, counts, scale.quick)
    (workspace / "floors.json").write_text(json.dumps(rates))
    emit("floors", floors=rates)


def measure_memory(benchmark: Benchmark, case: Case, implementation: Implementation, workspace: Path) -> None:
    """Peak memory of one call on CPU; this process does nothing else."""
    data = _load(workspace, case.data, "cpu", with_truth=False)
    case.bind(implementation, benchmark.shrink(data))()
    run = case.bind(implementation, data)
    extra, total = memory.measure(run, data.inputs.values(), "cpu")
    emit("memory", case=case.name, implementation=implementation.name, extra_mib=extra, total_mib=total)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=["prepare", "time", "memory", "calibrate"])
    parser.add_argument("--op", default="", help="comma-separated operators")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--workspace", type=Path, required=True)
    parser.add_argument("--setting", default="")
    parser.add_argument("--case", default="", help="memory: the case; otherwise only cases whose name contains this")
    parser.add_argument("--implementation", default="")
    arguments = parser.parse_args()

    global _OUT
    _OUT, sys.stdout = sys.stdout, sys.stderr  # whatever a peer prints must not enter the protocol
    scale = Scale(arguments.device, arguments.quick)
    if arguments.task == "calibrate":
        emit("calibration", extra_mib=memory.calibration())
        return
    ops = arguments.op.split(",")
    loaded = [benchmarks.load(op) for op in ops]
    chosen = [[case for case in b.cases(scale) if arguments.case in case.name] for b in loaded]
    if arguments.task == "prepare":
        measured = [op for benchmark in loaded for op in benchmark.measured_operators]
        emit("facts", facts=facts.gather(arguments.device, measured), slug=facts.device_slug(arguments.device))
        measure_floors(scale, [case for cases in chosen for case in cases], arguments.workspace)
    for benchmark, cases in zip(loaded, chosen, strict=True):
        if arguments.task == "prepare":
            prepare(benchmark, scale, cases, arguments.workspace)
        elif arguments.task == "time":
            time_cases(benchmark, scale, cases, arguments.workspace, arguments.setting)
        else:
            case = next(c for c in cases if c.name == arguments.case)
            implementation = next(i for i in case.implementations if i.name == arguments.implementation)
            measure_memory(benchmark, case, implementation, arguments.workspace)


if __name__ == "__main__":
    main()
