"""Benchmarks of every operator against its peers, its reference and the hardware's floor.

`python -m benchmarks.run` measures and writes `benchmarks/results/<device>/`;
`pytest benchmarks` runs the same cases under pytest-benchmark.

To add an operator: write `benchmarks/ops/<op>.py` with a module-level
`BENCHMARK = Benchmark(...)` (see `benchmarks/cases.py`), which is found there.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.cases import Benchmark

#: The committed results.
RESULTS = Path(__file__).with_name("results")
#: Commands that are no part of a run lie in tools/ and are called as if they lay here: `python -m benchmarks.launches`.
__path__.append(str(Path(__file__).with_name("tools")))

#: In this order; others follow.
_FIRST = ("point_loss", "end_to_end", "ms_deform_attn", "attention_mask", "masked_attention")
_FOUND = sorted(path.stem for path in Path(__file__).with_name("ops").glob("[!_]*.py"))
#: Operator -> module that defines its `BENCHMARK`.
REGISTRY: dict[str, str] = {op: f"benchmarks.ops.{op}" for op in dict.fromkeys((*_FIRST, *_FOUND))}

#: Measured only where `--op` names them.
OTHERS: dict[str, str] = {
    "whole_model": "benchmarks.ops.end_to_end:WHOLE_MODEL",
    "integrations": "benchmarks.models:INTEGRATIONS",
    "eomt": "benchmarks.models:EOMT",
    "mmcv": "benchmarks.models:MMCV",
    "id_maps": "benchmarks.models:ID_MAPS",
    "row_column_bias": "benchmarks.models:ROW_COLUMN_BIAS",
}


def load(op: str) -> Benchmark:
    """The benchmark of an operator in `REGISTRY` or `OTHERS`; of any other name, one without cases."""
    from benchmarks.cases import Benchmark

    module, _, name = (REGISTRY | OTHERS).get(op, "").partition(":")
    found: Benchmark = getattr(import_module(module), name or "BENCHMARK") if module else Benchmark(op, op)
    return found


def of_operators(name: str) -> list[Any]:
    """The results of the function `name` of every operator's module that has one, in one list."""
    functions = (getattr(import_module(module), name, list) for module in REGISTRY.values())
    return [found for function in functions for found in function()]


def arguments(
    description: str | None, declared: Mapping[str, Mapping[str, Any]], given: Sequence[str] | None = None
) -> argparse.Namespace:
    """The values of a command's arguments; `refuse(message)` of it ends the command with a message.

    Args:
        description: for `--help`, a module's docstring.
        declared: by name ("--old" or "old"), what `ArgumentParser.add_argument` takes.
        given: in place of the command line.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, about in declared.items():
        parser.add_argument(name, **about)
    return parser.parse_args(given, argparse.Namespace(refuse=parser.error))
