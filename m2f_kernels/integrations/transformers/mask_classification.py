"""Code shared by Mask2Former and OneFormer of `transformers`: masked attention and the losses."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from m2f_kernels import dispatch
from m2f_kernels._dtypes import without_autocast
from m2f_kernels.constants import ConstantCache
from m2f_kernels.integrations.transformers._swap import (
    Mixin,
    changed_methods,
    plan,
    qualified_name,
    reaches,
    watched,
)
from m2f_kernels.masks import FactoredMasks, InstanceMap, PackedMask, RunLengths
from m2f_kernels.masks import Targets as TargetMasks
from m2f_kernels.nn.hungarian_matcher import HungarianMatcher
from m2f_kernels.nn.point_mask_criterion import PointMaskCriterion, apart
from m2f_kernels.nn.predictions import Batch, Group, Targets, read_batch
from m2f_kernels.ops.masked_attention import masked_attention
from m2f_kernels.ops.points import Given, check_targets

#: Masks of one decoder output: factored, or logits [N, Q, h, w] where something needed them.
Masks = Tensor | FactoredMasks

#: The replaced parts, in words for the report.
ATTENTION = "masked attention from a packed mask, scores never written"
MASKS = "attention masks from resized features, one product for keys and values of the layers that share a level"
#: The reason why a decoder runs the original code in training.
DROPPED = "attention weights or activations are dropped out in training"
LOSSES = "matching and losses from factored masks at sampled points"
MATCHING = "matching at sampled points, all costs of an image in one operator"


def logits_of(masks: Masks) -> Tensor:
    """[N, Q, h, w], whatever `masks` is."""
    return masks.logits() if isinstance(masks, FactoredMasks) else masks


def dense_masks(mask_labels: Iterable[Given], device: torch.device) -> list[Tensor]:
    """For each image [T, H, W] as the original losses take it."""
    return [_dense(f"mask_labels[{i}]", masks, device) for i, masks in enumerate(mask_labels)]


def _dense(name: str, masks: Given, device: torch.device) -> Tensor:
    if isinstance(masks, Tensor):
        return masks
    if not isinstance(masks, (InstanceMap, RunLengths)):
        masks = RunLengths.from_coco(masks, None if masks else (1, 1), name)
    return masks.to(device).masks().float()


# ---------------------------------------------------------------- cross-attention with weights of nn.MultiheadAttention


def attention_problem(attention: nn.Module, gathered: bool = True) -> str | None:
    """The reason why an attention module cannot be computed from its weights alone, or None.

    Args:
        gathered: False if its weights are gathered only when the layer around it runs.
    """
    # By name: torch.export traces with classes derived from it that bear its name.
    if (name := qualified_name(type(attention))) != qualified_name(nn.MultiheadAttention):
        return f"its attention is {name}, not torch.nn.MultiheadAttention"
    assert isinstance(attention, nn.MultiheadAttention)
    weight, channels = attention.in_proj_weight, attention.embed_dim
    if attention.batch_first or attention.bias_k is not None or attention.add_zero_attn:
        return "its attention has batch_first, add_bias_kv or add_zero_attn"
    # Anything else is a shard of the parameter, which only the module's own call would gather.
    sharded = gathered and hasattr(weight, "to_local")
    if weight is None or tuple(weight.shape) != (3 * channels, channels) or sharded:
        return "its attention's projections are sharded or of different sizes"
    if watched(attention) or "forward" in vars(attention):
        return "its attention has hooks, which are only served by calling it"
    return None


def gathers(*modules: nn.Module) -> bool:
    """True if one of these modules gathers its parameters when it is called, and may free them afterwards (FSDP2).

    Before its call they may still be there from the last call, but code that reads them then gets no gradient.
    """
    # Where the class does not exist, nobody has sharded anything with it.
    sharded: Any = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    return any(isinstance(module, sharded) for module in modules)


def drops(attention: nn.MultiheadAttention) -> bool:
    """True if dropout acts on attention weights, which the operator does not support."""
    return attention.training and attention.dropout > 0


#: Weight and bias.
_Projection = tuple[Tensor, Tensor | None]


def _projections(attention: nn.MultiheadAttention) -> tuple[_Projection, _Projection, _Projection]:
    """Weight and bias of the projections of queries, keys and values, views whose gradients are joined in one copy."""
    assert attention.in_proj_weight is not None
    biases: Sequence[Tensor | None] = (None,) * 3
    if attention.in_proj_bias is not None:
        biases = attention.in_proj_bias.chunk(3)
    query, key, value = zip(attention.in_proj_weight.chunk(3), biases, strict=True)
    return query, key, value


def project_keys_values(
    attentions: Sequence[nn.MultiheadAttention], pixels: Tensor, positions: Tensor | None
) -> list[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """Keys and values of all layers that attend to the same level, each in one matrix product over all layers.

    Args:
        attentions: of one size.
        pixels: [S, N, C]; `positions` too, or [S, 1, C]: they are added to the keys.

    Returns:
        for each layer keys and values [N, H, S, D], views of two tensors, and weight and bias for its queries.
    """
    pixels = pixels.transpose(0, 1)
    placed = pixels if positions is None else pixels + positions.transpose(0, 1)
    heads = attentions[0].num_heads
    own = [_projections(attention) for attention in attentions]
    projected = []
    for part, x in ((1, placed), (2, pixels)):
        weights, biases = zip(*(projections[part] for projections in own), strict=True)
        if len(attentions) == 1:
            weight, bias = weights[0], biases[0]
        else:
            weight, bias = torch.cat(weights), None if biases[0] is None else torch.cat(biases)
        found = F.linear(x, weight, bias).unflatten(-1, (len(attentions), heads, -1))
        projected.append([x.transpose(1, 2) for x in found.unbind(2)])
    return [(*pair, *query) for pair, (query, _, _) in zip(zip(*projected, strict=True), own, strict=True)]


class Memory(NamedTuple):
    """The memory of a layer: projected keys and values [N, H, S, D] and the projection of its queries, or pixels and
    positions that it projects itself.

    A layer is given the fields one by one, so that activation checkpointing sees which of them have gradients.
    """

    key: Tensor | None = None
    value: Tensor | None = None
    query_weight: Tensor | None = None
    query_bias: Tensor | None = None
    pixels: Tensor | None = None
    positions: Tensor | None = None

    @property
    def empty(self) -> bool:
        return self.key is None and self.pixels is None

    def named(self) -> dict[str, Tensor | None]:
        """The fields as the arguments that a layer takes them by."""
        own = {"query_weight": self.query_weight, "query_bias": self.query_bias}
        return {"key": self.key, "value": self.value, **own, "pixels": self.pixels, "pixel_positions": self.positions}

    def projected(self, attention: nn.MultiheadAttention) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Keys, values, and weight and bias for the queries."""
        if self.key is not None and self.value is not None and self.query_weight is not None:
            return self.key, self.value, self.query_weight, self.query_bias
        assert self.pixels is not None
        return project_keys_values([attention], self.pixels, self.positions)[0]


def project_levels(
    attentions: Sequence[nn.MultiheadAttention],
    levels: Sequence[Tensor],
    positions: Sequence[Tensor],
    themselves: Sequence[bool],
) -> list[Memory]:
    """The memory of every layer; layer i attends to level i modulo the number of levels.

    `themselves` is True for layers that project for themselves.
    """
    found = [
        Memory(pixels=levels[i % len(levels)], positions=positions[i % len(levels)]) for i in range(len(attentions))
    ]
    for level, (pixels, position) in enumerate(zip(levels, positions, strict=True)):
        own = [i for i in range(level, len(attentions), len(levels)) if not themselves[i]]
        if own:
            for i, parts in zip(own, project_keys_values([attentions[i] for i in own], pixels, position), strict=True):
                found[i] = Memory(*parts)
    return found


def attend(attention: nn.MultiheadAttention, query: Tensor, memory: Memory, mask: PackedMask) -> Tensor:
    """Masked attention of queries [Q, N, C], positions already added, to the memory of their layer."""
    key, value, weight, bias = memory.projected(attention)
    projected = F.linear(query.transpose(0, 1), weight, bias)
    out = masked_attention(projected.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2), key, value, mask)
    merged = out.transpose(1, 2).flatten(2).transpose(0, 1)
    return F.linear(merged, attention.out_proj.weight, attention.out_proj.bias)


# ---------------------------------------------------------------- what is left alone


def subclass_problem(module: nn.Module, original: str, methods: Iterable[str]) -> str | None:
    """The reason why a subclass is left alone, or None: it overrides methods that the new `forward` would not call.

    Args:
        original: qualified name of the class that it derives from.
        methods: of that class.
    """
    for cls in type(module).__mro__:
        if qualified_name(cls) == original:
            break
        if names := sorted(vars(cls).keys() & set(methods)):
            return f"the subclass {qualified_name(cls)} overrides {', '.join(names)}"
    names = sorted(vars(module).keys() & set(methods))
    return f"this instance has its own {', '.join(names)}" if names else None


#: What the decoder and the criterion call. Where no kernel serves one of them, the published code runs.
DECODER_OPS = ("resize_mask_features", "predict_attention_mask", "masked_attention")
MATCHER_OPS = ("point_sample", "mask_matching_cost")
CRITERION_OPS = ("point_sample", "uncertain_points", "mask_matching_cost", "point_mask_loss")


def kernels_serve(ops: Sequence[str], tensor: Tensor) -> bool:
    """True if each operator has a kernel for a tensor's device and dtype, or plain PyTorch is forced."""
    return all([dispatch.serves(op, tensor) for op in ops])


def losses_served(masks: Masks) -> bool:
    """The same for the criterion. The published one takes masks in float32 only."""
    tensor = masks.mask_embed if isinstance(masks, FactoredMasks) else masks
    return tensor.dtype != torch.float32 or kernels_serve(CRITERION_OPS, tensor)


def layers_problem(layers: Iterable[nn.Module], mixin: type) -> str | None:
    """The reason why a decoder is left alone, or None: one of its layers is left alone."""
    for layer in layers:
        known = plan(layer)
        if known is None or known.replacement.mixin is not mixin:
            return f"its layer is {qualified_name(type(layer))}, unknown to m2f_kernels"
        if known.reason is not None:
            return f"its layer is left alone: {known.reason}"
    return None


def unfused_layer(
    layers: Iterable[nn.Module], mixin: type, problem: Callable[[Any], str | None], dropping: Callable[[Any], bool]
) -> str | None:
    """The reason why a replaced decoder runs its original code at this call, or None: one of its layers has a problem.

    Args:
        mixin: of layers that were replaced.
        problem: the reason why such a layer is not fused, or None.
        dropping: true for a layer in which dropout acts.
    """
    for layer in layers:
        if not isinstance(layer, mixin):
            return f"its layer is {qualified_name(type(layer))}, which is left alone"
        if (reason := problem(layer)) is not None:
            return reason
        if dropping(layer):
            return DROPPED
    return None


def warn_unfused(module: nn.Module, reason: str) -> None:
    """Warns, once for each reason, that a replaced module runs the original code."""
    if not torch.compiler.is_compiling():
        warnings.warn(f"{type(module).__name__} runs as in transformers: {reason}", RuntimeWarning, stacklevel=3)


# ---------------------------------------------------------------- the losses


def matcher_problem(criterion: Any, published: str) -> str | None:
    """The reason why a criterion's losses cannot be computed here, or None: its matching differs."""
    matcher = criterion.matcher
    if watched(matcher):
        return "its matcher has hooks, which are only served by calling it"
    if qualified_name(type(matcher)) == published and "forward" not in vars(matcher):
        return None
    known = plan(matcher)
    same = known is not None and issubclass(known.mixin, Matcher) and known.reason is None
    if same and "forward" not in changed_methods(type(matcher)):
        return None
    return f"its matcher is {qualified_name(type(matcher))}, unknown to m2f_kernels"


#: The methods of a criterion that the fused losses of masks stand for, and those that all fused losses stand for.
_SAMPLING = frozenset(
    {
        "calculate_uncertainty",
        "sample_points_using_uncertainty",
        "_get_predictions_permutation_indices",
        "_get_targets_permutation_indices",
        "_pad_images_to_max_in_batch",
        "_max_by_axis",
    }
)
_WHOLE = _SAMPLING | {"loss_labels", "loss_masks"}


def _own(criterion: Any, methods: frozenset[str]) -> list[str]:
    """Those of the methods that a criterion has otherwise than published: in its class, or on itself."""
    changed: frozenset[str] = getattr(type(criterion), "_m2f_changed", frozenset())
    return sorted(methods & (changed | vars(criterion).keys()))


def has_own_losses(criterion: Any, auxiliary: bool) -> bool:
    """True if a criterion has a part of its own that the fused losses would not call; `auxiliary`: of several outputs.

    The published `forward` calls itself for every auxiliary output.
    """
    return bool(_own(criterion, _WHOLE | {"forward"} if auxiliary else _WHOLE))


def _criterion_problems(criterion: Any, matcher: str) -> tuple[str | None, str | None]:
    """The reasons, or None, why a criterion is not computed as a whole, and why the losses of its masks are not."""
    cls = type(criterion)
    problems = []
    numbers = ("num_points", "oversample_ratio", "importance_sample_ratio")
    for method, methods, needed in (
        ("forward", _WHOLE, (*numbers, "empty_weight", "get_num_masks")),
        ("loss_masks", _SAMPLING, numbers),
    ):
        own = set(methods & (changed_methods(cls) | vars(criterion).keys()))
        if not reaches(criterion, method):
            own.add(method)
        missing = [name for name in needed if not hasattr(criterion, name)]
        reason = None
        if own:
            reason = f"{qualified_name(cls)} has its own {', '.join(sorted(own))}"
        elif missing:
            reason = f"{qualified_name(cls)} has no {', '.join(missing)}"
        problems.append(reason)
    whole, masks = problems
    return whole or matcher_problem(criterion, matcher), masks


def criterion_left(criterion: Any, matcher: str) -> str | None:
    """The reason why nothing of a criterion can be replaced, or None."""
    whole, masks = _criterion_problems(criterion, matcher)
    return None if whole is None or masks is None else whole


def criterion_partly(criterion: Any, matcher: str) -> str | None:
    """The part of a criterion that is replaced, where that is not all, for the report."""
    whole, _ = _criterion_problems(criterion, matcher)
    return None if whole is None else f"losses of masks at sampled points alone: {whole}"


def check_matcher(matcher: Any) -> str | None:
    """The reason why a matcher is left alone, or None."""
    if not reaches(matcher, "forward"):
        return f"{qualified_name(type(matcher))} has its own forward"
    missing = [x for x in ("cost_class", "cost_mask", "cost_dice", "num_points") if not hasattr(matcher, x)]
    return f"{qualified_name(type(matcher))} has no {', '.join(missing)}" if missing else None


class Matcher(Mixin):
    """`forward` of the matcher: costs of all pairs at sampled points, one transfer to the host."""

    # Attributes of the original class.
    cost_class: float
    cost_mask: float
    cost_dice: float
    num_points: int

    @torch.no_grad()
    def forward(
        self,
        masks_queries_logits: Masks,
        class_queries_logits: Tensor,
        mask_labels: Sequence[Given],
        class_labels: Sequence[Tensor],
    ) -> list[tuple[Tensor, Tensor]]:
        if not _are_masks(masks_queries_logits) or not losses_served(masks_queries_logits):
            labels = dense_masks(mask_labels, class_queries_logits.device)
            published: list[tuple[Tensor, Tensor]] = super().forward(
                logits_of(masks_queries_logits), class_queries_logits, labels, class_labels
            )
            return published
        device = class_queries_logits.device
        targets = [
            {"labels": labels.to(device), "masks": _readable(masks, device)}
            for labels, masks in zip(class_labels, mask_labels, strict=True)
        ]
        matcher = HungarianMatcher(self.cost_class, self.cost_mask, self.cost_dice, self.num_points, fresh_points=True)
        (found,) = matcher([{"class_logits": class_queries_logits, "masks": masks_queries_logits}], targets)
        return found


class MaskLosses(Mixin):
    """`loss_masks` of the criterion: points drawn and both losses of the matched masks in one operator."""

    # Attributes of the original class.
    num_points: int
    oversample_ratio: float
    importance_sample_ratio: float

    def loss_masks(
        self, masks_queries_logits: Masks, mask_labels: Any, indices: Any, num_masks: Any
    ) -> dict[str, Tensor]:
        masks = masks_queries_logits
        if _own(self, _SAMPLING) or not _are_masks(masks) or not losses_served(masks):
            labels = dense_masks(mask_labels, logits_of(masks).device)
            above: Any = super()
            published: dict[str, Tensor] = above.loss_masks(logits_of(masks), labels, indices, num_masks)
            return published
        like = masks.mask_embed if isinstance(masks, FactoredMasks) else masks
        targets = [_readable(x, like.device) for x in mask_labels]
        found = check_targets("mask_labels", targets, masks.shape[0], like)
        pairs = [(_index(queries), _index(chosen)) for queries, chosen in indices]
        # Classes have no part in it.
        classes = torch.zeros(1, *masks.shape[:2], 2, device=like.device)
        labels = [torch.zeros(len(x.pixels), dtype=torch.int64, device=like.device) for x in found]
        batch = Batch(classes, [Group([0], masks)], labels, _pad_to_largest(found))
        with without_autocast(batch.device):
            criterion = PointMaskCriterion(
                1,
                num_points=self.num_points,
                oversample_ratio=self.oversample_ratio,
                importance_sample_ratio=self.importance_sample_ratio,
            )
            cross_entropy, dice = criterion.mask_sums(batch, [pairs])
            return {"loss_mask": cross_entropy[0] / num_masks, "loss_dice": dice[0] / num_masks}


def _index(x: Any) -> Tensor:
    return torch.as_tensor(x, dtype=torch.int64, device="cpu")


def _are_masks(masks: Any) -> bool:
    return isinstance(masks, FactoredMasks) or (isinstance(masks, Tensor) and masks.dim() == 4)


def _readable(masks: Given, device: torch.device) -> Given:
    """Targets as the operators take them: tensors on the predictions' device, with integers as float32."""
    if not isinstance(masks, Tensor):
        return masks
    whole = not masks.is_floating_point() and masks.dtype not in (torch.bool, torch.uint8)
    return masks.to(device, torch.float32 if whole else masks.dtype)


class _Criterion(PointMaskCriterion):
    """The losses as the module `published` of `transformers` computes them: unweighted, with its normaliser."""

    def __init__(self, published: Any, num_labels: int) -> None:
        matcher = published.matcher
        super().__init__(
            num_labels,
            num_points=published.num_points,
            oversample_ratio=published.oversample_ratio,
            importance_sample_ratio=published.importance_sample_ratio,
            cost_class=matcher.cost_class,
            cost_mask=matcher.cost_mask,
            cost_dice=matcher.cost_dice,
            fresh_points=True,
        )
        self.matcher.num_points = matcher.num_points
        self.class_weights = published.empty_weight.float()

    def losses(self, predictions: Any, targets: Targets, num_masks: Tensor) -> list[dict[str, Tensor]]:
        """For each output "loss_mask", "loss_dice" and "loss_cross_entropy"."""
        batch = read_batch(predictions, targets, self.num_labels)
        indices = self.matcher.match(batch)
        batch.masks = _pad_to_largest(batch.masks)
        with without_autocast(batch.device):
            found = self._unweighted(batch, indices)
            sums = found.cross_entropy / num_masks, found.dice / num_masks
            values = apart(*sums, found.classes, weights=(1.0, 1.0, 1.0))
            # OneFormer's number of masks is a float32 tensor [1], and so are these losses, whatever the masks are.
            count = 2 * len(predictions)
            shaped = (x.to(torch.result_type(x, num_masks)).view(num_masks.shape) for x in values[:count])
            values = (*shaped, *values[count:])
            # Each a tensor of its own: the caller multiplies them by their weights in place.
            thirds = (values[i :: len(predictions)] for i in range(len(predictions)))
            return [dict(zip(("loss_mask", "loss_dice", "loss_cross_entropy"), third, strict=True)) for third in thirds]


def point_losses(
    published: Any,
    num_labels: int,
    outputs: Iterable[tuple[Tensor, Masks]],
    mask_labels: Iterable[Given],
    class_labels: Sequence[Tensor],
) -> list[dict[str, Tensor]]:
    """The losses of every output, a pair of class logits and masks, as the criterion `published` computes them.

    Points are drawn afresh for each output and image in the matching and for each mask in the loss, as published. The
    numbers are other ones: the operators' generator draws those of the loss.
    """
    predictions = [{"class_logits": classes, "masks": masks} for classes, masks in outputs]
    targets: list[Mapping[str, Any]] = [
        {"labels": labels, "masks": masks} for labels, masks in zip(class_labels, mask_labels, strict=True)
    ]
    return _Criterion(published, num_labels).losses(predictions, targets, _num_masks(published, class_labels))


def _num_masks(published: Any, class_labels: Sequence[Tensor]) -> Tensor:
    """The number that losses are divided by, as `published` computes it, on the labels' device. Of one process it is
    filled in there, not copied."""
    device = class_labels[0].device
    accelerate: Any = sys.modules.get("accelerate")
    # Without it transformers' losses are those of one process; a derived class may add up over torch.distributed's.
    processes = 1 if accelerate is None else accelerate.PartialState._shared_state.get("num_processes", 1)
    several = processes > 1 or (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)
    found: Tensor = published.get_num_masks(class_labels, device=device if several else torch.device("cpu"))
    return found if found.device == device else torch.full(found.shape, float(found), dtype=found.dtype, device=device)


#: Weights of losses on a device.
_WEIGHTS = ConstantCache(16)


def own_weights(losses: Iterable[str], weights: Mapping[str, float]) -> tuple[float, ...]:
    """The weight of each loss: the product of those whose name is part of its own."""
    return tuple(math.prod(weight for part, weight in weights.items() if part in name) for name in losses)


def weighted_total(losses: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """The sum of the losses, each times the weights whose name is part of its own, as `get_loss_dict` and `get_loss` of
    the published models compute it, in three kernels."""
    own = own_weights(losses, weights)
    values = torch.stack([x.reshape(()) for x in losses.values()])
    return (values * _WEIGHTS.get(lambda: torch.tensor(own, device=values.device), own, values)).sum()


def differentiated_at_once(*modules: nn.Module) -> bool:
    """True if heads of these modules are to be computed again for all outputs: there are gradients, and no hooks."""
    return torch.is_grad_enabled() and not any(watched(x) for module in modules for x in module.modules())


def _pad_to_largest(targets: list[TargetMasks]) -> list[TargetMasks]:
    """Targets [T_i, H, W] of one size. `transformers` pads them for the loss, though not for the matching."""
    height, width = (max((x.pixels.shape[axis] for x in targets), default=0) for axis in (1, 2))
    return [_pad(x, height, width) for x in targets]


def _pad(targets: TargetMasks, height: int, width: int) -> TargetMasks:
    pixels, marks = targets
    count, h, w = pixels.shape
    if (h, w) == (height, width) or not count:
        return targets._replace(pixels=pixels.new_empty(0, height, width)) if not count else targets
    if marks is None:
        return TargetMasks(F.pad(pixels, (0, width - w, 0, height - h)))
    if marks.dtype == torch.int32:  # background outside of the runs' own size
        return TargetMasks(pixels[:1, :1, :1].expand(count, height, width), marks)
    # The padding of a map is an id that no target has.
    padded = (marks.amin() - 1).expand(height, width).clone()
    padded[:h, :w] = pixels[0]
    return TargetMasks(padded.expand(count, -1, -1), marks)
