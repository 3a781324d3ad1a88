"""How good segmentations are: panoptic quality and mean intersection over union."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from m2f_model.data import Dataset, Sample, collate
from m2f_model.model import Mask2Former
from m2f_model.postprocess import Frame, Panoptic, panoptic


class Quality(NamedTuple):
    """Panoptic quality (Kirillov et al. 2019, section 4.2), means over the labels that occur: pq = about sq * rq."""

    pq: float
    sq: float
    rq: float


def panoptic_quality(pairs: Iterable[tuple[Panoptic, Sample]], num_labels: int) -> Quality:
    """Compare predictions with samples of the same size. Pixels in no target are void: they count for nothing.

    A predicted and a true segment of the same label match if their intersection over union exceeds 1/2, which at most
    one can. An unmatched prediction that lies in void by more than half is no mistake.
    """
    iou_sum = torch.zeros(num_labels, dtype=torch.float64)
    matched, missed, invented = (torch.zeros(num_labels, dtype=torch.float64) for _ in range(3))
    for found, sample in pairs:
        labels = sample["labels"].tolist()
        truth = sample["masks"].flatten(1)
        void = ~truth.any(0)
        taken: set[int] = set()
        for segment in found.segments:
            pixels = (found.segment_ids == segment.id).flatten()
            overlap = (truth & pixels).sum(1)
            union = truth.sum(1) + (pixels & ~void).sum() - overlap
            iou = overlap / union.clamp(min=1)
            match = next((j for j, x in enumerate(iou.tolist()) if x > 0.5 and labels[j] == segment.label), None)
            if match is not None:
                taken.add(match)
                iou_sum[segment.label] += iou[match].item()
                matched[segment.label] += 1
            elif 2 * (pixels & void).sum() <= pixels.sum():
                invented[segment.label] += 1
        for j, label in enumerate(labels):
            missed[label] += j not in taken
    occurs = matched + missed + invented > 0
    rq = matched / (matched + missed / 2 + invented / 2).clamp(min=1)
    sq = iou_sum / matched.clamp(min=1)
    pq = iou_sum / (matched + missed / 2 + invented / 2).clamp(min=1)
    return Quality(*(x[occurs].mean().item() if occurs.any() else 0.0 for x in (pq, sq, rq)))


@torch.inference_mode()
def evaluate(model: Mask2Former, data: Dataset, count: int | None = None, batch_size: int = 8) -> Quality:
    """Panoptic quality of `model`, which is left in the mode it was in, on the first `count` samples as they are."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device

    def pairs() -> Iterable[tuple[Panoptic, Sample]]:
        total = len(data) if count is None else min(count, len(data))
        for start in range(0, total, batch_size):
            samples = [data[i] for i in range(start, min(start + batch_size, total))]
            pixels, _ = collate(samples)
            sizes = [(s["image"].shape[1], s["image"].shape[2]) for s in samples]
            frames = [Frame((pixels.shape[2], pixels.shape[3]), size, size) for size in sizes]
            found = panoptic(model(pixels.to(device)), frames, stuff_labels=data.stuff_labels, threshold=0.5)
            yield from ((Panoptic(f.segment_ids.cpu(), f.segments), s) for f, s in zip(found, samples, strict=True))

    quality = panoptic_quality(pairs(), len(data.label_names))
    model.train(was_training)
    return quality


def mean_iou(found: Tensor, truth: Tensor, num_labels: int) -> float:
    """Mean over the labels that occur in `truth` of intersection over union; labels int64 [h, w], equal sizes."""
    pairs = torch.bincount((truth * num_labels + found).flatten(), minlength=num_labels**2)
    table = pairs.view(num_labels, num_labels).double()
    occurs = table.sum(1) > 0
    union = table.sum(0) + table.sum(1) - table.diag()
    return (table.diag()[occurs] / union[occurs]).mean().item()
