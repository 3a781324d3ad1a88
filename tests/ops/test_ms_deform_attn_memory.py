"""Multi-scale deformable attention on unusual memory and values: strides, poison, NaN and infinity, empty, huge."""

import pytest
import torch

import m2f_kernels
from tests.numerics import relative_error, rounding
from tests.ops.ms_deform_attn_cases import MODES, assert_matches, make_case, truth, value_and_gradients

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
MANY = {"sizes": ((5, 7), (3, 4)), "q": 9}
FEW = {"sizes": ((20, 30), (9, 11)), "q": 3}
NON_FINITE = [float("nan"), float("inf"), -float("inf")]


# ---------------------------------------------------------------- strides
def gap(x):
    """A view with holes in every axis but the last, and an odd storage offset."""
    padded = x.new_full([size + 2 for size in x.shape[:-1]] + [2 * x.shape[-1] + 3], float("nan"))
    view = padded[tuple(slice(1, size + 1) for size in x.shape[:-1])][..., 3 : 3 + x.shape[-1]]
    return view.copy_(x)


LAYOUTS = {
    "gaps": gap,
    "last axis strided": lambda x: torch.stack([x, torch.full_like(x, float("nan"))], -1)[..., 0],
    "axes 1 and 2 swapped": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "axes reversed": lambda x: x.permute(*range(x.dim() - 1, -1, -1)).contiguous().permute(*range(x.dim() - 1, -1, -1)),
    "expanded over the batch": lambda x: x[:1].expand_as(x),
    "expanded over axis 1": lambda x: x[:, :1].expand_as(x),
    "expanded over the last axis": lambda x: x[..., :1].expand_as(x),
    "one number": lambda x: x.flatten()[0].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_strides(implementation, mode, layout, dtype):
    """Every tensor in turn as a view: [N, H, S, D] transposed, slices, expanded, stride 0 and 2 in the last axis."""
    for path in (MANY, FEW):
        case = make_case(mode, dtype=dtype, **path).to(implementation)
        for name in case.tensors:
            dense = case.tensors[name]
            # Repeated samples may meet a pixel centre; for them the layout is compared with its own dense copy.
            case.tensors[name] = LAYOUTS[layout](dense)
            actual = value_and_gradients(case.call, case.tensors, case.grad_output)
            case.tensors[name] = case.tensors[name].clone(memory_format=torch.contiguous_format)
            expected = value_and_gradients(case.call, case.tensors, case.grad_output)
            for result, x in actual.items():
                assert relative_error(x, expected[result]) <= 1e-6, (name, result)
            case.tensors[name] = dense


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "swapped" not in name])
@pytest.mark.parametrize("path", [MANY, FEW], ids=["many", "few"])
def test_strided_output_gradients(implementation, layout, path):
    """out.sum().backward() sends a gradient of stride 0."""
    case = make_case("offsets4", **path).to(implementation)
    case.grad_output = LAYOUTS[layout](case.grad_output)
    assert_matches(case)


def test_sum_backward(implementation):
    case = make_case().to(implementation)
    value = case.value.requires_grad_()
    case.run().sum().backward()
    case.grad_output = torch.ones_like(case.grad_output)
    assert relative_error(value.grad, truth(case)["value"]) < 1e-4


# ---------------------------------------------------------------- everything is written
@pytest.mark.parametrize("path", [MANY, FEW, {"q": None, "sizes": ((17, 9), (4, 4))}], ids=["many", "few", "tiled"])
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_every_element_is_written(implementation, deterministic, mode, dtype, path):
    """Fresh tensors are full of NaN here: one element left out and the error is infinite."""
    for d in (16, 5):
        assert_matches(make_case(mode, d=d, dtype=dtype, **path).to(implementation))


def test_every_element_is_written_by_parts(deterministic, set_threads):
    set_threads(8)
    assert_matches(make_case("offsets4", n=1, heads=1, d=20, q=700))


# ---------------------------------------------------------------- values that are not finite
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bad", [*NON_FINITE, 1e30, -1e30])
@pytest.mark.parametrize("mode", MODES)
def test_non_finite_samples_contribute_nothing(implementation, mode, bad, axis):
    """A sample at a NaN, infinite or absurd place is as one with weight zero, and nothing has a gradient for it."""
    for path in (MANY, FEW):
        case = make_case(mode, **path).to(implementation)
        case.tensors["samples"][0, 2, 1, 3, axis] = bad
        actual = value_and_gradients(case.call, case.tensors, case.grad_output)
        assert (actual["samples"][0, 2, 1, 3] == 0).all()
        # The truth: the same sample far outside.
        case.tensors["samples"][0, 2, 1, 3, axis] = 1e4
        expected = truth(case)
        for name, x in actual.items():
            assert relative_error(x, expected[name]) < 1e-4, name


@pytest.mark.parametrize("bad", NON_FINITE)
@pytest.mark.parametrize(("mode", "components"), [("offsets2", 2), ("offsets4", 4)])
def test_non_finite_reference_points(implementation, mode, components, bad):
    """All samples of one level of one query vanish; everything else is as before."""
    for component in range(components):
        case = make_case(mode).to(implementation)
        good = truth(case)
        case.tensors["reference_points"][0, 2, 0, component] = bad
        actual = value_and_gradients(case.call, case.tensors, case.grad_output)
        for name, x in actual.items():
            assert torch.isfinite(x).all(), name
        assert (actual["samples"][0, 2, :, :3] == 0).all()
        assert (actual["reference_points"][0, 2, 0] == 0).all()
        others = torch.ones(case.grad_output.shape[1], dtype=torch.bool)
        others[2] = False
        assert relative_error(actual["output"][0, others], good["output"][0, others]) < 1e-5


@pytest.mark.parametrize("path", [MANY, FEW], ids=["many", "few"])
@pytest.mark.parametrize("bad", NON_FINITE)
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
@pytest.mark.parametrize("d", [5, 16])
def test_bad_values_elsewhere_do_not_leak(implementation, d, dtype, bad, path):
    """Only the corners of a sample are read: other positions, heads and levels may hold anything."""
    case = make_case(d=d, dtype=dtype, **path).to(implementation)
    clean = value_and_gradients(case.call, case.tensors, case.grad_output)
    # A position that no sample touches has a gradient of exactly zero.
    untouched = (clean["value"] == 0).all(-1, keepdim=True).expand_as(case.value)
    assert untouched.any()
    case.tensors["value"] = case.value.masked_fill(untouched, bad)
    for name, x in value_and_gradients(case.call, case.tensors, case.grad_output).items():
        if name == "value" and implementation.type == "cuda":  # summed in any order
            assert torch.equal(x == 0, clean[name] == 0)
            assert relative_error(x, clean[name]) < (1e-6 if dtype in (F32, F64) else 2 * rounding(dtype))
        else:
            assert torch.equal(x, clean[name]), name


def test_bad_weight_of_a_sample_outside(implementation):
    """A weight that is not finite, at a place that does not contribute."""
    case = make_case().to(implementation)
    case.tensors["samples"][0, 0, 0, 0] = 5.0
    clean = case.run()
    for bad in NON_FINITE:
        case.tensors["weights"][0, 0, 0, 0] = bad
        assert torch.equal(case.run(), clean)


def test_large_logits(implementation):
    """The softmax subtracts the maximum; what underflows is zero."""
    case = make_case("offsets2")
    case.tensors["weights"] *= 40
    case.tensors["weights"][0, 0, 0] += 1e4
    case.tensors["weights"][0, 1, 0] -= 1e4
    case.tensors["weights"][0, 2, 0, 1] = -float("inf")
    assert_matches(case.to(implementation))


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_bad_logits_stay_in_their_query_and_head(implementation, weight):
    """As in torch.softmax: NaN, but not for anybody else."""
    case = make_case("offsets2").to(implementation)
    good = case.run()
    case.tensors["weights"][0, 2, 1, 3] = weight
    bad = case.run().unflatten(2, (2, -1))
    assert bad[0, 2, 1].isnan().all()
    bad[0, 2, 1] = good.unflatten(2, (2, -1))[0, 2, 1]
    assert torch.equal(bad.flatten(2), good)


@pytest.mark.parametrize("mode", MODES)
def test_exactly_on_the_border(implementation, mode):
    """Pixel coordinates -1 and size contribute nothing; 0 and size - 1 are whole pixels."""
    case = make_case("locations", sizes=[(4, 8)], points=[6], n=1, q=1, heads=1, d=8, dtype=F32).to(implementation)
    pixels = torch.tensor(
        [[-1.0, 1.0], [8.0, 1.0], [1.0, -1.0], [1.0, 4.0], [0.0, 0.0], [7.0, 3.0]], device=implementation
    )
    size = torch.tensor([8.0, 4.0], device=implementation)
    value, weights = case.value, torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0], device=implementation).view(1, 1, 1, 6)
    if mode == "locations":
        samples = ((pixels + 0.5) / size).view(1, 1, 1, 6, 2)
        out = m2f_kernels.ms_deform_attn(value, case.sizes, None, samples, weights, points_per_level=[6])
        expected = 16 * value[0, 0, 0] + 32 * value[0, 31, 0]
    else:
        points = torch.tensor([0.0, 0.0] if mode == "offsets2" else [0.0, 0.0, 1.0, 1.0], device=implementation)
        scale = 1 if mode == "offsets2" else 6 / size
        samples = ((pixels + 0.5) * scale).view(1, 1, 1, 6, 2)
        out = m2f_kernels.ms_deform_attn_from_offsets(
            value, case.sizes, points.view(1, 1, 1, -1), samples, weights.log(), points_per_level=[6], offset_scale=1.0
        )
        expected = (16 * value[0, 0, 0] + 32 * value[0, 31, 0]) / 63
    assert relative_error(out.flatten(), expected) < 1e-5


# ---------------------------------------------------------------- empty and huge
@pytest.mark.parametrize(("n", "q"), [(0, 5), (2, 0), (0, 0)])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_empty(implementation, deterministic, mode, n, q, dtype):
    """An empty batch and no queries give empty results, and a value gradient of zero."""
    case = make_case(mode, n=n, q=q, dtype=dtype).to(implementation)
    result = value_and_gradients(case.call, case.tensors, case.grad_output)
    assert result["output"].shape == (n, q, 32)
    for name, x in case.tensors.items():
        assert result[name].shape == x.shape
        assert (result[name] == 0).all()


def spread(x, axis, device):
    """x with strides so large along one axis that its last entry lies 2^31 elements behind the first. On the host only
    the touched pages of the storage become real."""
    stride = 2**31 // max(x.shape[axis] - 1, 1)
    try:
        storage = torch.empty((x.shape[axis] - 1) * stride + x.numel(), dtype=x.dtype, device=device)
    except RuntimeError as error:
        pytest.skip(f"no address space for a tensor of over 2^31 elements: {error}")
    strides = list(x.contiguous().stride())
    strides[axis] = stride
    return storage.as_strided(x.shape, strides).copy_(x)


@pytest.mark.parametrize("name", ["value", "reference_points", "samples", "weights", "grad_output"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    "path",
    [{"sizes": [(1, 2)], "q": 2, "dtype": BF16}, {"sizes": [(4, 5)], "q": 2, "dtype": F32}],
    ids=["many", "few"],
)
def test_offsets_beyond_32_bits(device, name, axis, path):
    """The last image, query or position lies 2^31 elements behind the first."""
    case = make_case("offsets4", points=[1], heads=1, d=16, **path).to(device)
    expected = truth(case)
    if name == "grad_output":
        case.grad_output = spread(case.grad_output, axis, device)
    else:
        case.tensors[name] = spread(case.tensors[name], axis, device)
    assert_matches(case, expected=expected)


@pytest.mark.slow
def test_output_beyond_32_bits(device):
    """An output of over 2^31 elements: its last rows equal its first (4 GiB)."""
    heads, d = 8, 128
    q = 2**31 // (heads * d) + 64
    case = make_case(sizes=[(3, 4)], points=[1], n=1, q=1, heads=heads, d=d, dtype=BF16).to(device)
    value, samples, weights = case.tensors.values()
    samples, weights = samples.expand(1, q, -1, -1, -1), weights.expand(1, q, -1, -1)
    out = m2f_kernels.ms_deform_attn(value, case.sizes, None, samples, weights, points_per_level=[1])
    assert out.numel() > 2**31
    for row in (0, 1, q // 2, q - 2, q - 1):
        assert torch.equal(out[0, row], out[0, 0])
    assert relative_error(out[:, :1], truth(case)["output"]) < 0.01


def test_levels_in_another_order_than_in_memory():
    """level_start_index is honoured, not recomputed."""
    generator = torch.Generator().manual_seed(3)
    value = torch.randn(2, 22, 2, 16, generator=generator)
    locations = torch.rand(2, 22, 2, 2, 3, 2, generator=generator)
    weights = torch.rand(2, 22, 2, 2, 3, generator=generator)
    swapped = torch.cat([value[:, 12:], value[:, :12]], 1)
    expected = m2f_kernels.ms_deform_attn(value, [(3, 4), (2, 5)], None, locations, weights)
    actual = m2f_kernels.ms_deform_attn(swapped, [(3, 4), (2, 5)], [10, 0], locations, weights)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("side", [512, 2048])
def test_fractions_of_a_pixel_on_large_levels(implementation, side):
    """A float32 pixel coordinate of 2048 is good to 1e-4 pixels; on CPU the kernel keeps the rest of the product."""
    if implementation.type != "cpu":
        pytest.skip("CUDA places samples in plain float32 so far")
    generator = torch.Generator().manual_seed(side)
    value = torch.randn(1, side * side, 1, 16, generator=generator)
    points = torch.rand(1, 200, 1, 2, generator=generator)
    offsets = 3 * torch.randn(1, 200, 1, 1, 4, 2, generator=generator)
    logits = torch.randn(1, 200, 1, 1, 4, generator=generator)
    inputs = (value, points, offsets, logits)
    actual = m2f_kernels.ms_deform_attn_from_offsets(value, [(side, side)], *inputs[1:])
    with m2f_kernels.use_backend("reference"):
        exact = [x.double() for x in inputs]
        expected = m2f_kernels.ms_deform_attn_from_offsets(exact[0], [(side, side)], *exact[1:])
    assert relative_error(actual, expected) < 1e-5
