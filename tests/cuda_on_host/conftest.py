from __future__ import annotations

from types import ModuleType

import pytest

from tests.cuda_on_host import build


@pytest.fixture(scope="session")
def kernels() -> ModuleType:
    """The CUDA kernels, compiled for the host."""
    return build.load()
