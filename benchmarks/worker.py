"""The measuring processes. The runner starts each fresh, with the allocator setting in its environment.

Protocol: one JSON object per line on standard output, with an "event": progress, facts, floors, row, ...
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import time
from dataclasses import asdict, fields
from functools import partial
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import benchmarks
from benchmarks import facts, floors, launches, memory, timing
from benchmarks.arguments import arguments
from benchmarks.cases import Benchmark, Case, Data, Implementation, Row, Scale

#: Peaks of memory are measured this many at once: nothing is timed meanwhile.
MEMORY_PROCESSES = min(2, os.cpu_count() or 1)
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


def _checked(
    benchmark: Benchmark, case: Case, one: Implementation, data: Data, row: Row, skip: list[str]
) -> tuple[Any, float] | None:
    """The call to be timed, and what it took when its result was checked; None, and why in the row, if it is not."""
    left_out = [f"left out (--skip {text})" for text in skip if text in one.name]
    if reason := left_out[0] if left_out else one.unavailable():
        row.status = reason
        return None
    try:
        run = case.bind(one, data)
        start = time.perf_counter()
        results, row.written_mib = memory.written(partial(run, collect=True), one.counts_writes)
        taken = (time.perf_counter() - start) * 1e3
        verdict = benchmark.check(case, one, data, one.decode(results, data))
    except Exception as error:  # a peer may fail in any way; the row says how
        row.status = _failure(error)
        return None
    row.error_output, row.error_gradients = verdict.output, verdict.gradients
    row.status = "ok" if verdict.right else "wrong result"
    return (run, taken) if verdict.right else None


def _measure_case(
    benchmark: Benchmark, case: Case, data: Data, setting: str, scale: Scale, rates: floors.Floors, skip: list[str]
) -> list[Row]:
    rows, timed, cuda = [], [], scale.device == "cuda"
    every = scale.full or setting == next(iter(facts.settings(scale.device)))
    for one in case.implementations:
        if one.one_setting and not every:
            continue
        threads = case.threads or torch.get_num_threads()
        who = benchmark.op, case.name, one.name, setting, case.direction, case.distribution, case.dtype, threads
        rows.append(Row(*who, ours=one.ours, headline=case.headline))
        if found := _checked(benchmark, case, one, data, rows[-1], skip):
            timed.append((one, rows[-1], *found))
    plan = timing.plan(benchmark.budget_s, scale.quick, scale.full, benchmark.long_ms)
    alone = benchmark.cpu_time and torch.get_num_threads() == 1
    # On a GPU the first call compiles.
    results = timing.interleaved(
        [run for *_, run, _ in timed], scale.device, plan, [0.0 if cuda else taken for *_, taken in timed],
        time.process_time if alone else time.perf_counter,
    )  # fmt: skip
    work = benchmark.work(case, data)
    floor_ms, kind = (None, "") if work is None else floors.floor(work, rates)
    for (one, row, run, _), result in zip(timed, results, strict=True):
        vars(row).update(asdict(result), floor_ms=floor_ms, floor_kind=kind)
        row.floor_share = None if floor_ms is None else floor_ms / result.median_ms
        row.subject_speedup = rows[0].median_ms and result.median_ms / rows[0].median_ms
        stages = benchmark.stages(case, one)
        row.stages = ";".join(f"{name}={milliseconds:.6g}" for name, milliseconds in stages.items())
        if cuda:
            row.kernels = launches.count(run)
        if cuda and case.memory and one.counts_memory:
            row.memory_extra_mib, row.memory_total_mib = memory.measure(run, data.inputs.values(), "cuda")
            if benchmark.peak is not None:  # which counts outputs too
                row.memory_extra_mib, row.memory_total_mib = row.memory_total_mib, None
    return rows


def time_cases(
    benchmark: Benchmark, scale: Scale, cases: list[Case], workspace: Path, setting: str, skip: list[str]
) -> None:
    """Check and time every case under this process's allocator setting."""
    if not scale.full and setting != next(iter(facts.settings(scale.device))):
        cases = [case for case in cases if not case.one_setting]
    for op in benchmark.measured_operators:
        emit("backend", op=op, text=facts.backend_of(op, scale.device))
    rates = json.loads((workspace / "floors.json").read_text())
    all_threads = torch.get_num_threads()
    loaded: tuple[str, Data] | None = None
    for case in sorted(cases, key=lambda c: c.data):  # each data set is loaded once
        emit("progress", text=f"{benchmark.op}, {setting}: {case.name}")
        if loaded is None or loaded[0] != case.data:
            loaded = None  # free the former before the next is there
            loaded = case.data, _load(workspace, case.data, scale.device)
        torch.set_num_threads(case.threads or all_threads)
        rate = rates[str(case.threads or all_threads)]
        for row in _measure_case(benchmark, case, loaded[1], setting, scale, rate, skip):
            emit("row", row=asdict(row))
    torch.set_num_threads(all_threads)


def measure_floors(scale: Scale, cases: list[Case], workspace: Path) -> None:
    """Measure the floors for every number of threads that occurs."""
    emit("progress", text="rates of memory, gathers and matrix products")
    counts = {case.threads or torch.get_num_threads() for case in cases} | {torch.get_num_threads()}
    rates = floors.measure_all(scale.device, counts, scale.quick)
    (workspace / "floors.json").write_text(json.dumps(rates))
    emit("floors", floors=rates)


Job = tuple[str, str, str]  # operator, case, implementation


def _peak(scale: Scale, workspace: Path, op: str, case: str, implementation: str) -> tuple[float, float | None]:
    """Peak memory of one call on CPU: extra and total MiB."""
    benchmark = benchmarks.load(op)
    chosen = next(c for c in benchmark.select(scale) if c.name == case)
    one = next(i for i in chosen.implementations if i.name == implementation)
    if benchmark.peak is not None:
        return benchmark.peak(chosen, one), None
    data = _load(workspace, chosen.data, "cpu", with_truth=False)
    chosen.bind(one, benchmark.shrink(data))()
    run = chosen.bind(one, data)
    return memory.measure(run, data.inputs.values(), "cpu")


def _in_process(scale: Scale, workspace: Path, job: Job | None, sender: Any) -> None:
    """The body of a measuring process: sends (extra, total) MiB, or one line saying why there are none."""
    try:
        sender.send((memory.calibration(), None) if job is None else _peak(scale, workspace, *job))
    except Exception as error:  # as above: the row says how
        sender.send(_failure(error))


def measure_memory(scale: Scale, workspace: Path) -> None:
    """Peak memory of what `memory.json` lists, and the check of the method.

    Each measurement is a fresh process, forked from this one, which has imported everything and computed nothing: no
    thread has been started and no tensor made.
    """
    jobs: list[Job | None] = [None, *map(tuple, json.loads((workspace / "memory.json").read_text()))]
    for op in {job[0] for job in jobs if job}:
        benchmarks.load(op)
    if len(jobs) > 1 and importlib.util.find_spec("transformers"):
        importlib.import_module("transformers.models.mask2former.modeling_mask2former")
    context = get_context("fork")
    running: dict[int, tuple[Job | None, Any, Any]] = {}
    while jobs or running:
        while jobs and len(running) < MEMORY_PROCESSES:
            job = jobs.pop(0)
            if job is not None:
                emit("progress", text=f"peak memory: {job[1]}, {job[2]}")
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_in_process, args=(scale, workspace, job, sender))
            process.start()
            sender.close()
            running[process.sentinel] = job, process, receiver
        for sentinel in connection.wait(list(running)):
            job, process, receiver = running.pop(int(sentinel))
            process.join()
            try:
                result = receiver.recv()
            except EOFError:
                result = f"its process ended with {process.exitcode}"
            _report_memory(job, result)


def _report_memory(job: Job | None, result: tuple[float, float | None] | str) -> None:
    if isinstance(result, str):
        emit("failure", text=f"peak memory, {', '.join(job) if job else 'check of the method'}: {result}")
    elif job is None:
        emit("calibration", extra_mib=result[0])
    else:
        emit("memory", job=job, extra_mib=result[0], total_mib=result[1])


def main() -> None:
    options = arguments(
        __doc__,
        {
            "task": {"choices": ["prepare", "time", "memory"]},
            "--op": {"default": "", "help": "comma-separated operators"},
            "--device": {"default": "cpu"},
            "--quick": {"action": "store_true"},
            "--full": {"action": "store_true"},
            "--workspace": {"type": Path, "required": True},
            "--setting": {"default": ""},
            "--case": {"default": "", "help": "only cases whose name contains this"},
            "--skip": {"action": "append", "default": [], "help": "leave out implementations that contain this"},
        },
    )

    global _OUT
    _OUT, sys.stdout = sys.stdout, sys.stderr  # whatever a peer prints must not enter the protocol
    scale = Scale(options.device, options.quick, options.full)
    # float32 is float32 for everybody, in cuDNN's convolutions too, which default to TF32.
    torch.backends.cudnn.allow_tf32 = False
    if options.task == "memory":
        measure_memory(scale, options.workspace)
        return
    loaded = [benchmarks.load(op) for op in options.op.split(",")]
    chosen = [[case for case in b.select(scale) if options.case in case.name] for b in loaded]
    if options.task == "prepare":
        measured = [op for benchmark in loaded for op in benchmark.measured_operators]
        emit("facts", facts=facts.gather(options.device, measured), slug=facts.device_slug(options.device))
        measure_floors(scale, [case for cases in chosen for case in cases], options.workspace)
    for benchmark, cases in zip(loaded, chosen, strict=True):
        if options.task == "prepare":
            prepare(benchmark, scale, cases, options.workspace)
        else:
            time_cases(benchmark, scale, cases, options.workspace, options.setting, options.skip)


if __name__ == "__main__":
    main()
