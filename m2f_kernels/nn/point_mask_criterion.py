"""The training loss of Mask2Former with point supervision, all decoder outputs and all images at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from m2f_kernels import _tuning
from m2f_kernels._checks import check_number
from m2f_kernels._dtypes import without_autocast
from m2f_kernels._transfer import to_device
from m2f_kernels.nn.hungarian_matcher import HungarianMatcher, Indices
from m2f_kernels.nn.predictions import Batch, Group, Predictions, Targets, read_batch
from m2f_kernels.ops._autograd import call
from m2f_kernels.ops.points import point_counts, uncertain_loss
from m2f_kernels.ops.points.bookkeeping import class_losses, joined
from m2f_kernels.ops.points.masks import MaskRows


class Unweighted(NamedTuple):
    """Losses of every output [L]: class losses, means over queries; cross-entropy and dice, sums over masks."""

    classes: Tensor
    cross_entropy: Tensor
    dice: Tensor


class Matched(NamedTuple):
    """The matched masks of a group, in order of images and then of outputs.

    Attributes:
        rows: indices [M] into the group's [N, outputs * Q].
        targets: indices [M] into the targets of all images.
        outputs: which output each of the M is of.
    """

    rows: Tensor
    targets: Tensor
    outputs: Tensor


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


class _SumsOverMasks(torch.autograd.Function):
    """Autograd function that sums losses of masks for each output; its backward is one kernel.

    Losses are those of a group's masks [M], cross-entropy and dice alternately; `counts` are the masks of its images.
    """

    @staticmethod
    def forward(
        groups: list[list[int]], counts: list[list[int]], output_of_mask: Tensor, *losses: Tensor
    ) -> tuple[Tensor, Tensor]:
        sums = []
        for i, (outputs, masks) in enumerate(zip(groups, counts, strict=True)):
            size, both = len(outputs), torch.stack(losses[2 * i : 2 * i + 2])
            # Masks are in order of images, then of outputs.
            images = [x.view(2, size, -1).sum(2) for x in both.split(masks, 1)]
            if len(images) > 1:
                images = [torch.stack(images).sum(0)]
            sums.append(images[0] if images else both.new_zeros(2, size))
        total = sums[0] if len(sums) == 1 else torch.cat(sums, 1)
        order = [output for outputs in groups for output in outputs]
        if order != sorted(order):
            total = torch.stack([total[:, order.index(output)] for output in range(len(order))], 1)
        return total[0], total[1]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, ctx.counts, output_of_mask, *_ = inputs
        ctx.save_for_backward(output_of_mask)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (output_of_mask,) = ctx.saved_tensors
        of_masks = torch.stack(grads).index_select(1, output_of_mask)
        return None, None, None, *(x for part in of_masks.split([sum(x) for x in ctx.counts], 1) for x in part)


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
            sums = [found.cross_entropy, found.dice]
            if isinstance(scale, Tensor):  # of several ranks
                sums, scale = [x * scale for x in sums], 1.0
            weights = self.class_weight, self.mask_weight * scale, self.dice_weight * scale
            values = apart(found.classes, *sums, weights=weights)
        losses: dict[str, Tensor] = {}
        outputs = len(predictions)
        for output in [outputs - 1, *range(outputs - 1)]:
            suffix = "" if output == outputs - 1 else f"_{output}"
            for kind, name in enumerate(("cross_entropy", "mask", "dice")):
                losses[f"loss_{name}{suffix}"] = values[kind * outputs + output]
        return losses

    def _unweighted(self, batch: Batch, indices: Indices) -> Unweighted:
        """The losses of all outputs of a batch that is matched. Labels and matches are copied to the device at once."""
        outputs, n, q, classes = batch.class_logits.shape
        labels = torch.full((outputs, n, q), classes - 1, dtype=torch.int64, device="cpu")  # no object
        for image, own in enumerate(batch.host_labels):
            for output, pairs in enumerate(indices):
                queries, chosen = pairs[image]
                labels[output, image, queries] = own[chosen]
        matched = [_matched(batch, group, indices) for group in batch.groups]
        sent = [labels.flatten(), *(x for group in matched for x in group)]
        arrived = to_device(torch.cat(sent), batch.device).split([len(x) for x in sent])
        given = batch.class_logits.flatten(1, 2), arrived[0].view(outputs, n * q), self.class_weights
        losses, counts, output_of_mask = self._mask_losses(batch, indices, arrived[1:])
        if _tuning.CRITERION == "fused" and losses[0].dtype == torch.float32:
            pair = losses if len(batch.groups) == 1 else [torch.cat(losses[i::2]) for i in range(2)]
            found = call("criterion_losses", *given, *pair, output_of_mask)
            return Unweighted(*found[:3])
        groups = [group.outputs for group in batch.groups]
        sums = _SumsOverMasks.apply(groups, counts, output_of_mask, *losses)
        return Unweighted(class_losses(*given)[0], *sums)

    def mask_sums(self, batch: Batch, indices: Indices) -> tuple[Tensor, Tensor]:
        """Unweighted sums over matched masks alone, cross-entropy and dice of each output [L]."""
        sent = [x for group in batch.groups for x in _matched(batch, group, indices)]
        arrived = to_device(torch.cat(sent), batch.device).split([len(x) for x in sent])
        losses, counts, output_of_mask = self._mask_losses(batch, indices, arrived)
        groups = [group.outputs for group in batch.groups]
        cross_entropy, dice = _SumsOverMasks.apply(groups, counts, output_of_mask, *losses)
        return cross_entropy, dice

    def _mask_losses(
        self, batch: Batch, indices: Indices, matched: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[list[int]], Tensor]:
        """The losses of each group's masks, cross-entropy and dice [M]; the masks of its images; all masks' outputs.

        `matched` are the fields of each group's :class:`Matched`.
        """
        points = point_counts(self.num_points, self.oversample_ratio, self.importance_sample_ratio)
        losses: list[Tensor] = []
        counts = []
        for i, group in enumerate(batch.groups):
            counts.append(
                [sum(len(indices[output][image][0]) for output in group.outputs) for image in range(batch.images)]
            )
            masks = MaskRows(group.masks, matched[3 * i], counts[-1])
            losses += uncertain_loss(masks, batch.masks, matched[3 * i + 1], points, self.matcher.generator)
        return losses, counts, joined(matched[2::3])

    def _num_masks(self, batch: Batch) -> float | Tensor:
        """The number of targets of all ranks divided by the number of ranks, at least 1."""
        count = sum(batch.counts)
        if not (dist.is_available() and dist.is_initialized()):
            return max(count, 1)
        total = torch.full((1,), float(count), device=batch.device)  # filled there: no copy
        dist.all_reduce(total)
        return (total[0] / dist.get_world_size()).clamp(min=1)


def _matched(batch: Batch, group: Group, indices: Indices) -> Matched:
    q = batch.class_logits.shape[2]
    nothing = torch.zeros(0, dtype=torch.int64, device="cpu")
    rows, targets, outputs = [nothing], [nothing], [nothing]
    first_target = 0
    for image, count in enumerate(batch.counts):
        for part, output in enumerate(group.outputs):
            queries, chosen = indices[output][image]
            rows.append(queries + (image * len(group.outputs) + part) * q)
            targets.append(chosen + first_target)
            outputs.append(torch.full_like(queries, output))
        first_target += count
    return Matched(torch.cat(rows), torch.cat(targets), torch.cat(outputs))
