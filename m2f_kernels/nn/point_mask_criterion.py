"""The training loss of Mask2Former with point supervision, all decoder outputs and all images at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from m2f_kernels._checks import check_number
from m2f_kernels._dtypes import without_autocast
from m2f_kernels._transfer import to_device
from m2f_kernels.nn.hungarian_matcher import HungarianMatcher, Indices
from m2f_kernels.nn.predictions import Batch, Group, Predictions, Targets, read_batch
from m2f_kernels.ops.points import point_counts, uncertain_loss
from m2f_kernels.ops.points.masks import MaskRows


class Unweighted(NamedTuple):
    """Losses of every output: class losses, means over queries [L]; mask and dice losses, sums over masks [2, L]."""

    classes: Tensor
    sums: Tensor


class _Apart(torch.autograd.Function):
    """Autograd function that splits vectors of one length into weighted elements, which may be changed in place."""

    @staticmethod
    def forward(weights: tuple[float, ...], *vectors: Tensor) -> tuple[Tensor, ...]:
        elements = [x for vector in vectors for x in vector.detach().unbind()]
        return tuple(torch._foreach_mul(elements, [x for x in weights for _ in range(len(vectors[0]))]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.weights = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *torch._foreach_mul(torch.stack(grads).chunk(len(ctx.weights)), ctx.weights)


def apart(*vectors: Tensor, weights: tuple[float, ...]) -> tuple[Tensor, ...]:
    """The elements of all vectors [L], each vector times its weight, as separate tensors; one kernel, also backward."""
    found: tuple[Tensor, ...] = _Apart.apply(weights, *vectors)
    return found


class PointMaskCriterion(nn.Module):
    """Mask2Former's training loss: matching, cross-entropy of classes, cross-entropy and dice of masks at points.

    Masked-attention Mask Transformer (Cheng et al. 2022), section 3.3 and "loss weights" of section 4.1. Masks of
    unmatched queries are never computed; those of matched queries, and their gradients, exist a bounded chunk at a
    time. It copies to the host once and back once, from pinned memory, for any number of outputs and images.

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
        ValueError, TypeError: bad input; the message names the argument.
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
            targets: a list over images of `{"labels": int64 [T_i], "masks": [T_i, H_i, W_i]}`; masks bool, uint8
                (not 0 is foreground) or floating point, of any size: coordinates are relative to it. In their place an
                `InstanceMap` of ids, or `RunLengths` (COCO's, as `pycocotools` has them, too).

        Returns:
            "loss_cross_entropy", "loss_mask" and "loss_dice" of the last output; those of output i with the suffix
            `_i`. Mask losses are sums over masks divided by the number of targets of all ranks per rank, at least 1.

        Raises:
            ValueError, TypeError: bad input; the message names the argument, or image and label.
        """
        batch = read_batch(predictions, targets, self.num_labels)
        indices = self.matcher.match(batch)
        with without_autocast(batch.device):
            found = self._unweighted(batch, indices)
            scale = 1 / self._num_masks(batch)
            sums = found.sums
            if isinstance(scale, Tensor):  # of several ranks
                sums, scale = sums * scale, 1.0
            weights = self.class_weight, self.mask_weight * scale, self.dice_weight * scale
            values = apart(found.classes, *sums.unbind(), weights=weights)
        losses: dict[str, Tensor] = {}
        outputs = len(predictions)
        for output in [outputs - 1, *range(outputs - 1)]:
            suffix = "" if output == outputs - 1 else f"_{output}"
            for kind, name in enumerate(("cross_entropy", "mask", "dice")):
                losses[f"loss_{name}{suffix}"] = values[kind * outputs + output]
        return losses

    def _unweighted(self, batch: Batch, indices: Indices) -> Unweighted:
        """The losses of all outputs. The matches are copied to the device at once."""
        outputs, n, q, _ = batch.class_logits.shape
        # The label of each query, as an index into all images' labels and one more, no-object.
        position = torch.full((outputs, n, q), sum(batch.counts), dtype=torch.int64, device="cpu")
        start = 0
        for image, count in enumerate(batch.counts):
            for output, pairs in enumerate(indices):
                queries, chosen = pairs[image]
                position[output, image, queries] = chosen + start
            start += count
        rows = [_matched_rows(batch, group, indices) for group in batch.groups]
        sent = [position.flatten(), *(x for pair in rows for x in pair)]
        arrived = to_device(torch.cat(sent), batch.device).split([len(x) for x in sent])
        classes = self._class_losses(batch, arrived[0].view(outputs, n, q))
        return Unweighted(classes, self._mask_losses(batch, indices, arrived[1:]))

    def mask_sums(self, batch: Batch, indices: Indices) -> Tensor:
        """Unweighted sums over matched masks alone, cross-entropy and dice of each output: [2, L]."""
        rows = [x for group in batch.groups for x in _matched_rows(batch, group, indices)]
        arrived = to_device(torch.cat(rows), batch.device).split([len(x) for x in rows])
        return self._mask_losses(batch, indices, arrived)

    def _class_losses(self, batch: Batch, position: Tensor) -> Tensor:
        """The class losses [L], weighted means over all queries of all images."""
        outputs, n, q, classes = batch.class_logits.shape
        no_object = torch.full((1,), classes - 1, device=batch.device)
        labels = torch.cat([*batch.labels, no_object])[position]
        weights = self.class_weights[labels].flatten(1)
        weighted = F.cross_entropy(
            batch.class_logits.flatten(0, 2), labels.flatten(), self.class_weights, reduction="none"
        )
        return weighted.view(outputs, n * q).sum(1) / weights.sum(1).clamp(min=1e-12)

    def _mask_losses(self, batch: Batch, indices: Indices, rows: Sequence[Tensor]) -> Tensor:
        """Sums over matched masks [2, L]; `rows` are two tensors of each group, see :func:`_matched_rows`."""
        points = point_counts(self.num_points, self.oversample_ratio, self.importance_sample_ratio)
        sums = []
        for i, group in enumerate(batch.groups):
            size = len(group.outputs)
            counts = [sum(len(indices[output][image][0]) for output in group.outputs) for image in range(batch.images)]
            masks = MaskRows(group.masks, rows[2 * i], counts)
            losses = torch.stack(uncertain_loss(masks, batch.masks, rows[2 * i + 1], points, self.matcher.generator))
            # Masks are in order of images, then of outputs.
            per_image = [x.view(2, size, -1).sum(2) for x in losses.split(counts, 1)]
            # The sums of an empty batch depend on the predictions, too, so that they have a gradient.
            if len(per_image) > 1:
                per_image = [torch.stack(per_image).sum(0)]
            sums.append(per_image[0] if per_image else losses.sum().expand(2, size))
        total = sums[0] if len(sums) == 1 else torch.cat(sums, 1)
        order = [output for group in batch.groups for output in group.outputs]
        if order != sorted(order):
            total = torch.stack([total[:, order.index(output)] for output in range(len(order))], 1)
        return total

    def _num_masks(self, batch: Batch) -> float | Tensor:
        """The number of targets of all ranks divided by the number of ranks, at least 1."""
        count = sum(batch.counts)
        if not (dist.is_available() and dist.is_initialized()):
            return max(count, 1)
        total = torch.full((1,), float(count), device=batch.device)  # filled there: no copy
        dist.all_reduce(total)
        return (total[0] / dist.get_world_size()).clamp(min=1)


def _matched_rows(batch: Batch, group: Group, indices: Indices) -> tuple[Tensor, Tensor]:
    """The rows of a group's matched masks, in order of images and then of outputs, and the rows of their targets.

    Rows of masks are indices into the group's [N, outputs * Q], those of targets into the targets of all images.
    """
    q = batch.class_logits.shape[2]
    masks, targets = (
        [torch.zeros(0, dtype=torch.int64, device="cpu")],
        [torch.zeros(0, dtype=torch.int64, device="cpu")],
    )
    first_target = 0
    for image, count in enumerate(batch.counts):
        for part, output in enumerate(group.outputs):
            queries, chosen = indices[output][image]
            masks.append(queries + (image * len(group.outputs) + part) * q)
            targets.append(chosen + first_target)
        first_target += count
    return torch.cat(masks), torch.cat(targets)
