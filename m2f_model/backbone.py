"""The backbone: four feature maps, at strides 4, 8, 16 and 32."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from m2f_kernels.constants import cacheable, derived, forget
from m2f_model.config import Mask2FormerConfig

#: How a folded convolution runs on CUDA: "separate", as three or four kernels with its bias, the residual sum and ReLU,
#: or "fused", as one of cuDNN. No GPU has timed it, so it has to be asked for before the import.
CONVOLUTION = os.environ.get("M2F_CONVOLUTION", "separate")
if CONVOLUTION not in ("separate", "fused"):
    raise ValueError(f"M2F_CONVOLUTION: expected 'separate' or 'fused'; got {CONVOLUTION!r}")


class _FrozenBatchNorm(torch.autograd.Function):
    """Batch norm with constant statistics and parameters: an affine map, whose backward does not need its input."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> Tensor:
        ctx.save_for_backward(scale[:, None, None])
        return F.batch_norm(x, mean, var, weight, bias, eps=eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = ctx.saved_tensors
        return (grad * scale).to(grad.dtype), *[None] * 6


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """Batch norm as a fixed affine map (detectron2's FrozenBatchNorm2d), which saves no activations for backward.

    Its scale is cached, and computed again after a parameter or statistic has changed.
    """

    running_mean: Tensor
    running_var: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        scale = derived(self, "scale", self.tensors(), self.scale)
        out: Tensor = _FrozenBatchNorm.apply(
            x, scale, self.running_mean, self.running_var, self.weight, self.bias, self.eps
        )
        return out

    def scale(self) -> Tensor:
        scale = (self.running_var + self.eps).rsqrt()
        return scale if self.weight is None else self.weight * scale

    def tensors(self) -> list[Tensor]:
        return [x for x in (self.running_mean, self.running_var, self.weight, self.bias) if x is not None]


class ConvolutionLayer(nn.Module):
    """A ResNet's convolution, norm and activation (`transformers`' ResNetConvLayer and ResNetShortCut).

    Without gradients the convolution does the work of a frozen norm, too. Its weights times the norm's scale are kept
    in memory, in the dtype that they are multiplied in, until `train()`.
    """

    convolution: nn.Module
    normalization: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        folded = _folded(self.convolution, self.normalization)
        convolve: Any = self.convolution
        activation = getattr(self, "activation", None)
        if folded is not None and _fuses(x, convolve, activation):
            return torch.cudnn_convolution_relu(x.to(folded[0].dtype), *folded, *_geometry(convolve))
        x = self.normalization(convolve(x)) if folded is None else convolve._conv_forward(x, *folded)
        out: Tensor = x if activation is None else activation(x)
        return out


class ResidualLayer(nn.Module):
    """A ResNet's residual layer (`transformers`' ResNetBasicLayer and ResNetBottleNeckLayer)."""

    layer: nn.Sequential
    shortcut: nn.Module
    activation: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        *first, last = self.layer
        if (
            type(last) is ConvolutionLayer
            and not _hooked(self.layer, last)
            and isinstance(last.activation, nn.Identity)
        ):
            convolve: Any = last.convolution
            folded = _folded(convolve, last.normalization) if _fuses(x, convolve, self.activation) else None
            if folded is not None:
                residual, (weight, bias) = self.shortcut(x), folded
                for part in first:
                    x = part(x)
                x, residual = x.to(weight.dtype), residual.to(weight.dtype)
                return torch.cudnn_convolution_add_relu(x, weight, residual, 1, bias, *_geometry(convolve))
        out: Tensor = self.layer(x)
        out += self.shortcut(x)
        out = self.activation(out)
        return out


def _hooked(*modules: nn.Module) -> bool:
    return any(x._forward_hooks or x._forward_pre_hooks or "forward" in vars(x) for x in modules)


def _geometry(convolution: nn.Conv2d) -> tuple[Any, ...]:
    return convolution.stride, convolution.padding, convolution.dilation, convolution.groups


def _fuses(x: Tensor, convolution: nn.Conv2d, activation: nn.Module | None) -> bool:
    """True if cuDNN is to add a convolution's bias and apply the activation."""
    if CONVOLUTION != "fused":
        return False
    relu = type(activation) is nn.ReLU and not _hooked(activation)
    padded = convolution.padding_mode == "zeros" and not isinstance(convolution.padding, str)
    taken = x.numel() > 0 and x.dtype != torch.float64  # by cuDNN
    return relu and padded and taken and _on_cudnn(x)


def _on_cudnn(x: Tensor) -> bool:
    cudnn = torch.backends.cudnn
    deterministic = cudnn.deterministic or torch.are_deterministic_algorithms_enabled()  # these operators never are
    return x.is_cuda and torch.version.hip is None and cudnn.enabled and not deterministic


def _folded(convolution: nn.Module, norm: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Weight and bias of convolution and norm folded; None where gradients, compilation, hooks or classes forbid it."""
    if torch.is_grad_enabled() or type(convolution) is not nn.Conv2d or type(norm) is not FrozenBatchNorm2d:
        return None
    weight, bias = convolution.weight, convolution.bias
    if _hooked(convolution, norm) or not cacheable(weight) or weight.is_inference():
        return None
    kind = weight.device.type
    dtype = torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else weight.dtype

    def make() -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(weight.dtype, torch.float32)
        scale = norm.scale().to(wide)
        shift = -norm.running_mean * scale if norm.bias is None else norm.bias - norm.running_mean * scale
        if bias is not None:
            shift = shift + bias * scale
        folded = (weight * scale[:, None, None, None]).to(dtype)
        if kind == "cpu":  # the layout of the activations, see `Backbone.forward`
            folded = folded.contiguous(memory_format=torch.channels_last)
        return folded, shift.to(dtype)

    sources = [weight, *norm.tensors(), *([] if bias is None else [bias])]
    found: tuple[Tensor, Tensor] = derived(convolution, str(dtype), sources, make)
    return found


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
            # Parameters and statistics keep their places and names. A norm without statistics need not be frozen.
            if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm) and module.track_running_stats:
                module.__class__ = FrozenBatchNorm2d
                module.requires_grad_(False)
        for module in body.modules():
            if type(module).__module__ == "transformers.models.resnet.modeling_resnet":
                _prepare_resnet(module)

    def train(self, mode: bool = True) -> Backbone:
        """As `nn.Module.train`; training mode frees the memory of folded weights."""
        for module in self.modules() if mode else ():
            forget(module)
        return super().train(mode)

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


def _prepare_resnet(module: nn.Module) -> None:
    """Makes a ResNet's layers fold frozen norms and apply activations in place: nothing else reads their input."""
    if type(module).__name__ in ("ResNetConvLayer", "ResNetShortCut"):
        module.__class__ = ConvolutionLayer
    elif type(module).__name__ in ("ResNetBasicLayer", "ResNetBottleNeckLayer"):
        module.__class__ = ResidualLayer
    activation = getattr(module, "activation", None)
    if type(activation) is nn.ReLU:
        activation.inplace = True
