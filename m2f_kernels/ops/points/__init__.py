"""Operators on points of masks: sampling, uncertain points, matching cost and loss.

Those that this package's modules share, without checks or with parts of arguments, are not public.
"""

from m2f_kernels.ops.points.loss import (
    Given,
    Matches,
    check_targets,
    cost_of_samples,
    costs_of_image,
    mask_matching_cost,
    point_mask_loss,
    uncertain_loss,
    uncertain_point_mask_loss,
)
from m2f_kernels.ops.points.sampling import (
    check_masks,
    point_counts,
    point_sample,
    sample,
    sample_targets,
    uncertain_points,
)

__all__ = [
    "Given",
    "Matches",
    "check_masks",
    "check_targets",
    "cost_of_samples",
    "costs_of_image",
    "mask_matching_cost",
    "point_counts",
    "point_mask_loss",
    "point_sample",
    "sample",
    "sample_targets",
    "uncertain_loss",
    "uncertain_point_mask_loss",
    "uncertain_points",
]
