"""From predictions to semantic, instance and panoptic segmentations (Cheng et al. 2022; MaskFormer, 2021, section 3.4).

`original` follows the published evaluation: masks are resized to the network's input, cut to the image and resized to
its size. `compatible` is what `transformers`' image processor gives, by its own code: masks pass through 384 x 384.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from m2f_kernels import FactoredMasks
from m2f_model.model import Mask2FormerOutput

MODES = ("original", "compatible")
#: Masks that exist at full resolution at once.
_CHUNK = 16


class Frame(NamedTuple):
    """Where an image lies in the network's input, each as (height, width).

    Attributes:
        padded: the input.
        content: the upper left part of it that holds the resized image; the rest is padding.
        original: the image's own size, that of the results.
    """

    padded: tuple[int, int]
    content: tuple[int, int]
    original: tuple[int, int]


class Segment(NamedTuple):
    """One segment of a panoptic segmentation: its id in the map, its label, its score, and whether it is stuff."""

    id: int
    label: int
    score: float
    is_stuff: bool


class Instances(NamedTuple):
    """Instances of one image: `labels` int64 [M], `scores` [M], `masks` bool [M, h, w]. They may overlap."""

    labels: Tensor
    scores: Tensor
    masks: Tensor


class Panoptic(NamedTuple):
    """Panoptic segmentation of one image: `segment_ids` int32 [h, w], 0 where there is no segment, and `segments`."""

    segment_ids: Tensor
    segments: list[Segment]


@torch.no_grad()
def semantic(
    output: Mask2FormerOutput, frames: Sequence[Frame], *, mode: str = "original", resize_scores: bool = False
) -> list[Tensor]:
    """The label of every pixel, for each image int64 [h, w].

    Args:
        output: the model's.
        frames: one per image.
        mode: "original" or "compatible".
        resize_scores: sum the masks up at the input's size and resize the sums to the image's, as published for models
            of semantic segmentation alone; else the masks are resized first, as published for all others.

    Raises:
        ValueError: naming the argument.
    """
    if _is_compatible(output, frames, mode):
        return list(_processor().post_process_semantic_segmentation(_theirs(output), _sizes(frames)))
    results = []
    for i, frame in enumerate(frames):
        probability = output.class_logits[i].float().softmax(-1)[:, :-1]
        scores = probability.new_zeros(probability.shape[1], *(frame.padded if resize_scores else frame.original))
        for start in range(0, len(probability), _CHUNK):
            part = slice(start, start + _CHUNK)
            masks = _resize(_logits(output.masks, i, part), frame.padded)
            masks = masks if resize_scores else _to_image(masks, frame)
            scores += torch.einsum("qc,qhw->chw", probability[part], masks.sigmoid())
        results.append((_to_image(scores, frame) if resize_scores else scores).argmax(0))
    return results


@torch.no_grad()
def instance(
    output: Mask2FormerOutput,
    frames: Sequence[Frame],
    *,
    mode: str = "original",
    threshold: float = 0.0,
    top_k: int = 100,
    stuff_labels: Collection[int] = (),
) -> list[Instances]:
    """Scored instances: each pair of query and label competes on its own, so a query may appear under several labels.

    Args:
        output: the model's.
        frames: one per image.
        mode: "original" or "compatible" (where `top_k` is the number of queries).
        threshold: smallest score, the product of class probability and mean mask probability.
        top_k: pairs of query and label to keep, before `threshold`.
        stuff_labels: labels that have no instances.

    Raises:
        ValueError: naming the argument.
    """
    if _is_compatible(output, frames, mode):
        found = _processor().post_process_instance_segmentation(
            _theirs(output), threshold, target_sizes=_sizes(frames), return_binary_maps=True
        )
        return [_instances_of_theirs(x, frame, stuff_labels) for x, frame in zip(found, frames, strict=True)]
    results = []
    for i, frame in enumerate(frames):
        probability = output.class_logits[i].float().softmax(-1)[:, :-1]
        scores, pairs = probability.flatten().topk(min(top_k, probability.numel()))
        queries, labels = pairs // probability.shape[1], pairs % probability.shape[1]
        # The mean mask probability is at most 1: what cannot pass any more is left out.
        keep = (scores >= threshold) & ~torch.isin(labels, labels.new_tensor(sorted(stuff_labels)))
        scores, queries, labels = scores[keep], queries[keep], labels[keep]
        masks = torch.zeros(len(queries), *frame.original, dtype=torch.bool, device=scores.device)
        for start in range(0, len(queries), _CHUNK):
            part = slice(start, start + _CHUNK)
            logits = _to_image(_resize(_logits(output.masks, i, queries[part]), frame.padded), frame)
            masks[part] = logits > 0
            inside = masks[part].flatten(1)
            scores[part] *= (logits.sigmoid().flatten(1) * inside).sum(1) / (inside.sum(1) + 1e-6)
        keep = (scores >= threshold) & masks.flatten(1).any(1)
        results.append(Instances(labels[keep], scores[keep], masks[keep]))
    return results


@torch.no_grad()
def panoptic(
    output: Mask2FormerOutput,
    frames: Sequence[Frame],
    *,
    stuff_labels: Collection[int] = (),
    mode: str = "original",
    threshold: float = 0.8,
    mask_threshold: float = 0.5,
    overlap_threshold: float = 0.8,
) -> list[Panoptic]:
    """Each pixel goes to the query with the largest product of class and mask probability there.

    Args:
        output: the model's.
        frames: one per image.
        stuff_labels: labels that have one segment per image.
        mode: "original" or "compatible".
        threshold: a query counts if its class probability is larger. Published: 0.8; `transformers`' default: 0.5.
        mask_threshold: a mask is where its probability is at least this.
        overlap_threshold: a segment that keeps a smaller share of its mask than this is dropped.

    Raises:
        ValueError: naming the argument.
    """
    if _is_compatible(output, frames, mode):
        found = _processor().post_process_panoptic_segmentation(
            _theirs(output), threshold, mask_threshold, overlap_threshold, set(stuff_labels), _sizes(frames)
        )
        return [_panoptic_of_theirs(x) for x in found]
    results = []
    for i, frame in enumerate(frames):
        scores, labels = output.class_logits[i].float().softmax(-1).max(-1)
        no_object = output.class_logits.shape[-1] - 1
        queries = ((labels != no_object) & (scores > threshold)).nonzero().flatten()
        segment_ids = torch.zeros(frame.original, dtype=torch.int32, device=scores.device)
        segments: list[Segment] = []
        if len(queries):
            scores, labels = scores[queries], labels[queries]
            masks = _to_image(_resize(_logits(output.masks, i, queries), frame.padded), frame).sigmoid()
            owner = (masks * scores[:, None, None]).argmax(0)
            masks = masks >= mask_threshold
            fused: dict[int, int] = {}
            for k, (label, score) in enumerate(zip(labels.tolist(), scores.tolist(), strict=True)):
                owned = owner == k
                visible = owned & masks[k]
                area, full = int(owned.sum()), int(masks[k].sum())
                if not visible.any() or area / full < overlap_threshold:
                    continue
                if label in fused:
                    segment_ids[visible] = fused[label]
                    continue
                segments.append(Segment(len(segments) + 1, label, score, label in stuff_labels))
                segment_ids[visible] = len(segments)
                if label in stuff_labels:
                    fused[label] = len(segments)
        results.append(Panoptic(segment_ids, segments))
    return results


# ---------------------------------------------------------------- resizing, as published


def _logits(masks: FactoredMasks, image: int, queries: Tensor | slice) -> Tensor:
    """[q, h, w] of some queries of one image; the others are never multiplied out."""
    return FactoredMasks(masks.mask_embed[image, queries][None], masks.mask_features[image][None]).logits()[0].float()


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x[None], size=size, mode="bilinear", align_corners=False)[0]


def _to_image(x: Tensor, frame: Frame) -> Tensor:
    """Cut the padding off, and give the rest the image's size."""
    return _resize(x[:, : frame.content[0], : frame.content[1]], frame.original)


# ---------------------------------------------------------------- transformers' own code


@functools.cache
def _processor() -> Any:
    return transformers.Mask2FormerImageProcessorPil()


def _theirs(output: Mask2FormerOutput) -> Any:
    return SimpleNamespace(class_queries_logits=output.class_logits, masks_queries_logits=output.masks.logits())


def _sizes(frames: Sequence[Frame]) -> list[tuple[int, int]]:
    return [frame.original for frame in frames]


def _instances_of_theirs(found: dict[str, Any], frame: Frame, stuff_labels: Collection[int]) -> Instances:
    segments = found["segments_info"]
    keep = [i for i, segment in enumerate(segments) if segment["label_id"] not in stuff_labels]
    # Where nothing was found they give one map of -1 in place of no maps.
    masks = (
        found["segmentation"].bool() if segments else torch.zeros(0, *frame.original, dtype=torch.bool, device="cpu")
    )
    labels = torch.tensor([segment["label_id"] for segment in segments], dtype=torch.int64, device="cpu")
    scores = torch.tensor([segment["score"] for segment in segments], device="cpu")
    return Instances(labels[keep], scores[keep], masks[keep])


def _panoptic_of_theirs(found: dict[str, Any]) -> Panoptic:
    segments = [Segment(s["id"], s["label_id"], s["score"], s["was_fused"]) for s in found["segments_info"]]
    return Panoptic(found["segmentation"].clamp(min=0).int(), segments)


def _is_compatible(output: Mask2FormerOutput, frames: Sequence[Frame], mode: str) -> bool:
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(map(repr, MODES))}; got {mode!r}")
    if len(frames) != output.class_logits.shape[0]:
        raise ValueError(f"frames: expected one per image, {output.class_logits.shape[0]}; got {len(frames)}")
    return mode == "compatible"
