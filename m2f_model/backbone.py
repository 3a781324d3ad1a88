"""The backbone: four feature maps, at strides 4, 8, 16 and 32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from m2f_model.config import Mask2FormerConfig

#: Layers that keep running statistics.
_BATCH_NORM = (nn.BatchNorm2d, nn.SyncBatchNorm)


class Backbone(nn.Module):
    """A `transformers` backbone, or any module that does the same.

    Args:
        body: a module whose call gives four maps [N, C_i, h_i, w_i], finest first, itself or as `.feature_maps`; its
            `channels` are the four C_i.
        frozen_batch_norm: keep batch norm's statistics and parameters as they are.

    Raises:
        TypeError: without four `channels`.
    """

    def __init__(self, body: nn.Module, frozen_batch_norm: bool = True) -> None:
        super().__init__()
        channels: Any = getattr(body, "channels", None)
        if not isinstance(channels, Sequence) or len(channels) != 4:
            raise TypeError(f"backbone: expected a module with four `channels`; got {type(body).__name__}: {channels}")
        self.body = body
        self.channels = list(channels)
        self.frozen = [m for m in body.modules() if isinstance(m, _BATCH_NORM)] if frozen_batch_norm else []
        for module in self.frozen:
            module.requires_grad_(False)
        self.train(self.training)

    @classmethod
    def from_config(cls, config: Mask2FormerConfig) -> Backbone:
        """The backbone that `config` describes, freshly initialised."""
        if config.backbone is None:
            raise ValueError("config.backbone: expected a configuration where no backbone module is given; got None")
        body = transformers.AutoBackbone.from_config(transformers.AutoConfig.for_model(**config.backbone))
        return cls(body, config.frozen_batch_norm)

    def train(self, mode: bool = True) -> Backbone:
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        """Four maps, finest first, of `pixel_values` [N, 3, H, W]."""
        if pixel_values.device.type == "cpu":
            # oneDNN's own layout: else every bfloat16 convolution copies its input and output.
            pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        out = self.body(pixel_values)
        return list(getattr(out, "feature_maps", out))
