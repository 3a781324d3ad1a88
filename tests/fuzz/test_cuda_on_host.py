"""The CUDA kernels on the host, in random shapes, dtypes and launch configurations, against the reference."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.cuda_on_host import build
from tests.cuda_on_host.test_ms_deform_attn import DTYPES, MODES, check, make_case
from tests.fuzz.conftest import PROFILE

_sizes = st.tuples(st.integers(1, 5), st.integers(1, 5))
#: Levels, each with its number of points.
_levels = st.lists(st.tuples(_sizes, st.integers(1, 5)), min_size=1, max_size=3)
_sampling = st.one_of(st.none(), st.lists(st.sampled_from(sorted(DTYPES)), min_size=3, max_size=3))


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    return build.load()


@pytest.mark.parametrize("mode", MODES)
def test_cuda_kernels(kernels: ModuleType, mode: str, count_case: Callable[[], None]) -> None:
    @PROFILE
    @given(
        levels=_levels,
        # Nothing is launched for an empty batch or no queries.
        n=st.integers(1, 2),
        q=st.one_of(st.none(), st.integers(1, 8)),
        heads=st.integers(1, 3),
        d=st.integers(2, 72),
        dtype=st.sampled_from(sorted(DTYPES)),
        sampling=_sampling,
        on_device=st.booleans(),
        architecture=st.sampled_from((80, 86, 90, 100)),
        multiprocessors=st.sampled_from((1, 2, 132)),
        reverse=st.booleans(),
        seed=st.integers(0, 2**32 - 1),
    )
    def fuzz(levels, n, q, heads, d, dtype, sampling, on_device, architecture, multiprocessors, reverse, seed):  # type: ignore[no-untyped-def]
        count_case()
        case = make_case(
            mode,
            [size for size, _ in levels],
            [points for _, points in levels],
            n=n,
            q=q,
            heads=heads,
            d=d,
            dtype=dtype,
            sampling_dtype=sampling,
            seed=seed,
            on_device=on_device,
            architecture=architecture,
            multiprocessors=multiprocessors,
            reversed=reverse,
        )
        check(kernels, case)

    fuzz()
