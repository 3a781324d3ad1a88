from types import SimpleNamespace

import torch
from standin_attention import Attention, multi_scale_deformable_attn_pytorch
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def _no_kernel(*args, **kwargs):
    raise RuntimeError("MultiScaleDeformableAttention: implementation for device cpu not found")


ext_module = SimpleNamespace(ms_deform_attn_forward=_no_kernel, ms_deform_attn_backward=_no_kernel)


class MultiScaleDeformableAttnFunction(Function):
    """Calls the compiled extension, whose backward fills buffers."""

    @staticmethod
    def forward(ctx, value, value_spatial_shapes, value_level_start_index, sampling_locations, attention_weights, step):
        ctx.step = step
        saved = (value, value_spatial_shapes, value_level_start_index)
        saved += (sampling_locations.type_as(value), attention_weights.type_as(value))
        ctx.save_for_backward(*saved)
        return ext_module.ms_deform_attn_forward(*saved, im2col_step=step)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        saved = ctx.saved_tensors
        buffers = [torch.zeros_like(x) for x in (saved[0], saved[3], saved[4])]
        ext_module.ms_deform_attn_backward(*saved, grad_output.contiguous(), *buffers, im2col_step=ctx.step)
        return buffers[0], None, None, buffers[1], buffers[2], None


class MultiScaleDeformableAttention(Attention):
    def __init__(
        self,
        embed_dims=256,
        num_heads=8,
        num_levels=4,
        num_points=4,
        im2col_step=64,
        dropout=0.1,
        batch_first=False,
        norm_cfg=None,
        init_cfg=None,
        value_proj_ratio=1.0,
    ):
        value_dim = int(embed_dims * value_proj_ratio)
        super().__init__(embed_dims, num_heads, num_levels, num_points, im2col_step, dropout, batch_first, value_dim)
        self.embed_dims = embed_dims

    def forward(
        self,
        query,
        key=None,
        value=None,
        identity=None,
        query_pos=None,
        key_padding_mask=None,
        reference_points=None,
        spatial_shapes=None,
        level_start_index=None,
        **kwargs,
    ):
        function = multi_scale_deformable_attn_pytorch  # there is no CUDA where stand-ins run
        return self.attend(
            function, query, value, identity, query_pos, key_padding_mask, reference_points, spatial_shapes
        )
