"""Matching cost and point loss of masks: schemas, checks, fake kernels, autograd."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from m2f_kernels import dispatch, run_lengths
from m2f_kernels._checks import check_indices, check_same_device, check_shape, describe, readable
from m2f_kernels._dtypes import accumulation_dtype, without_autocast
from m2f_kernels._library import LIBRARY
from m2f_kernels.masks import FactoredMasks, InstanceMap, RunLengths, Targets, listed
from m2f_kernels.ops._autograd import call, differentiable_once, register_autograd, register_vmap
from m2f_kernels.ops.points import bookkeeping, factored, fallback, reference
from m2f_kernels.ops.points.masks import CHUNK_BYTES, MaskRows, multiply, select_rows
from m2f_kernels.ops.points.sampling import (
    check_masks,
    check_pixels,
    check_points,
    draw_seed,
    point_counts,
    points_of_planes,
    sample,
    sample_targets,
)

__all__ = ["Matches", "mask_matching_cost", "point_mask_loss"]

#: For each image the matched queries and their targets, int64 [M_i] both.
Matches = Sequence[tuple[Tensor, Tensor]]

# ---------------------------------------------------------------- schemas
# Targets are a list over images of [T_i, H_i, W_i], or what `masks.listed` makes of a map of ids or of run lengths;
# `target_rows` counts over all of them. The probability and
# label at each point are outputs so that backward needs neither masks nor targets.

_TAGS = (torch.Tag.pt2_compliant_tag,)
LIBRARY.define("mask_matching_cost(Tensor logits, Tensor labels) -> (Tensor, Tensor)", tags=_TAGS)
LIBRARY.define(
    "point_mask_loss(Tensor mask_logits, Tensor rows, Tensor[] targets, Tensor target_rows, Tensor points) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
LIBRARY.define(
    "point_mask_loss_backward(Tensor grad_cross_entropy, Tensor grad_dice, Tensor rows, Tensor points, "
    "Tensor probability, Tensor labels, SymInt planes, SymInt height, SymInt width) -> Tensor",
    tags=_TAGS,
)
# With a seed the points are drawn where the masks are uncertain, chunk by chunk, and returned; without, they are given.
LIBRARY.define(
    "factored_point_mask_loss(Tensor mask_embed, Tensor mask_features, Tensor rows, SymInt[] counts, Tensor[] targets, "
    "Tensor target_rows, Tensor? points, Tensor? seed, SymInt candidates, SymInt keep, SymInt fresh) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
LIBRARY.define(
    "factored_point_mask_loss_backward(Tensor grad_cross_entropy, Tensor grad_dice, Tensor mask_embed, "
    "Tensor mask_features, Tensor rows, SymInt[] counts, Tensor points, Tensor probability, Tensor labels) "
    "-> (Tensor, Tensor)",
    tags=_TAGS,
)
#: Targets of one image, as users pass them; the last form is pycocotools'.
Given = Tensor | InstanceMap | RunLengths | Sequence[Mapping[str, Any]]

#: Sampled logits of the matching cost exist a block of queries at a time, of about this many bytes.
_BLOCK_BYTES = 8 * 2**20


# ---------------------------------------------------------------- public functions


def mask_matching_cost(
    mask_logits: Tensor | FactoredMasks, target_masks: Tensor | Sequence[Given], points: Tensor
) -> tuple[Any, Any]:
    """Matching costs of each query and target: cross-entropy and dice over K points (Cheng et al. 2022, section 3.3).

    With x the sampled logits and t the sampled targets, `(sum_k softplus(x) - x t^T) / K`, which is the mean binary
    cross-entropy, and `1 - (2 sigmoid(x) t^T + 1) / (sum_k sigmoid(x) + sum_k t + 1)`. For factored masks the features
    are sampled and multiplied, and no mask is materialised. Not differentiable; float32 also under autocast.

    Args:
        mask_logits: [N, Q, h, w], or factored masks. float64, float32, bfloat16 or float16.
        target_masks: [N, T, H, W], or a list over images of [T_i, H_i, W_i], of any sizes and counts. bool, uint8
            (any value but 0 is foreground) or floating point with values in [0, 1]; read in place. Of an image also an
            :class:`InstanceMap`, :class:`RunLengths`, or COCO's run lengths as `pycocotools` has them.
        points: [N, K, 2], (x, y) in [0, 1], shared by all queries and targets of an image. float64 or float32.

    Returns:
        `(cross_entropy, dice)`, each [N, Q, T]; for a list of targets each a list of [Q, T_i]. float32 (float64 for
        float64 masks).

    Raises:
        ValueError, TypeError: bad input; the message names the argument, what was expected and what came.
    """
    check_masks("mask_logits", mask_logits)
    if isinstance(mask_logits, Tensor) and mask_logits.dim() != 4:
        raise ValueError(f"mask_logits: expected [N, Q, h, w] or factored masks; got {describe(mask_logits)}")
    first = mask_logits.mask_embed if isinstance(mask_logits, FactoredMasks) else mask_logits
    n = first.shape[0]
    targets = check_targets("target_masks", target_masks, n, first)
    check_points("points", points, "[N, K, 2]", (n,))
    check_same_device("points", points, "mask_logits", first)
    with torch.no_grad():
        pairs = [
            cost_of_image(mask_logits, i, points[i], sample_targets(targets[i], points[i], first.dtype))
            for i in range(n)
        ]
    cross_entropy, dice = [cross_entropy for cross_entropy, _ in pairs], [dice for _, dice in pairs]
    if isinstance(target_masks, Tensor):
        empty = first.new_zeros(0, *first.shape[1:2], target_masks.shape[1], dtype=accumulation_dtype(first.dtype))
        return (torch.stack(cross_entropy), torch.stack(dice)) if n else (empty, empty)
    return cross_entropy, dice


def point_mask_loss(
    mask_logits: Tensor | FactoredMasks,
    target_masks: Tensor | Sequence[Given],
    points: Tensor,
    *,
    matches: Matches | None = None,
) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy and dice loss of pairs of masks, each at its own points (Cheng et al. 2022, section 3.3).

    Sampling, both losses and their gradients are fused. Factored masks are multiplied out a bounded chunk at a time,
    forward and backward; their full logits never exist, nor does a gradient of that size.

    Args:
        mask_logits: [N, Q, h, w], factored masks, or [M, h, w], which counts as one image. float64, float32, bfloat16
            or float16.
        target_masks: a list over images of [T_i, H_i, W_i], or a tensor: [N, T, H, W], or [M, H, W] with [M, h, w].
            bool, uint8 (any value but 0 is foreground) or floating point with values in [0, 1]; read in place. Of an
            image also an :class:`InstanceMap`, :class:`RunLengths`, or COCO's run lengths as `pycocotools` has them.
        points: [M, K, 2], (x, y) in [0, 1], in order of images and then of matches. float64 or float32.
        matches: for each image the queries and their targets, int64 [M_i] both; None gives query j to target j.

    Returns:
        `(cross_entropy, dice)`, each [M]: the mean over points, and `1 - (2 sum(s t) + 1) / (sum(s) + sum(t) + 1)` with
        s = sigmoid. float32 (float64 for float64 masks). Differentiable once in the masks; bitwise deterministic.

    Raises:
        ValueError, TypeError: bad input; the message names the argument, what was expected and what came.
    """
    check_masks("mask_logits", mask_logits)
    masks, targets, target_rows = pair_up(mask_logits, target_masks, matches)
    check_points("points", points, "[M, K, 2]", (masks.rows.shape[0],))
    check_same_device("points", points, "mask_logits", masks.rows)
    if isinstance(mask_logits, FactoredMasks):
        return factored_loss(masks, targets, target_rows, points, None, (0, 0, 0))
    return loss_of_planes(masks.planes, masks.rows, targets, target_rows, points, masks.counts)


def uncertain_point_mask_loss(
    mask_logits: Tensor | FactoredMasks,
    target_masks: Tensor | Sequence[Given],
    matches: Matches | None = None,
    num_points: int = 12544,
    oversample_ratio: float = 3.0,
    importance_sample_ratio: float = 0.75,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`point_mask_loss` at :func:`uncertain_points`; factored masks are multiplied only once for both."""
    check_masks("mask_logits", mask_logits)
    counts = point_counts(num_points, oversample_ratio, importance_sample_ratio)
    masks, targets, target_rows = pair_up(mask_logits, target_masks, matches)
    return uncertain_loss(masks, targets, target_rows, counts, generator)


# ---------------------------------------------------------------- parts, without checks


def uncertain_loss(
    masks: MaskRows,
    targets: list[Targets],
    target_rows: Tensor,
    counts: tuple[int, int, int],
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """Both losses [M] at points drawn where the masks are uncertain; `counts` are those of :func:`point_counts`."""
    seed = draw_seed(masks.device, generator)
    if isinstance(masks.masks, FactoredMasks):
        return factored_loss(masks, targets, target_rows, None, seed, counts)
    with torch.no_grad():
        points = points_of_planes(masks.planes.detach(), masks.rows, seed, 0, *counts)
    return loss_of_planes(masks.planes, masks.rows, targets, target_rows, points, masks.counts)


def cost_of_image(masks: Tensor | FactoredMasks, image: int, points: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Both costs [Q, T] of one image's masks and of labels [T, K], sampled at the same points [K, 2]."""
    blocks = costs_of_image(masks, image, points, labels)
    return torch.cat([cross_entropy for cross_entropy, _ in blocks]), torch.cat([dice for _, dice in blocks])


def costs_of_image(
    masks: Tensor | FactoredMasks, image: int, points: Tensor, labels: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """The same in blocks of queries."""
    if isinstance(masks, Tensor):
        return [cost_of_samples(sample(masks[image : image + 1], points[None], exact=True)[0], labels)]
    samples = sample(masks.mask_features[image : image + 1], points[None], exact=True)[0]
    # The backward pass takes as much for the gradient of the features.
    return cost_of_sampled_features(masks.mask_embed[image], samples, labels, 4 * masks.mask_features.numel())


def cost_of_sampled_features(
    embed: Tensor, samples: Tensor, labels: Tensor, free: int = 0
) -> list[tuple[Tensor, Tensor]]:
    """The same from embeddings [Q, C] and features [C, K] sampled at the points; a block of queries at a time, of at
    most `free` bytes or what a chunk of masks may take."""
    dtype = accumulation_dtype(embed.dtype)
    embed, samples = embed.to(dtype), samples.to(dtype)  # float64 points make the reference's samples float64
    k = samples.shape[1]
    # On a CPU a block stays in the cache; on other devices blocks cost launches.
    bound = _BLOCK_BYTES if embed.device.type == "cpu" else max(CHUNK_BYTES, free)
    parts = -(-embed.shape[0] * k * dtype.itemsize // bound)
    blocks = embed.tensor_split(max(1, parts))
    buffer = embed.new_empty(blocks[0].shape[0], k)
    return [cost_of_samples(multiply(rows, samples, out=buffer[: rows.shape[0]]), labels) for rows in blocks]


def cost_of_samples(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    with without_autocast(logits.device):
        if (plain := dispatch.plain("mask_matching_cost", logits)) is not None:
            module = fallback if plain == "fallback" else reference
            return module.mask_matching_cost(logits, labels)
        cross_entropy, dice = torch.ops.m2f.mask_matching_cost(logits, labels.to(logits.dtype))
        return cross_entropy, dice


def loss_of_planes(
    mask_logits: Tensor, rows: Tensor, targets: list[Targets], target_rows: Tensor, points: Tensor, counts: list[int]
) -> tuple[Tensor, Tensor]:
    plain = dispatch.plain("point_mask_loss", mask_logits)
    if plain == "fallback":
        return fallback.point_mask_loss(mask_logits, rows, targets, target_rows, points, counts)
    if plain is not None:
        return reference.point_mask_loss(mask_logits, rows, listed(targets), target_rows, points)[:2]
    cross_entropy, dice, *_ = call("point_mask_loss", mask_logits, rows, listed(targets), target_rows, points.float())
    return cross_entropy, dice


def factored_loss(
    masks: MaskRows,
    targets: list[Targets],
    target_rows: Tensor,
    points: Tensor | None,
    seed: Tensor | None,
    counts: tuple[int, int, int],
) -> tuple[Tensor, Tensor]:
    assert isinstance(masks.masks, FactoredMasks)
    embed, features = masks.masks
    plain = dispatch.plain("point_mask_loss", embed)
    if plain == "fallback":
        planes = fallback.matched_planes(masks.masks, masks.rows, masks.counts)
        rows = torch.arange(len(planes), device=planes.device)
        if points is None:
            assert seed is not None
            with torch.no_grad():
                points = points_of_planes(planes.detach(), rows, seed, 0, *counts)
        return fallback.point_mask_loss(planes, None, targets, target_rows, points, masks.counts)
    if plain is not None:
        with without_autocast(embed.device):
            dtype = accumulation_dtype(embed.dtype)
            planes = FactoredMasks(embed.to(dtype), features.to(dtype)).logits().flatten(0, 1)
        if points is None:
            assert seed is not None
            points = reference.uncertain_points(planes.detach(), masks.rows, seed, 0, *counts)
        return reference.point_mask_loss(planes, masks.rows, listed(targets), target_rows, points)[:2]
    cross_entropy, dice, *_ = call(
        "factored_point_mask_loss",
        *(embed, features, masks.rows, masks.counts, listed(targets), target_rows),
        *(None if points is None else points.float(), seed, *counts),
    )
    return cross_entropy, dice


# ---------------------------------------------------------------- checks


def check_targets(name: str, targets: object, images: int, masks: Tensor) -> list[Targets]:
    """The checked targets of every image; a tensor [N, T, H, W] becomes a list of views."""
    if isinstance(targets, Tensor):
        check_pixels(name, targets, "[N, T, H, W]")
        if targets.shape[0] != images:
            raise ValueError(f"{name}: expected [N, T, H, W] with N = {images}; got {describe(targets)}")
        found = [Targets(x) for x in targets.unbind()]
    elif isinstance(targets, Sequence) and not isinstance(targets, (str, InstanceMap, RunLengths)):
        if len(targets) != images:
            raise ValueError(f"{name}: expected {images} tensors [T, H, W], one per image; got {len(targets)}")
        found = [_targets_of(f"{name}[{i}]", x, masks) for i, x in enumerate(targets)]
    else:
        raise TypeError(f"{name}: expected a tensor, or one tensor [T, H, W] per image; got {describe(targets)}")
    for i, (x, _) in enumerate(found):
        check_same_device(f"{name}[{i}]", x, "mask_logits", masks)
        if x.requires_grad:
            raise ValueError(f"{name}[{i}]: expected targets without a gradient; got one that requires it")
    return found


def _targets_of(name: str, target: object, masks: Tensor) -> Targets:
    """The targets of one image, after checking them."""
    if isinstance(target, InstanceMap):
        return _targets_of_map(name, target, masks)
    if isinstance(target, (list, tuple)) and not isinstance(target, RunLengths) and _all_mappings(target):
        # The size of no targets does not matter.
        target = RunLengths.from_coco(target, None if target else (1, 1), name).to(masks.device)
    if isinstance(target, RunLengths):
        return _targets_of_runs(name, target, masks)
    return Targets(check_pixels(name, target, "[T, H, W]"))


def _all_mappings(target: Sequence[object]) -> bool:
    return all(isinstance(x, Mapping) for x in target)


def _targets_of_map(name: str, target: InstanceMap, masks: Tensor) -> Targets:
    id_map, ids = target
    kinds = (torch.int64, torch.int32, torch.int16, torch.uint8)
    for field, x, layout, rank in (("id_map", id_map, "[H, W]", 2), ("ids", ids, "[T]", 1)):
        if not isinstance(x, Tensor) or x.dtype not in kinds:
            raise TypeError(f"{name}.{field}: expected int64, int32, int16 or uint8 {layout}; got {describe(x)}")
        if x.dim() != rank:
            raise ValueError(f"{name}.{field}: expected {layout}; got {describe(x)}")
        check_same_device(f"{name}.{field}", x, "mask_logits", masks)
    if not id_map.numel():
        raise ValueError(f"{name}.id_map: expected at least one pixel in [H, W]; got {describe(id_map)}")
    if readable(ids) and len(ids.unique()) != len(ids):
        raise ValueError(f"{name}.ids: expected different ids; got {ids.tolist()}")
    return Targets(id_map.contiguous().expand(len(ids), -1, -1), ids.long().contiguous())


def _targets_of_runs(name: str, target: RunLengths, masks: Tensor) -> Targets:
    runs, count, height, width = target
    if not isinstance(runs, Tensor) or runs.dtype != torch.int32 or runs.dim() != 1:
        raise TypeError(f"{name}.runs: expected int32, as RunLengths.from_coco makes it; got {describe(runs)}")
    check_same_device(f"{name}.runs", runs, "mask_logits", masks)
    if len(runs) < count + 2 + 2 * count or height < 1 or width < 1 or height * width >= 2**31:
        raise ValueError(f"{name}: expected run lengths of {count} targets of {height} x {width}; got {describe(runs)}")
    if readable(runs):
        problem = run_lengths.problem(*target)
        if problem is not None:
            raise ValueError(f"{name}.runs: expected {problem}; make it with RunLengths.from_coco or from_masks")
    # A tensor for its shape only: the kernels read the runs.
    return Targets(runs.new_empty(1, dtype=torch.bool).expand(count, height, width), runs.contiguous())


def pair_up(
    mask_logits: Tensor | FactoredMasks, target_masks: Tensor | Sequence[Given], matches: Matches | None
) -> tuple[MaskRows, list[Targets], Tensor]:
    """The masks that have a target, the targets of each image, and the row [M] of each mask's target among all."""
    flat = isinstance(mask_logits, Tensor) and mask_logits.dim() == 3
    if flat and isinstance(target_masks, Tensor):
        check_pixels("target_masks", target_masks, "[M, H, W]")
        target_masks = target_masks[None]
    first = mask_logits.mask_embed if isinstance(mask_logits, FactoredMasks) else mask_logits
    n, q = (1, first.shape[0]) if flat else first.shape[:2]
    targets = check_targets("target_masks", target_masks, n, first)
    if matches is None:
        for i, x in enumerate(targets):
            if x.pixels.shape[0] != q:
                raise ValueError(
                    f"target_masks[{i}]: expected {q} targets, one per query, where matches is None; "
                    f"got {describe(x.pixels)}"
                )
        masks = select_rows(mask_logits, None)
        return masks, targets, masks.rows
    if not isinstance(matches, Sequence) or not all(isinstance(x, (tuple, list)) and len(x) == 2 for x in matches):
        raise TypeError(f"matches: expected {n} pairs of int64 tensors [M], one per image; got {describe(matches)}")
    if len(matches) != n:
        raise ValueError(f"matches: expected {n} pairs of index tensors, one per image; got {len(matches)}")
    rows, first_row = [], 0
    for i, (queries, chosen) in enumerate(matches):
        check_indices(f"matches[{i}]", queries, first.device)
        check_indices(f"matches[{i}]", chosen, first.device)
        check_shape(f"matches[{i}]", chosen, "[M] of the targets, like that of the queries,", queries.shape)
        count = targets[i].pixels.shape[0]
        if readable(chosen) and chosen.numel() and not 0 <= int(chosen.min()) <= int(chosen.max()) < count:
            raise ValueError(f"matches[{i}]: expected targets from 0 to {count - 1}; got {chosen.tolist()}")
        rows.append(chosen + first_row)
        first_row += count
    masks = select_rows(mask_logits, [queries for queries, _ in matches], "matches")
    target_rows = torch.cat(rows) if rows else masks.rows
    return masks, targets, target_rows.to(masks.device, non_blocking=True)


# ---------------------------------------------------------------- implementations


def _plain(
    op: str, reference_function: Callable[..., Any], fallback_function: Callable[..., Any]
) -> Callable[..., Any]:
    """The registered operator where no kernel serves: the fallback, or the reference where that is chosen."""

    @torch.no_grad()
    def function(*args: Any) -> Any:
        return (reference_function if dispatch.plain(op, args[0]) == "reference" else fallback_function)(*args)

    return function


_TRITON = "m2f_kernels.ops.points.triton_loss"
dispatch.register(
    dispatch.Operator("mask_matching_cost", triton=_TRITON),
    {
        "mask_matching_cost": _plain("mask_matching_cost", reference.mask_matching_cost, fallback.mask_matching_cost),
        "matching_costs": bookkeeping.matching_costs,
    },
)
dispatch.register(
    dispatch.Operator("point_mask_loss", triton=_TRITON),
    {
        "point_mask_loss": _plain("point_mask_loss", reference.point_mask_loss, fallback.loss_operator),
        "point_mask_loss_backward": _plain(
            "point_mask_loss", reference.point_mask_loss_backward, fallback.loss_operator_backward
        ),
        # Loops over chunks that call the operators; Triton's do the common work of all chunks once.
        "criterion_losses": torch.no_grad()(bookkeeping.criterion_losses),
        "criterion_losses_backward": torch.no_grad()(bookkeeping.criterion_losses_backward),
        "factored_point_mask_loss": factored.forward,
        "factored_point_mask_loss_backward": factored.backward,
    },
)


# ---------------------------------------------------------------- fake kernels


def _fake_losses(like: Tensor, masks: int, points: int) -> tuple[Tensor, ...]:
    dtype = accumulation_dtype(like.dtype)
    return tuple(like.new_empty(size, dtype=dtype) for size in [(masks,)] * 2 + [(masks, points)] * 2)


@torch.library.register_fake("m2f::mask_matching_cost", lib=LIBRARY)
def _(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    dtype = accumulation_dtype(logits.dtype)
    return tuple(logits.new_empty(logits.shape[0], labels.shape[0], dtype=dtype) for _ in range(2))


@torch.library.register_fake("m2f::point_mask_loss", lib=LIBRARY)
def _(mask_logits: Tensor, rows: Tensor, targets: list[Tensor], target_rows: Tensor, points: Tensor) -> Any:
    return _fake_losses(mask_logits, *points.shape[:2])


@torch.library.register_fake("m2f::point_mask_loss_backward", lib=LIBRARY)
def _(grad_cross_entropy: Tensor, *rest: Any) -> Tensor:
    return grad_cross_entropy.new_empty(rest[-3:])


@torch.library.register_fake("m2f::factored_point_mask_loss", lib=LIBRARY)
def _(mask_embed: Tensor, mask_features: Tensor, rows: Tensor, *rest: Any) -> Any:
    points, keep, fresh = rest[3], rest[-2], rest[-1]
    count = points.shape[1] if points is not None else keep + fresh
    drawn = mask_embed.new_empty((rows.shape[0], count, 2) if points is None else (0,), dtype=torch.float32)
    cross_entropy, dice, probability, labels = _fake_losses(mask_embed, rows.shape[0], count)
    return cross_entropy, dice, drawn, probability, labels


@torch.library.register_fake("m2f::factored_point_mask_loss_backward", lib=LIBRARY)
def _(grad_cross_entropy: Tensor, grad_dice: Tensor, mask_embed: Tensor, mask_features: Tensor, *rest: Any) -> Any:
    return mask_embed.new_empty(mask_embed.shape), mask_features.new_empty(mask_features.shape)


# ---------------------------------------------------------------- autograd

_TITLE = "the point loss of masks"


def _setup_planes(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    mask_logits, rows, targets, _, points = inputs
    ctx.mark_non_differentiable(*output[2:])
    # Zeros for the outputs that only backward reads would take as much memory as those.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(rows, points, *output[2:])
    ctx.size, ctx.dtype, ctx.images = mask_logits.shape, mask_logits.dtype, len(targets)


def _both(labels: Tensor, grad_cross_entropy: Tensor | None, grad_dice: Tensor | None) -> tuple[Tensor, Tensor]:
    """Zeros for the gradient of a loss that was not used; `labels` are [M, K]."""
    given = grad_cross_entropy, grad_dice
    first, second = (labels.new_zeros(labels.shape[:1]) if x is None else x for x in given)
    return first, second


def _planes_vjp(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    grad_cross_entropy, grad_dice = _both(saved[-1], *grads[:2])
    gradient = torch.ops.m2f.point_mask_loss_backward(grad_cross_entropy, grad_dice, *saved, *ctx.size)
    gradients = differentiable_once(_TITLE, (gradient.to(ctx.dtype),), [grad_cross_entropy, grad_dice])
    return *gradients, None, [None] * ctx.images, None, None


def _setup_factored(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    mask_embed, mask_features, rows, ctx.counts, targets, _, points, *_ = inputs
    ctx.images = len(targets)
    ctx.mark_non_differentiable(*output[2:])
    # Zeros for the outputs that only backward reads would take as much memory as those.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(mask_embed, mask_features, rows, output[2] if points is None else points, *output[3:])


def _factored_vjp(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    embed, features, rows, *saved = ctx.saved_tensors
    grad_cross_entropy, grad_dice = _both(saved[-1], *grads[:2])
    gradients = torch.ops.m2f.factored_point_mask_loss_backward(
        grad_cross_entropy, grad_dice, embed, features, rows, ctx.counts, *saved
    )
    sources = [grad_cross_entropy, grad_dice, embed, features]
    grad_embed, grad_features = differentiable_once(_TITLE, gradients, sources)
    needs = ctx.needs_input_grad
    return (
        grad_embed if needs[0] else None,
        grad_features if needs[1] else None,
        None,
        None if ctx.counts else [],
        [None] * ctx.images,
        *[None] * 6,
    )


register_autograd("point_mask_loss", _TITLE, _planes_vjp, _setup_planes)
register_autograd("factored_point_mask_loss", _TITLE, _factored_vjp, _setup_factored)
for _name in ("mask_matching_cost", "point_mask_loss", "factored_point_mask_loss"):
    register_vmap(_name)
for _name in ("point_mask_loss_backward", "factored_point_mask_loss_backward"):
    register_vmap(_name)
