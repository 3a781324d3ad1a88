"""From predictions to semantic, instance and panoptic segmentations (Cheng et al. 2022; MaskFormer, 2021, section 3.4).

`original` follows the published evaluation: masks are resized to the network's input, cut to the image and resized to
its size. `compatible` gives the results of `transformers`' image processor, by its code: masks pass through 384 x 384.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from m2f_kernels import FactoredMasks
from m2f_model.model import Mask2FormerOutput

MODES = ("original", "compatible")
#: Bytes of masks and scores at full resolution that exist at once, a strip of the image's rows. On a GPU each strip
#: costs its launches.
_STRIP_BYTES, _STRIP_BYTES_GPU = 16 * 2**20, 256 * 2**20


class Frame(NamedTuple):
    """The place of an image in the network's input, as sizes (height, width) in pixels.

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
        resize_scores: sum the masks at the input's size and resize the sums to the image's, as published for models
            of semantic segmentation only; otherwise masks are resized first, as published for all others.

    Raises:
        ValueError: bad input; the message names the argument.
    """
    if _is_compatible(output, frames, mode):
        return list(_processor().post_process_semantic_segmentation(_theirs(output), _sizes(frames)))
    results = []
    for i, frame in enumerate(frames):
        probability = output.class_logits[i].float().softmax(-1)[:, :-1]
        found = torch.empty(frame.original, dtype=torch.int64, device=probability.device)
        for strip in _strips(output.masks, i, slice(None), frame, planes=probability.shape[1]):
            if resize_scores:
                scores = strip.to_image(torch.tensordot(probability.T, strip.masks().sigmoid(), 1))
            else:
                scores = torch.tensordot(probability.T, strip.to_image(strip.masks()).sigmoid(), 1)
            found[strip.rows] = scores.argmax(0)
        results.append(found)
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
        ValueError: bad input; the message names the argument.
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
        # The mean mask probability is at most 1, so pairs whose class probability is too small are left out.
        keep = (scores >= threshold) & ~torch.isin(labels, labels.new_tensor(sorted(stuff_labels)))
        scores, queries, labels = scores[keep], queries[keep], labels[keep]
        masks = torch.zeros(len(queries), *frame.original, dtype=torch.bool, device=scores.device)
        total, area = scores.new_zeros(len(queries)), labels.new_zeros(len(queries))
        for strip in _strips(output.masks, i, queries, frame):
            logits = strip.to_image(strip.masks())
            inside = logits > 0
            masks[:, strip.rows] = inside
            total += (logits.sigmoid() * inside).sum((1, 2))
            area += inside.sum((1, 2))
        scores = scores * (total / (area + 1e-6))
        keep = (scores >= threshold) & (area > 0)
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
        ValueError: bad input; the message names the argument.
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
            # For each query the number of pixels that it owns, of those that lie in its mask, and of those in its mask.
            owned, seen, full = (labels.new_zeros(len(queries)) for _ in range(3))
            owners = torch.empty(frame.original, dtype=torch.int16, device=scores.device)  # -1 where not in its mask
            for strip in _strips(output.masks, i, queries, frame):
                masks = strip.to_image(strip.masks()).sigmoid()
                owner = (masks * scores[:, None, None]).argmax(0)
                inside = masks >= mask_threshold
                visible = inside.gather(0, owner[None])[0]
                full += inside.sum((1, 2))
                owned += _counts(owner, None, len(queries))
                seen += _counts(owner, visible, len(queries))
                owners[strip.rows] = torch.where(visible, owner, -1).short()
            fused: dict[int, int] = {}
            ids = [0] * len(queries)
            found = zip(*(x.tolist() for x in (labels, scores, owned, seen, full)), strict=True)
            for k, (label, score, area, shown, whole) in enumerate(found):
                if not shown or area / whole < overlap_threshold:
                    continue
                if label not in fused:
                    segments.append(Segment(len(segments) + 1, label, score, label in stuff_labels))
                ids[k] = fused.get(label, len(segments))
                if label in stuff_labels:
                    fused[label] = ids[k]
            # Index -1 takes the last.
            table = torch.tensor([*ids, 0], dtype=torch.int32, device=scores.device)
            segment_ids = table[owners.int()]
        results.append(Panoptic(segment_ids, segments))
    return results


# ---------------------------------------------------------------- resizing, as published


@dataclass(frozen=True)
class _Strip:
    """Some rows of one image's result, for which alone masks are multiplied and resized."""

    embed: Tensor  # [q, C]
    features: Tensor  # [C, h, w] of the whole input
    frame: Frame
    rows: slice  # of the image
    content: slice  # the rows of the input from which these are computed

    def masks(self) -> Tensor:
        """Logits [q, r, w] of `content`, without the padding at the right."""
        (height, width), h = self.frame.padded, self.features.shape[1]
        rows = _source(h, height, self.content)
        logits = FactoredMasks(self.embed[None], self.features[None, :, rows]).logits()[0].float()
        return _resize(logits, rows, h, height, self.content, width)[..., : self.frame.content[1]]

    def to_image(self, x: Tensor) -> Tensor:
        """[., R, W] of the image's rows, from [., r, w] of `content`."""
        height, width = self.frame.original
        return _resize(x, self.content, self.frame.content[0], height, self.rows, width)


def _strips(
    masks: FactoredMasks, image: int, queries: Tensor | slice, frame: Frame, planes: int = 0
) -> Iterator[_Strip]:
    """Yields the rows of one image's result, a few at a time; `planes` are computed besides those of `queries`."""
    embed, features = masks.mask_embed[image, queries], masks.mask_features[image]
    if not len(embed):
        return
    (height, width), (content, _) = frame.original, frame.content
    # The input has more rows than the result if the image is made smaller.
    row_bytes = 4 * (len(embed) + planes) * max(width, frame.padded[1] * content / height)
    step = max(1, int((_STRIP_BYTES if features.device.type == "cpu" else _STRIP_BYTES_GPU) / max(1, row_bytes)))
    for first in range(0, height, step):
        rows = slice(first, min(first + step, height))
        yield _Strip(embed, features, frame, rows, _source(content, height, rows))


def _coordinates(old: int, new: int, rows: slice, device: torch.device | None = None) -> Tensor:
    """The coordinates of rows of `new` among `old` ones, in the arithmetic of `F.interpolate`."""
    centres = torch.arange(rows.start, rows.stop, dtype=torch.float32, device=device) + 0.5
    return (centres * (old / new) - 0.5).clamp(min=0)


def _source(old: int, new: int, rows: slice) -> slice:
    """The rows of `old` from which some rows of `new` are computed."""
    at = _coordinates(old, new, rows)
    return slice(min(int(at[0]), old - 1), min(int(at[-1]) + 2, old))


def _resize(x: Tensor, source: slice, old: int, new: int, rows: slice, width: int) -> Tensor:
    """Rows of the bilinear resizing of [., old, w] to [., new, width], of which `x` holds the rows `source`."""
    at = _coordinates(old, new, rows, x.device)
    low = at.long().clamp(max=old - 1)
    high = (low + 1).clamp(max=old - 1)
    x = torch.lerp(x[:, low - source.start], x[:, high - source.start], (at - low)[:, None])
    return F.interpolate(x[None], size=(x.shape[1], width), mode="bilinear", align_corners=False)[0]


def _counts(owner: Tensor, where: Tensor | None, queries: int) -> Tensor:
    """The number of pixels in `where` that each query owns. Unlike bincount it does not wait for a GPU."""
    weights = torch.ones_like(owner) if where is None else where.to(owner.dtype)
    return owner.new_zeros(queries).scatter_add(0, owner.flatten(), weights.flatten())


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
    # Without segments they return one map of -1 instead of no maps.
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
