"""Modules built from the operators, with the parameter names that published checkpoints use."""

from m2f_kernels.nn.masked_cross_attention import MaskedCrossAttention, project_keys_values
from m2f_kernels.nn.ms_deform_attn import MSDeformAttn

__all__ = ["MSDeformAttn", "MaskedCrossAttention", "project_keys_values"]
