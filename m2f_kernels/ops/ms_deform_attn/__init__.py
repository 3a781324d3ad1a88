"""Multi-scale deformable attention."""

from m2f_kernels.ops.ms_deform_attn.interface import ms_deform_attn, ms_deform_attn_from_offsets

__all__ = ["ms_deform_attn", "ms_deform_attn_from_offsets"]
