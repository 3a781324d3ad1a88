"""The masked cross-attention module of Mask2Former's decoder, on the fused operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2f_kernels._checks import check_floating, check_shape, describe
from m2f_kernels.masks import PackedMask
from m2f_kernels.ops.masked_attention import masked_attention

#: Weight and bias of the projections of queries, keys and values.
Projection: TypeAlias = tuple[Tensor, Tensor | None]
Projections: TypeAlias = tuple[Projection, Projection, Projection]


class MaskedCrossAttention(nn.Module):
    """Masked cross-attention with its projections (Cheng et al. 2022, section 3.2.1).

    Parameters are named and shaped as those of `nn.MultiheadAttention` (`in_proj_weight`, `in_proj_bias`,
    `out_proj.weight`, `out_proj.bias`), so that published checkpoints load, and initialised as there. Batch first; no
    dropout.

    Args:
        embed_dim: channels C of queries and pixels; divisible by `num_heads`.
        num_heads: heads H.
        bias: whether the projections have biases.

    Raises:
        ValueError: sizes that do not fit each other.
    """

    def __init__(self, embed_dim: int = 256, num_heads: int = 8, bias: bool = True) -> None:
        super().__init__()
        if embed_dim < 1 or num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"embed_dim: expected a multiple of num_heads = {num_heads}; got {embed_dim}")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * embed_dim)) if bias else None
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The initialisation of `nn.MultiheadAttention`."""
        nn.init.xavier_uniform_(self.in_proj_weight)
        self.out_proj.reset_parameters()
        for bias in (self.in_proj_bias, self.out_proj.bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def projections(self) -> Projections:
        """Weight and bias of the projections of queries, keys and values.

        Views whose gradients are put together in one copy. Each slice of the parameter would have a gradient of its
        whole size.
        """
        biases: Sequence[Tensor | None] = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        query, key, value = zip(self.in_proj_weight.chunk(3), biases, strict=True)
        return query, key, value

    def _split(self, x: Tensor) -> Tensor:
        """[N, *, C] to [N, H, *, D], a view."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def forward(
        self,
        query: Tensor,
        pixels: Tensor,
        mask: PackedMask | Tensor,
        query_pos: Tensor | None = None,
        key_pos: Tensor | None = None,
        *,
        key_value: tuple[Tensor, Tensor] | None = None,
        query_projection: Projection | None = None,
    ) -> Tensor:
        """Attend from each query to the pixels of its mask.

        Args:
            query: [N, Q, C].
            pixels: [N, S, C], a flattened feature level.
            mask: a :class:`PackedMask`, or bool [N, Q, S], True = attend.
            query_pos: [N, Q, C] or [Q, C], added to the queries.
            key_pos: [N, S, C] or [S, C], the pixels' position embedding, added to the keys and not to the values.
            key_value: keys and values [N, H, S, D] from :func:`project_keys_values`; only the shape of `pixels` is then
                used, and `key_pos` is ignored.
            query_projection: the first of :meth:`projections`, where those made `key_value`.

        Returns:
            [N, Q, C].

        Raises:
            ValueError, TypeError: bad input; the message names the argument.
        """
        check_floating("query", query, "[N, Q, C]")
        check_floating("pixels", pixels, "[N, S, C]")
        n, q, _ = query.shape
        s = pixels.shape[1]
        check_shape("query", query, "[N, Q, C]", (n, q, self.embed_dim))
        check_shape("pixels", pixels, "[N, S, C]", (n, s, self.embed_dim))
        query = _add_position("query_pos", query, query_pos)
        if key_value is None:
            projections = self.projections()
            query_projection = projections[0]
            ((key, value),) = project_keys_values([self], pixels, key_pos, projections=[projections])
        else:
            key, value = key_value
        if query_projection is None:
            c = self.embed_dim  # a slice, whose gradient is smaller than that of all three
            query_projection = self.in_proj_weight[:c], None if self.in_proj_bias is None else self.in_proj_bias[:c]
        out = masked_attention(self._split(F.linear(query, *query_projection)), key, value, mask)
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, num_heads={self.num_heads}"


def project_keys_values(
    layers: Sequence[MaskedCrossAttention],
    pixels: Tensor,
    key_pos: Tensor | None = None,
    *,
    projections: Sequence[Projections] | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of all layers that attend to the same pixels, each in one matrix product over all layers.

    Mask2Former's layers 0, 3 and 6 attend to the same level, and so do 1, 4, 7 and 2, 5, 8: their projections of it
    depend on nothing that the layers compute. Give each result to its layer as `key_value`.

    Args:
        layers: modules of one size, with whole parameters: a layer that FSDP2 wraps by itself has them only while it
            runs.
        pixels: [N, S, C].
        key_pos: [N, S, C] or [S, C], added to the keys.
        projections: of each layer, if their first ones are given to the layers as `query_projection`.

    Returns:
        per layer, keys and values [N, H, S, D], views of two tensors.

    Raises:
        ValueError, TypeError: bad input; the message names the argument.
    """
    if not layers or any((x.embed_dim, x.num_heads) != (layers[0].embed_dim, layers[0].num_heads) for x in layers):
        raise ValueError(f"layers: expected at least one, all of one size; got {describe(list(layers))}")
    check_floating("pixels", pixels, "[N, S, C]")
    check_shape("pixels", pixels, "[N, S, C]", (*pixels.shape[:2], layers[0].embed_dim))
    keys_from = _add_position("key_pos", pixels, key_pos)
    if projections is None:
        projections = [layer.projections() for layer in layers]
    projected = []
    for part, x in ((1, keys_from), (2, pixels)):
        weights, biases = zip(*(own[part] for own in projections), strict=True)
        bias = None if biases[0] is None else torch.cat(biases)
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        projected.append(F.linear(x, weight, bias).chunk(len(layers), -1))
    return [(layer._split(k), layer._split(v)) for layer, k, v in zip(layers, *projected, strict=True)]


def _add_position(name: str, x: Tensor, position: Tensor | None) -> Tensor:
    if position is None:
        return x
    check_floating(name, position, "[L, C]" if isinstance(position, Tensor) and position.dim() == 2 else "[N, L, C]")
    if position.shape[-2:] != x.shape[-2:] or (position.dim() == 3 and position.shape[0] not in (1, x.shape[0])):
        raise ValueError(f"{name}: expected {list(x.shape)} or {list(x.shape[1:])}; got {describe(position)}")
    return x + position
