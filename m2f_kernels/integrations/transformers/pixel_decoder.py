"""The pixel decoder of `transformers`' Mask2Former and OneFormer: the same steps with fewer and smaller copies."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2f_kernels.constants import ConstantCache, cacheable
from m2f_kernels.integrations.transformers._swap import Mixin, observed, watched
from m2f_kernels.nn.linear import linear_relu
from m2f_kernels.ops._autograd import transformed

#: Pixels whose FFN activations exist at a time without gradients: few enough that they stay in the cache.
_FFN_ROWS = 1024


_CONSTANTS = ConstantCache(64)

#: The replaced parts, in words for the report.
POSITIONS = "sine positions computed for one row and one column"
ENCODER_LAYER = "encoder layer with fewer copies"
ENCODER = "reference points of any size under torch.compile"
PIXEL_DECODER = "no padding mask where nothing is padded, feature maps in one memory layout"


class PositionEmbedding(Mixin):
    """`forward` of the sine embedding: one half depends on the row only, the other on the column only."""

    def forward(self, shape: torch.Size, device: Any, dtype: torch.dtype, mask: Tensor | None = None) -> Tensor:
        if mask is not None:
            return super().forward(shape, device, dtype, mask)
        n, c, h, w = shape
        # The original, for one column and for one row: the same numbers, h + w of them and not h * w.
        rows = self._m2f_axis(torch.Size((1, c, h, 1)), device, dtype)
        columns = self._m2f_axis(torch.Size((1, c, 1, w)), device, dtype)
        half = rows.shape[1] // 2
        parts = [rows[:, :half].expand(n, -1, h, w), columns[:, half:].expand(n, -1, h, w)]
        # In memory [N, h, w, C], as the original's.
        return torch.cat([part.permute(0, 2, 3, 1) for part in parts], 3).permute(0, 3, 1, 2)

    def _m2f_axis(self, shape: torch.Size, device: Any, dtype: torch.dtype) -> Tensor:
        """Computed once for each length, device, dtype and setting."""
        settings = tuple((k, v) for k, v in vars(self).items() if isinstance(v, (bool, int, float, str)))
        key = type(self), shape[2:], settings
        forward = super().forward
        return _CONSTANTS.get(lambda: forward(shape, device, dtype), key, torch.empty(0, device=device, dtype=dtype))


class _Clamp(torch.autograd.Function):
    """Clamps in place, and saves its output for backward, which the next layer saves, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: float) -> Tensor:
        ctx.mark_dirty(x)
        x.clamp_(-limit, limit)
        ctx.save_for_backward(x)
        ctx.limit = limit
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(grad, x, -ctx.limit, ctx.limit), None


def clamp_overflow(x: Tensor, in_place: bool) -> Tensor:
    """`x`, all of it clamped if any of it is infinite or NaN, as in the original; without a synchronisation."""
    largest = torch.finfo(x.dtype).max
    limit = largest - 1000
    if in_place and limit == largest and cacheable(x) and x.grad_fn is not None:
        # Finite numbers are unchanged.
        clamped: Tensor = _Clamp.apply(x, limit)
        return clamped
    return torch.where(x.isfinite().all(), x, x.clamp(-limit, limit))


class Encoder(Mixin):
    """Reference points of the encoder: the same numbers, for which `torch.compile` does not make a size a constant."""

    @staticmethod
    def get_reference_points(spatial_shapes_list: Any, valid_ratios: Tensor, device: Any) -> Tensor:
        def centres(length: int) -> Tensor:
            if not torch.compiler.is_compiling():
                return torch.linspace(0.5, length - 0.5, length, dtype=valid_ratios.dtype, device=device)
            dtype = torch.promote_types(valid_ratios.dtype, torch.float32)
            return (torch.arange(length, device=device, dtype=dtype) + 0.5).to(valid_ratios.dtype)

        if valid_ratios is _ones(valid_ratios.shape[0], valid_ratios.shape[1], valid_ratios):
            # Without padding they depend on sizes alone.
            key = ("reference points", *map(tuple, spatial_shapes_list), valid_ratios.shape[0])
            return _CONSTANTS.get(
                lambda: Encoder.get_reference_points(spatial_shapes_list, valid_ratios.clone(), device),
                key,
                valid_ratios,
            )
        levels = []
        for i, (h, w) in enumerate(spatial_shapes_list):
            y, x = (_CONSTANTS.get(partial(centres, n), ("centres", n), valid_ratios) for n in (h, w))
            y = y[:, None].expand(h, w).reshape(-1)[None] / (valid_ratios[:, None, i, 1] * h)
            x = x.expand(h, w).reshape(-1)[None] / (valid_ratios[:, None, i, 0] * w)
            levels.append(torch.stack((x, y), -1))
        return torch.cat(levels, 1)[:, :, None] * valid_ratios[:, None]


def check_encoder(encoder: Any) -> str | None:
    """The reason why the encoder around the layers is left alone, or None."""
    names = list(inspect.signature(encoder.get_reference_points).parameters)
    known = names == ["spatial_shapes_list", "valid_ratios", "device"]
    return None if known else f"its reference points are made from {', '.join(names)}"


class EncoderLayer(Mixin):
    """`forward` of a layer of the pixel decoder's encoder, with fewer copies of its largest tensors."""

    # Attributes of the original classes.
    self_attn: nn.Module
    self_attn_layer_norm: nn.Module
    final_layer_norm: nn.Module
    fc1: nn.Module
    fc2: nn.Module
    activation_fn: Any
    dropout: float
    activation_dropout: float

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, ...]:
        if args or self.activation_fn is not F.relu:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        # OneFormer applies dropout if its configuration says that it is trained, whatever the module's mode.
        training = bool(getattr(self, "is_training", self.training))
        attended, weights = self.self_attn(
            hidden_states=hidden_states,
            attention_mask=attention_mask,
            encoder_hidden_states=hidden_states,
            encoder_attention_mask=attention_mask,
            **kwargs,
        )
        hidden_states = self.self_attn_layer_norm(hidden_states + F.dropout(attended, self.dropout, training))
        hidden_states = self.final_layer_norm(hidden_states + self._m2f_feed_forward(hidden_states, training))
        if training:
            # A hook may have kept this tensor, so it must not be changed.
            hidden_states = clamp_overflow(hidden_states, in_place=not watched(self.final_layer_norm))
        if not kwargs.get("output_attentions"):
            return (hidden_states,)
        # Mask2Former returns the weights transposed.
        return hidden_states, weights if hasattr(self, "is_training") else weights.transpose(1, 0)

    def _m2f_feed_forward(self, x: Tensor, training: bool) -> Tensor:
        if watched(self.fc1) or watched(self.fc2):
            # A hook sees one call, of what the original passes on; it may keep it, so nothing is in place.
            hidden = F.dropout(F.relu(self.fc1(x)), self.activation_dropout, training)
            return F.dropout(self.fc2(hidden), self.dropout, training)
        # As one matrix: an in-place operation on a view would cost the backward pass two copies.
        rows = x.flatten(0, 1)
        whole = x.device.type != "cpu" or training or torch.is_grad_enabled() or torch.compiler.is_compiling()
        parts = [rows] if whole else rows.split(_FFN_ROWS)
        outs = []
        for part in parts:
            hidden = F.dropout(linear_relu(self.fc1, part), self.activation_dropout, training)
            outs.append(F.dropout(self.fc2(hidden), self.dropout, training))
        return (outs[0] if len(outs) == 1 else torch.cat(outs)).view(x.shape)


class PixelDecoder(Mixin):
    """`forward` of the pixel decoder around the encoder. Images have no padding, so there is no padding mask."""

    # Attributes of the original classes.
    config: Any
    num_feature_levels: int
    num_fpn_levels: int
    position_embedding: nn.Module
    level_embed: Tensor
    input_projections: nn.ModuleList
    encoder: nn.Module
    mask_projection: nn.Module

    def forward(
        self,
        features: Sequence[Tensor],
        encoder_outputs: Any = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        if encoder_outputs is not None:
            return super().forward(features, encoder_outputs, output_attentions, output_hidden_states, return_dict)
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        encoded = self._m2f_encode(
            features[::-1][: self.num_feature_levels],
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
        )
        sizes = [x.shape[-2:] for x in features[::-1][: self.num_feature_levels]]
        levels = encoded.last_hidden_state.split([h * w for h, w in sizes], 1)
        maps = [x.transpose(1, 2).unflatten(2, tuple(size)) for x, size in zip(levels, sizes, strict=True)]
        for feature, (lateral, output) in zip(
            features[: self.num_fpn_levels][::-1], self._m2f_convolutions(), strict=True
        ):
            # Convolutions, norms and resizing prefer different memory layouts; one layout for all saves copies.
            current = lateral(feature.contiguous())
            finer = F.interpolate(maps[-1].contiguous(), size=current.shape[-2:], mode="bilinear", align_corners=False)
            # Under vmap the sum may be larger than what it would be written to.
            kept = torch.is_grad_enabled() or transformed()
            in_place = not (kept or watched(lateral) or watched(lateral[-1]))
            current = current.add_(finer) if in_place else current + finer
            del finer
            maps.append(output(current))
            del current
        return self._m2f_output(self.mask_projection(maps[-1]), maps[: self.num_feature_levels], encoded.attentions)

    def _m2f_encode(self, features: Sequence[Tensor], **flags: Any) -> Any:
        """The encoder's output for the feature maps at strides 32, 16 and 8."""
        tokens, positions, sizes = [], [], []
        # All images have the same positions; hooks see those of each.
        images = features[0].shape[0] if observed(self.position_embedding) else 1
        for i, x in enumerate(features):
            position = self.position_embedding(torch.Size((images, *x.shape[1:])), x.device, x.dtype)
            positions.append(position.flatten(2).transpose(1, 2) + self.level_embed[i].view(1, 1, -1))
            projected = self.input_projections[i](x)
            sizes.append((projected.shape[2], projected.shape[3]))
            tokens.append(projected.flatten(2).transpose(1, 2))
        states, placed = torch.cat(tokens, 1), torch.cat(positions, 1)
        tokens.clear()
        positions.clear()
        del projected, position
        # One copy to the device for each list of sizes, not one for each call.
        both = _CONSTANTS.get(lambda: _levels(sizes, states.device), ("levels", *sizes), states)
        shapes, starts = both[:, :2], both[:, 2]
        return self.encoder(
            inputs_embeds=states,
            attention_mask=None,
            position_embeddings=placed.expand(states.shape[0], -1, -1),
            **self._m2f_shapes(shapes),
            spatial_shapes_list=sizes,
            level_start_index=starts,
            valid_ratios=_ones(states.shape[0], len(sizes), states),
            **flags,
        )

    def _m2f_shapes(self, shapes: Tensor) -> dict[str, Tensor]:
        """Further keyword arguments of the encoder, besides the list of sizes."""
        return {}

    def _m2f_convolutions(self) -> list[tuple[Any, Any]]:
        """Lateral and output convolution of each level of the feature pyramid, coarse first."""
        raise NotImplementedError

    def _m2f_output(self, mask_features: Tensor, maps: list[Tensor], attentions: Any) -> Any:
        raise NotImplementedError


def _ones(images: int, levels: int, like: Tensor) -> Tensor:
    """The valid ratios [N, L, 2] of images without padding, always the same tensor."""
    return _CONSTANTS.get(lambda: like.new_ones(images, levels, 2), ("ones", images, levels), like)


def _levels(sizes: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    """Height, width and first token of every level, int64 [L, 3]."""
    numbers, start = [], 0
    for h, w in sizes:
        numbers += [h, w, start]
        start += h * w
    # Filled where they lie: torch.compile runs no CUDA graph of what reads a tensor on the host.
    return torch.cat([torch.full((1,), x, dtype=torch.long, device=device) for x in numbers]).view(-1, 3)


def check_pixel_decoder(module: Any) -> str | None:
    """The reason why a pixel decoder is left alone, or None: in old versions its encoder takes no list of sizes."""
    parameters = inspect.signature(module.encoder.forward).parameters
    known = "spatial_shapes_list" in parameters or any(x.kind is x.VAR_KEYWORD for x in parameters.values())
    return None if known else "its encoder takes the sizes of the levels as a tensor alone"
