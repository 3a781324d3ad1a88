"""Peers of the operators on points: `transformers`' own functions, with points and with full masks."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

NUM_LABELS = 80
COST_CLASS, COST_MASK, COST_DICE = 2.0, 5.0, 5.0
TRANSFORMERS = "transformers, points"
FULL, STRIDE_4 = "full masks at ground-truth resolution", "full masks at stride 4"


def _published() -> Any:
    from transformers.models.mask2former import modeling_mask2former

    return modeling_mask2former


def published_loss(num_points: int, device: torch.device) -> Any:
    """`Mask2FormerLoss` with the published options, its class weights on `device`."""
    config = SimpleNamespace(
        num_labels=NUM_LABELS, no_object_weight=0.1, train_num_points=num_points, oversample_ratio=3.0,
        importance_sample_ratio=0.75, class_weight=COST_CLASS, dice_weight=COST_DICE, mask_weight=COST_MASK,
    )  # fmt: skip
    return _published().Mask2FormerLoss(config, {}).to(device)


def weighted(losses: dict[str, Tensor]) -> Tensor:
    """The training loss."""
    weights = {"loss_cross_entropy": COST_CLASS, "loss_mask": COST_MASK, "loss_dice": COST_DICE}
    return torch.stack([weights[name.rstrip("_0123456789")] * x for name, x in losses.items()]).sum()


def logits_of(a: dict[str, Any]) -> list[Tensor]:
    """Every output's mask logits [N, Q, h, w], as a published decoder makes them."""
    return [torch.einsum("nqc,nchw->nqhw", embed, a["mask_features"]) for embed in a["mask_embed"]]


def points_loss(num_points: int) -> Callable[[dict[str, Any]], Tensor]:
    """The loss part of `transformers`: targets as float, a matching and a loss for each output."""

    def call(a: dict[str, Any]) -> Tensor:
        masks, classes = logits_of(a), a["class_logits"]
        auxiliary = [
            {"masks_queries_logits": m, "class_queries_logits": c}
            for m, c in zip(masks[:-1], classes[:-1], strict=True)
        ]
        targets, labels = [t.float() for t in a["targets"]], list(a["labels"])
        criterion = published_loss(num_points, a["labels"].device)
        return weighted(criterion(masks[-1], classes[-1], targets, labels, auxiliary))

    return call


def full_loss(stride_4: bool) -> Callable[[dict[str, Any]], Tensor]:
    """The same with every pixel: predictions upsampled to the targets' size, or targets shrunk to the predictions'."""

    def call(a: dict[str, Any]) -> Tensor:
        published, criterion = _published(), published_loss(1, a["labels"].device)
        from scipy.optimize import linear_sum_assignment

        targets = [t.float() for t in a["targets"]]
        if stride_4:
            size = a["mask_features"].shape[-2:]
            targets = [F.interpolate(t[None], size=size, mode="bilinear", antialias=True)[0] for t in targets]

        def resized(logits: Tensor, target: Tensor) -> Tensor:
            if logits.shape[-2:] == target.shape[-2:]:
                return logits
            return F.interpolate(logits[None], size=target.shape[-2:], mode="bilinear", align_corners=False)[0]

        total = []
        count = max(sum(len(t) for t in targets), 1)
        for logits, classes in zip(logits_of(a), a["class_logits"], strict=True):
            indices = []
            with torch.no_grad():
                for i, target in enumerate(targets):
                    x, t = resized(logits[i], target).flatten(1), target.flatten(1)
                    cost = COST_MASK * published.pair_wise_sigmoid_cross_entropy_loss(x, t)
                    cost += COST_DICE * published.pair_wise_dice_loss(x, t)
                    cost -= COST_CLASS * classes[i].softmax(-1)[:, a["labels"][i]]
                    indices.append([torch.as_tensor(j) for j in linear_sum_assignment(cost.cpu())])
            matched = zip(indices, targets, strict=True)
            for i, ((queries, chosen), target) in enumerate(matched):
                x, t = resized(logits[i, queries], target).flatten(1), target[chosen].flatten(1)
                total.append(COST_MASK * published.sigmoid_cross_entropy_loss(x, t, count))
                total.append(COST_DICE * published.dice_loss(x, t, count))
            labels = criterion.loss_labels(classes, list(a["labels"]), indices)
            total.append(COST_CLASS * labels["loss_cross_entropy"])
        return torch.stack(total).sum()

    return call


def matching(num_points: int, from_logits: bool) -> Callable[[dict[str, Any]], Any]:
    """`transformers`' matcher for every output, from mask logits that exist already or from their factors."""

    def call(a: dict[str, Any]) -> list[Tensor]:
        matcher = published_loss(num_points, a["labels"].device).matcher
        masks = a["mask_logits"] if from_logits else logits_of(a)
        targets, labels = [t.float() for t in a["targets"]], list(a["labels"])
        found = [matcher(m, c, targets, labels) for m, c in zip(masks, a["class_logits"], strict=True)]
        return [torch.stack([torch.as_tensor(x) for x in pair]) for pairs in found for pair in pairs]

    return call


def grid_sample(a: dict[str, Any]) -> Tensor:
    """`transformers`' sample_point."""
    return _published().sample_point(a["mask_features"], a["points"], align_corners=False)


def available_gib() -> float:
    """Memory that is free for a process, on Linux; infinite elsewhere."""
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("MemAvailable")) / 2**20
    except OSError:
        return float("inf")


def needs_gib(size: int, targets: int) -> Callable[[], str | None]:
    """Refuses full masks where they would not fit: about 6 float planes of each matched mask and output, and 6 of
    each of 100 queries while matching."""
    needed = size * size * 4 * (10 * targets * 6 + 100 * 6) / 2**30

    def reason() -> str | None:
        here = available_gib()
        return None if needed < here else f"needs about {needed:.0f} GiB of memory, {here:.0f} are free"

    return reason
