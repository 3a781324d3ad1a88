"""Cross-attention with a bias of rows and columns, as SAM-3's decoder has it: published and fused.

    OMP_NUM_THREADS=1 python -m benchmarks.row_column_bias

200 box queries and one more attend to 72 x 72 keys in 8 heads of 32 channels, with a bias of each query for the row and
one for the column of a key (`transformers`' `Sam3DetrDecoder`, image 1008 x 1008), forward, and forward + backward.

- published: both parts are added up to [N, H, Q, S], made contiguous and padded, and go to SDPA as a float mask.
- masked_attention: takes both parts.
- without a bias: the same operator with a mask that blocks nothing, to show what the bias costs.

Time is CPU time, in turns; memory the peak above inputs and results (`benchmarks/memory.py`), each in a process
of its own. The bar: less than half of the memory, and of the time less than 1 / 1.3; another exit status than 0 where
it is missed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import m2f_kernels
from benchmarks import memory

QUERIES, SIDE, HEADS, DIM = 200, 72, 8, 32
#: The most time and memory, as shares of the published form's.
BARS = 1 / 1.3, 0.5


def published(query: Tensor, key: Tensor, value: Tensor, by_row: Tensor, by_column: Tensor) -> Tensor:
    """Attention [N, H, Q + 1, D]; `by_row` [N, Q, h, H] and `by_column` [N, Q, w, H], for all queries but the first."""
    bias = (by_row.unsqueeze(3) + by_column.unsqueeze(2)).flatten(2, 3).permute(0, 3, 1, 2).contiguous()
    return F.scaled_dot_product_attention(query, key, value, attn_mask=F.pad(bias, (0, 0, 1, 0)))


def fused(query: Tensor, key: Tensor, value: Tensor, by_row: Tensor, by_column: Tensor) -> Tensor:
    """The same; the first query has zeros."""
    by_row, by_column = (F.pad(x.permute(0, 3, 1, 2), (0, 0, 1, 0)) for x in (by_row, by_column))
    return m2f_kernels.masked_attention(query, key, value, bias=(by_row, by_column))


def _inputs(training: bool) -> list[Tensor]:
    torch.manual_seed(0)
    heads = [torch.randn(1, length, HEADS, DIM).transpose(1, 2) for length in (QUERIES + 1, SIDE**2, SIDE**2)]
    return [x.requires_grad_(training) for x in (*heads, *(torch.randn(1, QUERIES, SIDE, HEADS) for _ in range(2)))]


def _make(what: str) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    inputs = _inputs(what != "forward")
    mask = m2f_kernels.pack_attention_mask(torch.ones(1, QUERIES + 1, SIDE**2, dtype=torch.bool))
    functions: dict[str, Callable[..., Tensor]] = {
        "published": published,
        "masked_attention": fused,
        "without a bias": lambda query, key, value, *_: m2f_kernels.masked_attention(query, key, value, mask),
    }

    def call(name: str) -> tuple[Tensor, ...]:
        out = functions[name](*inputs)
        if what == "forward":
            return (out,)
        used = inputs[:3] if name == "without a bias" else inputs
        return out, *torch.autograd.grad(out, used, torch.ones_like(out))

    return {name: lambda name=name: call(name) for name in functions}  # type: ignore[misc]


def _peak(what: str, name: str) -> float:
    command = [sys.executable, "-m", "benchmarks.row_column_bias", "--memory", what, name]
    environment = {**os.environ, **memory.ENVIRONMENT}
    return float(subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="timed calls of each, after one to warm up")
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        run = _make(options.memory[0])[options.memory[1]]
        run()
        print(memory.measure(run, (), "cpu")[0])
        return 0
    met = True
    print("| pass | form | ms | against published | peak, MiB | against published | relative difference |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for what in ("forward", "forward + backward"):
        runs = _make(what)
        times: dict[str, list[float]] = {name: [] for name in runs}
        results = {}
        for i in range(options.rounds + 1):
            for name, run in runs.items():
                start = time.process_time()
                results[name] = tuple(x.detach() for x in run())
                if i:
                    times[name].append((time.process_time() - start) * 1e3)
        ms = {name: statistics.median(taken) for name, taken in times.items()}
        mib = {name: _peak(what, name) for name in runs}
        for name in runs:
            pairs = zip(results["published"], results[name], strict=False)
            worst = max(float((a - b).norm() / a.norm()) for a, b in pairs)
            shares = ms[name] / ms["published"], mib[name] / mib["published"]
            print(
                f"| {what} | {name} | {ms[name]:.1f} | {shares[0]:.2f}x | {mib[name]:.1f} | {shares[1]:.2f}x "
                f"| {'-' if name == 'without a bias' else f'{worst:.1e}'} |",
                flush=True,
            )
            if name == "masked_attention":
                met &= worst < 1e-4 and all(share <= bar for share, bar in zip(shares, BARS, strict=True))
    print(f"\nat most {BARS[0]:.2f}x of the time and {BARS[1]:.2f}x of the memory: {'met' if met else 'missed'}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
