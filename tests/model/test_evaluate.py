"""Panoptic quality and mean intersection over union, on cases counted by hand."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from m2f_model import Mask2Former, Segmenter
from m2f_model.data import Shapes
from m2f_model.evaluate import PanopticCounts, evaluate, mean_iou, panoptic_quality
from m2f_model.postprocess import Panoptic, Segment

MODEL = Path(__file__).parents[2] / "benchmarks" / "models" / "shapes"


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


def test_background_is_no_void():
    """Pixels that no instance covers are background: to fill them costs, and so does what is invented there."""
    truth = sample([(0, slice(0, 2))])
    assert panoptic_quality([(found([(0, slice(0, 10))]), truth)], 1).pq == 0
    assert panoptic_quality([(found([(0, slice(0, 3))]), truth)], 1).pq == pytest.approx(2 / 3)
    inventions = [(0, slice(i, i + 1)) for i in range(4, 10)]
    assert panoptic_quality([(found([(0, slice(0, 2)), *inventions]), truth)], 1).pq == pytest.approx(1 / (1 + 6 / 2))
    assert panoptic_quality([(found([(0, slice(0, 2)), (1, slice(5, 9))]), truth)], 2).pq == pytest.approx(1 / 2)


def test_void():
    """Predictions mostly in void are no mistakes, and void counts in no union."""
    truth = sample([(0, slice(0, 4))])
    truth["void"] = ~truth["masks"].any(0)
    assert panoptic_quality([(found([(0, slice(0, 4)), (1, slice(5, 9))]), truth)], 2).pq == 1
    assert panoptic_quality([(found([(0, slice(0, 9))]), truth)], 2).pq == 1
    assert panoptic_quality([(found([(0, slice(0, 2)), (1, slice(2, 6))]), truth)], 2).pq == pytest.approx(0)
    truth["void"][0, 7:] = False  # columns 4 to 6 are void, 7 to 9 background
    assert panoptic_quality([(found([(0, slice(0, 4)), (1, slice(4, 9))]), truth)], 2).pq == 1  # 3 of 5 in void
    assert panoptic_quality([(found([(0, slice(0, 4)), (1, slice(4, 10))]), truth)], 2).pq == 0.5  # 3 of 6
    assert panoptic_quality([(found([(0, slice(0, 9))]), truth)], 2).pq == pytest.approx(4 / 6)


def test_crowds_excuse_their_own_label():
    truth = sample([(0, slice(0, 4))])
    crowd = torch.zeros(2, 1, 10, dtype=torch.bool)
    crowd[0, 0, 4:7], crowd[1, 0, 6:8] = True, True  # they overlap: columns 4 to 7 are crowd
    truth |= {"crowd_labels": torch.tensor([0, 0]), "crowd_masks": crowd}
    right = (0, slice(0, 4))
    assert panoptic_quality([(found([right, (0, slice(4, 10))]), truth)], 2).pq == 1  # 4 of 6 in the crowd
    assert panoptic_quality([(found([right, (0, slice(5, 10))]), truth)], 2).pq == 1  # 3 of 5
    assert panoptic_quality([(found([right, (0, slice(6, 10))]), truth)], 2).pq == pytest.approx(2 / 3)  # 2 of 4
    assert panoptic_quality([(found([right, (1, slice(4, 10))]), truth)], 2).pq == pytest.approx(1 / 2)
    assert panoptic_quality([(found([(0, slice(0, 6))]), truth)], 2).pq == pytest.approx(4 / 6)  # it is in the union


def test_targets_that_overlap():
    """Each prediction takes the best target that is left."""
    truth = sample([(0, slice(0, 6)), (0, slice(0, 8))])
    quality = panoptic_quality([(found([(0, slice(0, 8))]), truth)], 1)
    assert quality == pytest.approx((1 / 1.5, 1.0, 1 / 1.5))


def test_things_and_stuff_apart():
    counts = PanopticCounts(3)
    counts.add(found([(0, slice(0, 3)), (1, slice(8, 10))]), sample(TRUTH))
    assert counts.quality([0]) == pytest.approx((0.5, 0.75, 2 / 3))
    assert counts.quality([1, 2]) == pytest.approx((1, 1, 1))
    assert counts.quality([2]) == (0, 0, 0)
    assert (counts.matched.tolist(), counts.missed.tolist(), counts.invented.tolist()) == (
        [1, 1, 0],
        [1, 0, 0],
        [0, 0, 0],
    )


def test_pairs_that_do_not_fit():
    with pytest.raises(ValueError, match=r"found: expected the sample's size, \[1, 10\]; got \[1, 9\]"):
        panoptic_quality([(Panoptic(torch.zeros(1, 9, dtype=torch.int32), []), sample(TRUTH))], 2)
    for rows, truth in [([(2, slice(0, 1))], TRUTH), ([], [(2, slice(0, 1))])]:
        with pytest.raises(ValueError, match="labels: expected less than num_labels = 2; got 2"):
            panoptic_quality([(found(rows), sample(truth))], 2)


class Growing:
    """Two pairs of images of the same size, and an image of another."""

    label_names, stuff_labels = Shapes.label_names, Shapes.stuff_labels
    samples = tuple(Shapes(seed=3, size=size)[i] for i, size in enumerate((64, 64, 96, 128, 128)))

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


def test_evaluation_is_that_of_the_segmenter():
    """The figure in a training's log is that of the images as `m2f segment` segments them, one by one."""
    model = Mask2Former.from_pretrained(MODEL).train()
    quality = evaluate(model, Growing(), image_size=(96, 160))
    assert model.training
    segmenter = Segmenter(model.eval(), "panoptic", image_size=(96, 160), threshold=0.5)
    images = (Image.fromarray(s["image"].permute(1, 2, 0).numpy()) for s in Growing.samples)
    pairs = [(segmenter(image), s) for image, s in zip(images, Growing.samples, strict=True)]
    assert 0.4 < quality.pq < 1
    assert quality == pytest.approx(panoptic_quality(pairs, 5), abs=1e-6)
    first = panoptic_quality(pairs[:3], 5)
    assert evaluate(model, Growing(), 3, batch_size=1, image_size=(96, 160)) == pytest.approx(first, abs=1e-6)


def test_images_add_up():
    pairs = [(found(TRUTH), sample(TRUTH)), (found([]), sample(TRUTH))]
    assert panoptic_quality(pairs, 2).pq == pytest.approx(2 / 3)


def test_mean_iou():
    truth, guess = torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 1, 1, 2]])
    assert mean_iou(truth, truth, 3) == 1
    assert mean_iou(guess, truth, 3) == pytest.approx((1 / 2 + 1 / 3) / 2)


def test_images_without_anything():
    """An empty image changes nothing; what is found in one is one too many; a crowd is neither found nor missed."""
    empty, all_void = sample([]), sample([])
    all_void["void"] = torch.ones(1, 10, dtype=torch.bool)
    crowd = sample([]) | {"crowd_labels": torch.tensor([0]), "crowd_masks": torch.ones(1, 1, 10, dtype=torch.bool)}
    right = (found(TRUTH), sample(TRUTH))
    assert panoptic_quality([right, (found([]), empty)], 2).pq == 1
    assert panoptic_quality([right, (found([(1, slice(0, 2))]), empty)], 2).pq == pytest.approx((1 + 1 / 1.5) / 2)
    assert panoptic_quality([right, (found([(1, slice(0, 2))]), all_void)], 2).pq == 1
    assert panoptic_quality([right, (found([(0, slice(0, 2))]), crowd)], 2).pq == 1
    assert panoptic_quality([right, (found([]), crowd)], 2).pq == 1
    assert panoptic_quality([(found([]), empty)], 2) == (0, 0, 0)


def test_qualities_of_labels():
    counts = PanopticCounts(4)
    counts.add(found([(0, slice(0, 3)), (2, slice(8, 10))]), sample(TRUTH))
    assert counts.qualities()[0] == pytest.approx((0.5, 0.75, 2 / 3))
    assert counts.qualities()[1:] == [(0, 0, 0), (0, 0, 0), None]
