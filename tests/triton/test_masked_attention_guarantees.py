"""Guarantees of the Triton kernels of masked attention that are exact: equal bits, untouched memory, special values."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F

from m2f_kernels import _triton
from m2f_kernels.masks import pack, unpack
from m2f_kernels.ops.masked_attention import configs

# In the interpreter numpy warns of what the kernels mean: log of 0 and 0/0 in rows that are not stored, NaN inputs.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton", "ignore::RuntimeWarning:numpy")


@pytest.fixture(scope="module")
def kernels():
    from m2f_kernels.ops.masked_attention import triton

    return triton


def normal(generator, device, *shape, dtype=torch.float32):
    return torch.randn(shape, generator=generator).to(device, dtype)


def inputs_of(generator, device, n, heads, queries, keys, d, dtype=torch.float32):
    """query, key, value."""
    return [normal(generator, device, n, heads, rows, d, dtype=dtype) for rows in (queries, keys, keys)]


def run(kernels, query, key, value, mask):
    """Output, log-sum-exp and the gradients of the three."""
    inputs = (query, key, value, *pack(mask))
    saved = kernels.masked_attention(*inputs, 0.25)
    return *saved, *kernels.masked_attention_backward(saved[0] + 1, *inputs, *saved, 0.25)


@pytest.mark.parametrize("keys", [33, 200])
def test_all_blocked_is_all_open(kernels, device, generator, keys):
    """A query that may attend to nothing attends to everything, to the bit."""
    inputs = inputs_of(generator, device, 1, 2, 20, keys, 16)
    masks = [torch.full((1, 20, keys), fill, device=device) for fill in (False, True)]
    for blocked, opened in zip(*(run(kernels, *inputs, mask) for mask in masks), strict=True):
        assert torch.equal(blocked, opened)


@pytest.mark.parametrize("attended", [0, 31, 32, 129, 199])
def test_one_attended_key_is_the_output(kernels, device, generator, attended):
    query, key, value = inputs_of(generator, device, 1, 2, 20, 200, 16)
    mask = torch.zeros(1, 20, 200, dtype=torch.bool, device=device)
    mask[:, :, attended] = True
    output, _ = kernels.masked_attention(query, key, value, *pack(mask), 0.25)
    torch.testing.assert_close(output, value[:, None, :, attended].expand_as(output), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_without_bits_are_not_used(kernels, device, generator, monkeypatch, dtype):
    """Each image attends to one stretch of keys, whole tiles; NaN everywhere else changes no bit of any result.

    All tiles have one program. Had it multiplied such a tile in, its sum would not be finite, and the rare path, which
    adds key by key, would have given other bits.
    """
    monkeypatch.setattr(configs, "tiles_per_program", lambda *_: configs.MAX_TILES)
    query, key, value = inputs_of(generator, device, 2, 1, 16, 500, 16, dtype)
    mask = torch.zeros(2, 16, 500, dtype=torch.bool, device=device)
    mask[0, :, 128:256] = torch.rand(16, 128, generator=generator).to(device) < 0.5
    mask[1, :, 256:384] = True
    used = mask.any(1)[:, None, :, None]
    poisoned = [x.masked_fill(~used, torch.nan) for x in (key, value)]
    expected = run(kernels, query, key, value, mask)
    for x, clean in zip(run(kernels, query, *poisoned, mask), expected, strict=True):
        assert torch.equal(x, clean)


@pytest.mark.parametrize("where", ["key", "value"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_attended_special_values_propagate(kernels, device, generator, where, poison):
    """Number for number what PyTorch's attention gives, and finite for queries that do not attend to them.

    In float64 on the CPU: PyTorch's own kernels on CUDA turn some infinities into NaN."""
    query, key, value = inputs_of(generator, device, 1, 2, 6, 70, 16)
    {"key": key, "value": value}[where][:, :, 40, 2] = poison
    mask = torch.rand(1, 6, 70, generator=generator).to(device) < 0.3
    mask[:, 0] = True
    mask[:, 1:4, 40] = True
    mask[:, 4:, 40] = False
    mask[:, 4:, 0] = True
    output, _ = kernels.masked_attention(query, key, value, *pack(mask), 0.25)
    exact = (x.cpu().double() for x in (query, key, value))
    theirs = F.scaled_dot_product_attention(*exact, attn_mask=mask[:, None].cpu(), scale=0.25).float()
    ours = output.transpose(1, 2).cpu()
    assert ours[:, :, 4:].isfinite().all()
    torch.testing.assert_close(ours[:, :, :4], theirs[:, :, :4], equal_nan=True, rtol=1e-4, atol=1e-5)


def test_inputs_are_left_alone(kernels, device, generator):
    query, key, value = inputs_of(generator, device, 1, 2, 5, 40, 16)
    bits, row_any = pack(torch.rand(1, 5, 40, generator=generator).to(device) < 0.2)
    inputs = (query, key, value, bits, row_any)
    copies = [x.clone() for x in inputs]
    saved = kernels.masked_attention(*inputs, 0.25)
    kernels.masked_attention_backward(saved[0], *inputs, *saved, 0.25)
    assert all(torch.equal(x, copy) for x, copy in zip(inputs, copies, strict=True))
    assert torch.equal(unpack(bits, row_any, 40), unpack(*copies[3:], 40))


def test_tiles_by_part_and_compiler():
    """Other parts than those that the heuristics are made for get smaller pieces, and so does sm_100 where Triton would
    put products of 64 rows into its tensor memory and fail."""
    for element_size, d in product((2, 4), (16, 32, 64, 128)):
        for part in _triton.ARCHITECTURES.values():
            made = [
                configs.forward(part, (3, 9), element_size, 100, d),
                configs.backward(part, (3, 9), element_size, 100, d),
                configs.open_forward(part, (3, 9), element_size, d),
                configs.open_backward(part, (3, 9), element_size, d),
            ]
            if part.name in ("sm_75", "gfx1100"):
                assert all(x["BLOCK_Q"] <= 32 and x["num_stages"] == 1 for x in made)
            elif part.name in ("sm_86", "sm_89", "sm_120"):
                assert all(x["num_stages"] <= 2 for x in made)
            elif part.name in ("sm_80", "sm_90", "sm_100"):
                assert made[0] == configs.default_forward(element_size, 100, d)
        b200 = _triton.ARCHITECTURES[100]
        old = configs.forward(b200, (3, 7), element_size, 100, d), configs.backward(b200, (3, 6), element_size, 100, d)
        assert all(x["BLOCK_Q"] <= 32 and x["BLOCK_K"] <= 32 for x in old)
