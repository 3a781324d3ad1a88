"""Interleaved timing: A B C A B C ..., medians and interquartile ranges, in milliseconds.

Interleaving spreads whatever else the machine does over all implementations alike, which
a ratio needs more than a small variance. CPU: `time.perf_counter`. CUDA: events; before every run the
L2 cache is overwritten and the GPU kept waiting for `_HEAD_START_CYCLES`, so that launches are queued by the time
the clock starts, and all are measured by what the GPU does. The result of a run is freed after the clock stops.
"""

from __future__ import annotations

import gc
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

WARM_UP_ROUNDS = 1
MAX_ROUNDS = 50
#: A run that takes this long is timed twice and no more, its warm-up included (its result was checked before, so it is
#: warm): full masks take ten seconds where points take a tenth of one.
SLOW_MS = 2000.0
_L2_FLUSH_BYTES = 256 << 20
_HEAD_START_CYCLES = 2_000_000  # about a millisecond


@dataclass(frozen=True)
class Timing:
    """Median and interquartile range in milliseconds; minor page faults per run (CPU) as a median."""

    median_ms: float
    iqr_ms: float
    rounds: int
    page_faults: float | None


def _time_cpu(run: Callable[[], Any]) -> tuple[float, float]:
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    start = time.perf_counter()
    result = run()
    elapsed = time.perf_counter() - start
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    del result
    return elapsed * 1e3, float(faults)


def _time_cuda(run: Callable[[], Any], flush: torch.Tensor) -> tuple[float, float]:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    flush.zero_()
    torch.cuda._sleep(_HEAD_START_CYCLES)
    start.record()
    result = run()
    end.record()
    torch.cuda.synchronize()
    del result
    return start.elapsed_time(end), 0.0


def interleaved(runs: Sequence[Callable[[], Any]], device: str, budget_s: float, min_rounds: int) -> list[Timing]:
    """Time several runs in turn.

    Args:
        runs: each is called once per round, in order.
        device: "cpu" or "cuda".
        budget_s: stop after this many seconds, but not before `min_rounds` nor after `MAX_ROUNDS`.
    """
    if not runs:
        return []
    flush = torch.empty(_L2_FLUSH_BYTES, dtype=torch.int8, device=device) if device == "cuda" else None

    def once(run: Callable[[], Any]) -> tuple[float, float]:
        return _time_cpu(run) if flush is None else _time_cuda(run, flush)

    samples: list[list[tuple[float, float]]] = [[] for _ in runs]
    for _ in range(WARM_UP_ROUNDS):
        for run, taken in zip(runs, samples, strict=True):
            warm_up = once(run)
            if warm_up[0] > SLOW_MS:
                taken.append(warm_up)
    gc.collect()
    gc.disable()
    try:
        start, rounds = time.perf_counter(), 0
        while rounds < min_rounds or (rounds < MAX_ROUNDS and time.perf_counter() - start < budget_s):
            for run, taken in zip(runs, samples, strict=True):
                if len(taken) < 2 or taken[0][0] <= SLOW_MS:
                    taken.append(once(run))
            rounds += 1
    finally:
        gc.enable()
    return [_summarise(taken, device) for taken in samples]


def _summarise(taken: list[tuple[float, float]], device: str) -> Timing:
    times = [milliseconds for milliseconds, _ in taken]
    quartiles = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else [times[0]] * 3
    faults = statistics.median(count for _, count in taken) if device == "cpu" else None
    return Timing(quartiles[1], quartiles[2] - quartiles[0], len(times), faults)
