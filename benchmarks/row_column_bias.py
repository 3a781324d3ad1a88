"""Cross-attention with a bias of rows and columns, as SAM-3's decoder has it: what a factored bias would save.

    OMP_NUM_THREADS=1 python -m benchmarks.row_column_bias

200 box queries and one more attend to 72 x 72 keys in 8 heads of 32 channels, with a bias of each query for the row and
one for the column of a key (`transformers`' `Sam3DetrDecoder`, image 1008 x 1008), forward, and forward + backward.

- published: both parts are added up to [N, H, Q, S], made contiguous and padded, and go to SDPA as a float mask.
- factored: a prototype in plain PyTorch that adds both parts to the scores of a few rows of keys at a time.
- bound: `masked_attention` with a mask that blocks nothing and no bias, less than a kernel with one would take.

Time is CPU time, in turns; memory the peak above inputs and results (`benchmarks/memory.py`), each in a process
of its own.
"""

from __future__ import annotations

import argparse
import math
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
#: Rows of keys whose scores the prototype makes at a time.
ROWS = 8


def published(query: Tensor, key: Tensor, value: Tensor, by_row: Tensor, by_column: Tensor) -> Tensor:
    """Attention [N, H, Q + 1, D]; `by_row` [N, Q, h, H] and `by_column` [N, Q, w, H], for all queries but the first."""
    bias = (by_row.unsqueeze(3) + by_column.unsqueeze(2)).flatten(2, 3).permute(0, 3, 1, 2).contiguous()
    return F.scaled_dot_product_attention(query, key, value, attn_mask=F.pad(bias, (0, 0, 1, 0)))


class Factored(torch.autograd.Function):
    """The same without a bias or scores of all pairs; the backward pass computes the scores again."""

    @staticmethod
    def forward(ctx, query, key, value, by_row, by_column):  # type: ignore[no-untyped-def]
        rows, columns = (F.pad(x.permute(0, 3, 1, 2), (0, 0, 1, 0)) for x in (by_row, by_column))
        scaled = query / math.sqrt(DIM)
        largest = query.new_full(query.shape[:3], -math.inf)
        total, out = torch.zeros_like(largest), torch.zeros_like(query)
        for part in range(0, SIDE, ROWS):
            keys = slice(part * SIDE, (part + ROWS) * SIDE)
            scores = _scores(scaled, key[:, :, keys], rows[..., part : part + ROWS], columns)
            now = torch.maximum(largest, scores.amax(-1))
            weights, kept = scores.sub_(now[..., None]).exp_(), (largest - now).exp()
            total = total * kept + weights.sum(-1)
            out = out * kept[..., None] + weights @ value[:, :, keys]
            largest = now
        out = out / total[..., None]
        ctx.save_for_backward(scaled, key, value, rows, columns, out, largest + total.log())
        return out

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        scaled, key, value, rows, columns, out, logsumexp = ctx.saved_tensors
        delta = (grad * out).sum(-1, keepdim=True)
        grads = [torch.zeros_like(scaled), torch.empty_like(key), torch.empty_like(value)]
        grad_rows, grad_columns = torch.empty_like(rows), torch.zeros_like(columns)
        for part in range(0, SIDE, ROWS):
            keys = slice(part * SIDE, (part + ROWS) * SIDE)
            scores = _scores(scaled, key[:, :, keys], rows[..., part : part + ROWS], columns)
            weights = scores.sub_(logsumexp[..., None]).exp_()
            grads[2][:, :, keys] = weights.transpose(2, 3) @ grad
            slope = weights.mul_((grad @ value[:, :, keys].transpose(2, 3)).sub_(delta))
            grads[0] += slope @ key[:, :, keys]
            grads[1][:, :, keys] = slope.transpose(2, 3) @ scaled
            pixels = slope.unflatten(-1, (ROWS, SIDE))
            grad_rows[..., part : part + ROWS] = pixels.sum(-1)
            grad_columns += pixels.sum(-2)
        parts = (x[:, :, 1:].permute(0, 2, 3, 1) for x in (grad_rows, grad_columns))
        return grads[0] / math.sqrt(DIM), *grads[1:], *parts


def _scores(scaled: Tensor, key: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    scores = scaled @ key.transpose(2, 3)
    scores.unflatten(-1, (-1, SIDE)).add_(rows[..., None]).add_(columns.unsqueeze(-2))
    return scores


def _inputs(training: bool) -> list[Tensor]:
    torch.manual_seed(0)
    heads = [torch.randn(1, length, HEADS, DIM).transpose(1, 2) for length in (QUERIES + 1, SIDE**2, SIDE**2)]
    return [x.requires_grad_(training) for x in (*heads, *(torch.randn(1, QUERIES, SIDE, HEADS) for _ in range(2)))]


def _make(what: str) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    inputs = _inputs(what != "forward")
    mask = m2f_kernels.pack_attention_mask(torch.ones(1, QUERIES + 1, SIDE**2, dtype=torch.bool))
    functions: dict[str, Callable[..., Tensor]] = {
        "published": published,
        "factored": Factored.apply,
        "bound": lambda query, key, value, *_: m2f_kernels.masked_attention(query, key, value, mask),
    }

    def call(name: str) -> tuple[Tensor, ...]:
        out = functions[name](*inputs)
        if what == "forward":
            return (out,)
        used = inputs[:3] if name == "bound" else inputs
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
            print(
                f"| {what} | {name} | {ms[name]:.1f} | {ms[name] / ms['published']:.2f}x | {mib[name]:.1f} "
                f"| {mib[name] / mib['published']:.2f}x | {'-' if name == 'bound' else f'{worst:.1e}'} |",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
