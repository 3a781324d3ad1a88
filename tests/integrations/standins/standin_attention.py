"""The common base of mmcv's and detrex's modules of deformable attention."""

import torch
from torch import nn
from torch.nn import functional as F


def multi_scale_deformable_attn_pytorch(value, value_spatial_shapes, sampling_locations, attention_weights):
    """Level by level with grid_sample."""
    n, _, heads, d = value.shape
    out = 0
    values = value.split([int(h) * int(w) for h, w in value_spatial_shapes], 1)
    for level, (h, w) in enumerate(value_spatial_shapes):
        image = values[level].permute(0, 2, 3, 1).reshape(n * heads, d, int(h), int(w))
        grid = (2 * sampling_locations[:, :, :, level] - 1).transpose(1, 2).flatten(0, 1)
        weight = attention_weights[:, :, :, level].transpose(1, 2).flatten(0, 1).unsqueeze(1)
        out = out + (F.grid_sample(image, grid, align_corners=False) * weight).sum(-1)
    return out.view(n, heads * d, -1).transpose(1, 2).contiguous()


class Attention(nn.Module):
    """The module's parameters and forward; subclasses give it a name and their constructor's arguments."""

    def __init__(self, dim, num_heads, num_levels, num_points, im2col_step, dropout, batch_first, value_dim):
        super().__init__()
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        self.im2col_step, self.batch_first = im2col_step, batch_first
        self.dropout = nn.Dropout(dropout)
        self.sampling_offsets = nn.Linear(dim, num_heads * num_levels * num_points * 2)
        self.attention_weights = nn.Linear(dim, num_heads * num_levels * num_points)
        self.value_proj = nn.Linear(dim, value_dim)
        self.output_proj = nn.Linear(value_dim, dim)

    def attend(
        self,
        function,
        query,
        value,
        identity,
        query_pos,
        key_padding_mask,
        reference_points,
        spatial_shapes,
    ):
        value = query if value is None else value
        identity = query if identity is None else identity
        query = query if query_pos is None else query + query_pos
        if not self.batch_first:
            query, value = query.transpose(0, 1), value.transpose(0, 1)
        n, q, _ = query.shape
        size = (n, q, self.num_heads, self.num_levels, self.num_points)
        value = self.value_proj(value)
        if key_padding_mask is not None:
            value = value.masked_fill(key_padding_mask[..., None], 0.0)
        value = value.view(n, value.shape[1], self.num_heads, -1)
        offsets = self.sampling_offsets(query).view(*size, 2)
        weights = self.attention_weights(query).view(*size[:3], -1).softmax(-1).view(size)
        points = reference_points[:, :, None, :, None]
        if reference_points.shape[-1] == 2:
            locations = points + offsets / torch.stack([spatial_shapes[:, 1], spatial_shapes[:, 0]], -1)[:, None]
        else:
            locations = points[..., :2] + offsets / self.num_points * points[..., 2:] * 0.5
        output = self.output_proj(function(value, spatial_shapes, locations, weights))
        if not self.batch_first:
            output = output.transpose(0, 1)
        return self.dropout(output) + identity
