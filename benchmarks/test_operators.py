"""The cases of every operator under pytest-benchmark, which compares runs and writes JSON.

    pytest benchmarks --benchmark-only -k ms_deform_attn --benchmark-autosave [--full] [--device cuda]

The same registry, data and checks as `python -m benchmarks.run`, which is what reports are made of: it interleaves.
"""

from __future__ import annotations

from functools import cache, partial

import pytest
import torch

import benchmarks
from benchmarks.cases import Data, Scale


@cache
def _data(scale: Scale, op: str, name: str) -> Data:
    return benchmarks.load(op).data(scale)[name]().to(scale.device)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    full = metafunc.config.getoption("--full")
    scale = Scale(metafunc.config.getoption("--device"), quick=not full, full=full)
    chosen = [
        (scale, op, case, implementation)
        for op in benchmarks.REGISTRY
        for case in benchmarks.load(op).select(scale)
        for implementation in case.implementations
    ]
    ids = [f"{op}-{case.name}-{implementation.name}" for _, op, case, implementation in chosen]
    metafunc.parametrize(("scale", "op", "case", "implementation"), chosen, ids=ids)


def test_operator(request, benchmark, scale, op, case, implementation):
    reason = implementation.unavailable()
    if reason is not None:
        pytest.skip(f"{implementation.name}: {reason}")
    data = _data(scale, op, case.data)
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(case.threads or torch.get_num_threads())
    run = case.bind(implementation, data)
    results = implementation.decode(run(collect=True), data)
    verdict = benchmarks.load(op).check(case, implementation, data, results)
    assert verdict.right, f"errors against the fp64 reference: {verdict}"
    synchronise = torch.cuda.synchronize if scale.device == "cuda" else lambda: None
    benchmark.group = f"{op}: {case.name}"
    benchmark.extra_info.update(error=verdict.output, error_gradients=verdict.gradients)
    benchmark.pedantic(lambda: (run(), synchronise()), rounds=5, warmup_rounds=1)
