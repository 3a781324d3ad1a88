"""Segmentation of RF-DETR in `transformers`: matching and losses of masks at sampled points, targets as they are.

The published loss casts the targets to floating point, once in the matching and once in the loss for every match, of
which each target has one in each of 13 groups of queries; here they are looked up at the points. Those lie where the
published `grid_sample(mode="nearest")` has them: at the nearest pixel.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from m2f_kernels._dtypes import without_autocast
from m2f_kernels.integrations.transformers._swap import Mixin, Replacement
from m2f_kernels.integrations.transformers.mask_classification import CRITERION_OPS, dense_masks, kernels_serve
from m2f_kernels.masks import Targets
from m2f_kernels.ops.points import check_targets, cost_of_samples, point_sample, sample, uncertain_points

_LOSS = "transformers.loss.loss_rf_detr"


class ForInstanceSegmentation(Mixin):
    """`loss_function` of the model: the published one with this module's matching and loss of masks."""

    @property
    def loss_function(self) -> Any:
        published: Any = super().loss_function  # type: ignore[misc]
        known = getattr(sys.modules.get(_LOSS), "RfDetrForSegmentationLoss", None)
        return segmentation_loss if published is known and isinstance(known, FunctionType) else published

    @loss_function.setter
    def loss_function(self, value: Any) -> None:
        self._loss_function = value


def segmentation_loss(
    logits: Tensor, labels: Sequence[Mapping[str, Any]], device: Any, pred_boxes: Tensor, pred_masks: Tensor, *rest: Any
) -> Any:
    """The published function's result; `labels` may have an `InstanceMap` or run lengths as "masks"."""
    serves = kernels_serve(CRITERION_OPS, pred_masks)
    if not serves:
        masks = dense_masks([x["masks"] for x in labels], pred_masks.device)
        labels = [{**x, "masks": own} for x, own in zip(labels, masks, strict=True)]
    function = _with_these_classes() if serves else import_module(_LOSS).RfDetrForSegmentationLoss
    return function(logits, labels, device, pred_boxes, pred_masks, *rest)


@cache
def _with_these_classes() -> Any:
    """The published function, which finds this module's classes under the names of its own."""
    published = import_module(_LOSS)
    matcher = type("RfDetrHungarianMatcher", (published.RfDetrHungarianMatcher,), {"forward": torch.no_grad()(_match)})
    loss = type("RfDetrImageLoss", (published.RfDetrImageLoss,), {"loss_masks": _loss_masks})
    names = {**vars(published), "RfDetrHungarianMatcher": matcher, "RfDetrImageLoss": loss}
    original = published.RfDetrForSegmentationLoss
    made = FunctionType(original.__code__, names, original.__name__, original.__defaults__, original.__closure__)
    made.__kwdefaults__ = original.__kwdefaults__
    return made


# ---------------------------------------------------------------- matching


def _match(self: Any, outputs: Mapping[str, Tensor], targets: Sequence[Mapping[str, Any]], group_detr: int) -> Any:
    """For each image the queries and their targets, of one group of queries after another."""
    from scipy.optimize import linear_sum_assignment

    masks = outputs["pred_masks"]
    n, q = masks.shape[:2]
    # As published: a number of points by the size of the predicted boxes, four numbers for each query.
    points = torch.rand(1, n * q * 4 // self.mask_point_sample_ratio, 2, device=masks.device)
    with without_autocast(masks.device):
        costs = [
            _costs(self, outputs, i, target, own, points)
            for i, (target, own) in enumerate(zip(targets, _masks_of(targets, masks), strict=True))
        ]
        largest = torch.finfo(costs[0].dtype).max if costs else 0.0
        # One transfer to the host.
        flat = torch.cat([x.flatten() for x in costs]).nan_to_num(largest, largest, largest).cpu() if costs else masks
    matched = []
    for cost in (x.view(q, -1) for x in flat.split([x.numel() for x in costs])):
        size = q // group_detr
        pairs = [linear_sum_assignment(x) for x in cost.split(size)[:group_detr]]
        queries = np.concatenate([own + group * size for group, (own, _) in enumerate(pairs)])
        chosen = np.concatenate([own for _, own in pairs])
        matched.append(tuple(torch.as_tensor(x, dtype=torch.int64, device="cpu") for x in (queries, chosen)))
    return matched


def _costs(
    matcher: Any, outputs: Mapping[str, Tensor], image: int, target: Mapping[str, Any], masks: Targets, points: Tensor
) -> Tensor:
    """[Q, T]: focal cost of classes, L1 distance and generalised IoU of boxes, cross-entropy and dice at points."""
    boxes = import_module("transformers.loss.loss_for_object_detection")
    corners = import_module("transformers.image_transforms").center_to_corners_format
    probability = outputs["logits"][image].float().sigmoid()[:, target["class_labels"]]
    positive = 0.25 * (1 - probability) ** 2 * -(probability + 1e-8).log()
    negative = 0.75 * probability**2 * -(1 - probability + 1e-8).log()
    predicted, wanted = outputs["pred_boxes"][image].float(), target["boxes"].float()
    cost = matcher.bbox_cost * torch.cdist(predicted, wanted, p=1) + matcher.class_cost * (positive - negative)
    cost -= matcher.giou_cost * boxes.generalized_box_iou(corners(predicted), corners(wanted))
    logits = sample(outputs["pred_masks"][image : image + 1], points, exact=True)[0]
    rows = torch.arange(len(masks.pixels), device=points.device)[:, None]
    labels = nearest(masks, rows, points[0]).to(logits.dtype)
    cross_entropy, dice = cost_of_samples(logits, labels)
    return cost + matcher.cost_mask_class * cross_entropy + matcher.cost_mask_dice * dice


# ---------------------------------------------------------------- the loss of masks


def _loss_masks(
    self: Any,
    outputs: Mapping[str, Tensor],
    targets: Sequence[Mapping[str, Any]],
    indices: Sequence[tuple[Tensor, Tensor]],
    num_boxes: float,
) -> dict[str, Tensor]:
    published = import_module(_LOSS)
    masks = outputs["pred_masks"]
    images, queries = self._get_source_permutation_idx(indices)
    chosen = masks[images, queries]  # [M, h, w]
    if not chosen.numel():
        return {name: torch.zeros_like(chosen) for name in ("loss_mask_ce", "loss_mask_dice")}
    height, width = chosen.shape[1:]
    count = max(height, height * width // self.mask_point_sample_ratio)
    with torch.no_grad():
        points = uncertain_points(chosen.detach(), count, 3.0, 0.75)
        labels = [
            nearest(own, rows.to(masks.device)[:, None], at)
            for own, (_, rows), at in zip(
                _masks_of(targets, masks), indices, points.split([len(rows) for _, rows in indices]), strict=True
            )
        ]
    logits = point_sample(chosen[:, None], points)[:, 0]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    wanted = torch.cat(labels).to(logits.dtype)
    return {
        "loss_mask_ce": published.sigmoid_cross_entropy_loss(logits, wanted, num_boxes),
        "loss_mask_dice": published.dice_loss(logits, wanted, num_boxes),
    }


def _masks_of(targets: Sequence[Mapping[str, Any]], masks: Tensor) -> list[Targets]:
    return check_targets("labels['masks']", [x["masks"] for x in targets], len(targets), masks)


def nearest(targets: Targets, rows: Tensor, points: Tensor) -> Tensor:
    """Targets at the nearest pixels of points, as `grid_sample(mode="nearest")` has it; background outside.

    Args:
        targets: of one image.
        rows: int64 [M, 1], which of them.
        points: [K, 2] or [M, K, 2], (x, y) in [0, 1].

    Returns:
        [M, K], bool, or floating point where the masks are.
    """
    height, width = targets.pixels.shape[1:]
    column, row = (
        (((2.0 * points[..., axis] - 1.0) + 1) * size - 1).div(2).round() for axis, size in ((0, width), (1, height))
    )
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    row, column = (torch.where(inside, x, 0).long() for x in (row, column))
    found = targets.at(rows, row, column)
    return found & inside if found.dtype == torch.bool else torch.where(inside, found, 0)


REPLACEMENTS = {
    "transformers.models.rf_detr.modeling_rf_detr.RfDetrForInstanceSegmentation": Replacement(
        ForInstanceSegmentation, "matching and loss of masks at points, targets read where they lie", ops=CRITERION_OPS
    )
}
