"""Panoptic quality and mean intersection over union, on cases counted by hand."""

import pytest
import torch

from m2f_model.evaluate import mean_iou, panoptic_quality
from m2f_model.postprocess import Panoptic, Segment


def sample(rows):
    """One target per (label, columns) of an image of one row and ten columns."""
    masks = torch.zeros(len(rows), 1, 10, dtype=torch.bool)
    for i, (_, columns) in enumerate(rows):
        masks[i, 0, columns] = True
    return {"image": torch.zeros(3, 1, 10), "labels": torch.tensor([label for label, _ in rows]), "masks": masks}


def found(rows):
    ids, segments = torch.zeros(1, 10, dtype=torch.int32), []
    for i, (label, columns) in enumerate(rows, 1):
        ids[0, columns] = i
        segments.append(Segment(i, label, 1.0, False))
    return Panoptic(ids, segments)


TRUTH = [(0, slice(0, 4)), (0, slice(4, 8)), (1, slice(8, 10))]


@pytest.mark.parametrize(
    ("rows", "pq", "sq", "rq"),
    [
        (TRUTH, 1.0, 1.0, 1.0),
        # Label 0: one matches with 3/4, one is missed: 0.75 / 1.5. Label 1 matches.
        ([(0, slice(0, 3)), (1, slice(8, 10))], (0.5 + 1) / 2, (0.75 + 1) / 2, (2 / 3 + 1) / 2),
        # Half is not more than half: an invention and a miss.
        ([(0, slice(0, 4)), (0, slice(4, 6)), (1, slice(8, 10))], (0.5 + 1) / 2, 1.0, (0.5 + 1) / 2),
        # The wrong label; label 2 is invented.
        ([(0, slice(0, 4)), (0, slice(4, 8)), (2, slice(8, 10))], 1 / 3, 1 / 3, 1 / 3),
        ([], 0.0, 0.0, 0.0),
    ],
)
def test_panoptic_quality(rows, pq, sq, rq):
    quality = panoptic_quality([(found(rows), sample(TRUTH))], 3)
    assert quality == pytest.approx((pq, sq, rq))


def test_void():
    """Predictions mostly in void are no mistakes, and void counts in no union."""
    truth = sample([(0, slice(0, 4))])
    assert panoptic_quality([(found([(0, slice(0, 4)), (1, slice(5, 9))]), truth)], 2).pq == 1
    assert panoptic_quality([(found([(0, slice(0, 9))]), truth)], 2).pq == 1
    assert panoptic_quality([(found([(0, slice(0, 2)), (1, slice(2, 6))]), truth)], 2).pq == pytest.approx(0)


def test_images_add_up():
    pairs = [(found(TRUTH), sample(TRUTH)), (found([]), sample(TRUTH))]
    assert panoptic_quality(pairs, 2).pq == pytest.approx(2 / 3)


def test_mean_iou():
    truth, guess = torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 1, 1, 2]])
    assert mean_iou(truth, truth, 3) == 1
    assert mean_iou(guess, truth, 3) == pytest.approx((1 / 2 + 1 / 3) / 2)
