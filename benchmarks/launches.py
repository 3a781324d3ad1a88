"""How many kernels a call launches on a GPU, counted by `torch.profiler`."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch


def kernels(events: Iterable[dict[str, Any]]) -> int:
    """The kernels among the events of a trace; copies and fills by the driver have categories of their own."""
    return sum(event.get("cat") == "kernel" for event in events)


def count(run: Callable[[], Any]) -> int:
    """Kernels that one call launches, the call being warm."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return kernels(json.loads(path.read_text())["traceEvents"])
