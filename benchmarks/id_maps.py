"""Targets as a map of ids and as run lengths against dense masks: bytes, bits, and the time of the loss part, in turns.

    OMP_NUM_THREADS=1 python -m benchmarks.id_maps

One image, 100 queries at stride 4, 3 outputs, K = 12544: matching, losses and gradients of the criterion,
in CPU time, which other programs of the machine do not change.
Memory of the targets: what they hold; the criterion makes no copy of them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from m2f_kernels import FactoredMasks, InstanceMap, RunLengths
from m2f_kernels.nn import PointMaskCriterion

QUERIES, CHANNELS, OUTPUTS, LABELS = 100, 256, 3, 80


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=int, default=200)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each, after one to warm up")
    options = parser.parse_args()
    torch.manual_seed(0)
    size, count = options.size, options.targets
    # Targets as Voronoi cells: connected, and every pixel belongs to one.
    side = -(-size // 8)
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    centres = torch.rand(2, count, 1, 1) * side
    nearest = ((y - centres[0]) ** 2 + (x - centres[1]) ** 2).argmin(0).int()
    id_map = nearest.repeat_interleave(8, 0).repeat_interleave(8, 1)[:size, :size].contiguous()
    instances = InstanceMap(id_map, torch.arange(count))
    dense_masks = instances.masks()
    forms = {"dense": dense_masks, "id map": instances, "run lengths": RunLengths.from_masks(dense_masks)}
    features = torch.randn(1, CHANNELS, size // 4, size // 4, requires_grad=True)
    embeds = [torch.randn(1, QUERIES, CHANNELS, requires_grad=True) for _ in range(OUTPUTS)]
    predictions = [
        {"class_logits": torch.randn(1, QUERIES, LABELS + 1), "masks": FactoredMasks(embed, features)}
        for embed in embeds
    ]
    labels = torch.randint(0, LABELS, (count,))
    criterion = PointMaskCriterion(LABELS)

    def run(form: str) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        losses = criterion(predictions, [{"labels": labels, "masks": forms[form]}])
        total = sum(losses.values(), torch.zeros(()))
        return total.detach(), *torch.autograd.grad(total, [features, *embeds])

    times: dict[str, list[float]] = {form: [] for form in forms}
    results: dict[str, tuple[Tensor, ...]] = {}
    for i in range(options.rounds + 1):
        for form, taken in times.items():
            start = time.process_time()
            results[form] = run(form)
            if i:
                taken.append((time.process_time() - start) * 1e3)
    equal = all(torch.equal(a, b) for form in results for a, b in zip(results["dense"], results[form], strict=True))
    held = {form: sum(x.nbytes for x in tree_leaves(given) if isinstance(x, Tensor)) for form, given in forms.items()}
    dense = statistics.median(times["dense"])
    print(f"{count} targets of {size} x {size}; losses and gradients have equal bits: {equal}\n")
    print("| targets | MiB | loss part, ms of CPU time | against dense |\n|---|---:|---:|---:|")
    for form, taken in times.items():
        ms = statistics.median(taken)
        print(f"| {form} | {held[form] / 2**20:.1f} | {ms:.0f} | {ms / dense:.2f}x |")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
