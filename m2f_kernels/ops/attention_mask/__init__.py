"""Attention masks: resized mask features, and bits predicted from them or packed from masks."""

from m2f_kernels.ops.attention_mask.interface import (
    attention_mask_levels,
    pack_attention_mask,
    predict_attention_mask,
    resize_mask_features,
)

__all__ = ["attention_mask_levels", "pack_attention_mask", "predict_attention_mask", "resize_mask_features"]
