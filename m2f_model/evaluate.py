"""Quality of segmentations: panoptic quality, and intersection over union by a confusion matrix.

COCO's average precision is in :mod:`m2f_model.average_precision`; all of them together in :mod:`m2f_model.score`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from m2f_model.data import Dataset
from m2f_model.model import Mask2Former, Mask2FormerOutput
from m2f_model.postprocess import Frame, Panoptic, panoptic, semantic
from m2f_model.samples import Sample
from m2f_model.segment import prepare


class Quality(NamedTuple):
    """Panoptic quality (Kirillov et al. 2019, section 4.2), means over the labels that occur: pq = about sq * rq."""

    pq: float
    sq: float
    rq: float


class PanopticCounts:
    """The counts behind panoptic quality, summed over images, for each label.

    Args:
        num_labels: labels of predictions and samples are less.

    Attributes:
        iou: sum of the intersections over unions of matched segments, float64 [num_labels].
        matched, missed, invented: true positives, false negatives and false positives, int64 [num_labels].
    """

    def __init__(self, num_labels: int) -> None:
        self.iou = torch.zeros(num_labels, dtype=torch.float64, device="cpu")
        self.matched, self.missed, self.invented = (
            torch.zeros(num_labels, dtype=torch.int64, device="cpu") for _ in range(3)
        )

    def add(self, found: Panoptic, sample: Sample) -> None:
        """Count the segments of one image.

        A predicted and a true segment of the same label match if their intersection over union exceeds 1/2, which at
        most one can. Pixels of the sample's "void" count for nothing: they are in no union, and an unmatched prediction
        that lies by more than half in void and crowds of its label is no false positive. All other pixels outside the
        targets
        are background: a prediction there is a false positive.

        Args:
            found: what was predicted.
            sample: with masks of the same size; and, where there are any, "void", bool [H, W], and "crowd_labels" and
                "crowd_masks", groups of things of a label that are not told apart.

        Raises:
            ValueError: where sizes differ, or a label is not less than `num_labels`.
        """
        ids = found.segment_ids.long()
        labels, masks = sample["labels"].tolist(), sample["masks"]
        if masks.shape[1:] != ids.shape:
            raise ValueError(f"found: expected the sample's size, {list(masks.shape[1:])}; got {list(ids.shape)}")
        beyond = [x for x in (*labels, *(s.label for s in found.segments)) if not 0 <= x < len(self.iou)]
        if beyond:
            raise ValueError(f"labels: expected less than num_labels = {len(self.iou)}; got {beyond[0]}")

        count = 1 + max(int(ids.max()) if ids.numel() else 0, *(s.id for s in found.segments), 0)
        nothing = [0] * count

        def areas(mask: Tensor) -> list[int]:
            """Pixels of each predicted segment within `mask`."""
            return ids[mask].bincount(minlength=count).tolist()

        overlaps, sizes = [areas(mask) for mask in masks], masks.flatten(1).sum(1).tolist()
        total, void = areas(ids >= 0), areas(sample["void"]) if "void" in sample else nothing
        crowds: dict[int, list[int]] = {}
        if "crowd_labels" in sample:
            for label in set(sample["crowd_labels"].tolist()):
                crowds[label] = areas(sample["crowd_masks"][sample["crowd_labels"] == label].any(0))
        missed = set(range(len(labels)))
        for segment in found.segments:
            k, area = segment.id, total[segment.id]
            # Targets of instance data may overlap, so that several can match: the best one does.
            ious = [
                (overlaps[j][k] / (sizes[j] + area - void[k] - overlaps[j][k]), -j)
                for j in missed
                if labels[j] == segment.label and overlaps[j][k]
            ]
            iou, best = max(ious, default=(0.0, 0))
            if iou > 0.5:
                missed.remove(-best)
                self.iou[segment.label] += iou
                self.matched[segment.label] += 1
            elif 2 * (void[k] + crowds.get(segment.label, nothing)[k]) <= area:
                self.invented[segment.label] += 1
        for j in missed:
            self.missed[labels[j]] += 1

    def qualities(self) -> list[Quality | None]:
        """The quality of each label; None for those that occur neither in a target nor in a prediction."""
        occurs = (self.matched + self.missed + self.invented > 0).tolist()
        return [self.quality([i]) if there else None for i, there in enumerate(occurs)]

    def quality(self, labels: Iterable[int] | None = None) -> Quality:
        """The means over those of `labels` (by default all) that occur, in a target or a prediction; 0 if none does."""
        chosen = torch.tensor(
            sorted(range(len(self.iou)) if labels is None else labels), dtype=torch.int64, device="cpu"
        )
        iou, matched, missed, invented = (
            x[chosen].double() for x in (self.iou, self.matched, self.missed, self.invented)
        )
        halves = matched + missed / 2 + invented / 2
        occurs = halves > 0
        values = iou / halves, iou / matched.clamp(min=1), matched / halves
        return Quality(*(x[occurs].mean().item() if occurs.any() else 0.0 for x in values))


def panoptic_quality(pairs: Iterable[tuple[Panoptic, Sample]], num_labels: int) -> Quality:
    """The quality of predictions for samples of the same size: see :class:`PanopticCounts`."""
    counts = PanopticCounts(num_labels)
    for found, sample in pairs:
        counts.add(found, sample)
    return counts.quality()


class SemanticQuality(NamedTuple):
    """Means over the labels that occur in the truth, and shares of all pixels.

    Attributes:
        miou: mean intersection over union.
        fwiou: the same, weighted by the pixels of each label.
        macc: mean of the share of a label's pixels that is found.
        pacc: share of all pixels that is right.
    """

    miou: float
    fwiou: float
    macc: float
    pacc: float


class SemanticCounts:
    """A confusion matrix, summed over images.

    Args:
        num_labels: labels of the truth are less.

    Attributes:
        table: int64 [num_labels, num_labels + 1], pixels by true label and found one; last, those that have none.
    """

    def __init__(self, num_labels: int) -> None:
        self.table = torch.zeros(num_labels, num_labels + 1, dtype=torch.int64, device="cpu")

    def add(self, found: Tensor, truth: Tensor) -> None:
        """Count one image's pixels.

        Args:
            found: label of every pixel, int64 [h, w]; other values count as wrong.
            truth: the same; pixels with other values, such as -1 and 255, are ignored.

        Raises:
            ValueError: where sizes differ.
        """
        if found.shape != truth.shape:
            raise ValueError(f"found: expected the truth's size, {list(truth.shape)}; got {list(found.shape)}")
        count = len(self.table)
        inside = (truth >= 0) & (truth < count)
        found = torch.where((found >= 0) & (found < count), found, count)
        pairs = truth[inside] * (count + 1) + found[inside]
        self.table += torch.bincount(pairs, minlength=self.table.numel()).view_as(self.table)

    def ious(self) -> list[float | None]:
        """Intersection over union of each label; None for those that do not occur in the truth."""
        table = self.table.double()
        right, truth = table[:, :-1].diag(), table.sum(1)
        union = truth + table[:, :-1].sum(0) - right
        return [float(r / u) if n > 0 else None for r, u, n in zip(right, union, truth, strict=True)]

    def quality(self) -> SemanticQuality:
        """The means; zeros where nothing was counted."""
        table = self.table.double()
        right, truth, total = table[:, :-1].diag(), table.sum(1), table.sum()
        occurs = truth > 0
        if not occurs.any():
            return SemanticQuality(0.0, 0.0, 0.0, 0.0)
        iou = torch.tensor([x for x in self.ious() if x is not None], dtype=torch.float64, device="cpu")
        return SemanticQuality(
            iou.mean().item(),
            (iou * truth[occurs]).sum().item() / total.item(),
            (right[occurs] / truth[occurs]).mean().item(),
            right.sum().item() / total.item(),
        )


def mean_iou(found: Tensor, truth: Tensor, num_labels: int) -> float:
    """Mean over the labels that occur in `truth` of intersection over union: see :class:`SemanticCounts`."""
    counts = SemanticCounts(num_labels)
    counts.add(found, truth)
    return counts.quality().miou


def label_map(sample: Sample) -> Tensor:
    """int64 [H, W], the label of every pixel of a sample, crowds included; -1 where there is none."""
    labels = torch.full(sample["image"].shape[1:], -1, device="cpu")
    for name in ("crowd_", ""):
        for label, mask in zip(sample.get(f"{name}labels", ()), sample.get(f"{name}masks", ()), strict=True):
            labels[mask] = label
    return labels


# ---------------------------------------------------------------- models


class Batch(NamedTuple):
    """Some samples of one size, resized, and the model's output for them."""

    indices: list[int]
    samples: list[Sample]
    output: Mask2FormerOutput
    frames: list[Frame]


def predictions(
    model: Mask2Former,
    data: Dataset,
    indices: Iterable[int],
    batch_size: int = 8,
    image_size: tuple[int, int] | None = None,
) -> Iterator[Batch]:
    """Yields the outputs of `model` for samples of `data`, in batches, resized as in the published test.

    Args:
        model: left in the mode that it was in.
        data: samples.
        indices: which of them.
        batch_size: images at once, where successive ones have the same size.
        image_size: (short, long) side of the network's input, as :class:`Segmenter` takes it; by default what the
            model's configuration says.
    """
    was_training, config = model.training, model.config
    if image_size is not None:
        config = replace(config, image_size=image_size, keep_aspect_ratio=True)
    model.eval()
    weight = next(model.parameters())
    batch: list[tuple[int, Sample, Tensor, Frame]] = []

    def run() -> Batch:
        pixels = torch.cat([x for _, _, x, _ in batch]).to(weight.device, weight.dtype)
        numbers, samples, _, frames = (list(part) for part in zip(*batch, strict=True))
        with torch.inference_mode():
            return Batch(numbers, samples, model(pixels), frames)

    try:
        for i in indices:
            sample = data[i]
            pixels, frame = prepare(Image.fromarray(sample["image"].permute(1, 2, 0).numpy()), config)
            # The model has no mask for padding, so images of different sizes would change each other's results.
            if batch and (len(batch) == batch_size or pixels.shape != batch[0][2].shape):
                yield run()
                batch = []
            batch.append((i, sample, pixels, frame))
        if batch:
            yield run()
    finally:
        model.train(was_training)


def evaluate(
    model: Mask2Former,
    data: Dataset,
    count: int | None = None,
    batch_size: int = 8,
    image_size: tuple[int, int] | None = None,
) -> Quality:
    """Panoptic quality of `model` on samples of `data`, at their own size.

    Args:
        model: left in the mode that it was in.
        data: with the model's labels. Pixels in no target are background, unless the sample says that they are void.
        count: of samples, the first ones; by default all.
        batch_size, image_size: see :func:`predictions`.
    """
    counts = PanopticCounts(len(data.label_names))
    for batch in predictions(model, data, _first(data, count), batch_size, image_size):
        results = panoptic(batch.output, batch.frames, stuff_labels=data.stuff_labels, threshold=0.5)
        for found, sample in zip(results, batch.samples, strict=True):
            counts.add(Panoptic(found.segment_ids.cpu(), found.segments), sample)
    return counts.quality()


def evaluate_semantic(
    model: Mask2Former,
    data: Dataset,
    count: int | None = None,
    batch_size: int = 8,
    image_size: tuple[int, int] | None = None,
) -> SemanticQuality:
    """Mean intersection over union and related metrics; arguments as of :func:`evaluate`."""
    counts = SemanticCounts(len(data.label_names))
    for batch in predictions(model, data, _first(data, count), batch_size, image_size):
        results = semantic(batch.output, batch.frames, resize_scores=model.config.semantic_only)
        for found, sample in zip(results, batch.samples, strict=True):
            counts.add(found.cpu(), label_map(sample))
    return counts.quality()


def _first(data: Dataset, count: int | None) -> range:
    return range(len(data) if count is None else min(count, len(data)))
