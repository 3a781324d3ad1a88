"""Loss and gradients of every parameter, against `transformers`' model at the same points."""

import dataclasses

import pytest
import torch

import m2f_kernels
from m2f_model import Mask2Former, Mask2FormerConfig
from m2f_model.weights import from_huggingface
from tests.model.peers import CONFIGS, fix_points, photograph, their_model


@pytest.fixture(autouse=True)
def _fixed_points(monkeypatch):
    fix_points(monkeypatch.setattr)


def scene():
    """Two photographs and masks cut out of their brightness: 4 targets in one, 2 in the other."""
    pixels = torch.cat([photograph("astronaut", 96, 160), photograph("coffee", 96, 160)])
    # Ours takes this layout on CPU. In both, for convolutions that round alike: a ReLU that rounding switches on or off
    # changes its weights' gradient by 2e-3 in these small models.
    pixels = pixels.contiguous(memory_format=torch.channels_last)
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
