"""The cases of `bench_ms_deform_attn` under pytest-benchmark: `pytest benchmarks [--full] [--device cuda]`."""

from __future__ import annotations

from functools import cache

import pytest
import torch

import benchmarks
from benchmarks.cases import Data, Scale, check

BENCHMARK = benchmarks.load("ms_deform_attn")


@cache
def _data(scale: Scale, name: str) -> Data:
    return BENCHMARK.data(scale)[name]().to(scale.device)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    scale = Scale(metafunc.config.getoption("--device"), not metafunc.config.getoption("--full"))
    pairs = [(case, implementation) for case in BENCHMARK.cases(scale) for implementation in case.implementations]
    ids = [f"{case.name}-{implementation.name}" for case, implementation in pairs]
    metafunc.parametrize(("scale", "case", "implementation"), [(scale, *pair) for pair in pairs], ids=ids)


def test_ms_deform_attn(benchmark, scale, case, implementation):  # type: ignore[no-untyped-def]
    reason = implementation.unavailable()
    if reason is not None:
        pytest.skip(f"{implementation.name}: {reason}")
    data = _data(scale, case.data)
    threads = torch.get_num_threads()
    torch.set_num_threads(case.threads or threads)
    try:
        run = case.bind(implementation, data)
        right, errors = check(case, implementation, data, run())
        assert right, f"relative L2 errors against the fp64 reference: {errors}"
        synchronise = torch.cuda.synchronize if scale.device == "cuda" else lambda: None
        benchmark.group = case.name
        benchmark.extra_info.update(errors=errors)
        benchmark.pedantic(lambda: (run(), synchronise()), rounds=5, warmup_rounds=1)
    finally:
        torch.set_num_threads(threads)
