"""The transformer decoder: queries that look only where they last predicted their mask.

Masked-attention Mask Transformer (Cheng et al. 2022), section 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from m2f_kernels import FactoredMasks, PackedMask, masked_attention, predict_attention_mask, resize_mask_features
from m2f_model.config import Mask2FormerConfig
from m2f_model.layers import CheckpointedLayer, FeedForward, sine_positions
from m2f_model.pixel_decoder import NUM_LEVELS, Level


class Prediction(NamedTuple):
    """What the heads make of the queries.

    Attributes:
        class_logits: [N, Q, num_labels + 1], "no object" last.
        masks: the mask logits [N, Q, h, w] at stride 4, as their two factors.
    """

    class_logits: Tensor
    masks: FactoredMasks


class CrossAttention(nn.Module):
    """Masked cross-attention over projected keys and values; parameters as in nn.MultiheadAttention."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * channels, channels))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * channels))
        self.out_proj = nn.Linear(channels, channels)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: PackedMask) -> Tensor:
        """Attend from `query` [N, Q, C] to projected `key` and `value` [N, S, C]."""
        c = query.shape[-1]
        query = nn.functional.linear(query, self.in_proj_weight[:c], self.in_proj_bias[:c])
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (query, key, value))
        return self.out_proj(masked_attention(q, k, v, mask).transpose(1, 2).flatten(2))


class DecoderLayer(CheckpointedLayer):
    """Masked cross-attention first, then self-attention, then the FFN (section 3.2.2)."""

    def __init__(self, config: Mask2FormerConfig) -> None:
        super().__init__()
        channels = config.hidden_dim
        self.cross_attention = CrossAttention(channels, config.num_heads)
        self.cross_norm = nn.LayerNorm(channels)
        self.self_attention = nn.MultiheadAttention(channels, config.num_heads, batch_first=True)
        self.self_norm = nn.LayerNorm(channels)
        self.ffn = FeedForward(channels, config.decoder_ffn_dim)

    def forward(self, x: Tensor, positions: Tensor, key: Tensor, value: Tensor, mask: PackedMask) -> Tensor:
        x = self.cross_norm(x + self.cross_attention(x + positions, key, value, mask))
        placed = x + positions
        x = self.self_norm(x + self.self_attention(placed, placed, x, need_weights=False)[0])
        return self.ffn(x)


class TransformerDecoder(nn.Module):
    """Learnable queries, `decoder_layers` layers over the levels in turn, and a prediction before and after each."""

    def __init__(self, config: Mask2FormerConfig) -> None:
        super().__init__()
        channels = config.hidden_dim
        project = config.enforce_input_projection or config.feature_size != channels
        self.input_projections = nn.ModuleList(
            nn.Conv2d(config.feature_size, channels, 1) if project else nn.Identity() for _ in range(NUM_LEVELS)
        )
        self.level_embed = nn.Embedding(NUM_LEVELS, channels)
        self.query_features = nn.Embedding(config.num_queries, channels)
        self.query_positions = nn.Embedding(config.num_queries, channels)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.norm = nn.LayerNorm(channels)
        self.class_head = nn.Linear(channels, config.num_labels + 1)
        self.mask_head = nn.Sequential(
            *(nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, channels), nn.ReLU()),
            nn.Linear(channels, config.mask_feature_size),
        )

    def forward(self, mask_features: Tensor, levels: Sequence[Level]) -> list[Prediction]:
        """Predictions of the queries before the first layer and after each layer, the last one last.

        Args:
            mask_features: [N, mask_feature_size, h, w], at stride 4.
            levels: at strides 32, 16 and 8; layer i attends to level i modulo 3.
        """
        n = mask_features.shape[0]
        # Resizing commutes with the product of embeddings and features: once per level, not per layer.
        mask_levels = resize_mask_features(mask_features, [level.size for level in levels])
        memory = self._project_levels(levels)
        positions = self.query_positions.weight.expand(n, -1, -1)
        x = self.query_features.weight.expand(n, -1, -1)
        predictions = [self._predict(x, mask_features)]
        for i, layer in enumerate(self.layers):
            mask = predict_attention_mask(predictions[-1].masks.mask_embed, mask_levels[i % NUM_LEVELS])
            x = layer(x, positions, *memory[i], mask)
            predictions.append(self._predict(x, mask_features))
        return predictions

    def _predict(self, x: Tensor, mask_features: Tensor) -> Prediction:
        x = self.norm(x)
        return Prediction(self.class_head(x), FactoredMasks(self.mask_head(x), mask_features))

    def _project_levels(self, levels: Sequence[Level]) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [N, S, C] of every layer; the layers that share a level are projected in one product."""
        memory: dict[int, tuple[Tensor, Tensor]] = {}
        for index, (features, size) in enumerate(levels):
            layers = range(index, len(self.layers), NUM_LEVELS)
            if not layers:
                continue
            projection = self.input_projections[index]
            if isinstance(projection, nn.Conv2d):
                features = nn.functional.linear(features, projection.weight.flatten(1), projection.bias)
            value = features + self.level_embed.weight[index]
            c = value.shape[-1]
            # Positions belong to the keys alone.
            key = value + sine_positions(size, c, value)
            attentions: list[Any] = [self.layers[i].cross_attention for i in layers]
            weights = torch.stack([a.in_proj_weight for a in attentions]).unflatten(1, (3, c))
            biases = torch.stack([a.in_proj_bias for a in attentions]).unflatten(1, (3, c))
            keys = nn.functional.linear(key, weights[:, 1].flatten(0, 1), biases[:, 1].flatten())
            values = nn.functional.linear(value, weights[:, 2].flatten(0, 1), biases[:, 2].flatten())
            memory.update(zip(layers, zip(keys.split(c, -1), values.split(c, -1), strict=True), strict=True))
        return [memory[i] for i in range(len(self.layers))]
