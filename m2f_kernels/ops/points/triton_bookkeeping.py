"""Triton kernels of `bookkeeping.py`, and the gradient of rows that were chosen. Sums are always in the same order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from m2f_kernels._triton import launch, narrow
from m2f_kernels.ops.points.bookkeeping import LEAST_WEIGHT

_LEAST_WEIGHT = tl.constexpr(LEAST_WEIGHT)
#: Class logits that a program holds at once.
_ELEMENTS = 2048


@triton.jit
def _softmax_of_rows(logits_ptr, row, inside, num_classes, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """The largest logit of each row, and the sum of exponentials above it; NaN where a logit is NaN."""
    largest = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    for start in range(0, num_classes, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        read = inside[:, None] & (c < num_classes)[None, :]
        x = tl.load(logits_ptr + row[:, None] * num_classes + c[None, :], mask=read, other=float("-inf"))
        largest = tl.maximum(largest, tl.max(x, axis=1))
    largest = tl.where(inside, largest, 0.0)
    total = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, num_classes, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        read = inside[:, None] & (c < num_classes)[None, :]
        x = tl.load(logits_ptr + row[:, None] * num_classes + c[None, :], mask=read, other=float("-inf"))
        total += tl.sum(tl.exp(x - largest[:, None]), axis=1)
    return largest, tl.where(inside, total, 1.0)


def _blocks(classes: int) -> dict[str, int]:
    block = min(triton.next_power_of_2(classes), _ELEMENTS)
    return {"BLOCK_C": block, "BLOCK_R": max(_ELEMENTS // block, 1)}


# ---------------------------------------------------------------- costs


@triton.jit(do_not_specialize=["first", "lines", "num_queries", "image", "images", "num_targets", "num_classes"])
def _matching_costs_kernel(
    logits_ptr, labels_ptr, cross_entropy_ptr, dice_ptr, costs_ptr, sent_labels_ptr, first, lines, num_queries, image,
    images, num_targets, num_classes, cost_class, cost_mask, cost_dice,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One program: the costs of BLOCK_R queries and BLOCK_T targets of one image. Queries are numbered over outputs;
    this block of them begins at `first`."""
    line = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = line < lines
    number = first + line
    row = ((number // num_queries) * images + image) * num_queries + number % num_queries
    row = tl.where(inside, row, 0).to(tl.int64)
    largest, total = _softmax_of_rows(logits_ptr, row, inside, num_classes, BLOCK_R, BLOCK_C)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    label = tl.load(labels_ptr + t, mask=t < num_targets, other=0)
    chosen = tl.minimum(tl.maximum(label, 0), num_classes - 2)
    both = inside[:, None] & (t < num_targets)[None, :]
    x = tl.load(logits_ptr + row[:, None] * num_classes + chosen[None, :], mask=both, other=0.0)
    probability = tl.exp(x - largest[:, None]) / total[:, None]
    pair = line.to(tl.int64)[:, None] * num_targets + t[None, :]
    masks = cost_mask * tl.load(cross_entropy_ptr + pair, mask=both, other=0.0)
    masks += cost_dice * tl.load(dice_ptr + pair, mask=both, other=0.0)
    to = costs_ptr + number.to(tl.int64)[:, None] * num_targets + t[None, :]
    tl.store(to, masks - cost_class * probability, mask=both)
    if (first == 0) & (tl.program_id(0) == 0):
        tl.store(sent_labels_ptr + t, label.to(tl.float32), mask=t < num_targets)


def matching_costs(
    class_logits: Tensor,
    labels: list[Tensor],
    cross_entropy: list[Tensor],
    dice: list[Tensor],
    cost_class: float,
    cost_mask: float,
    cost_dice: float,
) -> Tensor:
    """`m2f::matching_costs`: one launch for each block of queries."""
    outputs, images, queries, classes = class_logits.shape
    class_logits = class_logits.contiguous()
    lines = outputs * queries
    counts = [len(x) for x in labels]
    sent = class_logits.new_empty(sum(counts) * (lines + 1))
    blocks = iter(zip(cross_entropy, dice, strict=True))
    costs, ends = sent.split([sum(counts) * lines, sum(counts)])
    parts = zip(labels, costs.split([count * lines for count in counts]), ends.split(counts), strict=True)
    for image, (label, cost, end) in enumerate(parts):
        count, first = len(label), 0
        block = _blocks(classes) | {"BLOCK_T": min(max(triton.next_power_of_2(count), 16), 64)}
        if not lines:  # no kernel copies the labels
            end.copy_(label)
        while count and first < lines:
            one, two = next(blocks)
            grid = triton.cdiv(len(one), block["BLOCK_R"]), triton.cdiv(count, block["BLOCK_T"])
            launch(
                _matching_costs_kernel, grid, logits_ptr=class_logits, labels_ptr=label.contiguous(),
                cross_entropy_ptr=one.contiguous(), dice_ptr=two.contiguous(), costs_ptr=cost, sent_labels_ptr=end,
                first=first, lines=len(one), num_queries=queries, image=image, images=images, num_targets=count,
                num_classes=classes, cost_class=cost_class, cost_mask=cost_mask, cost_dice=cost_dice, **block,
            )  # fmt: skip
            first += len(one)
    return sent


# ---------------------------------------------------------------- losses


@triton.jit(do_not_specialize=["rows", "num_classes", "num_masks"])
def _losses_kernel(
    logits_ptr, labels_ptr, class_weights_ptr, cross_entropy_ptr, dice_ptr, output_of_mask_ptr, classes_ptr, masks_ptr,
    dices_ptr, weights_ptr, rows, num_classes, num_masks,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One program: the class loss of one output, and its sums over masks."""
    output = tl.program_id(0)
    loss = tl.zeros((BLOCK_R,), tl.float32)
    weight = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, rows, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        inside = r < rows
        row = (output * rows + r).to(tl.int64)
        label = tl.load(labels_ptr + row, mask=inside, other=0)
        largest, total = _softmax_of_rows(logits_ptr, row, inside, num_classes, BLOCK_R, BLOCK_C)
        x = tl.load(logits_ptr + row * num_classes + label, mask=inside, other=0.0)
        own = tl.load(class_weights_ptr + label, mask=inside, other=0.0)
        loss += tl.where(inside, own * (tl.log(total) - (x - largest)), 0.0)
        weight += own
    weight_sum = tl.maximum(tl.sum(weight, axis=0), _LEAST_WEIGHT)
    tl.store(classes_ptr + output, tl.sum(loss, axis=0) / weight_sum)
    tl.store(weights_ptr + output, weight_sum)
    first = tl.zeros((BLOCK_M,), tl.float32)
    second = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, num_masks, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        mine = tl.load(output_of_mask_ptr + m, mask=m < num_masks, other=-1) == output
        first += tl.load(cross_entropy_ptr + m, mask=mine, other=0.0)
        second += tl.load(dice_ptr + m, mask=mine, other=0.0)
    tl.store(masks_ptr + output, tl.sum(first, axis=0))
    tl.store(dices_ptr + output, tl.sum(second, axis=0))


def criterion_losses(
    class_logits: Tensor,
    labels: Tensor,
    class_weights: Tensor,
    cross_entropy: Tensor,
    dice: Tensor,
    output_of_mask: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`m2f::criterion_losses`."""
    (outputs, rows), classes = labels.shape, class_logits.shape[2]
    of_classes, of_masks, of_dices, weights = (class_logits.new_empty(outputs) for _ in range(4))
    launch(
        _losses_kernel, (outputs,), logits_ptr=class_logits.contiguous(), labels_ptr=labels.contiguous(),
        class_weights_ptr=class_weights.contiguous(), cross_entropy_ptr=cross_entropy.contiguous(),
        dice_ptr=dice.contiguous(), output_of_mask_ptr=output_of_mask.contiguous(), classes_ptr=of_classes,
        masks_ptr=of_masks, dices_ptr=of_dices, weights_ptr=weights, rows=rows, num_classes=classes,
        num_masks=len(dice), **_blocks(classes), BLOCK_M=256, num_warps=8,
    )  # fmt: skip
    return of_classes, of_masks, of_dices, weights


@triton.jit(do_not_specialize=["row_blocks", "all_rows", "rows", "num_classes", "num_masks"])
def _losses_backward_kernel(
    grad_classes_ptr, grad_masks_ptr, grad_dices_ptr, logits_ptr, labels_ptr, class_weights_ptr, weights_ptr,
    output_of_mask_ptr, grad_logits_ptr, grad_cross_entropy_ptr, grad_dice_ptr, row_blocks, all_rows, rows, num_classes,
    num_masks, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One program: the gradient of BLOCK_R rows of class logits, or after those of the losses of BLOCK_M masks."""
    block = tl.program_id(0)
    if block < row_blocks:
        r = block * BLOCK_R + tl.arange(0, BLOCK_R)
        inside = r < all_rows
        row = r.to(tl.int64)
        largest, total = _softmax_of_rows(logits_ptr, row, inside, num_classes, BLOCK_R, BLOCK_C)
        label = tl.load(labels_ptr + row, mask=inside, other=0)
        output = r // rows
        scale = tl.load(grad_classes_ptr + output, mask=inside, other=0.0) * tl.load(class_weights_ptr + label)
        scale /= tl.load(weights_ptr + output, mask=inside, other=1.0)
        for start in range(0, num_classes, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            both = inside[:, None] & (c < num_classes)[None, :]
            at = row[:, None] * num_classes + c[None, :]
            x = tl.load(logits_ptr + at, mask=both, other=0.0)
            gradient = tl.exp(x - largest[:, None]) / total[:, None]
            gradient -= tl.where(c[None, :] == label[:, None], 1.0, 0.0)
            tl.store(grad_logits_ptr + at, gradient * scale[:, None], mask=both)
    else:
        m = (block - row_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
        own = tl.load(output_of_mask_ptr + m, mask=m < num_masks, other=0)
        tl.store(grad_cross_entropy_ptr + m, tl.load(grad_masks_ptr + own), mask=m < num_masks)
        tl.store(grad_dice_ptr + m, tl.load(grad_dices_ptr + own), mask=m < num_masks)


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
    """`m2f::criterion_losses_backward`."""
    class_logits, labels = class_logits.contiguous(), labels.contiguous()
    gradient = torch.empty_like(class_logits)
    of_cross_entropy, of_dice = (class_logits.new_empty(len(output_of_mask)) for _ in range(2))
    block = _blocks(class_logits.shape[2]) | {"BLOCK_M": 256}
    row_blocks = triton.cdiv(labels.numel(), block["BLOCK_R"])
    blocks = row_blocks + triton.cdiv(len(output_of_mask), block["BLOCK_M"])
    if blocks:
        launch(
            _losses_backward_kernel, (blocks,), grad_classes_ptr=grad_classes.contiguous(),
            grad_masks_ptr=grad_cross_entropy.contiguous(), grad_dices_ptr=grad_dice.contiguous(),
            logits_ptr=class_logits, labels_ptr=labels, class_weights_ptr=class_weights.contiguous(),
            weights_ptr=weights, output_of_mask_ptr=output_of_mask.contiguous(), grad_logits_ptr=gradient,
            grad_cross_entropy_ptr=of_cross_entropy, grad_dice_ptr=of_dice, row_blocks=row_blocks,
            all_rows=labels.numel(), rows=labels.shape[1], num_classes=class_logits.shape[2],
            num_masks=len(output_of_mask), **block,
        )  # fmt: skip
    return gradient, of_cross_entropy, of_dice


# ---------------------------------------------------------------- chosen rows


@triton.jit(do_not_specialize=["num_chosen", "channels"])
def _rows_backward_kernel(
    grad_ptr, rows_ptr, out_ptr, num_chosen, channels, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """One program: BLOCK_C channels of one row's gradient, the sum over all places that it was chosen for, in order."""
    row = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, num_chosen, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        mine = tl.load(rows_ptr + m, mask=m < num_chosen, other=-1) == row
        before = start - 1
        for _ in range(tl.sum(mine.to(tl.int32), axis=0)):
            before = tl.min(tl.where(mine & (m > before), m, 0x7FFFFFFF), axis=0)
            total += tl.load(grad_ptr + before.to(tl.int64) * channels + c, mask=c < channels, other=0.0)
    tl.store(out_ptr + row.to(tl.int64) * channels + c, narrow(total, out_ptr.dtype.element_ty), mask=c < channels)


def rows_backward(grad: Tensor, rows: Tensor, out: Tensor) -> None:
    """Writes the gradient of x [R, C] into `out`, where `grad` [M, C] is that of x[rows]."""
    block = min(triton.next_power_of_2(out.shape[1]), 256)
    grid = out.shape[0], triton.cdiv(out.shape[1], block)
    launch(
        _rows_backward_kernel, grid, grad_ptr=grad, rows_ptr=rows, out_ptr=out, num_chosen=len(rows),
        channels=out.shape[1], BLOCK_M=256, BLOCK_C=block,
    )  # fmt: skip
