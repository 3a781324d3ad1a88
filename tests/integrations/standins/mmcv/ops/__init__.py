from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttention
from mmcv.ops.point_sample import point_sample  # the function hides the module of this name, as in mmcv

__all__ = ["MultiScaleDeformableAttention", "point_sample"]
