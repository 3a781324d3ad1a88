"""Modules built from the operators, with the parameter names that published checkpoints use."""

from m2f_kernels.nn.hungarian_matcher import HungarianMatcher
from m2f_kernels.nn.linear import linear_relu
from m2f_kernels.nn.masked_cross_attention import MaskedCrossAttention, project_keys_values
from m2f_kernels.nn.ms_deform_attn import MSDeformAttn
from m2f_kernels.nn.point_mask_criterion import PointMaskCriterion

__all__ = [
    "HungarianMatcher",
    "MSDeformAttn",
    "MaskedCrossAttention",
    "PointMaskCriterion",
    "linear_relu",
    "project_keys_values",
]
