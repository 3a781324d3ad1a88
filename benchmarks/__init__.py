"""Benchmarks of every operator against its peers, its reference and the hardware's floor.

`python -m benchmarks.run` measures and writes `benchmarks/results/<device>/`;
`pytest benchmarks` runs the same cases under pytest-benchmark.

To add an operator: write `benchmarks/ops/<op>.py` with a module-level
`BENCHMARK = Benchmark(...)` (see `benchmarks/cases.py`) and add a line to `REGISTRY`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.cases import Benchmark

#: Operator -> module that defines its `BENCHMARK`.
REGISTRY: dict[str, str] = {
    "point_loss": "benchmarks.ops.point_loss",
    "end_to_end": "benchmarks.bench_end_to_end",
    "ms_deform_attn": "benchmarks.ops.ms_deform_attn",
    "attention_mask": "benchmarks.ops.attention_mask",
    "masked_attention": "benchmarks.ops.masked_attention",
}


#: What other commands measure into the same files.
OTHERS: dict[str, str] = {"integrations": "benchmarks.other_models", "learning": "benchmarks.learning"}


def load(op: str) -> Benchmark:
    """The benchmark of an operator in `REGISTRY` or `OTHERS`; of any other name, one without cases."""
    from benchmarks.cases import Benchmark

    module = (REGISTRY | OTHERS).get(op)
    found: Benchmark = import_module(module).BENCHMARK if module else Benchmark(op, op.replace("_", " "))
    return found
