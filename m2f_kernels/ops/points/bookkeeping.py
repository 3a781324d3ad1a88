"""Sums and weights around matching cost and point loss: costs added up, the loss of classes, sums over masks.

The functions are plain PyTorch. The operators, registered with those of `loss.py`, are the same in one Triton kernel
each; `M2F_CRITERION=fused` asks for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from m2f_kernels._library import LIBRARY
from m2f_kernels.ops._autograd import register_autograd

_TAGS = (torch.Tag.pt2_compliant_tag,)
LIBRARY.define(
    "matching_costs(Tensor class_logits, Tensor[] labels, Tensor[] cross_entropy, Tensor[] dice, float cost_class, "
    "float cost_mask, float cost_dice) -> Tensor",
    tags=_TAGS,
)
LIBRARY.define(
    "criterion_losses(Tensor class_logits, Tensor labels, Tensor class_weights, Tensor cross_entropy, Tensor dice, "
    "Tensor output_of_mask) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
LIBRARY.define(
    "criterion_losses_backward(Tensor grad_classes, Tensor grad_cross_entropy, Tensor grad_dice, Tensor class_logits, "
    "Tensor labels, Tensor class_weights, Tensor weights, Tensor output_of_mask) -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
#: No sum of weights is smaller.
LEAST_WEIGHT = 1e-12


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The parts, one after the other; one alone is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def matching_costs(
    class_logits: Tensor,
    labels: Sequence[Tensor],
    cross_entropy: Sequence[Tensor],
    dice: Sequence[Tensor],
    cost_class: float,
    cost_mask: float,
    cost_dice: float,
) -> Tensor:
    """The costs [L, Q, T] of every image, flat and one after the other, then all labels, in one tensor.

    Args:
        class_logits: [L, N, Q, num_labels + 1], float32.
        labels: of each image [T].
        cross_entropy, dice: blocks of queries [., T] that follow each other, of images that have targets.
    """
    counts = [len(x) for x in labels]
    every = joined(labels)
    # A label out of range is detected on the host, with the costs; here it must only not be used as an index.
    classes = every.clamp(0, class_logits.shape[3] - 2).split(counts)
    probability = class_logits.softmax(-1)
    classification = joined([probability[:, i][..., chosen].flatten() for i, chosen in enumerate(classes)])
    sent = classification.new_empty(len(classification) + len(every))
    cost, end = sent.split([len(classification), len(every)])
    end.copy_(every)  # exact in float32 up to 2^24
    if cross_entropy:
        # Rounded as the published sum is: queries that are alike have costs that differ in the last bit.
        parts = [classification, *(joined([x.flatten() for x in blocks]) for blocks in (cross_entropy, dice))]
        weighted = torch._foreach_mul(parts, [-cost_class, cost_mask, cost_dice])
        torch.add(weighted[0], weighted[1].add_(weighted[2]), out=cost)
    return sent


def class_losses(class_logits: Tensor, labels: Tensor, class_weights: Tensor) -> tuple[Tensor, Tensor]:
    """The weighted mean cross-entropy of each output [L], and its sum of weights [L].

    Args:
        class_logits: [L, R, num_labels + 1], float32.
        labels: int64 [L, R].
        class_weights: [num_labels + 1].
    """
    weights = class_weights[labels].sum(1).clamp(min=LEAST_WEIGHT)
    weighted = F.cross_entropy(class_logits.flatten(0, 1), labels.flatten(), class_weights, reduction="none")
    return weighted.view(labels.shape).sum(1) / weights, weights


def criterion_losses(
    class_logits: Tensor,
    labels: Tensor,
    class_weights: Tensor,
    cross_entropy: Tensor,
    dice: Tensor,
    output_of_mask: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The class losses [L], sums over masks of cross-entropy and dice [L] both, and the sums of weights [L].

    Args:
        class_logits, labels, class_weights: as :func:`class_losses` takes them.
        cross_entropy, dice: of every mask [M].
        output_of_mask: int64 [M], which of the L it belongs to.
    """
    classes, weights = class_losses(class_logits, labels, class_weights)
    of_output = (output_of_mask == torch.arange(len(classes), device=labels.device)[:, None]).to(dice.dtype)
    return classes, of_output @ cross_entropy, of_output @ dice, weights


def criterion_losses_backward(
    grad_classes: Tensor,
    grad_cross_entropy: Tensor,
    grad_dice: Tensor,
    class_logits: Tensor,
    labels: Tensor,
    class_weights: Tensor,
    weights: Tensor,
    output_of_mask: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the class logits and of both losses of every mask."""
    scale = class_weights[labels] * (grad_classes / weights)[:, None]
    gradient = (class_logits.softmax(-1) - F.one_hot(labels, class_logits.shape[2])) * scale[..., None]
    return gradient, grad_cross_entropy[output_of_mask], grad_dice[output_of_mask]


@torch.library.register_fake("m2f::matching_costs", lib=LIBRARY)
def _(class_logits: Tensor, labels: list[Tensor], *_: Any) -> Tensor:
    outputs, _n, queries, _c = class_logits.shape
    return class_logits.new_empty(sum(len(x) for x in labels) * (outputs * queries + 1))


@torch.library.register_fake("m2f::criterion_losses", lib=LIBRARY)
def _(class_logits: Tensor, labels: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(class_logits.new_empty(labels.shape[0]) for _ in range(4))


@torch.library.register_fake("m2f::criterion_losses_backward", lib=LIBRARY)
def _(grad_classes: Tensor, _a: Tensor, _b: Tensor, class_logits: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    masks = rest[-1].shape
    return torch.empty_like(class_logits), class_logits.new_empty(masks), class_logits.new_empty(masks)


def _setup(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    class_logits, labels, class_weights, _, _, output_of_mask = inputs
    ctx.mark_non_differentiable(output[3])
    ctx.set_materialize_grads(False)  # one would be that of the weights
    ctx.save_for_backward(class_logits, labels, class_weights, output[3], output_of_mask)


def _vjp(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    weights = ctx.saved_tensors[3]
    given = [torch.zeros_like(weights) if x is None else x for x in grads[:3]]
    logits, cross_entropy, dice = torch.ops.m2f.criterion_losses_backward(*given, *ctx.saved_tensors)
    return logits, None, None, cross_entropy, dice, None


register_autograd("criterion_losses", "the losses of a criterion", _vjp, _setup)
