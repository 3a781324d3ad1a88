"""The same weights give the same predictions as `transformers`' model, on photographs of sizes that are not square."""

import pytest
import torch

import m2f_kernels
from m2f_model import Mask2Former, bench, transformer_decoder
from tests.model.peers import CONFIGS, photograph, their_model

PHOTOGRAPHS = [("astronaut", 96, 160), ("chelsea", 150, 101), ("coffee", 64, 64)]


def both(name, tmp_path):
    theirs = their_model(name)
    theirs.save_pretrained(tmp_path)
    return theirs, Mask2Former.from_pretrained(tmp_path)


def predictions_of(ours, theirs, pixels):
    """Class and mask logits of all predictions, ours and theirs, first to last."""
    with torch.no_grad():
        out = ours(pixels)
        expected = theirs(pixels, output_auxiliary_logits=True)
    mine = [*((a.class_logits, a.masks.logits()) for a in out.auxiliary), (out.class_logits, out.masks.logits())]
    last = (expected.class_queries_logits, expected.masks_queries_logits)
    published = [*((a["class_queries_logits"], a["masks_queries_logits"]) for a in expected.auxiliary_logits), last]
    return mine, published


def assert_same(mine, published, tolerance):
    assert len(mine) == len(published)
    for i, (ours, theirs) in enumerate(zip(mine, published, strict=True)):
        for kind, a, b in zip(("classes", "masks"), ours, theirs, strict=True):
            assert a.shape == b.shape
            error = ((a - b).abs().max() / b.abs().max()).item()
            assert error < tolerance, f"prediction {i}, {kind}: {error:.2g}"


@pytest.mark.parametrize("name", CONFIGS)
def test_exactly_the_published_function(name, tmp_path):
    """In float64, where no attention mask flips by rounding."""
    theirs, ours = both(name, tmp_path)
    for photo in PHOTOGRAPHS:
        mine, published = predictions_of(ours.double(), theirs.double(), photograph(*photo).double())
        assert_same(mine, published, 1e-8)
        # The weights are such that later predictions differ from the first: the decoder is not a bystander.
        assert (mine[-1][1] - mine[0][1]).abs().max() > 0.1 * mine[0][1].abs().max()


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", CONFIGS)
def test_float32(name, backend, tmp_path):
    theirs, ours = both(name, tmp_path)
    for photo in PHOTOGRAPHS:
        with m2f_kernels.use_backend(backend):
            assert_same(*predictions_of(ours, theirs, photograph(*photo)), 1e-4)


def test_batches(tmp_path):
    theirs, ours = both("swin", tmp_path)
    pixels = torch.cat([photograph("astronaut", 96, 130), photograph("coffee", 96, 130)])
    mine, published = predictions_of(ours.double(), theirs.double(), pixels.double())
    assert_same(mine, published, 1e-8)


@pytest.mark.slow
def test_bits_of_attention_masks_at_1024(monkeypatch):
    """R50 at 1024²: what parts the predictions in float32 is a few bits of all nine attention masks.

    How many depends on the number of threads, and each that flips moves the logits of later layers.
    """
    case = bench.Case("r50", 1024)
    theirs, ours = (bench.build(case, name) for name in bench.IMPLEMENTATIONS)
    published, mine = [], []
    for layer in theirs.model.transformer_module.decoder.layers:
        layer.register_forward_pre_hook(
            lambda _, __, kwargs: published.append(~kwargs["encoder_attention_mask"]), with_kwargs=True
        )

    def keep(*arguments):
        mine.append(m2f_kernels.predict_attention_mask(*arguments))
        return mine[-1]

    monkeypatch.setattr(transformer_decoder, "predict_attention_mask", keep)
    bench.call(case, theirs)()
    bench.call(case, ours)()
    different = total = 0
    for blocked, packed in zip(published, mine, strict=True):
        attend = blocked.view(1, 8, 100, -1)[:, 0]
        bits = (packed.bits.long()[..., None] >> torch.arange(32) & 1).flatten(2)[..., : attend.shape[-1]].bool()
        bits |= ~bits.any(-1, keepdim=True)  # a row without a pixel attends everywhere
        different, total = different + int((bits != attend).sum()), total + attend.numel()
    print(f"{different} of {total} bits differ")
    assert len(mine) == 9
    assert different <= 1e-5 * total
