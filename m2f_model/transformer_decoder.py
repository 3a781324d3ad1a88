"""The transformer decoder: queries that look only where they last predicted their mask.

Masked-attention Mask Transformer (Cheng et al. 2022), section 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2f_kernels import FactoredMasks, PackedMask, attention_mask_levels, predict_attention_mask
from m2f_kernels.nn import MaskedCrossAttention, linear_relu, project_keys_values
from m2f_model.config import Mask2FormerConfig
from m2f_model.layers import CheckpointedLayer, FeedForward, gathers, sine_positions
from m2f_model.pixel_decoder import NUM_LEVELS, Level


class Memory(NamedTuple):
    """The memory that a layer attends to.

    Attributes:
        pixels: [N, S, C].
        key_pos: their position embedding, [S, C].
        key_value: projected keys and values [N, H, S, D]; None where the layer projects for itself.
        query_projection: weight and bias of the queries' projection, where there are keys and values.
    """

    pixels: Tensor
    key_pos: Tensor
    key_value: tuple[Tensor, Tensor] | None = None
    query_projection: tuple[Tensor, Tensor | None] | None = None


class Prediction(NamedTuple):
    """The heads' predictions for the queries.

    Attributes:
        class_logits: [N, Q, num_labels + 1], "no object" last.
        masks: the mask logits [N, Q, h, w] at stride 4, as their two factors.
    """

    class_logits: Tensor
    masks: FactoredMasks


class SelfAttention(nn.MultiheadAttention):
    """Attention of the queries among themselves: parameters of the base class, queries and keys in one product."""

    def forward(self, placed: Tensor, x: Tensor) -> Tensor:  # type: ignore[override]
        """[N, Q, C] from the queries with and without their positions."""
        c = self.embed_dim
        weights, biases = self.in_proj_weight.split([2 * c, c]), self.in_proj_bias.split([2 * c, c])
        query, key = F.linear(placed, weights[0], biases[0]).chunk(2, -1)
        value = F.linear(x, weights[1], biases[1])
        heads = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (query, key, value))
        attended = F.scaled_dot_product_attention(*heads)
        return F.linear(attended.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)


class MaskHead(nn.Sequential):
    """Three linear layers with ReLU between them, as published; its parameters are named by their place."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__(
            *(nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, channels), nn.ReLU()),
            nn.Linear(channels, out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Mask embeddings [N, Q, out_channels]."""
        first, _, second, _, last = self
        found: Tensor = last(linear_relu(second, linear_relu(first, x)))
        return found


class DecoderLayer(CheckpointedLayer):
    """Masked cross-attention first, then self-attention, then the FFN (section 3.2.2)."""

    def __init__(self, config: Mask2FormerConfig) -> None:
        super().__init__()
        channels = config.hidden_dim
        self.cross_attention = MaskedCrossAttention(channels, config.num_heads)
        self.cross_norm = nn.LayerNorm(channels)
        self.self_attention = SelfAttention(channels, config.num_heads, batch_first=True)
        self.self_norm = nn.LayerNorm(channels)
        self.ffn = FeedForward(channels, config.decoder_ffn_dim)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        pixels: Tensor,
        key_pos: Tensor,
        key_value: tuple[Tensor, Tensor] | None,
        query_projection: tuple[Tensor, Tensor | None] | None,
        mask: PackedMask,
    ) -> Tensor:
        own = {"key_value": key_value, "query_projection": query_projection}
        x = self.cross_norm(x + self.cross_attention(x, pixels, mask, positions, key_pos, **own))
        placed = x + positions
        x = self.self_norm(x + self.self_attention(placed, x))
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
        self.mask_head = MaskHead(channels, config.mask_feature_size)

    def forward(self, mask_features: Tensor, levels: Sequence[Level]) -> list[Prediction]:
        """Predictions of the queries before the first layer and after each layer, the last one last.

        Args:
            mask_features: [N, mask_feature_size, h, w], at stride 4.
            levels: at strides 32, 16 and 8; layer i attends to level i modulo 3.
        """
        n = mask_features.shape[0]
        # Resizing commutes with the product of embeddings and features: once per level, not per layer.
        sizes = [level.size for level in levels]
        queries = self.query_positions.num_embeddings
        mask_levels, flags = attention_mask_levels(mask_features, sizes, len(self.layers), queries)
        memory = self._project_levels(levels)
        positions = self.query_positions.weight.expand(n, -1, -1)
        states = [self.query_features.weight.expand(n, -1, -1)]
        found: list[tuple[Tensor, Tensor]] = []
        # With gradients the predictions are computed again, all at once, so that they are differentiated at once: those
        # in the loop only make masks, which have no gradient.
        again = torch.is_grad_enabled()
        for i, layer in enumerate(self.layers):
            normed, embed = self._predict(states[-1].detach() if again else states[-1])
            if not again:
                found.append((normed, embed))
            mask = predict_attention_mask(embed, mask_levels[i % NUM_LEVELS], flags[i])
            states.append(layer(states[-1], positions, *memory[i], mask))
        if again:
            normed, stacked = self._predict(torch.stack(states))
            embeds = stacked.unbind()
        else:
            all_normed, embeds = zip(*found, self._predict(states[-1]), strict=True)
            normed = torch.stack(all_normed)
        # Nothing waits for the classes: one product for all.
        classes = self.class_head(normed).unbind()
        return [
            Prediction(logits, FactoredMasks(embed, mask_features))
            for logits, embed in zip(classes, embeds, strict=True)
        ]

    def _predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised queries, and their mask embeddings."""
        normed = self.norm(x)
        return normed, self.mask_head(normed)

    def _project_levels(self, levels: Sequence[Level]) -> list[Memory]:
        """The memory of every layer. Layers that share a level get their keys from one product, and their values."""
        memory: dict[int, Memory] = {}
        for index, (pixels, size) in enumerate(levels):
            layers = range(index, len(self.layers), NUM_LEVELS)
            if not layers:
                continue
            projection = self.input_projections[index]
            if isinstance(projection, nn.Conv2d):
                pixels = nn.functional.linear(pixels, projection.weight.flatten(1), projection.bias)
            pixels = pixels + self.level_embed.weight[index]
            key_pos = sine_positions(size, pixels.shape[2], pixels)
            memory.update((i, Memory(pixels, key_pos)) for i in layers)
            # A layer sharded by itself (FSDP2) has its parameters, and their gradients, only while it runs.
            shared = [i for i in layers if not gathers(self.layers[i])]
            if shared:
                attentions: list[Any] = [self.layers[i].cross_attention for i in shared]
                parts = [attention.projections() for attention in attentions]
                projected = project_keys_values(attentions, pixels, key_pos, projections=parts)
                for i, pair, (query, *_) in zip(shared, projected, parts, strict=True):
                    memory[i] = Memory(pixels, key_pos, pair, query)
        return [memory[i] for i in range(len(self.layers))]
