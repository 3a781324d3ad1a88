"""Fused operators for mask-classification transformers: Mask2Former, Deformable DETR and their relatives."""

from m2f_kernels import nn
from m2f_kernels._version import __version__
from m2f_kernels.backend import BackendChoice, explain, use_backend
from m2f_kernels.ops.ms_deform_attn import ms_deform_attn, ms_deform_attn_from_offsets

__all__ = [
    "BackendChoice",
    "__version__",
    "explain",
    "ms_deform_attn",
    "ms_deform_attn_from_offsets",
    "nn",
    "use_backend",
]
