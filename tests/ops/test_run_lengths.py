"""COCO's run lengths: read, encoded, decoded, and refused where they are wrong."""

import re

import numpy as np
import pytest
import torch

import m2f_kernels
from m2f_kernels import RunLengths, run_lengths
from tests.ops.test_instance_map import counts

SIZE = (9, 7)


def dense(generator, size=SIZE):
    found = torch.rand(4, *size, generator=generator) > 0.5
    found[1], found[2] = False, True
    return found


@pytest.mark.parametrize("size", [SIZE, (1, 1), (1, 6), (6, 1), (64, 50)], ids=str)
@pytest.mark.parametrize("compressed", ["list", "array", "bytes", "str"])
def test_read(generator, size, compressed):
    """Every form has the runs that the dense masks have, and gives them back."""
    masks = dense(generator, size)
    encoded = [{"size": list(size), "counts": counts(x)} for x in masks]
    if compressed == "array":
        encoded = [{**x, "counts": np.array(x["counts"], np.uint32)} for x in encoded]
    elif compressed != "list":
        coco = pytest.importorskip("pycocotools.mask")
        encoded = [coco.frPyObjects(x, *size) for x in encoded]
        if compressed == "str":
            encoded = [{**x, "counts": x["counts"].decode()} for x in encoded]
    read, made = RunLengths.from_coco(encoded), RunLengths.from_masks(masks)
    assert read.shape == made.shape == masks.shape
    assert torch.equal(read.runs, made.runs)
    assert torch.equal(read.masks(), masks)
    assert run_lengths.problem(*read) is None


def test_lengths_of_nothing():
    """Runs of no pixels join those around them, wherever they lie."""
    given = [[0, 3, 0, 0, 0, 2, 1], [3, 0, 0, 0, 3], [3, 3, 0], [0, 0, 0, 6, 0, 0], [6, 0, 0, 0]]
    expected = ["111110", "000000", "000111", "111111", "000000"]
    read = RunLengths.from_coco([{"size": [2, 3], "counts": x} for x in given])
    assert run_lengths.problem(*read) is None
    assert ["".join(map(str, x.T.flatten().int().tolist())) for x in read.masks()] == expected


@pytest.mark.parametrize("values", [torch.bool, torch.uint8], ids=str)
def test_masks_one_by_one(generator, values):
    """Of any iterable, with strides of any kind."""
    masks = dense(generator).to(values)
    expected = RunLengths.from_masks(masks)
    turned = (x.T.contiguous().T for x in masks)
    assert torch.equal(RunLengths.from_masks(turned).runs, expected.runs)
    assert RunLengths.from_masks(iter(()), SIZE).masks().shape == (0, *SIZE)
    for given, error, words in (
        (iter(()), ValueError, "at least one mask"),
        ([masks[0], masks[1, 1:]], ValueError, "masks[1]: expected [9, 7], one size for all"),
        ([masks[0].float()], TypeError, "masks[0]: expected a bool or uint8"),
        (masks[0], ValueError, "masks: expected [T, H, W]"),
        (7, TypeError, "masks: expected a tensor [T, H, W] or an iterable"),
    ):
        with pytest.raises(error, match=re.escape(words)):
            RunLengths.from_masks(given)


def test_padded(generator):
    """The frame grows, the runs are the same; samples too are those of padded masks."""
    masks = dense(generator)
    runs = RunLengths.from_masks(masks)
    padded = runs.padded(SIZE[0] + 4, SIZE[1] + 2)
    assert padded.runs is runs.runs
    expected = torch.nn.functional.pad(masks, (0, 2, 0, 4))
    assert torch.equal(padded.masks(), expected)
    logits, at = torch.randn(1, 3, 5, 4, generator=generator), torch.rand(1, 90, 2, generator=generator)
    found, dense_cost = (m2f_kernels.mask_matching_cost(logits, [x], at)[0][0] for x in (padded, expected))
    assert torch.equal(found, dense_cost)
    with pytest.raises(ValueError, match="height, width: expected at least 9, 7"):
        runs.padded(8, 7)


def test_bytes_are_masks(generator):
    masks = dense(generator)
    assert torch.equal(RunLengths.from_masks(masks.byte() * 255).runs, RunLengths.from_masks(masks).runs)


def test_size_of_none():
    assert RunLengths.from_coco([], (3, 5)).masks().shape == (0, 3, 5)
    with pytest.raises(ValueError, match="size"):
        RunLengths.from_coco([])


def one(**changes):
    return {"size": [4, 4], "counts": [16], **changes}


BAD = {
    "too few": (
        [one(), one(counts=[3, 4])],
        ValueError,
        "[1]['counts']: expected lengths that sum to 16, 4 * 4; got 7",
    ),
    "too many": ([one(counts=[3, 14])], ValueError, "expected lengths that sum to 16, 4 * 4; got 17"),
    "none": ([one(counts=[])], ValueError, "expected lengths that sum to 16, 4 * 4; got 0"),
    "no text": ([one(counts="")], ValueError, "expected lengths that sum to 16, 4 * 4; got 0"),
    "negative": ([one(counts=[20, -4])], ValueError, "expected lengths of at least 0; got -4"),
    "fractions": ([one(counts=[1.5, 14.5])], TypeError, "expected a list of integers"),
    "lists": ([one(counts=[[1, 2], [3]])], TypeError, "expected a list of integers"),
    "nothing": ([one(counts=None)], TypeError, "expected a list of integers"),
    "other sizes": (
        [one(), one(size=[2, 8])],
        ValueError,
        "[1]['size']: expected [4, 4], one size per image; got [2, 8]",
    ),
    "three sides": ([one(size=[4, 4, 1])], ValueError, "['size']: expected [H, W]"),
    "no pixels": ([one(size=[0, 4])], ValueError, "['size']: expected at least one and fewer than 2^31 pixels"),
    "text of other characters": ([one(counts="~~")], ValueError, "characters from '0' to 'o'"),
    "text of other letters": ([one(counts="é")], ValueError, "characters from '0' to 'o'"),
    "text that ends too early": ([one(counts="P")], ValueError, "end within a number"),
    "text of a large number": ([one(counts="o" * 9 + "0")], ValueError, "below 2^31"),
    "no counts": ([{"size": [4, 4]}], ValueError, "expected a mapping with 'size' and 'counts'; got ['size']"),
}


@pytest.mark.parametrize(("encoded", "error", "words"), BAD.values(), ids=BAD)
def test_bad_input(encoded, error, words):
    """Said by the class, and by an operator that is given them as they are."""
    with pytest.raises(error, match=re.escape(words)):
        RunLengths.from_coco(encoded)
    with pytest.raises(error, match=r"target_masks\[0\].*" + re.escape(words)):
        m2f_kernels.mask_matching_cost(torch.zeros(1, 2, 4, 4), [encoded], torch.rand(1, 3, 2))


def test_polygons_are_no_runs():
    with pytest.raises(TypeError, match=r"target_masks\[0\]"):
        m2f_kernels.mask_matching_cost(torch.zeros(1, 2, 4, 4), [[[1.0, 2.0, 3.0]]], torch.rand(1, 3, 2))


def changed(runs, at, value):
    runs = runs.clone()
    runs[at] = value
    return runs


#: Of two targets of 4 x 4: H, three places, then ends 3, 9, 11, 16 and 16, 16.
GOOD = RunLengths.from_coco([one(counts=[3, 6, 2, 5]), one()])
WRONG = {
    "of less height": {"height": 3},
    "of less width": {"width": 3},
    "of more targets": {"num_targets": 3},
    "no integers": {"runs": GOOD.runs.float()},
    "too short": {"runs": GOOD.runs[:-2]},
    "not from 0": {"runs": changed(GOOD.runs, 1, 2)},
    "places that fall": {"runs": changed(GOOD.runs, 2, 8)},
    "odd numbers": {"runs": changed(GOOD.runs, 2, 3)},
    "negative": {"runs": changed(GOOD.runs, 4, -1)},
    "ends that fall": {"runs": changed(GOOD.runs, 5, 2)},
    "ends twice": {"runs": changed(GOOD.runs, 5, 3)},
    "beyond the last pixel": {"runs": changed(GOOD.runs, 7, 17)},
    "no column": {"runs": changed(GOOD.runs, 0, 0)},
    "of half a column": {"runs": changed(GOOD.runs, 0, 3)},
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_runs_that_no_kernel_can_trust(change):
    logits, at = torch.zeros(1, 2, 4, 4), torch.rand(1, 3, 2)
    m2f_kernels.mask_matching_cost(logits, [GOOD], at)
    with pytest.raises((ValueError, TypeError), match=r"target_masks\[0\]"):
        m2f_kernels.mask_matching_cost(logits, [GOOD._replace(**change)], at)


@pytest.mark.parametrize(
    ("marks", "pixels"),
    [
        (torch.tensor([4, 0, 9, 16, 16]).int(), torch.zeros(1, 4, 4).bool()),
        (torch.tensor([4]).int(), torch.zeros(1, 4, 4).bool()),
        (torch.tensor([1, 2]), torch.zeros(1, 4, 4).int()),
        (torch.tensor([1]), torch.zeros(1, 4, 4)),
    ],
)
def test_the_operator_itself_reads_nothing_beyond(marks, pixels):
    with pytest.raises(RuntimeError, match="targets: expected"):
        torch.ops.m2f.sample_targets(pixels, marks, torch.rand(3, 2))
