"""As built without CUDA: `_C` could not be imported, and does not exist here."""

import standin_attention
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class MultiScaleDeformableAttnFunction(Function):
    """Calls the compiled extension, whose backward returns gradients."""

    @staticmethod
    def forward(ctx, value, value_spatial_shapes, value_level_start_index, sampling_locations, attention_weights, step):
        ctx.step = step
        saved = (value, value_spatial_shapes, value_level_start_index, sampling_locations, attention_weights)
        ctx.save_for_backward(*saved)
        return _C.ms_deform_attn_forward(*saved, step)  # noqa: F821

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        gradients = _C.ms_deform_attn_backward(*ctx.saved_tensors, grad_output, ctx.step)  # noqa: F821
        return gradients[0], None, None, gradients[1], gradients[2], None


def multi_scale_deformable_attn_pytorch(value, value_spatial_shapes, sampling_locations, attention_weights):
    return standin_attention.multi_scale_deformable_attn_pytorch(
        value, value_spatial_shapes, sampling_locations, attention_weights
    )


class MultiScaleDeformableAttention(standin_attention.Attention):
    def __init__(
        self,
        embed_dim=256,
        num_heads=8,
        num_levels=4,
        num_points=4,
        img2col_step=64,
        dropout=0.1,
        batch_first=False,
    ):
        super().__init__(embed_dim, num_heads, num_levels, num_points, img2col_step, dropout, batch_first, embed_dim)
        self.embed_dim = embed_dim

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
        function = multi_scale_deformable_attn_pytorch
        return self.attend(
            function, query, value, identity, query_pos, key_padding_mask, reference_points, spatial_shapes
        )
