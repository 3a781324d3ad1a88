"""Loss and gradients of every parameter, against `transformers`' model at the same points."""

import dataclasses

import pytest
import torch

import m2f_kernels
from m2f_kernels.nn import hungarian_matcher, point_mask_criterion
from m2f_model import Mask2Former, Mask2FormerConfig
from m2f_model.weights import from_huggingface
from tests.model.peers import CONFIGS, photograph, published, their_model

LOSSES = ("loss_cross_entropy", "loss_mask", "loss_dice")


@pytest.fixture(autouse=True)
def fixed_points(monkeypatch):
    """Both criteria look at the same points: the first k of one sequence wherever they want k."""
    points = torch.rand(20000, 2, generator=torch.Generator().manual_seed(7))

    class Random:
        def __getattr__(self, name):
            return getattr(torch, name)

        @staticmethod
        def rand(*shape, **_):
            return points[: shape[-2]].expand(*shape)

    def ours(masks, targets, pairs, count, *_):
        rows = sum(len(queries) for queries, _ in pairs)
        return m2f_kernels.point_mask_loss(masks, targets, points[:count].expand(rows, -1, -1), matches=pairs)

    def theirs(self, logits, uncertainty, count, *_):
        return points[:count].expand(logits.shape[0], -1, -1)

    monkeypatch.setattr(hungarian_matcher, "torch", Random())
    monkeypatch.setattr(point_mask_criterion, "uncertain_point_mask_loss", ours)
    monkeypatch.setattr(published, "torch", Random())
    monkeypatch.setattr(published.Mask2FormerLoss, "sample_points_using_uncertainty", theirs)


def scene():
    """Two photographs and masks cut out of their brightness: 4 targets in one, 2 in the other."""
    pixels = torch.cat([photograph("astronaut", 96, 160), photograph("coffee", 96, 160)])
    grey = pixels.mean(1)
    bands = [[-2, -0.8, 0, 0.6], [-0.5, 0.4]]
    masks = [torch.stack([(g > low) & (g < low + 1) for low in band]) for g, band in zip(grey, bands, strict=True)]
    labels = [torch.tensor([0, 3, 3, 4]), torch.tensor([2, 1])]
    return pixels, masks, labels


def run_both(name):
    theirs = their_model(name)
    config = dataclasses.replace(Mask2FormerConfig.from_transformers(theirs.config), frozen_batch_norm=False)
    ours = Mask2Former(config).eval()
    ours.load_state_dict(from_huggingface(theirs.state_dict()))
    pixels, masks, labels = scene()
    targets = [{"labels": label, "masks": mask} for label, mask in zip(labels, masks, strict=True)]
    with m2f_kernels.use_backend("reference"):
        out = ours(pixels, targets)
        sum(out.losses.values()).backward()
    their_dict = {}
    theirs.criterion.register_forward_hook(lambda _, __, losses: their_dict.update(losses))
    expected = theirs(pixels, mask_labels=[m.float() for m in masks], class_labels=labels)
    expected.loss.backward()
    return ours, theirs, out.losses, their_dict, expected.loss


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients(name):
    ours, theirs, losses, their_losses, total = run_both(name)
    # Their dictionary holds all outputs, their own weights already in it.
    assert losses.keys() == their_losses.keys()
    for key in losses:
        torch.testing.assert_close(losses[key], their_losses[key], rtol=1e-4, atol=0, msg=lambda m, k=key: f"{k}: {m}")
    torch.testing.assert_close(sum(losses.values()), total, rtol=1e-4, atol=0)

    expected = from_huggingface({k: p.grad for k, p in theirs.named_parameters() if p.grad is not None})
    found = {k: p.grad for k, p in ours.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    assert len(found) > 100
    scale = max(g.norm() for g in expected.values())
    errors = {k: ((found[k] - g).norm() / max(g.norm(), 1e-6 * scale)).item() for k, g in expected.items()}
    worst = max(errors, key=errors.get)
    assert errors[worst] < 1e-3, f"{worst}: {errors[worst]:.2g}"
