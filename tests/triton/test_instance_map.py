"""The Triton kernels that sample targets, on planes of numbers: the same bits as on the dense masks."""

import pytest
import torch

from m2f_kernels import InstanceMap, masks


@pytest.fixture
def planes(device, generator):
    """Planes of numbers and the dense masks; 40 is no target's id, and the last target has no pixel."""
    id_map = torch.tensor([9, 4, 40])[torch.randint(0, 3, (13, 21), generator=generator)].to(device)
    one = InstanceMap(id_map, torch.tensor([4, 9, 5], device=device))
    return masks.numbered_planes(*one), one.masks()


def points(generator, device, *shape):
    found = torch.rand(*shape, 2, generator=generator) * 1.2 - 0.1
    found[..., 0, :] = torch.nan
    return found.to(device)


def test_point_sample(device, planes, generator):
    from m2f_kernels.ops.point_sample import triton

    at = points(generator, device, 1, 150)
    numbered, dense = (triton.point_sample(x[None], at, True) for x in planes)
    assert numbered.dtype == torch.float32
    assert torch.equal(numbered, dense)
    assert dense[:, :2].any(-1).all()


def test_point_mask_loss(device, planes, generator):
    from m2f_kernels.ops.point_loss import triton

    logits = torch.randn(4, 6, 7, generator=generator).to(device)
    rows, target_rows = torch.tensor([3, 0, 1, 2], device=device), torch.tensor([4, 0, 2, 1], device=device)
    at = points(generator, device, 4, 90)
    numbered, dense = (triton.point_mask_loss(logits, rows, [x, x], target_rows, at) for x in planes)
    for first, second in zip(numbered, dense, strict=True):
        assert torch.equal(first, second)
    assert dense[3].any()
