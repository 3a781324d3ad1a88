"""Each operator in standard operators, in PyTorch, against its reference in float64."""

import pytest
import torch

from m2f_kernels.integrations import decompositions
from m2f_kernels.masks import pack
from m2f_kernels.ops.attention_mask import reference as attention_mask
from m2f_kernels.ops.masked_attention import reference as masked_attention
from m2f_kernels.ops.ms_deform_attn import reference as ms_deform_attn
from m2f_kernels.ops.points import reference as point_sample
from tests.numerics import FORWARD, relative_error, tolerance
from tests.ops.ms_deform_attn_cases import make_case, truth

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TABLE = {op.name().partition("::")[2]: function for op, function in decompositions.decompositions().items()}


def level_arguments(case, as_tensors):
    if not as_tensors:
        return case.levels, None, None
    return [], torch.tensor(case.sizes), torch.tensor(case.levels[2::3])


@pytest.mark.parametrize("as_tensors", [False, True], ids=["integers", "tensors"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [((5, 7), (3, 4)), ((1, 1), (1, 9), (8, 2))], ids=str)
def test_ms_deform_attn(as_tensors, dtype, sizes):
    """Levels with different numbers of points; a good part of the samples lies outside."""
    case = make_case("locations", sizes=sizes, points=[3, 2, 1][: len(sizes)], dtype=dtype)
    value, samples, weights = case.tensors.values()
    out = TABLE["ms_deform_attn"](value, *level_arguments(case, as_tensors), samples, weights, case.points)
    assert out.dtype == dtype
    assert relative_error(out, truth(case)["output"]) <= tolerance(FORWARD, dtype, dtype)


@pytest.mark.parametrize("as_tensors", [False, True], ids=["integers", "tensors"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["offsets2", "offsets4"])
@pytest.mark.parametrize("scale", [0.5, 0.125])
def test_ms_deform_attn_from_offsets(as_tensors, dtype, mode, scale):
    case = make_case(mode, dtype=dtype, offset_scale=scale)
    value, *sampling = case.tensors.values()
    function = TABLE["ms_deform_attn_from_offsets"]
    out = function(value, *level_arguments(case, as_tensors), *sampling, case.points, scale)
    assert out.dtype == dtype
    assert relative_error(out, truth(case)["output"]) <= tolerance(FORWARD, dtype, dtype)


@pytest.mark.parametrize("as_tensors", [False, True], ids=["integers", "tensors"])
def test_coordinates_that_are_not_finite_or_far_outside(as_tensors):
    case = make_case("locations", dtype=torch.float32)
    samples = case.tensors["samples"]
    for i, bad in enumerate([torch.nan, torch.inf, -torch.inf, 1e30, -1e30, 1e5]):
        samples[0, i, :, i % 5, i % 2] = bad
    value, samples, weights = case.tensors.values()
    out = TABLE["ms_deform_attn"](value, *level_arguments(case, as_tensors), samples, weights, case.points)
    assert relative_error(out, truth(case)["output"]) <= FORWARD[torch.float32]


def test_levels_with_gaps_between_them():
    """level_start_index is obeyed."""
    case = make_case("locations", dtype=torch.float64)
    value, samples, weights = case.tensors.values()
    padded = torch.cat([value[:, :35], torch.full_like(value[:, :4], 7), value[:, 35:]], 1)
    levels = [5, 7, 0, 3, 4, 39]
    expected = ms_deform_attn.ms_deform_attn(padded, levels, samples, weights, case.points)
    tensors = torch.tensor(case.sizes), torch.tensor([0, 39])
    for arguments in ((levels, None, None), ([], *tensors)):
        out = TABLE["ms_deform_attn"](padded, *arguments, samples, weights, case.points)
        assert relative_error(out, expected) <= FORWARD[torch.float64]


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.bool, torch.uint8], ids=str)
def test_point_sample(dtype, exact):
    g = torch.Generator().manual_seed(0)
    input = torch.rand(2, 3, 6, 5, generator=g) * 4
    input = (input > 2) if dtype == torch.bool else input.to(dtype)
    points = torch.rand(2, 40, 2, generator=g) * 1.6 - 0.3
    points[0, :3, 0] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    out = TABLE["point_sample"](input, points, exact)
    expected = point_sample.point_sample(input, points, exact)
    assert out.dtype == expected.dtype
    assert relative_error(out, expected) <= tolerance(FORWARD, out.dtype, out.dtype)


@pytest.mark.parametrize("s", [1, 31, 32, 33, 64, 100])
def test_bits(s):
    """Packed as the reference packs, every bit of a word among them; and back, with the row rule."""
    attend = torch.rand(2, 5, s, generator=torch.Generator().manual_seed(s)) < 0.5
    attend[0, 0], attend[0, 1] = True, False
    bits, row_any = decompositions._pack(attend)
    expected_bits, expected_any = pack(attend)
    assert bits.dtype == expected_bits.dtype
    assert torch.equal(bits, expected_bits)
    assert torch.equal(row_any, expected_any)
    ruled = attend | ~attend.any(-1, keepdim=True)
    assert torch.equal(decompositions._unpack(bits, row_any, s), ruled)


def test_attention_masks():
    """Resized features, thresholded product, packed logits; a NaN attends."""
    g = torch.Generator().manual_seed(0)
    features, embed = torch.randn(2, 8, 16, 12, generator=g), torch.randn(2, 5, 8, generator=g)
    resized = TABLE["resize_mask_features"](features, [8, 6, 3, 5])
    assert torch.equal(resized, attention_mask.resize_mask_features(features, [8, 6, 3, 5]))
    embed[0, 1] = torch.nan
    found = TABLE["predict_attention_mask"](embed, resized)
    expected = attention_mask.predict_attention_mask(embed, resized)
    logits = embed @ resized
    for actual in (found, TABLE["pack_attention_mask"](logits), TABLE["pack_attention_mask"](~(logits < 0))):
        assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))


@pytest.mark.parametrize("rows", [5, 3, 0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_attention(dtype, rows):
    """A mask of the first queries; the others attend everywhere."""
    g = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, n, 8, generator=g).to(dtype) for n in (5, 70, 70))
    attend = torch.rand(2, 5, 70, generator=g) < 0.2
    attend[1, 2] = False
    output, logsumexp = TABLE["masked_attention"](query, key, value, *pack(attend[:, :rows]), 0.3)
    attend[:, rows:] = True
    ruled = attend | ~attend.any(-1, keepdim=True)
    exact = [x.double() for x in (query, key, value)]
    expected, expected_logsumexp = masked_attention.masked_attention(*exact, ruled, 0.3)
    assert output.dtype == dtype
    assert output.shape == (2, 5, 3, 8)
    assert relative_error(output.transpose(1, 2), expected) <= tolerance(FORWARD, dtype, dtype)
    assert relative_error(logsumexp, expected_logsumexp) <= FORWARD[logsumexp.dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [True, False])
def test_masked_attention_with_bias(dtype, masked):
    g = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, n, 8, generator=g).to(dtype) for n in (5, 70, 70))
    bias = [torch.randn(2, 3, 5, side, generator=g).to(dtype) for side in (7, 10)]
    attend = torch.rand(2, 5, 70, generator=g) < (0.2 if masked else 2)
    bits, row_any = pack(attend if masked else attend[:, :0])
    output, logsumexp = TABLE["masked_attention_with_bias"](query, key, value, bits, row_any, *bias, 0.3)
    exact = [x.double() for x in (query, key, value)]
    expected, expected_logsumexp = masked_attention.masked_attention(*exact, attend, 0.3, *(x.double() for x in bias))
    assert output.dtype == dtype
    assert relative_error(output.transpose(1, 2), expected) <= tolerance(FORWARD, dtype, dtype)
    assert relative_error(logsumexp, expected_logsumexp) <= FORWARD[logsumexp.dtype]
