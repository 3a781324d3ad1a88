"""The deformable attention module of Deformable DETR, on the fused operator."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from m2f_kernels._checks import check_floating, check_same_device, check_shape, describe
from m2f_kernels.ops.ms_deform_attn import ms_deform_attn_from_offsets
from m2f_kernels.ops.ms_deform_attn.levels import MAX_LEVELS, SpatialShapes


class MSDeformAttn(nn.Module):
    """Multi-scale deformable attention with its projections (Deformable DETR, Zhu et al. 2021, section 4.1).

    Parameters are named as in every published checkpoint: `sampling_offsets`, `attention_weights`,
    `value_proj`, `output_proj`, and initialised as published: offsets point from each head into its own
    direction, the i-th point i pixels away; attention is uniform; projections are Xavier uniform.

    Args:
        embed_dim: channels C of queries and values; divisible by `num_heads`.
        num_levels: feature levels L.
        num_heads: heads H.
        num_points: points P per level and head; or one count per level (RT-DETRv2, D-FINE).

    Raises:
        ValueError: sizes that do not fit each other.
    """

    def __init__(
        self, embed_dim: int = 256, num_levels: int = 4, num_heads: int = 8, num_points: int | Sequence[int] = 4
    ) -> None:
        super().__init__()
        if embed_dim < 1 or num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"embed_dim: expected a multiple of num_heads = {num_heads}; got {embed_dim}")
        if not 1 <= num_levels <= MAX_LEVELS:
            raise ValueError(f"num_levels: expected 1 to {MAX_LEVELS}; got {num_levels}")
        counts = [num_points] if isinstance(num_points, int) else num_points
        if not isinstance(counts, Sequence) or not all(isinstance(p, int) for p in counts):
            raise TypeError(f"num_points: expected an integer, or one per level; got {num_points!r}")
        points = [num_points] * num_levels if isinstance(num_points, int) else list(num_points)
        if len(points) != num_levels or any(p < 1 for p in points):
            raise ValueError(
                f"num_points: expected one count, or {num_levels} of them, each at least 1; got {num_points!r}"
            )
        self.embed_dim = embed_dim
        self.num_levels = num_levels
        self.num_heads = num_heads
        self.points_per_level = points
        total = num_heads * sum(points)
        self.sampling_offsets = nn.Linear(embed_dim, total * 2)
        self.attention_weights = nn.Linear(embed_dim, total)
        self.value_proj = nn.Linear(embed_dim, embed_dim)
        self.output_proj = nn.Linear(embed_dim, embed_dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The published initialisation."""
        device = self.sampling_offsets.bias.device
        angle = torch.arange(self.num_heads, device=device) * (2 * math.pi / self.num_heads)
        direction = torch.stack([angle.cos(), angle.sin()], -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        distance = torch.cat([torch.arange(1, p + 1, device=device) for p in self.points_per_level])
        nn.init.zeros_(self.sampling_offsets.weight)
        self.sampling_offsets.bias.copy_((direction[:, None] * distance[:, None]).flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        value: Tensor,
        spatial_shapes: SpatialShapes,
        level_start_index: Tensor | Sequence[int] | None = None,
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend from each query to a few points around its reference.

        Args:
            query: [N, Q, C], position embedding already added.
            reference_points: [N, Q, L, 2] or [N, Q, L, 4], normalised; L may be 1.
            value: [N, S, C], the flattened feature levels.
            spatial_shapes: (h, w) of each level, pairs or an integer tensor [L, 2].
            level_start_index: [L]; None when the levels follow each other.
            padding_mask: bool [N, S], True where `value` is padding; its values are zeroed after `value_proj`.

        Returns:
            [N, Q, C].

        Raises:
            ValueError, TypeError: bad input; the message names the argument.
        """
        check_floating("query", query, "[N, Q, C]")
        check_floating("value", value, "[N, S, C]")
        n, q, _ = query.shape
        s = value.shape[1]
        check_shape("query", query, "[N, Q, C]", (n, q, self.embed_dim))
        check_shape("value", value, "[N, S, C]", (n, s, self.embed_dim))
        if isinstance(spatial_shapes, Sequence) and len(spatial_shapes) != self.num_levels:
            raise ValueError(
                f"spatial_shapes: expected (h, w) of {self.num_levels} levels; got {describe(spatial_shapes)}"
            )
        projected = self.value_proj(value)
        if padding_mask is not None:
            if not isinstance(padding_mask, Tensor) or padding_mask.dtype != torch.bool:
                raise TypeError(
                    f"padding_mask: expected bool, True where value is padding; got {describe(padding_mask)}"
                )
            check_shape("padding_mask", padding_mask, "[N, S]", (n, s))
            check_same_device("padding_mask", padding_mask, "value", value)
            projected = projected.masked_fill(padding_mask[..., None], 0)
        points = sum(self.points_per_level)
        out = ms_deform_attn_from_offsets(
            projected.unflatten(-1, (self.num_heads, -1)),
            spatial_shapes,
            reference_points,
            self.sampling_offsets(query).view(n, q, self.num_heads, points, 2),
            self.attention_weights(query).view(n, q, self.num_heads, points),
            level_start_index=level_start_index,
            points_per_level=self.points_per_level,
        )
        return self.output_proj(out)

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, num_heads={self.num_heads}, points_per_level={self.points_per_level}"
