"""It learns: synthetic shapes, and a real photograph by heart. Minutes."""

import numpy as np
import pytest
import skimage.data
import skimage.filters
import skimage.segmentation
import torch
from scipy import ndimage

import m2f_kernels
from benchmarks.inputs import SHAPES_MODEL
from m2f_model import Mask2Former, Mask2FormerConfig
from m2f_model.data import Shapes, collate
from m2f_model.evaluate import evaluate
from m2f_model.postprocess import Frame, panoptic
from m2f_model.train import Recipe, Trainer


class Coins:
    """The photograph of coins, labelled as scikit-image's example of watershed segmentation labels it."""

    label_names = ("coin", "background")
    stuff_labels = (1,)

    def __init__(self):
        coins = skimage.data.coins()
        markers = np.zeros_like(coins)
        markers[coins < 30], markers[coins > 150] = 1, 2
        region = skimage.segmentation.watershed(skimage.filters.sobel(coins), markers)
        ids, count = ndimage.label(ndimage.binary_fill_holes(region - 1))
        masks = torch.from_numpy(np.stack([ids == i for i in range(1, count + 1)]))
        masks = masks[masks.flatten(1).sum(1) > 100]  # specks of a few pixels are no coins
        background = ~masks.any(0, keepdim=True)
        self.sample = {
            "image": torch.from_numpy(coins).expand(3, -1, -1).contiguous(),
            "labels": torch.tensor([0] * len(masks) + [1]),
            "masks": torch.cat([masks, background]),
        }

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return self.sample


@pytest.mark.slow
def test_coins_by_heart(tmp_path):
    data = Coins()
    labels, masks = data.sample["labels"], data.sample["masks"]
    assert len(labels) == 25  # 24 coins
    config = Mask2FormerConfig.tiny(2, num_queries=40, stuff_labels=data.stuff_labels, frozen_batch_norm=True)
    torch.manual_seed(0)
    recipe = Recipe.shapes(steps=500, batch_size=1, save_every=500, evaluate_every=500)
    model = Mask2Former(config)
    Trainer(model, data, recipe, tmp_path, log=print).run()
    pixels, _ = collate([data.sample])
    height, width = masks.shape[1:]
    frame = Frame((pixels.shape[2], pixels.shape[3]), (height, width), (height, width))
    with torch.no_grad():
        (found,) = panoptic(model.eval()(pixels), [frame], stuff_labels=data.stuff_labels, threshold=0.5)
    ious = []
    for label, mask in zip(labels.tolist(), masks, strict=True):
        candidates = [found.segment_ids == s.id for s in found.segments if s.label == label]
        ious.append(max(((c & mask).sum() / (c | mask).sum()).item() for c in candidates))
    print(f"mean intersection over union {np.mean(ious):.3f}, smallest {min(ious):.3f}")
    assert np.mean(ious) >= 0.9, ious


@pytest.mark.slow
def test_shapes(tmp_path):
    """The recipe of `m2f train --data shapes`."""
    torch.manual_seed(0)
    config = Mask2FormerConfig.tiny(5, stuff_labels=Shapes.stuff_labels, label_names=Shapes.label_names)
    model = Mask2Former(config)
    Trainer(model, Shapes(), Recipe.shapes(), tmp_path, log=print).run()
    quality = evaluate(Mask2Former.from_pretrained(tmp_path), Shapes(length=200, seed=1))
    print(quality)
    assert quality.pq >= 0.8
    assert (tmp_path / "model.safetensors").stat().st_size < 10e6


def test_trained_masks_in_bfloat16():
    """Masks of the trained model under autocast are those of float32, but for pixels at their edges."""
    model = Mask2Former.from_pretrained(SHAPES_MODEL)
    data = Shapes(length=20, seed=1)
    pixels, _ = collate([data[i] for i in range(20)])
    with torch.no_grad():
        precise = model(pixels)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(pixels)
    found = precise.class_logits.softmax(-1)[..., :-1].amax(-1) > 0.5  # queries that are a segment
    a, b = (out.masks.logits()[found] > 0 for out in (precise, rounded))
    ious = (a & b).flatten(1).sum(1) / (a | b).flatten(1).sum(1).clamp(min=1)
    print(f"{len(ious)} masks, mean intersection over union {ious.mean():.4f}, smallest {ious.min():.3f}")
    assert len(ious) > 60
    assert ious.mean() >= 0.98


def test_backends_learn_alike(tmp_path):
    """The first losses on the kernels are those on the reference; then Adam, which moves a weight by as much for a
    gradient that is rounding as for any other, makes them part. The whole curves: benchmarks/tools/learning.py."""
    curves = []
    for backend in ("auto", "reference"):
        losses = []
        with m2f_kernels.use_backend(backend):
            torch.manual_seed(0)
            recipe = Recipe.shapes(steps=4, batch_size=2, evaluate_every=4)
            run = Trainer(Mask2Former(Mask2FormerConfig.tiny(5)), Shapes(), recipe, tmp_path / backend, log=print)
            for pixels, targets in run._batches(4):
                losses.append(sum(run.update(pixels, targets)[0].values()).item())
        curves.append(losses)
    assert len(set(curves[0])) == 4
    assert curves[0] == pytest.approx(curves[1], rel=2e-3)
