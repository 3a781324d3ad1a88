"""The backbone: four feature maps, at strides 4, 8, 16 and 32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from m2f_model.config import Mask2FormerConfig


class _FrozenBatchNorm(torch.autograd.Function):
    """Batch norm with constants for statistics and parameters: an affine map; backward does not need its input."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        scale = (var + eps).rsqrt()
        ctx.save_for_backward((scale if weight is None else weight * scale)[:, None, None])
        return F.batch_norm(x, mean, var, weight, bias, eps=eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = ctx.saved_tensors
        return (grad * scale).to(grad.dtype), None, None, None, None, None


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """Batch norm as a fixed affine map (detectron2's FrozenBatchNorm2d), kept without the activations before it."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.running_mean is not None
        assert self.running_var is not None
        return _FrozenBatchNorm.apply(x, self.running_mean, self.running_var, self.weight, self.bias, self.eps)


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
        for module in body.modules() if frozen_batch_norm else ():
            # Parameters and statistics stay where they are, under their names. Without statistics nothing is to freeze.
            if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm) and module.track_running_stats:
                module.__class__ = FrozenBatchNorm2d
                module.requires_grad_(False)

    @classmethod
    def from_config(cls, config: Mask2FormerConfig) -> Backbone:
        """The backbone that `config` describes, freshly initialised."""
        if config.backbone is None:
            raise ValueError("config.backbone: expected a configuration where no backbone module is given; got None")
        body = transformers.AutoBackbone.from_config(transformers.AutoConfig.for_model(**config.backbone))
        return cls(body, config.frozen_batch_norm)

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        """Four maps, finest first, of `pixel_values` [N, 3, H, W]."""
        if pixel_values.device.type == "cpu":
            # oneDNN's own layout: else every bfloat16 convolution copies its input and output. A clone, since one image
            # that was [H, W, 3] counts as contiguous already, but convolutions do not see it by its strides.
            pixel_values = pixel_values.clone(memory_format=torch.channels_last)
        out = self.body(pixel_values)
        return list(getattr(out, "feature_maps", out))
