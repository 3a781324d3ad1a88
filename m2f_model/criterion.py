"""The training loss: a :class:`m2f_kernels.nn.PointMaskCriterion` with the settings of the configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from m2f_kernels.nn import PointMaskCriterion
from m2f_model.config import Mask2FormerConfig
from m2f_model.transformer_decoder import Prediction

#: For each image "labels", int64 [T], and "masks" of the input's extent: [T, H, W], bool, uint8 (not 0 is foreground)
#: or floating point, or in their place `m2f_kernels.InstanceMap` or `RunLengths`.
Targets = Sequence[Mapping[str, Any]]


def build_criterion(config: Mask2FormerConfig) -> PointMaskCriterion:
    """Matching and loss (Cheng et al. 2022, sections 3.3 and 4.1): costs of the matching are weighted as the losses."""
    return PointMaskCriterion(
        config.num_labels,
        num_points=config.num_points,
        oversample_ratio=config.oversample_ratio,
        importance_sample_ratio=config.importance_sample_ratio,
        cost_class=config.class_weight,
        cost_mask=config.mask_weight,
        cost_dice=config.dice_weight,
        class_weight=config.class_weight,
        mask_weight=config.mask_weight,
        dice_weight=config.dice_weight,
        no_object_weight=config.no_object_weight,
    )


def losses_of(criterion: PointMaskCriterion, predictions: Sequence[Prediction], targets: Targets) -> dict[str, Tensor]:
    """Weighted losses by name; the training loss is their sum. Every prediction is matched and supervised."""
    return criterion([prediction._asdict() for prediction in predictions], targets)


def total_loss(losses: Mapping[str, Tensor]) -> Tensor:
    """The training loss, the sum of all losses, in two kernels; `sum()` launches one for each loss but the first."""
    return torch.stack(list(losses.values())).sum()
