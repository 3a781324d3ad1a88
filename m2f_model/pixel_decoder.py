"""The pixel decoder: multi-scale deformable attention over strides 32, 16 and 8, and one FPN step to stride 4.

Masked-attention Mask Transformer (Cheng et al. 2022), section 4.1; the encoder is Deformable DETR's (Zhu et al. 2021).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2f_kernels.nn import MSDeformAttn
from m2f_model.config import Mask2FormerConfig
from m2f_model.layers import CheckpointedLayer, FeedForward, pixel_centres, sine_positions

NUM_LEVELS = 3
NUM_POINTS = 4
NUM_GROUPS = 32


class Level(NamedTuple):
    """One feature level, flattened: `features` [N, h*w, C] of a map of `size` (h, w)."""

    features: Tensor
    size: tuple[int, int]


class EncoderLayer(CheckpointedLayer):
    """Deformable self-attention and an FFN, each followed by residual and layer norm."""

    def __init__(self, config: Mask2FormerConfig) -> None:
        super().__init__()
        self.attention = MSDeformAttn(config.feature_size, NUM_LEVELS, config.num_heads, NUM_POINTS)
        self.norm = nn.LayerNorm(config.feature_size)
        self.ffn = FeedForward(config.feature_size, config.encoder_ffn_dim)

    def forward(self, x: Tensor, positions: Tensor, centres: Tensor, sizes: list[tuple[int, int]]) -> Tensor:
        return self.ffn(self.norm(x + self.attention(x + positions, centres, x, sizes)))


def _projection(in_channels: int, channels: int) -> nn.Sequential:
    """The projection of a level before the encoder, initialised as published."""
    conv = nn.Conv2d(in_channels, channels, 1)
    nn.init.xavier_uniform_(conv.weight)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return nn.Sequential(conv, nn.GroupNorm(NUM_GROUPS, channels))


def _conv(in_channels: int, channels: int, size: int, bias: bool = False) -> nn.Conv2d:
    """A convolution of the FPN step, initialised as published."""
    conv = nn.Conv2d(in_channels, channels, size, padding=size // 2, bias=bias)
    nn.init.kaiming_uniform_(conv.weight, a=1)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


def _pointwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A 1 x 1 convolution whose result has contiguous planes, which the kernels for masks read, for any layout of `x`.

    From channels last, one matrix product does that; a convolution would keep the layout, and each reader copy it.
    """
    if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        return conv(x)
    assert conv.bias is not None
    columns = x.permute(1, 0, 2, 3).flatten(1)  # [C, N*h*w], a view
    planes = torch.addmm(conv.bias[:, None], conv.weight.flatten(1), columns)
    return planes.unflatten(1, (x.shape[0], *x.shape[2:])).transpose(0, 1)


class PixelDecoder(nn.Module):
    """The pixel decoder: from the backbone's four maps to three levels and the mask features.

    Args:
        config: sizes.
        in_channels: channels of the backbone's maps, finest first.
    """

    def __init__(self, config: Mask2FormerConfig, in_channels: Sequence[int]) -> None:
        super().__init__()
        channels = config.feature_size
        self.input_projections = nn.ModuleList(_projection(c, channels) for c in in_channels[:0:-1])
        self.level_embed = nn.Parameter(torch.randn(NUM_LEVELS, channels))
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.lateral = nn.Sequential(_conv(in_channels[0], channels, 1), nn.GroupNorm(NUM_GROUPS, channels))
        self.output = nn.Sequential(
            _conv(channels, channels, 3), nn.GroupNorm(NUM_GROUPS, channels), nn.ReLU(inplace=True)
        )
        self.mask_projection = _conv(channels, config.mask_feature_size, 1, bias=True)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, list[Level]]:
        """Mask features at stride 4 [N, mask_feature_size, h, w], and the levels at strides 32, 16 and 8.

        Args:
            features: four maps at strides 4, 8, 16 and 32.
        """
        maps = [project(x) for project, x in zip(self.input_projections, features[:0:-1], strict=True)]
        sizes = [(x.shape[2], x.shape[3]) for x in maps]
        tokens = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], 1)
        positions = torch.cat(
            [
                sine_positions(size, tokens.shape[2], tokens) + embed
                for size, embed in zip(sizes, self.level_embed, strict=True)
            ]
        )
        centres = pixel_centres(sizes, tokens)[None, :, None].expand(tokens.shape[0], -1, -1, -1)
        for layer in self.layers:
            tokens = layer(tokens, positions, centres, sizes)
        levels = tokens.split([h * w for h, w in sizes], 1)

        lateral = self.lateral(features[0])
        finest = levels[-1].unflatten(1, sizes[-1]).permute(0, 3, 1, 2)  # channels last, and recognised as such
        upsampled = F.interpolate(finest, size=lateral.shape[2:], mode="bilinear", align_corners=False)
        mask_features = _pointwise(self.mask_projection, self.output(lateral + upsampled))
        return mask_features, [Level(x, size) for x, size in zip(levels, sizes, strict=True)]
