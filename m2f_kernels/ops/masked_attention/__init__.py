"""Masked attention."""

from m2f_kernels.ops.masked_attention.interface import masked_attention

__all__ = ["masked_attention"]
