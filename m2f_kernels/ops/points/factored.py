"""The point loss of factored masks: logits and their gradients exist a bounded chunk at a time, on every device.

Gathering features per mask and point instead (K rows of C numbers for each mask) moves 30-80 times the bytes of
multiplying the matched masks out.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from m2f_kernels._dtypes import accumulation_dtype
from m2f_kernels.ops.points.masks import chunk_bounds, in_accumulation_dtype, mask_bytes, product_chunks


@torch.no_grad()
def forward(
    mask_embed: Tensor,
    mask_features: Tensor,
    rows: Tensor,
    counts: list[int],
    targets: list[Tensor],
    target_rows: Tensor,
    points: Tensor | None,
    seed: Tensor | None,
    candidates: int,
    keep: int,
    fresh: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Cross-entropy and dice [M], drawn points [M, K, 2] (empty if they were given), probability and labels [M, K]."""
    dtype = accumulation_dtype(mask_embed.dtype)
    k = keep + fresh if points is None else points.shape[1]
    m = rows.shape[0]
    drawn = mask_embed.new_empty((m, k, 2) if points is None else (0,), dtype=torch.float32)
    cross_entropy, dice = (mask_embed.new_empty(m, dtype=dtype) for _ in range(2))
    probability, labels = (mask_embed.new_empty(m, k, dtype=dtype) for _ in range(2))
    for chunk in product_chunks(mask_embed, mask_features, rows, counts, mask_bytes(mask_features, k, dtype)):
        here, own = chunk.slice, chunk.arange()
        if points is None:
            drawn[here] = torch.ops.m2f.uncertain_points(chunk.logits, own, seed, chunk.first, candidates, keep, fresh)
        found = torch.ops.m2f.point_mask_loss(
            chunk.logits, own, targets, target_rows[here], (drawn if points is None else points)[here]
        )
        for whole, part in zip((cross_entropy, dice, probability, labels), found, strict=True):
            whole[here] = part
    return cross_entropy, dice, drawn, probability, labels


@torch.no_grad()
def backward(
    grad_cross_entropy: Tensor,
    grad_dice: Tensor,
    mask_embed: Tensor,
    mask_features: Tensor,
    rows: Tensor,
    counts: list[int],
    points: Tensor,
    probability: Tensor,
    labels: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of both factors: each chunk's logit gradient is scattered, multiplied twice and dropped."""
    dtype = probability.dtype
    n, q, c = mask_embed.shape
    h, w = mask_features.shape[2:]
    embed = mask_embed.flatten(0, 1)[rows].to(dtype)
    grad_embed = torch.empty_like(mask_embed, memory_format=torch.contiguous_format)
    grad_features = mask_features.new_empty(n, c, h * w)
    chunks = list(chunk_bounds(counts, mask_bytes(mask_features, points.shape[1], dtype)))
    starts = list(itertools.accumulate(counts, initial=0))
    with torch.autocast(embed.device.type, enabled=False):
        for image in range(n):
            features = in_accumulation_dtype(mask_features[image]).to(dtype)
            total = grad_features[image] if grad_features.dtype == dtype else embed.new_empty(c, h * w)
            grad_rows = embed.new_empty(counts[image], c)
            if counts[image] == 0:
                total.zero_()
            for _, first, last in (chunk for chunk in chunks if chunk[0] == image):
                here, own = slice(first, last), torch.arange(last - first, device=embed.device)
                gradient = torch.ops.m2f.point_mask_loss_backward(
                    *(grad_cross_entropy[here], grad_dice[here], own, points[here], probability[here], labels[here]),
                    *(last - first, h, w),
                ).flatten(1)
                offset = starts[image]
                torch.mm(gradient, features.T, out=grad_rows[first - offset : last - offset])
                if first == offset:
                    torch.mm(embed[here].T, gradient, out=total)
                else:
                    total.addmm_(embed[here].T, gradient)
            # A query may have several targets: a product with zeros and ones adds its rows, always in the same order.
            own_rows = rows[starts[image] : starts[image + 1]] - image * q
            chosen = (own_rows == torch.arange(q, device=rows.device)[:, None]).to(dtype)
            grad_embed[image] = chosen @ grad_rows
            if grad_features.dtype != dtype:
                grad_features[image] = total
    return grad_embed, grad_features.view(n, c, h, w)
