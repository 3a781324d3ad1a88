"""The Triton kernels that sample targets, on maps of ids and on run lengths: the same bits as on the dense masks."""

import pytest
import torch

from m2f_kernels import InstanceMap, RunLengths, masks
from m2f_kernels.ops.points import check_targets

T = 4


def mapped(generator, dtype):
    """40 is no target's id, -2 and 300 are in no map of bytes, and one target has no pixel."""
    id_map = torch.tensor([9, 4, 40])[torch.randint(0, 3, (13, 21), generator=generator)].to(dtype)
    return InstanceMap(id_map, torch.tensor([4, 9, -2, 300 if dtype == torch.uint8 else 5]))


def run_lengths(generator, *_):
    """Overlapping; one target has no pixel, one has all."""
    found = torch.rand(T, 13, 21, generator=generator) > 0.4
    found[1], found[2] = False, True
    return RunLengths.from_masks(found)


FORMS = {
    "int64": (mapped, torch.int64),
    "int32": (mapped, torch.int32),
    "int16": (mapped, torch.int16),
    "uint8": (mapped, torch.uint8),
    "run lengths": (run_lengths, None),
}


@pytest.fixture(params=FORMS)
def given(request, device, generator):
    """Targets as the operators have them, and the dense masks."""
    make, dtype = FORMS[request.param]
    one = make(generator, dtype).to(device)
    (targets,) = check_targets("targets", [one], 1, torch.empty(0, device=device))
    return targets, one.masks()


def points(generator, device, *shape):
    found = torch.rand(*shape, 2, generator=generator) * 1.2 - 0.1
    found[..., 0, :] = torch.nan
    return found.to(device)


def test_sample_targets(device, given, generator):
    from m2f_kernels.ops.points import triton_sampling as triton

    targets, dense = given
    at = points(generator, device, 150)
    found = triton.sample_targets(*targets, at)
    assert found.dtype == torch.float32
    expected = triton.point_sample(dense[None], at[None], True)[0]
    assert torch.equal(found, expected)
    assert expected.any()


def test_in_a_larger_frame(device, given, generator):
    """Beyond the pixels that runs know of is background."""
    from m2f_kernels.integrations.transformers import mask_classification
    from m2f_kernels.ops.points import triton_sampling as triton

    targets, dense = given
    at = points(generator, device, 60)
    padded = mask_classification._pad(targets, 16, 30)
    expected = triton.point_sample(torch.nn.functional.pad(dense, (0, 9, 0, 3))[None], at[None], True)[0]
    assert torch.equal(triton.sample_targets(*padded, at), expected)


def test_point_mask_loss(device, given, generator):
    from m2f_kernels.ops.points import triton_loss as triton

    targets, dense = given
    logits = torch.randn(4, 6, 7, generator=generator).to(device)
    rows, target_rows = torch.tensor([3, 0, 1, 2], device=device), torch.tensor([4, 0, 2, 1], device=device)
    at = points(generator, device, 4, 90)
    found, expected = (
        triton.point_mask_loss(logits, rows, masks.listed([x, x]), target_rows, at)
        for x in (targets, masks.Targets(dense))
    )
    for first, second in zip(found, expected, strict=True):
        assert torch.equal(first, second)
    assert expected[3].any()
