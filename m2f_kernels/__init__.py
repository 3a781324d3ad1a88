"""Fused operators for mask-classification transformers: Mask2Former, Deformable DETR and their relatives."""

from m2f_kernels import nn
from m2f_kernels._version import __version__
from m2f_kernels.dispatch import BackendChoice, explain, use_backend
from m2f_kernels.graphs import CudaGraphs
from m2f_kernels.integrations.transformers import accelerate, restore
from m2f_kernels.masks import FactoredMasks, InstanceMap, PackedMask, RunLengths
from m2f_kernels.ops.attention_mask import (
    attention_mask_levels,
    pack_attention_mask,
    predict_attention_mask,
    resize_mask_features,
)
from m2f_kernels.ops.masked_attention import masked_attention
from m2f_kernels.ops.ms_deform_attn import ms_deform_attn, ms_deform_attn_from_offsets
from m2f_kernels.ops.points import mask_matching_cost, point_mask_loss, point_sample, uncertain_points

__all__ = [
    "BackendChoice",
    "CudaGraphs",
    "FactoredMasks",
    "InstanceMap",
    "PackedMask",
    "RunLengths",
    "__version__",
    "accelerate",
    "attention_mask_levels",
    "explain",
    "mask_matching_cost",
    "masked_attention",
    "ms_deform_attn",
    "ms_deform_attn_from_offsets",
    "nn",
    "pack_attention_mask",
    "point_mask_loss",
    "point_sample",
    "predict_attention_mask",
    "resize_mask_features",
    "restore",
    "uncertain_points",
    "use_backend",
]
