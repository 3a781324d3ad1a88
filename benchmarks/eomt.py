"""A masked block of EoMT, and a training step, before and after: time in turns, peak memory each in its own process.

    OMP_NUM_THREADS=1 python -m benchmarks.eomt            # a block of EoMT-L at 640 x 640: its attention, all of it
    OMP_NUM_THREADS=1 python -m benchmarks.eomt --step 640

A block: tokens [1, 1805, 1024] (200 queries, 5 prefix tokens, 40 x 40 patches) and the bool mask of queries and patches
in, the block's output and the gradients of tokens and weights out. Before: the mask as `transformers` makes it of all
pairs for each head, and its block with SDPA; after: the bits, and the accelerated block. Memory: the peak above inputs,
weights and what is returned (`benchmarks/memory.py`). A step: the whole model of ViT-S's size (at 1280 x 1280 with 3
heads and 6 layers), one image with 10 targets.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import m2f_kernels
from benchmarks import memory
from m2f_kernels.integrations.transformers import eomt

QUERIES, PREFIX, SIDE, CHANNELS, HEADS = 200, 5, 40, 1024, 16


def _block(what: str) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """Before and after of a block ("block") or of its attention ("attention")."""
    from transformers import EomtConfig
    from transformers.models.eomt.modeling_eomt import EomtLayer

    torch.manual_seed(0)
    config = EomtConfig(hidden_size=CHANNELS, num_attention_heads=HEADS, attn_implementation="sdpa")
    layer = EomtLayer(config).train()
    accelerated = m2f_kernels.accelerate(copy.deepcopy(layer)).model
    tokens = torch.randn(1, QUERIES + PREFIX + SIDE**2, CHANNELS)
    grad = torch.randn_like(tokens)
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    centre = torch.rand(2, QUERIES, 1, 1) * SIDE
    attend = ((y - centre[0]) ** 2 + (x - centre[1]) ** 2 < 64).flatten(1)[None]

    def call(module: Any, mask: Any) -> tuple[Tensor, ...]:
        leaf = tokens.detach().requires_grad_()
        part = module if what == "block" else module.attention
        out = part(leaf, mask)
        out = out if isinstance(out, Tensor) else out[0]
        return out, *torch.autograd.grad(out, [leaf, *part.parameters()], grad)

    def before() -> tuple[Tensor, ...]:
        mask = torch.ones(1, tokens.shape[1], tokens.shape[1], dtype=torch.bool)
        mask[:, :QUERIES, QUERIES + PREFIX :] = attend
        mask = mask[:, None].expand(-1, HEADS, -1, -1)
        return call(layer, mask.float().masked_fill(~mask, -1e9))

    def after() -> tuple[Tensor, ...]:
        return call(accelerated, eomt.QueryMask(m2f_kernels.pack_attention_mask(attend), QUERIES + PREFIX))

    return {"before": before, "after": after}


def _step(size: int) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    from transformers import EomtConfig, EomtForUniversalSegmentation

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 384, "num_attention_heads": 6, "num_hidden_layers": 12}
    if size > 640:
        sizes = {"hidden_size": 192, "num_attention_heads": 3, "num_hidden_layers": 6}
    config = EomtConfig(**sizes, image_size=size, patch_size=16, num_labels=133)
    model = EomtForUniversalSegmentation(config).train()
    accelerated = m2f_kernels.accelerate(copy.deepcopy(model)).model
    pixels = torch.randn(1, 3, size, size)
    masks = (torch.rand(10, size // 32, size // 32) > 0.7).repeat_interleave(32, 1).repeat_interleave(32, 2)
    labels = {"mask_labels": [masks.float()], "class_labels": [torch.arange(10)]}

    def call(one: Any) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        loss = one(pixels, **labels).loss
        used = [p for p in one.parameters() if p.requires_grad]
        return loss, *(g for g in torch.autograd.grad(loss, used, allow_unused=True) if g is not None)

    return {"before": lambda: call(model), "after": lambda: call(accelerated)}


def _make(what: str) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    return _block(what) if what in ("attention", "block") else _step(int(what))


def _memory(what: str, name: str) -> None:
    """Print the peak of a call of one of the two; in a process of its own. A first call starts threads and code."""
    run = _make(what)[name]
    if what in ("attention", "block"):
        run()
    print(memory.measure(run, (), "cpu")[0])


def _peak(what: str, name: str) -> float:
    command = [sys.executable, "-m", "benchmarks.eomt", "--memory", what, name]
    done = subprocess.run(command, env={**os.environ, **memory.ENVIRONMENT}, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed")
    return float(done.stdout.split()[-1])


def measure(what: str, rounds: int) -> str:
    """One line of the table."""
    runs = _make(what)
    times: dict[str, list[float]] = {name: [] for name in runs}
    results: dict[str, tuple[Tensor, ...]] = {}
    for i in range(rounds + 1):
        for name, run in runs.items():
            start = time.process_time()
            results[name] = run()
            if i or rounds == 1:
                times[name].append((time.process_time() - start) * 1e3)
    # Of all together: the gradient of the keys' bias is zero but for rounding. The losses of a step draw other points.
    first, second = (torch.cat([x.detach().flatten() for x in results[name]]) for name in ("before", "after"))
    error = float((first - second).norm() / first.norm())
    difference = f"{error:.1e}" if what in ("attention", "block") else "-"
    del runs, results, first, second
    ms = [statistics.median(times[name]) for name in ("before", "after")]
    mib = [_peak(what, name) for name in ("before", "after")]
    return (
        f"| {what} | {ms[0]:.0f} | {ms[1]:.0f} | **{ms[1] / ms[0]:.2f}x** | {mib[0]:.0f} | {mib[1]:.0f} "
        f"| **{mib[1] / mib[0]:.2f}x** | {difference} |"
    )


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", type=int, choices=(640, 1280), help="a training step at this size instead")
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each, after one to warm up")
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        _memory(*options.memory)
        return 0
    print("| part | before, ms | after, ms | time | before, MiB | after, MiB | peak memory | relative difference |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for what in ("attention", "block") if options.step is None else (str(options.step),):
        print(measure(what, options.rounds), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
