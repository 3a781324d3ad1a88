"""Multi-scale deformable attention in plain PyTorch: the definition that tests compare every kernel with.

Deformable DETR (Zhu et al., 2021), section 4.1, equation 3. Written with index
arithmetic and `index_select` rather than `grid_sample`, so that the rules at the border
and for non-finite coordinates are the explicit ones of this package, and so that its
backward is deterministic where PyTorch's `index_add` is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from m2f_kernels._dtypes import accumulation_dtype


def _bilinear(value: Tensor, height: int, width: int, location: Tensor) -> tuple[Tensor, Tensor]:
    """Sample one level. value [N, h*w, H, D], location [N, Q, H, P, 2] in [0, 1].

    Returns:
        the samples [N, Q, H, P, D], zero outside, and a bool tensor [N, Q, H, P], True for samples inside.
    """
    n, _, heads, d = value.shape
    x = location[..., 0] * width - 0.5
    y = location[..., 1] * height - 0.5
    # Comparisons with NaN are false, so a NaN coordinate contributes nothing.
    contributes = (x > -1) & (x < width) & (y > -1) & (y < height)
    x = torch.where(contributes, x, 0)
    y = torch.where(contributes, y, 0)
    x0, y0 = x.detach().floor(), y.detach().floor()
    fx, fy = x - x0, y - y0
    rows = value.reshape(n * height * width * heads, d)
    image = torch.arange(n, device=value.device).view(n, 1, 1, 1)
    head = torch.arange(heads, device=value.device).view(1, 1, heads, 1)
    total = value.new_zeros(*location.shape[:-1], d)
    for dy in (0, 1):
        for dx in (0, 1):
            cx, cy = x0.long() + dx, y0.long() + dy
            inside = contributes & (cx >= 0) & (cx < width) & (cy >= 0) & (cy < height)
            pixel = cy.clamp(0, height - 1) * width + cx.clamp(0, width - 1)
            row = (image * (height * width) + pixel) * heads + head
            corner = rows.index_select(0, row.flatten()).view(total.shape)
            weight = (fx if dx else 1 - fx) * (fy if dy else 1 - fy)
            total = total + torch.where(inside.unsqueeze(-1), weight.unsqueeze(-1) * corner, 0)
    return total, contributes


def ms_deform_attn(
    value: Tensor,
    levels: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    points_per_level: Sequence[int],
) -> Tensor:
    """sum over levels and points of `weight * bilinear(value_l, location * size - 0.5)`.

    Args:
        value: [N, S, H, D].
        levels: `(h, w, start)` of each level, flattened to 3L integers.
        sampling_locations: [N, Q, H, K, 2] with K the sum of `points_per_level`.
        attention_weights: [N, Q, H, K].
        points_per_level: L integers.

    Returns:
        [N, Q, H*D] in value's dtype.
    """
    dtype = accumulation_dtype(value.dtype)
    n, q, heads, _ = attention_weights.shape
    d = value.shape[-1]
    v, location, weight = value.to(dtype), sampling_locations.to(dtype), attention_weights.to(dtype)
    out = v.new_zeros(n, q, heads, d)
    first = 0
    for level, points in enumerate(points_per_level):
        h, w, start = levels[3 * level : 3 * level + 3]
        sampled, contributes = _bilinear(v[:, start : start + h * w], h, w, location[..., first : first + points, :])
        # A sample outside contributes exactly nothing, even when its weight is not finite.
        level_weight = torch.where(contributes, weight[..., first : first + points], 0)
        out = out + (level_weight.unsqueeze(-1) * sampled).sum(-2)
        first += points
    return out.flatten(2).to(value.dtype)


def locations_from_offsets(
    levels: Sequence[int],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    points_per_level: Sequence[int],
    offset_scale: float,
) -> Tensor:
    """Sampling locations [N, Q, H, K, 2] from reference points [N, Q, L, 2 or 4] and offsets [N, Q, H, K, 2].

    With 2-d reference points `ref + offset / (w, h)`; with 4-d ones (cx, cy, w, h)
    `ref_xy + offset / P * ref_wh * offset_scale`. Deformable DETR, appendix A.4.
    """
    points = torch.tensor(points_per_level, device=sampling_offsets.device)
    per_point = reference_points.repeat_interleave(points, dim=2, output_size=sum(points_per_level)).unsqueeze(2)
    # Values that are not finite contribute nothing, and 0 * inf must not reach a gradient either.
    finite = sampling_offsets.isfinite().all(-1, True) & per_point.isfinite().all(-1, True)
    per_point, offsets = torch.where(finite, per_point, 0), torch.where(finite, sampling_offsets, 0)
    if reference_points.shape[-1] == 2:
        sizes = [(levels[3 * i + 1], levels[3 * i]) for i, p in enumerate(points_per_level) for _ in range(p)]
        locations = per_point + offsets / offsets.new_tensor(sizes)
    else:
        count = offsets.new_tensor([[p] for p in points_per_level for _ in range(p)])
        locations = per_point[..., :2] + offsets / count * per_point[..., 2:] * offset_scale
    return torch.where(finite, locations, torch.nan)


def ms_deform_attn_from_offsets(
    value: Tensor,
    levels: Sequence[int],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    points_per_level: Sequence[int],
    offset_scale: float,
) -> Tensor:
    """The same with the softmax over all K points and the location arithmetic in front of it."""
    dtype = accumulation_dtype(value.dtype)
    locations = locations_from_offsets(
        levels, reference_points.to(dtype), sampling_offsets.to(dtype), points_per_level, offset_scale
    )
    weights = attention_logits.to(dtype).softmax(-1)
    return ms_deform_attn(value, levels, locations, weights, points_per_level)
