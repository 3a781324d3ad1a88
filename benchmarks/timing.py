"""Interleaved timing: A B C A B C ..., medians and interquartile ranges, in milliseconds.

Interleaving spreads whatever else the machine does over all implementations alike, which
a ratio needs more than a small variance. CPU: `time.perf_counter`. CUDA: events; before every run the
L2 cache is overwritten and the GPU kept waiting for twice the time that the CPU needs to launch the run, so that
all are measured by what the GPU does. A run that waits for the GPU itself, or takes the CPU more than
`_LONGEST_LAUNCH_S`, gets no such start: it is measured from an idle GPU to its end, as a user meets it. The result of a
run is freed after the clock stops.
"""

from __future__ import annotations

import gc
import math
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

MAX_ROUNDS = 50
#: The call whose result was checked before has warmed up a run that takes this long.
WARM_MS = 200.0
#: Of a run that takes this long, the checked call is itself a sample; a benchmark may set less (`Benchmark.long_ms`).
LONG_MS = 10_000.0
_L2_FLUSH_BYTES = 256 << 20
_CYCLES_PER_S = 2.0e9  # about
_LONGEST_LAUNCH_S = 0.010
_SHORTEST_START_S = 0.001


@dataclass(frozen=True)
class Plan:
    """The number of timed calls of a case.

    Its runs are timed in rounds until `budget_s` seconds have passed: at least `min_rounds`, at most `MAX_ROUNDS`.
    A run that takes longer than `long_ms` is called `long_calls` times more after the call whose result was checked.
    """

    budget_s: float
    min_rounds: int
    long_calls: int = 0
    long_ms: float = LONG_MS


def plan(budget_s: float, quick: bool, full: bool, long_ms: float = LONG_MS) -> Plan:
    """The plan of a benchmark whose full run has `budget_s` seconds per case."""
    if quick:
        return Plan(0.2, 3, 0, long_ms)
    return Plan(budget_s, 5, 1, long_ms) if full else Plan(min(budget_s, 0.6), 3, 0, long_ms)


@dataclass(frozen=True)
class Timing:
    """Median and interquartile range in milliseconds; minor page faults per run (CPU) as a median."""

    median_ms: float
    iqr_ms: float
    rounds: int
    page_faults: float | None


def _time_cpu(run: Callable[[], Any], clock: Callable[[], float]) -> tuple[float, float]:
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    start = clock()
    result = run()
    elapsed = clock() - start
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    del result
    return elapsed * 1e3, float(faults)


def head_start(run: Callable[[], Any]) -> float:
    """Seconds that the GPU is kept waiting before a run; the run is called while the GPU is busy for longer."""
    torch.cuda.synchronize()
    torch.cuda._sleep(int(2 * _LONGEST_LAUNCH_S * _CYCLES_PER_S))
    start = time.perf_counter()
    result = run()
    seconds = time.perf_counter() - start
    torch.cuda.synchronize()
    del result
    return 0.0 if seconds > _LONGEST_LAUNCH_S else max(2 * seconds, _SHORTEST_START_S)


def _time_cuda(run: Callable[[], Any], flush: torch.Tensor, start_s: float) -> tuple[float, float]:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    flush.zero_()
    torch.cuda._sleep(int(start_s * _CYCLES_PER_S))
    start.record()
    result = run()
    end.record()
    torch.cuda.synchronize()
    del result
    return start.elapsed_time(end), math.nan


def timer(device: str, clock: Callable[[], float] = time.perf_counter) -> Callable[..., tuple[float, float]]:
    """A function that gives the milliseconds and the page faults (NaN on a GPU) of one call of a run, which on a GPU
    starts after the seconds given."""
    if device == "cpu":
        return lambda run, start_s=0.0: _time_cpu(run, clock)
    flush = torch.empty(_L2_FLUSH_BYTES, dtype=torch.int8, device=device)
    return lambda run, start_s=0.0: _time_cuda(run, flush, start_s)


def interleaved(
    runs: Sequence[Callable[[], Any]],
    device: str,
    plan: Plan,
    checked_ms: Sequence[float] = (),
    clock: Callable[[], float] = time.perf_counter,
) -> list[Timing]:
    """Time several runs in turn.

    Args:
        runs: each is called once per round, in order.
        device: "cpu" or "cuda".
        plan: how often.
        checked_ms: what each run took when its result was checked; without it, every run is warmed up.
        clock: of the CPU's timing.
    """
    once, starts = timer(device, clock), [0.0] * len(runs)
    known = checked_ms or [0.0] * len(runs)
    samples: list[list[tuple[float, float]]] = [[] for _ in runs]
    for i, (run, before) in enumerate(zip(runs, known, strict=True)):
        if before > plan.long_ms:
            samples[i].append((before, math.nan))
        elif before < WARM_MS:
            once(run)
            starts[i] = head_start(run) if device == "cuda" else 0.0
    gc.collect()
    gc.disable()
    try:
        start, rounds = time.perf_counter(), 0
        while rounds < plan.min_rounds or (rounds < MAX_ROUNDS and time.perf_counter() - start < plan.budget_s):
            for run, before, taken, start_s in zip(runs, known, samples, starts, strict=True):
                if before <= plan.long_ms or len(taken) <= plan.long_calls:
                    taken.append(once(run, start_s))
            rounds += 1
    finally:
        gc.enable()
    return [_summarise(taken) for taken in samples]


def _summarise(taken: list[tuple[float, float]]) -> Timing:
    times = [milliseconds for milliseconds, _ in taken]
    quartiles = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else [times[0]] * 3
    faults = [count for _, count in taken if not math.isnan(count)]
    return Timing(quartiles[1], quartiles[2] - quartiles[0], len(times), statistics.median(faults) if faults else None)
