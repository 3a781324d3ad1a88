"""nn.MaskedCrossAttention against nn.MultiheadAttention with the same parameters."""

import re

import pytest
import torch

import m2f_kernels
from m2f_kernels.nn import MaskedCrossAttention, project_keys_values
from tests.numerics import relative_error

N, Q, S, C, H = 2, 7, 60, 32, 4


def inputs(seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    query, pixels = torch.randn(N, Q, C, generator=g), torch.randn(N, S, C, generator=g)
    query_pos, key_pos = torch.randn(N, Q, C, generator=g), torch.randn(N, S, C, generator=g)
    attend = torch.rand(N, Q, S, generator=g) < 0.3
    attend[:, :, 0] = True
    return [x.to(dtype) for x in (query, pixels, query_pos, key_pos)], attend


def pair(bias=True):
    """This module and PyTorch's with the same random parameters."""
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(C, H, bias=bias, batch_first=True)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours = MaskedCrossAttention(C, H, bias=bias)
    ours.load_state_dict(theirs.state_dict())  # strict: the names are the same
    return ours, theirs


@pytest.mark.parametrize("bias", [True, False])
def test_equals_multihead_attention(bias):
    """Values and every parameter's gradient."""
    ours, theirs = pair(bias)
    (query, pixels, query_pos, key_pos), attend = inputs()
    blocked = ~attend.repeat_interleave(H, 0)
    expected, _ = theirs(query + query_pos, pixels + key_pos, pixels, attn_mask=blocked, need_weights=False)
    actual = ours(query, pixels, attend, query_pos, key_pos)
    assert relative_error(actual, expected) < 1e-5
    actual.square().sum().backward()
    expected.square().sum().backward()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert relative_error(a.grad, b.grad) < 1e-4, name


def test_packed_and_bool_masks():
    ours, _ = pair()
    (query, pixels, *positions), attend = inputs()
    packed = m2f_kernels.pack_attention_mask(attend)
    assert torch.equal(ours(query, pixels, packed, *positions), ours(query, pixels, attend, *positions))


def test_positions_are_optional_and_may_lack_the_batch():
    ours, _ = pair()
    (query, pixels, query_pos, key_pos), attend = inputs()
    zero = ours(query, pixels, attend, torch.zeros_like(query_pos), torch.zeros_like(key_pos))
    assert torch.equal(ours(query, pixels, attend), zero)
    shared = ours(query, pixels, attend, query_pos[0], key_pos[0])
    repeated = query_pos[:1].expand(N, -1, -1), key_pos[:1].expand(N, -1, -1)
    assert torch.equal(shared, ours(query, pixels, attend, *repeated))


@pytest.mark.parametrize("bias", [True, False])
def test_layers_of_a_level_project_together(bias):
    layers = [MaskedCrossAttention(C, H, bias=bias) for _ in range(3)]
    (query, pixels, query_pos, key_pos), attend = inputs()
    projected = project_keys_values(layers, pixels, key_pos)
    for layer, key_value in zip(layers, projected, strict=True):
        alone = layer(query, pixels, attend, query_pos, key_pos)
        assert key_value[0].shape == key_value[1].shape == (N, H, S, C // H)
        assert relative_error(layer(query, pixels, attend, query_pos, key_value=key_value), alone) < 1e-6
    assert projected[0][0].untyped_storage().data_ptr() == projected[2][0].untyped_storage().data_ptr()


def test_initialisation_is_that_of_multihead_attention():
    torch.manual_seed(3)
    ours = MaskedCrossAttention(64, 8)
    theirs = torch.nn.MultiheadAttention(64, 8)
    assert ours.in_proj_weight.std().item() == pytest.approx(theirs.in_proj_weight.std().item(), rel=0.05)
    assert ours.out_proj.weight.std().item() == pytest.approx(theirs.out_proj.weight.std().item(), rel=0.05)
    assert not ours.in_proj_bias.any()
    assert not ours.out_proj.bias.any()


def test_autocast():
    ours, _ = pair()
    (query, pixels, *positions), attend = inputs()
    expected = ours(query, pixels, attend, *positions)
    with torch.autocast("cpu", torch.bfloat16):
        actual = ours(query, pixels, attend, *positions)
    assert actual.dtype == torch.bfloat16
    assert relative_error(actual, expected) < 0.03


def test_compile():
    torch._dynamo.reset()
    ours, _ = pair()
    (query, pixels, *positions), attend = inputs()
    mask = m2f_kernels.pack_attention_mask(attend)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(query, pixels, mask, *positions), ours(query, pixels, mask, *positions))


BAD = {
    "query of other channels": (
        lambda m, q, p, a: m(q[..., :5], p, a),
        ValueError,
        "query: expected [N, Q, C] = [2, 7, 32]; got",
    ),
    "pixels of another batch": (
        lambda m, q, p, a: m(q, p[:1], a),
        ValueError,
        "pixels: expected [N, S, C] = [2, 60, 32]; got",
    ),
    "pixels of integers": (lambda m, q, p, a: m(q, p.long(), a), TypeError, "pixels: expected float64, float32"),
    "positions of another length": (
        lambda m, q, p, a: m(q, p, a, None, p[:, :9]),
        ValueError,
        "key_pos: expected [2, 60, 32] or [60, 32]; got a float32 tensor of shape [2, 9, 32]",
    ),
    "positions that are none": (lambda m, q, p, a: m(q, p, a, 3), TypeError, "query_pos: expected a tensor"),
    "a mask of another length": (lambda m, q, p, a: m(q, p, a[..., :9]), ValueError, "mask: expected [N, Q, S] ="),
    "no layers": (
        lambda m, q, p, a: project_keys_values([], p),
        ValueError,
        "layers: expected at least one, all of one size; got [] (list)",
    ),
    "layers of two sizes": (
        lambda m, q, p, a: project_keys_values([m, MaskedCrossAttention(C, 2)], p),
        ValueError,
        "layers: expected at least one, all of one size; got",
    ),
    "heads that do not divide": (
        lambda m, q, p, a: MaskedCrossAttention(30, 4),
        ValueError,
        "embed_dim: expected a multiple of num_heads = 4; got 30",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, error, message = BAD[name]
    (query, pixels, _, _), attend = inputs()
    with pytest.raises(error, match=re.escape(message)):
        call(MaskedCrossAttention(C, H), query, pixels, attend)
