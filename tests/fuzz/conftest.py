"""The number of cases of each test, M2F_FUZZ_CASES (default 25; `make fuzz` takes 500), and a count of those run."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

CASES = int(os.environ.get("M2F_FUZZ_CASES", "25"))
#: A few cases are the same ones at every run, many are new ones each time: a failure is kept in .hypothesis and its
#: recipe printed.
PROFILE = settings(
    max_examples=CASES,
    derandomize=CASES <= 25,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
_tried = pytest.StashKey[int]()


@pytest.fixture(scope="session")
def count_case(request: pytest.FixtureRequest) -> Callable[[], None]:
    """To be called once in every case."""
    stash = request.config.stash

    def count() -> None:
        stash[_tried] = stash.get(_tried, 0) + 1

    return count


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    tried = config.stash.get(_tried, 0)
    if tried:
        failed = [r for r in terminalreporter.stats.get("failed", []) if "tests/fuzz/" in r.nodeid]
        terminalreporter.write_line(f"fuzzing: {tried} cases run, failures in {len(failed)} tests")
