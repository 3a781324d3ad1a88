"""The tasks of measuring processes. The runner starts each fresh, with the allocator setting in its environment.

A task yields what it finds: the name of its next step, facts by name, and rows.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import groupby
from multiprocessing.connection import Connection
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

import benchmarks
from benchmarks import facts, launches, measure
from benchmarks.cases import Benchmark, Case, Data, Implementation, Row, Scale

Found = str | dict[str, str] | Row


def fresh(context: Any, workspace: Path, task: Callable[..., Iterable[Any]], *arguments: Any) -> Iterator[Any]:
    """Yields what a task yields in a process of its own, which has this one's environment.

    Args:
        context: of `multiprocessing`: how the process is started.
        workspace: a folder, for what the process prints.

    Raises:
        RuntimeError: the process failed; the end of what it printed.
    """
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile("w", dir=workspace, suffix=".log", delete=False) as log:
        process = context.Process(target=_relay, args=(sender, log.name, task, *arguments))
    process.start()
    sender.close()
    try:
        while True:
            yield receiver.recv()
    except EOFError:
        process.join()
    finally:
        process.kill()
        process.join()
    if process.exitcode:
        last = Path(log.name).read_text().strip().splitlines()[-15:]
        raise RuntimeError("\n".join([f"its process ended with {process.exitcode}: {last[-1] if last else ''}", *last]))


def _relay(sender: Connection, log: str, task: Callable[..., Iterable[Any]], *arguments: Any) -> None:
    with open(log, "w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    # float32 is float32 for everybody, in cuDNN's convolutions too, which default to TF32.
    torch.backends.cudnn.allow_tf32 = False
    for found in task(*arguments):
        sender.send(found)


# ---------------------------------------------------------------- tasks


def prepare(scale: Scale, ops: Sequence[str], only: str, workspace: Path) -> Iterator[Found]:
    """The conditions, the floors for every number of threads, and each case's data with its fp64 reference."""
    chosen = [(benchmark, benchmark.select(scale, only)) for benchmark in map(benchmarks.load, ops)]
    yield facts.gather(scale.device, [op for benchmark, _ in chosen for op in benchmark.operators or [benchmark.op]])
    yield "rates of memory, gathers and matrix products"
    counts = {case.threads or torch.get_num_threads() for _, cases in chosen for case in cases}
    rates = measure.rates_by_threads(scale.device, counts | {torch.get_num_threads()}, scale.quick)
    (workspace / "floors.json").write_text(json.dumps(rates))
    for benchmark, cases in chosen:
        needed = {case.data for case in cases}
        for name, build in benchmark.data(scale).items():
            if name in needed:
                yield f"{benchmark.op}: inputs and fp64 reference of {name}"
                torch.save(vars(build()), workspace / f"{name}.pt")


def _load(workspace: Path, case: Case, device: str) -> Data:
    return Data(**torch.load(workspace / f"{case.data}.pt", map_location=device))


def times(
    scale: Scale, ops: Sequence[str], only: str, workspace: Path, setting: str, skip: Sequence[str]
) -> Iterator[Found]:
    """Every case checked and timed under this process's allocator setting."""
    rates, usual = json.loads((workspace / "floors.json").read_text()), torch.get_num_threads()
    every = scale.full or setting == next(iter(facts.SETTINGS[scale.device]))
    for benchmark in map(benchmarks.load, ops):
        cases = [case for case in benchmark.select(scale, only) if every or not case.one_setting]
        for _, group in groupby(sorted(cases, key=attrgetter("data")), key=attrgetter("data")):
            data = None
            for case in group:
                yield f"{benchmark.op}, {setting}: {case.name}"
                data = data or _load(workspace, case, scale.device)
                threads = case.threads or usual
                torch.set_num_threads(threads)
                chosen = [one for one in case.implementations if every or not one.one_setting]
                case = replace(case, implementations=chosen)
                yield from _measure(benchmark, case, data, setting, scale, rates[str(threads)], skip)
        torch.set_num_threads(usual)


def _checked(
    benchmark: Benchmark, case: Case, one: Implementation, data: Data, row: Row, skip: Sequence[str]
) -> tuple[Any, float] | None:
    """The call to be timed, and what it took when its result was checked; None, and why in the row, if it is not."""
    left_out = [f"left out (--skip {text})" for text in skip if text in one.name]
    row.status = (left_out or [one.unavailable() or "ok"])[0]
    if row.status != "ok":
        return None
    try:
        run = case.bind(one, data)
        start = time.perf_counter()
        results, row.written_mib = measure.written(partial(run, collect=True), one.counts_writes)
        taken = (time.perf_counter() - start) * 1e3
        verdict = benchmark.check(case, one, data, one.decode(results, data))
    except Exception as error:  # a peer may fail in any way; the row says how
        row.status = f"failed: {type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')[:160]}"
        return None
    row.error_output, row.error_gradients = verdict.output, verdict.gradients
    row.status = "ok" if verdict.right else "wrong result"
    return (run, taken) if verdict.right else None


def _measure(
    benchmark: Benchmark, case: Case, data: Data, setting: str, scale: Scale, rates: measure.Rates, skip: Sequence[str]
) -> list[Row]:
    rows, timed, cuda = [], [], scale.device == "cuda"
    what = case.direction, case.distribution, case.dtype, torch.get_num_threads()
    for one in case.implementations:
        row = Row(benchmark.op, case.name, one.name, setting, *what, ours=one.ours, headline=case.headline,
                  run="full" if scale.full else "default")  # fmt: skip
        rows.append(row)
        if found := _checked(benchmark, case, one, data, row, skip):
            timed.append((one, row, *found))
    budget_s = benchmark.budget_s if scale.full else min(benchmark.budget_s, 0.2 if scale.quick else 0.6)
    plan = measure.Plan(budget_s, 5 if scale.full else 3, int(scale.full), benchmark.long_ms)
    alone = benchmark.cpu_time and torch.get_num_threads() == 1
    # On a GPU the first call compiles.
    results = measure.interleaved(
        [run for *_, run, _ in timed], scale.device, plan, [0.0 if cuda else taken for *_, taken in timed],
        time.process_time if alone else time.perf_counter,
    )  # fmt: skip
    work = benchmark.work(case, data)
    floor_ms, kind = (None, "") if work is None else measure.floor(work, rates)
    for (one, row, run, _), result in zip(timed, results, strict=True):
        vars(row).update(asdict(result), floor_ms=floor_ms, floor_kind=kind)
        row.floor_share = None if floor_ms is None else floor_ms / result.median_ms
        row.subject_speedup = rows[0].median_ms and result.median_ms / rows[0].median_ms
        stages = benchmark.stages(case, one)
        row.stages = ";".join(f"{name}={milliseconds:.6g}" for name, milliseconds in stages.items())
        if cuda:
            row.kernels = launches.count(run)
        if cuda and case.memory and one.counts_memory:
            row.memory_extra_mib, row.memory_total_mib = measure.memory(run, data.inputs.values(), "cuda")
            if benchmark.peak is not None:  # which counts outputs too
                row.memory_extra_mib, row.memory_total_mib = row.memory_total_mib, None
    return rows


def peak(
    scale: Scale, workspace: Path, op: str, case: str, implementation: str
) -> Iterator[tuple[float, float | None]]:
    """Peak memory of one call on CPU: extra and total MiB."""
    benchmark = benchmarks.load(op)
    chosen = next(c for c in benchmark.select(scale) if c.name == case)
    one = next(i for i in chosen.implementations if i.name == implementation)
    if benchmark.peak is not None:
        yield benchmark.peak(chosen, one), None
        return
    data = replace(_load(workspace, chosen, "cpu"), truth={})
    chosen.bind(one, benchmark.shrink(data))()
    yield measure.memory(chosen.bind(one, data), data.inputs.values(), "cpu")
