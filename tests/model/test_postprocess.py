"""Post-processing: `compatible` is `transformers`' image processor, `original` the published evaluation."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

from m2f_kernels import FactoredMasks
from m2f_model import Mask2Former, Mask2FormerOutput, postprocess
from m2f_model.postprocess import Frame, instance, panoptic, semantic
from tests.model.peers import photograph, their_model

FRAMES = [Frame((96, 160), (96, 140), (210, 301)), Frame((96, 160), (80, 160), (33, 65))]


def blobs(num_labels=5, queries=12, seed=0, sharpness=8.0):
    """An output with confident classes and overlapping round masks, for two images."""
    generator = torch.Generator().manual_seed(seed)
    n, (h, w) = 2, (24, 40)
    y, x = torch.meshgrid(torch.arange(h) / h, torch.arange(w) / w, indexing="ij")
    # Masks linear in (x² + y², x, y, 1) are discs.
    features = torch.stack([x**2 + y**2, x, y, torch.ones_like(x)]).expand(n, -1, -1, -1)
    cx, cy = torch.rand(2, n, queries, generator=generator)
    radius = 0.05 + 0.2 * torch.rand(n, queries, generator=generator)
    embed = 60 * torch.stack([-torch.ones_like(cx), 2 * cx, 2 * cy, radius**2 - cx**2 - cy**2], -1)
    logits = sharpness * F.one_hot(torch.randint(num_labels + 1, (n, queries), generator=generator), num_labels + 1)
    return Mask2FormerOutput(
        logits + torch.randn(logits.shape, generator=generator), FactoredMasks(embed, features), []
    )


def published(output, frame, i):
    """Class logits, and mask logits at the image's size: resized to the input, cut, resized (the whole tensor)."""
    masks = F.interpolate(output.masks.logits()[i : i + 1], frame.padded, mode="bilinear", align_corners=False)
    cut = masks[..., : frame.content[0], : frame.content[1]]
    return output.class_logits[i], masks[0], F.interpolate(cut, frame.original, mode="bilinear", align_corners=False)[0]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("resize_scores", [False, True])
def test_semantic_as_published(resize_scores, seed):
    """The masks are resized first; for models of semantic segmentation alone, the sums of them."""
    output = blobs(seed=seed, queries=37)
    others, apart = semantic(output, FRAMES, resize_scores=not resize_scores), 0.0
    for i, (found, frame) in enumerate(zip(semantic(output, FRAMES, resize_scores=resize_scores), FRAMES, strict=True)):
        logits, at_input, masks = published(output, frame, i)
        masks = at_input if resize_scores else masks
        scores = torch.einsum("qc,qhw->chw", logits.softmax(-1)[:, :-1], masks.sigmoid())
        if resize_scores:
            cut = scores[None, :, : frame.content[0], : frame.content[1]]
            scores = F.interpolate(cut, frame.original, mode="bilinear", align_corners=False)[0]
        assert found.shape == frame.original
        best = scores.gather(0, found[None])[0]
        assert (scores.amax(0) - best).max() < 1e-5  # the same label, or an equal one
        assert (found == scores.argmax(0)).float().mean() > 0.999
        apart = max(apart, (scores.amax(0) - scores.gather(0, others[i][None])[0]).max().item())
    assert apart > 1e-4, "the case cannot tell them apart"


@pytest.mark.parametrize("seed", range(3))
def test_instance_as_published(seed):
    output = blobs(seed=seed, queries=37)
    for i, (found, frame) in enumerate(zip(instance(output, FRAMES, top_k=60), FRAMES, strict=True)):
        logits, _, masks = published(output, frame, i)
        scores, index = logits.softmax(-1)[:, :-1].flatten().topk(60)
        masks = masks[index // 5]
        binary = (masks > 0).float()
        scores = scores * (masks.sigmoid() * binary).flatten(1).sum(1) / (binary.flatten(1).sum(1) + 1e-6)
        seen = binary.flatten(1).any(1)
        assert torch.equal(found.labels, (index % 5)[seen])
        assert torch.equal(found.masks, binary[seen].bool())
        torch.testing.assert_close(found.scores, scores[seen])
        kept = instance(output, FRAMES, top_k=60, threshold=0.3, stuff_labels=[2])[i]
        expected = (found.scores >= 0.3) & (found.labels != 2)
        assert 0 < expected.sum() < len(expected)
        assert torch.equal(kept.masks, found.masks[expected])
        assert torch.equal(kept.scores, found.scores[expected])


def published_panoptic(logits, masks, stuff):
    """Pixel by pixel over all masks, in numpy."""
    scores, labels = (x.numpy() for x in logits.softmax(-1).max(-1))
    keep = (labels != logits.shape[-1] - 1) & (scores > 0.8)
    scores, labels, masks = scores[keep], labels[keep], masks.sigmoid().numpy()[keep]
    ids, segments, stuff_ids = np.zeros(masks.shape[1:], int), [], {}
    owner = (scores[:, None, None] * masks).argmax(0)
    for k in range(len(scores)):
        area, original = (owner == k).sum(), (masks[k] >= 0.5).sum()
        pixels = (owner == k) & (masks[k] >= 0.5)
        if area == 0 or original == 0 or pixels.sum() == 0 or area / original < 0.8:
            continue
        if labels[k] in stuff and labels[k] in stuff_ids:
            ids[pixels] = stuff_ids[labels[k]]
            continue
        segments.append((len(segments) + 1, labels[k], labels[k] in stuff))
        stuff_ids[labels[k]] = len(segments)
        ids[pixels] = len(segments)
    return ids, segments


@pytest.mark.parametrize("seed", range(6))
def test_panoptic_as_published(seed):
    output, stuff = blobs(seed=seed, queries=20), {0, 1, 2}
    for i, (found, frame) in enumerate(zip(panoptic(output, FRAMES, stuff_labels=stuff), FRAMES, strict=True)):
        logits, _, masks = published(output, frame, i)
        ids, segments = published_panoptic(logits, masks, stuff)
        assert segments, "the case is empty"
        assert np.array_equal(found.segment_ids.numpy(), ids)
        assert [(s.id, s.label, s.is_stuff) for s in found.segments] == segments


def test_stuff_is_one_segment_and_things_are_many():
    output = blobs(queries=20, seed=2)
    things = panoptic(output, FRAMES)[1].segments
    fused = panoptic(output, FRAMES, stuff_labels=range(5))[1].segments
    assert len({s.label for s in things}) < len(things)
    assert len({s.label for s in fused}) == len(fused)


def theirs(output):
    return transformers.models.mask2former.modeling_mask2former.Mask2FormerForUniversalSegmentationOutput(
        class_queries_logits=output.class_logits, masks_queries_logits=output.masks.logits()
    )


@pytest.mark.parametrize("seed", range(2))
def test_compatible_is_their_processor(seed):
    output, processor = blobs(seed=seed), transformers.Mask2FormerImageProcessorPil()
    sizes = [frame.original for frame in FRAMES]
    expected = processor.post_process_semantic_segmentation(theirs(output), sizes)
    assert all(map(torch.equal, semantic(output, FRAMES, mode="compatible"), expected))

    found = panoptic(output, FRAMES, stuff_labels={1}, mode="compatible", threshold=0.5)
    expected = processor.post_process_panoptic_segmentation(theirs(output), 0.5, 0.5, 0.8, {1}, sizes)
    for ours, their in zip(found, expected, strict=True):
        assert ours.segments
        assert torch.equal(ours.segment_ids, their["segmentation"].clamp(min=0).int())
        assert [(s.id, s.label, s.score) for s in ours.segments] == [
            (s["id"], s["label_id"], s["score"]) for s in their["segments_info"]
        ]

    found = instance(output, FRAMES, mode="compatible", threshold=0.4)
    expected = processor.post_process_instance_segmentation(
        theirs(output), 0.4, target_sizes=sizes, return_binary_maps=True
    )
    for ours, their in zip(found, expected, strict=True):
        assert torch.equal(ours.masks, their["segmentation"].bool())
        assert ours.labels.tolist() == [s["label_id"] for s in their["segments_info"]]


def test_compatible_from_weights_to_maps(tmp_path):
    """The whole way: the same weights and photograph, their model and processor, our model and post-processing."""
    model = their_model("swin")
    model.save_pretrained(tmp_path)
    pixels = photograph("astronaut", 96, 160)
    with torch.no_grad():
        ours = Mask2Former.from_pretrained(tmp_path)(pixels)
        expected = transformers.Mask2FormerImageProcessorPil().post_process_semantic_segmentation(
            model(pixels), [(200, 333)]
        )
    (found,) = semantic(ours, [Frame((96, 160), (96, 160), (200, 333))], mode="compatible")
    assert (found == expected[0]).float().mean() > 0.9999


def in_one(output, frame, resize_scores):
    """Masks [q, h, w] at the image's size, or scores [C, h, w], by the published steps for the whole image at once."""

    def resize(x, size):
        return F.interpolate(x[None], size=size, mode="bilinear", align_corners=False)[0]

    masks = resize(output.masks.logits()[0].float(), frame.padded)
    probability = output.class_logits[0].softmax(-1)[:, :-1]
    cut = lambda x: resize(x[:, : frame.content[0], : frame.content[1]], frame.original)  # noqa: E731
    scores = torch.einsum("qc,qhw->chw", probability, masks.sigmoid() if resize_scores else cut(masks).sigmoid())
    return cut(masks), cut(scores) if resize_scores else scores


@pytest.mark.parametrize(
    "frame",
    [
        Frame((96, 160), (90, 140), (211, 301)),
        Frame((96, 160), (96, 160), (37, 53)),
        Frame((64, 64), (64, 10), (160, 25)),
        Frame((32, 64), (1, 64), (1, 200)),
    ],
    ids=str,
)
@pytest.mark.parametrize("strip", [1, 20_000, 10**9])
def test_strips_are_the_whole(frame, strip, monkeypatch, generator):
    """Enlarged and reduced images in strips of one row, of a few, and at once."""
    monkeypatch.setattr(postprocess, "_STRIP_BYTES", strip)
    h, w = (side // 4 for side in frame.padded)
    masks = FactoredMasks(torch.randn(1, 12, 4, generator=generator), 2 * torch.randn(1, 4, h, w, generator=generator))
    output = Mask2FormerOutput(3 * torch.randn(1, 12, 6, generator=generator), masks, [])
    for resize_scores in (False, True):
        expected, scores = in_one(output, frame, resize_scores)
        (found,) = postprocess.semantic(output, [frame], resize_scores=resize_scores)
        chosen = scores.gather(0, found[None])[0]
        torch.testing.assert_close(chosen, scores.amax(0), rtol=0, atol=1e-5)  # equals up to rounding
        assert (found == scores.argmax(0)).float().mean() > 0.999
    (found,) = postprocess.instance(output, [frame], top_k=20)
    probability, pairs = output.class_logits[0].softmax(-1)[:, :-1].flatten().topk(20)
    inside = expected[pairs // 5] > 0
    mean = (expected[pairs // 5].sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)
    keep = inside.flatten(1).any(1)
    assert found.labels.tolist() == (pairs % 5)[keep].tolist()
    torch.testing.assert_close(found.scores, (probability * mean)[keep], rtol=1e-4, atol=1e-6)
    assert (found.masks != inside[keep]).float().mean() < 1e-3
    (found,) = postprocess.panoptic(output, [frame], threshold=0.3, overlap_threshold=0.1, stuff_labels=[0])
    monkeypatch.setattr(postprocess, "_STRIP_BYTES", 10**12)
    (whole,) = postprocess.panoptic(output, [frame], threshold=0.3, overlap_threshold=0.1, stuff_labels=[0])
    assert found.segments == whole.segments
    assert (found.segment_ids != whole.segment_ids).float().mean() < 1e-3


@pytest.mark.parametrize("mode", ["original", "compatible"])
def test_nothing_found(mode):
    output = blobs()
    nothing = output._replace(class_logits=torch.zeros_like(output.class_logits))
    for found in panoptic(nothing, FRAMES, mode=mode):
        assert found.segments == []
        assert not found.segment_ids.any()
    for found, frame in zip(instance(nothing, FRAMES, threshold=0.9, mode=mode), FRAMES, strict=True):
        assert found.masks.shape == (0, *frame.original)


@pytest.mark.parametrize("function", [semantic, instance, panoptic])
def test_bad_input(function):
    with pytest.raises(ValueError, match="mode: expected one of 'original', 'compatible'; got 'fast'"):
        function(blobs(), FRAMES, mode="fast")
    with pytest.raises(ValueError, match="frames: expected one per image, 2; got 1"):
        function(blobs(), FRAMES[:1])
