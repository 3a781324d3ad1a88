"""The box decoder of SAM-3 in `transformers`: attention to the image with a bias of rows and columns.

Each query adds to the scores a number for the row and one for the column of a pixel, made from its box. The published
decoder adds both up for all pairs and heads, in every layer. Here they stay two parts until the attention takes them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree

from m2f_kernels._checks import tracing
from m2f_kernels.integrations.transformers._swap import Mixin, Replacement
from m2f_kernels.integrations.transformers.eomt import _weights_seen
from m2f_kernels.integrations.transformers.mask_classification import kernels_serve
from m2f_kernels.ops.masked_attention import masked_attention

_OPS = ("masked_attention",)


class BoxBias:
    """A bias [N, H, Q, S] as its two parts. Padding with zeros for another first query keeps it so; anything else that
    asks for it, as a tensor, gets the sum."""

    def __init__(self, by_row: Tensor, by_column: Tensor) -> None:
        self.parts = by_row, by_column

    def dense(self) -> Tensor:
        by_row, by_column = self.parts
        return (by_row.unsqueeze(-1) + by_column.unsqueeze(-2)).flatten(-2)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dense(), name)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        mode, value = kwargs.get("mode", "constant"), kwargs.get("value")
        if function is F.pad and tuple(args[1:]) == ((0, 0, 1, 0),) and mode == "constant" and not value:
            return cls(*(F.pad(x, (0, 0, 1, 0)) for x in args[0].parts))
        args, kwargs = _pytree.tree_map(lambda x: x.dense() if isinstance(x, cls) else x, (args, kwargs))
        return function(*args, **kwargs)


class Decoder(Mixin):
    """The bias of the decoder, in parts where every layer's attention takes those."""

    # Attributes of the original class.
    layers: nn.ModuleList
    box_rpb_embed_x: nn.Module
    box_rpb_embed_y: nn.Module
    _get_coords: Any

    def _get_rpb_matrix(self, reference_boxes: Tensor, spatial_shape: Any) -> Any:
        # While tracing, a tensor: a graph holds nothing else.
        traced = torch.compiler.is_compiling() or tracing()
        if traced or not kernels_serve(_OPS, reference_boxes) or not self._m2f_fusable():
            # The original class has it, which mypy does not see.
            return super()._get_rpb_matrix(reference_boxes, spatial_shape)  # type: ignore[misc]
        rows, columns = self._get_coords(*spatial_shape, dtype=reference_boxes.dtype, device=reference_boxes.device)
        centre, half = reference_boxes[..., :2], reference_boxes[..., 2:] * 0.5
        sides = torch.stack([centre - half, centre + half], -1)  # [N, Q, (x, y), both sides]
        return BoxBias(
            _embedded(rows, sides[:, :, 1], self.box_rpb_embed_y),
            _embedded(columns, sides[:, :, 0], self.box_rpb_embed_x),
        )

    def _m2f_fusable(self) -> bool:
        attentions: list[Any] = [getattr(layer, "vision_cross_attn", None) for layer in self.layers]
        return all(isinstance(x, Attention) and x._m2f_fusable() for x in attentions)


def _embedded(places: Tensor, sides: Tensor, layers: nn.Module) -> Tensor:
    """[N, H, Q, L]: what boxes with sides [N, Q, 2] add to L places, from the signed logarithms of the distances."""
    distance = 8 * (places[:, None] - sides.unsqueeze(2))
    bias: Tensor = layers(distance.sign() * (distance.abs() + 1).log2() / 3)
    return bias.permute(0, 3, 1, 2)


class Attention(Mixin):
    """`forward` of an attention: with a :class:`BoxBias`, fused."""

    # Attributes of the original class.
    config: Any
    num_attention_heads: int
    scaling: float
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        if not isinstance(attention_mask, BoxBias):
            return super().forward(query, key, value, attention_mask, **kwargs)
        # Tensors may be elsewhere, or of another dtype, than the boxes by which the decoder asked.
        if not kernels_serve(_OPS, query):
            return super().forward(query, key, value, attention_mask.dense(), **kwargs)
        projections = ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        heads = [layer(x).unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2) for layer, x in projections]
        by_row, by_column = (x.to(heads[0].dtype) for x in attention_mask.parts)
        out = masked_attention(*heads, bias=(by_row, by_column), scale=self.scaling)
        return self.o_proj(out.transpose(1, 2).flatten(2)), None

    def _m2f_fusable(self) -> bool:
        """False where anybody sees the weights or the bias of all pairs."""
        return self.config._attn_implementation != "eager" and not _weights_seen(self)


def _check_decoder(decoder: Any) -> str | None:
    known = ("_get_rpb_matrix", "_get_coords", "box_rpb_embed_x", "box_rpb_embed_y")
    missing = [name for name in known if not hasattr(decoder, name)]
    return f"it has no {', '.join(missing)}" if missing else None


REPLACEMENTS = {
    f"transformers.models.{family}.modeling_{family}.{prefix}{name}": replacement
    for family, prefix in (("sam3", "Sam3"), ("sam3_lite_text", "Sam3LiteText"))
    for name, replacement in (
        ("DetrDecoder", Replacement(Decoder, "the bias of boxes in two parts", check=_check_decoder, ops=_OPS)),
        ("Attention", Replacement(Attention, "attention with a bias of rows and columns", ops=_OPS)),
    )
}
