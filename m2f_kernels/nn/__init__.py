"""Modules built from the operators, with the parameter names that published checkpoints use."""

from m2f_kernels.nn.ms_deform_attn import MSDeformAttn

__all__ = ["MSDeformAttn"]
