"""A user of mmcv that imported names from it."""

from mmcv.ops import MultiScaleDeformableAttention, point_sample


class MSDeformAttnPixelDecoder:
    """Holds mmcv's attention, as mmdet's does in its encoder layers."""

    def __init__(self, **options):
        self.attention = MultiScaleDeformableAttention(**options)


def sample(input, points):
    return point_sample(input, points)
