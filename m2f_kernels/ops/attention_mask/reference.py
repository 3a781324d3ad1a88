"""Attention masks of Mask2Former's decoder in plain PyTorch: the definition that tests compare every kernel with.

Masked-attention Mask Transformer (Cheng et al., 2022), section 3.2.1: the mask of a layer is the previous
prediction, resized to the layer's level and thresholded at 0.5; a query whose mask is empty attends everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from m2f_kernels._dtypes import accumulation_dtype
from m2f_kernels.masks import pack


def resize_mask_features(mask_features: Tensor, sizes: Sequence[int]) -> Tensor:
    """Bilinear, `align_corners=False`, no antialias.

    Args:
        mask_features: [N, C, H, W].
        sizes: `(h, w)` of each level, flattened to 2L integers.

    Returns:
        [N, C, S], the levels' pixels one level after the other, in mask_features' dtype.
    """
    if mask_features.numel() == 0:  # PyTorch refuses no channels
        total = sum(h * w for h, w in zip(sizes[::2], sizes[1::2], strict=True))
        return mask_features.new_empty(*mask_features.shape[:2], total)
    features = mask_features.to(accumulation_dtype(mask_features.dtype))
    levels = [
        F.interpolate(features, size=(h, w), mode="bilinear", align_corners=False).flatten(2)
        for h, w in zip(sizes[::2], sizes[1::2], strict=True)
    ]
    return torch.cat(levels, 2).to(mask_features.dtype)


def attends(logits: Tensor) -> Tensor:
    """Bool, True where the query attends: where `sigmoid(logit) < 0.5` is false, so at a NaN logit too."""
    return ~(logits < 0)


def predict_attention_mask(mask_embed: Tensor, level_features: Tensor) -> tuple[Tensor, Tensor]:
    """`pack` of the thresholded product of mask_embed [N, Q, C] and level_features [N, C, S]."""
    dtype = accumulation_dtype(mask_embed.dtype)
    return pack(attends(mask_embed.to(dtype) @ level_features.to(dtype)))


def pack_attention_mask(mask: Tensor) -> tuple[Tensor, Tensor]:
    """`pack` of a bool mask [N, Q, S] (True = attend), or of the thresholded logits."""
    return pack(mask if mask.dtype == torch.bool else attends(mask))
