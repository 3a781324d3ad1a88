"""Options of the pytest-benchmark cases."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="benchmark the full shapes rather than the quick ones")
    parser.addoption("--device", default="cpu", choices=["cpu", "cuda"], help="device to benchmark on")
