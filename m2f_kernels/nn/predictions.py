"""Inputs of the matcher and the criterion: checks of predictions and targets, and predictions that share features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from m2f_kernels._checks import check_floating, check_same_device, check_shape, describe
from m2f_kernels.masks import FactoredMasks
from m2f_kernels.masks import Targets as TargetMasks
from m2f_kernels.ops.points import check_masks, check_targets

#: For each decoder output "class_logits" [N, Q, num_labels + 1] and "masks", FactoredMasks or logits [N, Q, h, w].
Predictions: TypeAlias = Sequence[Mapping[str, Any]]
#: For each image "labels", int64 [T_i], and "masks", [T_i, H_i, W_i], an InstanceMap, or run lengths.
Targets: TypeAlias = Sequence[Mapping[str, Any]]


@dataclass
class Group:
    """Consecutive rows of queries whose masks are computed together: of one output or several that share features."""

    outputs: list[int]
    masks: Tensor | FactoredMasks  # [N, outputs * Q, ...]


@dataclass
class Batch:
    """Checked predictions and targets."""

    class_logits: Tensor  # [L, N, Q, num_labels + 1], float32
    groups: list[Group]
    labels: list[Tensor]
    masks: list[TargetMasks]
    host_labels: list[Tensor] = field(default_factory=list)  # once they are matched

    @property
    def device(self) -> torch.device:
        return self.class_logits.device

    @property
    def images(self) -> int:
        return len(self.labels)

    @property
    def counts(self) -> list[int]:
        """Targets of each image."""
        return [len(x) for x in self.labels]


def read_batch(predictions: Predictions, targets: Targets, num_labels: int | None) -> Batch:
    """The checked arguments of the criterion, with outputs that share their mask features grouped."""
    if not isinstance(predictions, Sequence) or not predictions:
        raise ValueError(f"predictions: expected a list of at least one output; got {describe(predictions)}")
    outputs = [_output(f"predictions[{i}]", x) for i, x in enumerate(predictions)]
    first = outputs[0][0]
    n, q, classes = first.shape
    if classes < 2 or (num_labels is not None and classes != num_labels + 1):
        wanted = "at least one label and no-object" if num_labels is None else f"{num_labels + 1}, num_labels + 1"
        raise ValueError(f"predictions[0]['class_logits']: expected [N, Q, {wanted}]; got {describe(first)}")
    for i, (logits, masks) in enumerate(outputs):
        name = f"predictions[{i}]"
        check_shape(f"{name}['class_logits']", logits, "[N, Q, num_labels + 1]", first.shape)
        check_same_device(f"{name}['class_logits']", logits, "predictions[0]['class_logits']", first)
        if tuple(masks.shape[:2]) != (n, q):
            raise ValueError(
                f"{name}['masks']: expected N, Q = {n}, {q}, as class_logits have; got {list(masks.shape)}"
            )
    labels, target_masks = _targets(targets, n, outputs[0][1])
    class_logits = torch.stack([logits.float() for logits, _ in outputs])
    return Batch(class_logits, _groups([masks for _, masks in outputs]), labels, target_masks)


def _output(name: str, output: object) -> tuple[Tensor, Tensor | FactoredMasks]:
    if not isinstance(output, Mapping) or "class_logits" not in output or "masks" not in output:
        got = str(sorted(output)) if isinstance(output, Mapping) else describe(output)
        raise ValueError(f"{name}: expected a mapping with 'class_logits' and 'masks'; got {got}")
    logits, masks = output["class_logits"], output["masks"]
    check_floating(f"{name}['class_logits']", logits, "[N, Q, num_labels + 1]")
    check_masks(f"{name}['masks']", masks)
    if isinstance(masks, Tensor) and masks.dim() != 4:
        raise ValueError(f"{name}['masks']: expected [N, Q, h, w] or FactoredMasks; got {describe(masks)}")
    pixels = masks.mask_embed if isinstance(masks, FactoredMasks) else masks
    check_same_device(f"{name}['masks']", pixels, f"{name}['class_logits']", logits)
    return logits, masks


def _targets(targets: Targets, n: int, masks: Tensor | FactoredMasks) -> tuple[list[Tensor], list[TargetMasks]]:
    if not isinstance(targets, Sequence) or len(targets) != n:
        got = f"{len(targets)}" if isinstance(targets, Sequence) else describe(targets)
        raise ValueError(f"targets: expected {n} mappings, one per image of class_logits; got {got}")
    for i, target in enumerate(targets):
        if not isinstance(target, Mapping) or "labels" not in target or "masks" not in target:
            got = str(sorted(target)) if isinstance(target, Mapping) else describe(target)
            raise ValueError(f"targets[{i}]: expected a mapping with 'labels' and 'masks'; got {got}")
    pixels = masks.mask_embed if isinstance(masks, FactoredMasks) else masks
    found = check_targets("targets['masks']", [x["masks"] for x in targets], n, pixels)
    labels = [x["labels"] for x in targets]
    for i, (label, (mask, _)) in enumerate(zip(labels, found, strict=True)):
        if not isinstance(label, Tensor) or label.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"targets[{i}]['labels']: expected an int64 tensor [T]; got {describe(label)}")
        check_shape(f"targets[{i}]['labels']", label, "[T], one per mask,", mask.shape[:1])
        check_same_device(f"targets[{i}]['labels']", label, "masks", mask)
    return [label.long() for label in labels], found


def _groups(masks: list[Tensor | FactoredMasks]) -> list[Group]:
    shared: dict[int, list[int]] = {}
    for i, x in enumerate(masks):
        # Logits are not grouped, since that would copy them.
        shared.setdefault(id(x.mask_features) if isinstance(x, FactoredMasks) else -1 - i, []).append(i)
    groups = []
    for outputs in shared.values():
        first = masks[outputs[0]]
        if isinstance(first, FactoredMasks):
            embeds = [x.mask_embed for i in outputs if isinstance(x := masks[i], FactoredMasks)]
            groups.append(Group(outputs, FactoredMasks(torch.cat(embeds, 1), first.mask_features)))
        else:
            groups.append(Group(outputs, first))
    return groups
