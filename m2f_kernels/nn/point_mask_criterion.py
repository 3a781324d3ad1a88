"""The training loss of Mask2Former with point supervision, all decoder outputs and all images at once."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from m2f_kernels._checks import check_number
from m2f_kernels.nn.hungarian_matcher import HungarianMatcher, Indices
from m2f_kernels.nn.predictions import Batch, Group, Predictions, Targets, read_batch
from m2f_kernels.ops.point_loss import uncertain_point_mask_loss
from m2f_kernels.ops.point_sample import point_counts


class PointMaskCriterion(nn.Module):
    """Matching, then cross-entropy of classes, and binary cross-entropy and dice of masks at sampled points.

    Masked-attention Mask Transformer (Cheng et al. 2022), section 3.3 and "loss weights" of section 4.1. Masks of
    unmatched queries are never computed; those of matched ones exist a bounded chunk at a time, and so do their
    gradients. One transfer from the device to the host, whatever the number of outputs and images.

    Args:
        num_labels: classes without no-object, which is the last class.
        num_points: points K, per image for matching and per mask for the loss.
        oversample_ratio, importance_sample_ratio: see :func:`m2f_kernels.uncertain_points`.
        cost_class, cost_mask, cost_dice: weights of the matching costs.
        class_weight, mask_weight, dice_weight: weights of the losses.
        no_object_weight: weight of no-object among the classes.
        fresh_points, non_finite: see :class:`HungarianMatcher`.
        generator: source of all points, on the predictions' device; None for PyTorch's.

    Raises:
        ValueError, TypeError: naming the argument.
    """

    class_weights: Tensor

    def __init__(
        self,
        num_labels: int,
        *,
        num_points: int = 12544,
        oversample_ratio: float = 3.0,
        importance_sample_ratio: float = 0.75,
        cost_class: float = 2.0,
        cost_mask: float = 5.0,
        cost_dice: float = 5.0,
        class_weight: float = 2.0,
        mask_weight: float = 5.0,
        dice_weight: float = 5.0,
        no_object_weight: float = 0.1,
        fresh_points: bool = False,
        non_finite: str = "replace",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if isinstance(num_labels, bool) or not isinstance(num_labels, int) or num_labels < 1:
            raise ValueError(f"num_labels: expected an integer of at least 1; got {num_labels!r}")
        point_counts(num_points, oversample_ratio, importance_sample_ratio)
        self.num_labels = num_labels
        self.num_points = num_points
        self.oversample_ratio = oversample_ratio
        self.importance_sample_ratio = importance_sample_ratio
        self.class_weight = check_number("class_weight", class_weight)
        self.mask_weight = check_number("mask_weight", mask_weight)
        self.dice_weight = check_number("dice_weight", dice_weight)
        self.matcher = HungarianMatcher(
            cost_class,
            cost_mask,
            cost_dice,
            num_points,
            fresh_points=fresh_points,
            non_finite=non_finite,
            generator=generator,
        )
        weights = torch.ones(num_labels + 1)
        weights[-1] = check_number("no_object_weight", no_object_weight)
        self.register_buffer("class_weights", weights, persistent=False)

    def forward(self, predictions: Predictions, targets: Targets) -> dict[str, Tensor]:
        """The weighted losses of every decoder output; their sum is the training loss.

        Args:
            predictions: a list over decoder outputs, the last output last, of `{"class_logits": [N, Q, num_labels + 1],
                "masks": M}`, M being `FactoredMasks` or logits [N, Q, h, w].
            targets: a list over images of `{"labels": int64 [T_i], "masks": [T_i, H_i, W_i]}`; masks bool, uint8 or
                floating point, of any size: coordinates are relative to it.

        Returns:
            "loss_cross_entropy", "loss_mask" and "loss_dice" of the last output; those of output i with the suffix
            `_i`. Mask losses are sums over masks divided by the number of targets of all ranks per rank, at least 1.

        Raises:
            ValueError, TypeError: naming the argument; a label out of range names image and label.
        """
        batch = read_batch(predictions, targets, self.num_labels)
        indices = self.matcher.match(batch)
        with torch.autocast(batch.device.type, enabled=False):
            classes = self._class_losses(batch, indices)
            masks, dice = self._mask_losses(batch, indices)
            scale = 1 / self._num_masks(batch)
            losses: dict[str, Tensor] = {}
            last = len(predictions) - 1
            for output in [last, *range(last)]:
                suffix = "" if output == last else f"_{output}"
                losses[f"loss_cross_entropy{suffix}"] = self.class_weight * classes[output]
                losses[f"loss_mask{suffix}"] = self.mask_weight * scale * masks[output]
                losses[f"loss_dice{suffix}"] = self.dice_weight * scale * dice[output]
        return losses

    def _class_losses(self, batch: Batch, indices: Indices) -> Tensor:
        """[L], the weighted mean over all queries of all images."""
        outputs, n, q, classes = batch.class_logits.shape
        # Which label each query has, counted over all images' labels, with no-object as one more: made on the host.
        position = torch.full((outputs, n, q), sum(batch.counts), dtype=torch.int64, device="cpu")
        for output, pairs in enumerate(indices):
            start = 0
            for image, (queries, chosen) in enumerate(pairs):
                position[output, image, queries] = chosen + start
                start += batch.counts[image]
        no_object = torch.full((1,), classes - 1, device=batch.device)
        labels = torch.cat([*batch.labels, no_object])[position.to(batch.device, non_blocking=True)]
        weights = self.class_weights[labels].flatten(1)
        negative_log = F.cross_entropy(batch.class_logits.flatten(0, 2), labels.flatten(), reduction="none")
        return (negative_log.view(outputs, n * q) * weights).sum(1) / weights.sum(1).clamp(min=1e-12)

    def _mask_losses(self, batch: Batch, indices: Indices) -> tuple[list[Tensor], list[Tensor]]:
        """Sums over matched masks, for each output."""
        outputs = len(indices)
        masks: list[Tensor] = [batch.class_logits.new_empty(0)] * outputs
        dice = list(masks)
        for group in batch.groups:
            for output, cross_entropy_sum, dice_sum in self._group_losses(batch, group, indices):
                masks[output], dice[output] = cross_entropy_sum, dice_sum
        return masks, dice

    def _group_losses(self, batch: Batch, group: Group, indices: Indices) -> list[tuple[int, Tensor, Tensor]]:
        q, size = batch.class_logits.shape[2], len(group.outputs)
        pairs = [
            (
                torch.cat([indices[output][image][0] + part * q for part, output in enumerate(group.outputs)]),
                torch.cat([indices[output][image][1] for output in group.outputs]),
            )
            for image in range(len(batch.labels))
        ]
        cross_entropy, dice = uncertain_point_mask_loss(
            group.masks,
            batch.masks,
            pairs,
            self.num_points,
            self.oversample_ratio,
            self.importance_sample_ratio,
            self.matcher.generator,
        )
        counts = [len(queries) for queries, _ in pairs]
        sums = []
        for losses in (cross_entropy, dice):
            # Masks lie in order of images, then of outputs.
            per_image = [x.view(size, -1).sum(1) for x in losses.split(counts)]
            # Of an empty batch too the sums are connected to the predictions.
            sums.append(torch.stack(per_image).sum(0) if per_image else losses.sum().expand(size))
        return [(output, sums[0][part], sums[1][part]) for part, output in enumerate(group.outputs)]

    def _num_masks(self, batch: Batch) -> float | Tensor:
        """Targets of all ranks, per rank, at least 1."""
        count = sum(batch.counts)
        if not (dist.is_available() and dist.is_initialized()):
            return max(count, 1)
        total = torch.tensor([float(count)], device=batch.device)
        dist.all_reduce(total)
        return (total[0] / dist.get_world_size()).clamp(min=1)
