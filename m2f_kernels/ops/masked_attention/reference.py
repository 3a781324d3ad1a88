"""Masked cross-attention in plain PyTorch: the definition that tests compare every kernel with.

Masked-attention Mask Transformer (Cheng et al., 2022), section 3.2.1, equation 1: softmax(mask + Q K^T) V.
"""

from __future__ import annotations

import torch
from torch import Tensor

from m2f_kernels._dtypes import accumulation_dtype


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attend: Tensor,
    scale: float,
    by_row: Tensor | None = None,
    by_column: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Each query attends to the keys that `attend` names.

    A blocked key contributes exactly nothing, even if it is NaN or infinite (0 * NaN would be NaN): such keys are
    handled pair by pair, and only for queries that attend to them.

    Args:
        query: [N, H, Q, D].
        key, value: [N, H, S, D].
        attend: bool [N, Q, S], at least one True in every row.
        scale: factor of the scores.
        by_row, by_column: None, or [N, H, Q, h] and [N, H, Q, w] with h * w = S: key s gets `by_row[..., s // w]` and
            `by_column[..., s % w]` added to its score.

    Returns:
        the output [N, H, Q, D] in query's dtype, and the log-sum-exp of each query's scores [N, H, Q] in the
        accumulation dtype.
    """
    dtype = accumulation_dtype(query.dtype)
    q, k, v = query.to(dtype), key.to(dtype), value.to(dtype)
    finite = k.isfinite().all(-1) & v.isfinite().all(-1)  # [N, H, S]
    suspects = (~finite).flatten(0, 1).any(0).nonzero().flatten()
    pairs = attend[:, None][..., suspects, None]  # [N, 1, Q, suspects, 1]
    k_suspect = torch.where(pairs, k[:, :, None, suspects], 0)
    v_suspect = torch.where(pairs, v[:, :, None, suspects], 0)
    k = k.index_fill(2, suspects, 0)
    v = v.index_fill(2, suspects, 0)

    blocked = ~attend.unsqueeze(1)
    scores = q @ k.transpose(-1, -2)
    scores = scores.index_copy(-1, suspects, (q.unsqueeze(3) * k_suspect).sum(-1)) * scale
    if by_row is not None and by_column is not None:
        scores = scores + (by_row.to(dtype).unsqueeze(-1) + by_column.to(dtype).unsqueeze(-2)).flatten(-2)
    scores = scores.masked_fill(blocked, -torch.inf)
    weights = scores.softmax(-1).masked_fill(blocked, 0)
    output = weights @ v + (weights[..., suspects, None] * v_suspect).sum(3)
    return output.to(query.dtype), scores.logsumexp(-1)
