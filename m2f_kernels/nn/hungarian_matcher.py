"""Bipartite matching of queries and targets, all decoder outputs and all images at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from m2f_kernels import _tuning
from m2f_kernels._checks import check_number, describe
from m2f_kernels._dtypes import without_autocast
from m2f_kernels.masks import FactoredMasks
from m2f_kernels.nn.predictions import Batch, Predictions, Targets, read_batch
from m2f_kernels.ops.points import costs_of_image, point_counts, sample_targets
from m2f_kernels.ops.points.bookkeeping import matching_costs

#: For each decoder output, for each image: queries and their targets, int64 [M_i] on the CPU.
Indices = list[list[tuple[Tensor, Tensor]]]

NON_FINITE = ("replace", "raise")


class HungarianMatcher(nn.Module):
    """Assigns one query to each target at the lowest total cost (Cheng et al. 2022, section 3.3; Carion et al. 2020).

    Cost: `cost_class * -softmax(class_logits)[label] + cost_mask * cross_entropy + cost_dice * dice`, masks compared
    at uniform points. Features of factored masks are sampled once per image and multiplied at once for all outputs that
    share them. All costs are copied to the host in one transfer.

    Args:
        cost_class, cost_mask, cost_dice: weights of the three costs.
        num_points: points K per image.
        fresh_points: draw new points for each decoder output, as published. By default the outputs of an image share
            them, which samples the features once instead of once per output; each cost stays an unbiased estimate
            with the same variance, but the estimates of different outputs are then correlated.
        non_finite: "replace" treats a NaN or infinite cost as the largest number, so that it is matched last, and
            counts them in `self.non_finite_costs`; "raise" raises a ValueError.
        generator: source of the points, on the predictions' device; None for PyTorch's.

    Raises:
        ValueError, TypeError: bad input; the message names the argument.
    """

    def __init__(
        self,
        cost_class: float = 2.0,
        cost_mask: float = 5.0,
        cost_dice: float = 5.0,
        num_points: int = 12544,
        *,
        fresh_points: bool = False,
        non_finite: str = "replace",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        point_counts(num_points, 1.0, 0.0)
        if cost_class == 0 and cost_mask == 0 and cost_dice == 0:
            raise ValueError("cost_class, cost_mask, cost_dice: expected at least one of them not to be 0")
        if non_finite not in NON_FINITE:
            raise ValueError(f"non_finite: expected one of {', '.join(map(repr, NON_FINITE))}; got {non_finite!r}")
        self.cost_class = check_number("cost_class", cost_class)
        self.cost_mask = check_number("cost_mask", cost_mask)
        self.cost_dice = check_number("cost_dice", cost_dice)
        self.num_points = num_points
        self.fresh_points = fresh_points
        self.non_finite = non_finite
        self.generator = generator
        #: NaN and infinite costs of the last call.
        self.non_finite_costs = 0

    def forward(self, predictions: Predictions, targets: Targets) -> Indices:
        """The queries that are matched with targets, for every output and every image.

        Args:
            predictions: a list over decoder outputs of `{"class_logits": [N, Q, num_labels + 1], "masks": M}`, M
                being `FactoredMasks` or logits [N, Q, h, w].
            targets: a list over images of `{"labels": int64 [T_i], "masks": [T_i, H_i, W_i]}`; masks bool, uint8
                (not 0 is foreground) or floating point, or in their place an `InstanceMap` or run lengths.

        Returns:
            for each output, for each image, the queries and their targets: two int64 tensors [min(Q, T_i)] on the CPU,
            in ascending order of queries.

        Raises:
            ValueError, TypeError: bad input; the message names the argument, or image and label.
        """
        return self.match(read_batch(predictions, targets, None))

    @torch.no_grad()
    def match(self, batch: Batch) -> Indices:
        """The same as :meth:`forward`, for checked arguments."""
        with without_autocast(batch.device):
            return self._solve(batch, self._costs(batch))

    def _costs(self, batch: Batch) -> Tensor:
        """The costs [L_order, Q, T] of every image, flat and one after the other, then all labels, in one tensor.

        Outputs are in the order of :func:`_order`. Sums and weights are applied to all images at once.
        """
        if not batch.labels:
            return batch.class_logits.new_empty(0)
        order, logits = _order(batch), batch.class_logits
        if order != list(range(len(order))):
            logits = torch.stack([logits[output] for output in order])
        pairs = [pair for image, count in enumerate(batch.counts) if count for pair in self._mask_costs(batch, image)]
        cross_entropy, dice = [x for x, _ in pairs], [x for _, x in pairs]
        add_up: Any = matching_costs
        if _tuning.CRITERION == "fused" and all(x.dtype == torch.float32 for x in dice):
            add_up = torch.ops.m2f.matching_costs
        costs: Tensor = add_up(
            logits, batch.labels, cross_entropy, dice, self.cost_class, self.cost_mask, self.cost_dice
        )
        return costs

    def _mask_costs(self, batch: Batch, image: int) -> list[tuple[Tensor, Tensor]]:
        """Cross-entropy and dice of one image, in blocks of queries [., T] that follow each other."""
        q = batch.class_logits.shape[2]
        shared = None if self.fresh_points else self._points(batch.device)
        shared_labels = None if shared is None else sample_targets(batch.masks[image], shared)
        costs = []
        for group in batch.groups:
            masks = group.masks
            if shared is not None and shared_labels is not None:
                costs += costs_of_image(masks, image, shared, shared_labels)
                continue
            for part in range(len(group.outputs)):
                points = self._points(batch.device)
                rows = slice(part * q, (part + 1) * q)
                own = masks.select(rows) if isinstance(masks, FactoredMasks) else masks
                costs += costs_of_image(own, image, points, sample_targets(batch.masks[image], points))
        return costs

    def _points(self, device: torch.device) -> Tensor:
        return torch.rand(self.num_points, 2, device=device, generator=self.generator)

    def _solve(self, batch: Batch, costs: Tensor) -> Indices:
        from scipy.optimize import linear_sum_assignment

        outputs, n, q, classes = batch.class_logits.shape
        counts, order = batch.counts, _order(batch)
        host = costs.cpu()  # the one transfer
        sizes = [outputs * q * count for count in counts]
        parts = host.split([*sizes, *counts])
        batch.host_labels = [label.long() for label in parts[n:]]
        for i, label in enumerate(batch.host_labels):
            check_labels(label.tolist(), i, classes - 1)
        self.non_finite_costs = 0
        indices: Indices = [[] for _ in range(outputs)]
        for i, count in enumerate(counts):
            cost = parts[i].view(outputs, q, count)
            finite = cost.isfinite()
            bad = int(cost.numel() - finite.sum())
            if bad and self.non_finite == "raise":
                raise ValueError(
                    f"predictions: expected finite costs, as non_finite='raise' asks; got {bad} of {cost.numel()} that "
                    f"are NaN or infinite in image {i}"
                )
            self.non_finite_costs += bad
            if bad:
                cost = torch.where(finite, cost, torch.finfo(cost.dtype).max)
            # One after the other: the solver holds the interpreter's lock, so that a thread pool gains nothing.
            for output, matrix in zip(order, cost.numpy(), strict=True):
                pair = linear_sum_assignment(matrix)
                indices[output].append((torch.from_numpy(pair[0]), torch.from_numpy(pair[1])))
        return indices

    def extra_repr(self) -> str:
        return (
            f"cost_class={self.cost_class}, cost_mask={self.cost_mask}, cost_dice={self.cost_dice}, "
            f"num_points={self.num_points}, fresh_points={self.fresh_points}, non_finite={self.non_finite!r}"
        )


def _order(batch: Batch) -> list[int]:
    """The order in which the masks of outputs are computed: outputs that share features follow each other."""
    return [output for group in batch.groups for output in group.outputs]


def check_labels(labels: Sequence[int], image: int, num_labels: int) -> None:
    for j, label in enumerate(labels):
        if not 0 <= label < num_labels:
            raise ValueError(
                f"targets[{image}]['labels'][{j}]: expected a label from 0 to {num_labels - 1}; got {describe(label)}"
            )
