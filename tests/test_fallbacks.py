"""Plain PyTorch where no kernel serves: the reference's results, and no more work than the published form."""

import importlib

import pytest
import torch

import m2f_kernels
from benchmarks import fallbacks
from m2f_kernels import FactoredMasks, InstanceMap, dispatch
from m2f_kernels.ops.points import check_targets, uncertain_point_mask_loss
from tests.numerics import relative_error
from tests.ops import masked_attention_cases
from tests.ops.ms_deform_attn_cases import MODES, make_case, truth, value_and_gradients

ROWS = fallbacks.rows()


@pytest.mark.parametrize("row", ROWS, ids=[f"{row.op}, {row.case}" for row in ROWS])
def test_no_more_work_than_the_published_form(row):
    theirs, ours = row.counts()
    operations, written = row.exception or (fallbacks.OPERATIONS, fallbacks.BYTES)
    assert ours.operations <= operations * theirs.operations, (ours.names, theirs.names)
    assert ours.written <= written * theirs.written
    assert ours.saved <= fallbacks.BYTES * theirs.saved
    if row.exception:
        assert ours.operations > fallbacks.OPERATIONS * theirs.operations


def test_every_operator_has_a_row_and_one_row_an_exception():
    assert {row.op for row in ROWS} == set(dispatch.OPERATORS)
    assert [(row.op, row.case) for row in ROWS if row.exception] == [("uncertain_points", "with its random points")]


def test_the_counter_counts():
    """Against numbers known beforehand: two operations forward, two backward, and the exponential is saved."""
    x = fallbacks.meta(100, 100)
    found = fallbacks.count(lambda x: (x.exp() * 2).view(-1), (x,))
    assert found.names[:2] == ["aten::exp", "aten::mul"]
    assert (found.written, found.saved) == (4 * 40_000, 40_000)
    assert found.operations == 4
    assert fallbacks.count(lambda x: x.detach().exp_(), (x,)).written == 40_000
    row = next(row for row in ROWS if row.case == "bool masks")
    assert "| point_sample | bool masks | 4 -> 5 | 1.25 |" in fallbacks.table([row])


# ---------------------------------------------------------------- deformable attention
SIZES = ((5, 7), (3, 4), (1, 1))


def run(case, backend="fallback"):
    with m2f_kernels.use_backend(backend):
        return value_and_gradients(case.call, case.tensors, case.grad_output)


@pytest.mark.parametrize("points", [[3, 3, 3], [3, 2, 4]])
@pytest.mark.parametrize("mode", MODES)
def test_deformable_attention(mode, points):
    case = make_case(mode, sizes=SIZES, points=points)
    found = run(case)
    for name, expected in truth(case).items():
        assert relative_error(found[name], expected) < 1e-5, name


@pytest.mark.parametrize("mode", MODES)
def test_what_is_not_finite_contributes_nothing(mode):
    """In coordinates, offsets, reference points and boxes, forward and backward."""
    case = make_case(mode, sizes=SIZES, points=[3, 2, 4])
    values = (float("nan"), float("inf"), -float("inf"), 3e38, -3e38)
    _, *inputs, _ = case.tensors.values()
    for tensor in inputs:
        flat = tensor.view(-1)
        for i, x in enumerate(values):
            flat[7 * i + 3] = x
    found, expected = run(case), run(case, "reference")
    for name, x in expected.items():
        assert x.isfinite().all(), name
        assert relative_error(found[name], x) < 1e-5, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", MODES)
def test_locations_stay_float32(mode, dtype):
    """Values in 16 bits: at the far end of a level of 512 a location in 16 bits would be a pixel off."""
    case = make_case(mode, sizes=((4, 512),), points=[4], n=1)
    case.tensors["value"] = case.tensors["value"].to(dtype)
    found, expected = run(case), truth(case)
    rounding = relative_error(expected["output"].to(dtype).double(), expected["output"])
    assert found["output"].dtype == dtype
    assert relative_error(found["output"].double(), expected["output"]) < 1.1 * rounding + 1e-5


@pytest.mark.parametrize("mode", MODES)
def test_compiled(mode):
    """Plain PyTorch is traced into, forward and backward, in one graph; what autograd does not record stays so."""
    case = make_case(mode, sizes=SIZES[:2], points=[2, 2], n=1, q=3)
    torch._dynamo.reset()
    compiled = torch.compile(case.call, backend="aot_eager", fullgraph=True)
    with m2f_kernels.use_backend("fallback"):
        found = value_and_gradients(compiled, case.tensors, case.grad_output)
    for name, expected in run(case).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-5, msg=name)


def test_levels_elsewhere():
    """Levels that do not follow each other in value."""
    case = make_case("locations", sizes=SIZES[:2], points=[2, 3])
    order = torch.cat([case.value[:, 35:], case.value[:, :35]], 1)
    call = m2f_kernels.ms_deform_attn
    locations, weights = list(case.tensors.values())[1:]
    with m2f_kernels.use_backend("fallback"):
        found = call(order, case.sizes, [12, 0], locations, weights, points_per_level=case.points)
    torch.testing.assert_close(found, run(case)["output"])


@pytest.mark.parametrize("empty", [{"n": 0}, {"q": 0}])
def test_nothing_to_do(empty):
    case = make_case("offsets2", sizes=SIZES, points=[1, 1, 1], **empty)
    assert run(case)["output"].shape == case.grad_output.shape


# ---------------------------------------------------------------- masks and masked attention
NOT_FINITE = (float("nan"), float("inf"), -float("inf"))


def both(function):
    """The results of a function without arguments on the fallback and on the reference."""
    results = []
    for backend in ("fallback", "reference"):
        with m2f_kernels.use_backend(backend):
            results.append(function())
    return results


def assert_same(function, **tolerances):
    found, expected = both(function)
    leaves = [[x for x in torch.utils._pytree.tree_leaves(y) if isinstance(x, torch.Tensor)] for y in (found, expected)]
    for x, y in zip(*leaves, strict=True):
        torch.testing.assert_close(x, y, equal_nan=True, **tolerances)


@pytest.mark.parametrize("s", [1, 31, 32, 37, 96])
def test_packed_masks_have_the_same_bits(s):
    logits = torch.randn(2, 5, s, generator=torch.Generator().manual_seed(s))
    logits[0, 0] = -1
    logits[1, 1, 0] = float("nan")  # attends, as published
    logits[1, 2] = -0.0  # so does this
    for mask in (logits, logits.bfloat16(), logits > 0.5, (logits > 0.5)[:, 1:], (logits > 0.5).transpose(0, 1)):
        assert_same(lambda mask=mask: m2f_kernels.pack_attention_mask(mask), rtol=0, atol=0)
    embed = torch.eye(5).expand(2, 5, 5)
    assert_same(lambda: m2f_kernels.predict_attention_mask(embed, logits.nan_to_num(-1)), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_resized_features(dtype):
    features = torch.randn(2, 3, 16, 12).to(dtype)
    assert_same(lambda: m2f_kernels.resize_mask_features(features, [(8, 6), (4, 3), (20, 5)]))
    assert_same(lambda: m2f_kernels.resize_mask_features(features[:0], [(8, 6)]))
    found = torch.ops.m2f.resize_mask_features(features.to("meta"), [8, 6, 4, 3])
    assert found.shape == (2, 3, 60)


def attention(case, mask=None, **options):
    """Output and gradients, of a function of no arguments."""

    def call():
        def run(*tensors):
            return m2f_kernels.masked_attention(*tensors, case.mask if mask is None else mask, **options)

        return masked_attention_cases.value_and_gradients(run, case)

    return call


@pytest.mark.parametrize("density", masked_attention_cases.DENSITIES.values(), ids=masked_attention_cases.DENSITIES)
@pytest.mark.parametrize("s", [5, 64, 150])
def test_masked_attention(density, s):
    case = masked_attention_cases.make_case(s=s, density=density)
    for mask in (None, case.attend):
        assert_same(attention(case, mask), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("first_key", [0, 9, 110])
def test_masked_attention_in_part(first_key):
    """A mask for some queries and some keys; one for all keys has the row rule, others do not."""
    case = masked_attention_cases.make_case(s=150)
    part = case.attend[:, :4, :40].clone()
    part[0, 1] = False
    for mask in (part, m2f_kernels.pack_attention_mask(part)):
        assert_same(attention(case, mask, first_key=first_key), rtol=1e-5, atol=1e-5)
    case.attend[:, 2] = False
    assert_same(attention(case, case.attend[:, :4], first_key=0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("looks", [True, False])
@pytest.mark.parametrize("bad", NOT_FINITE)
@pytest.mark.parametrize("name", ["key", "value"])
def test_blocked_keys_contribute_nothing(monkeypatch, name, bad, looks):
    """To output and gradients, whether the fallback can look at the numbers or not, as on a device other than the CPU.
    Rows that attend to them are not finite, of keys as in the reference."""
    if not looks:
        monkeypatch.setattr("m2f_kernels.ops.masked_attention.fallback.readable", lambda x: False)
    case = masked_attention_cases.make_case(q=9, s=150)
    case.attend[:, :, 40], case.attend[:, :, 0] = False, True
    clean = attention(case)()
    case.tensors[name] = case.tensors[name].clone()
    case.tensors[name][:, :, 40, 1] = bad
    poisoned = both(attention(case))[0]
    for key, x in poisoned.items():
        assert relative_error(x, clean[key]) < 1e-5, key
    case.attend[:, 3, 40] = True
    found, expected = (x["output"] for x in both(attention(case)))
    others = [i for i in range(9) if i != 3]
    assert relative_error(found[:, :, others], expected[:, :, others]) < 1e-5
    if name == "key" or looks:
        assert torch.equal(found[:, :, 3].isnan(), expected[:, :, 3].isnan())
        assert torch.equal(found[:, :, 3].isinf(), expected[:, :, 3].isinf())
    else:
        assert found[:, :, 3].isnan().all()


def test_masked_attention_compiled_and_mapped():
    case = masked_attention_cases.make_case(n=2, s=70)
    torch._dynamo.reset()
    compiled = torch.compile(case.call, backend="aot_eager", fullgraph=True)
    with m2f_kernels.use_backend("fallback"):
        expected = masked_attention_cases.value_and_gradients(case.call, case)
        found = masked_attention_cases.value_and_gradients(compiled, case)
        tensors = [x.unsqueeze(1) for x in case.tensors.values()]
        mapped = torch.vmap(m2f_kernels.masked_attention)(*tensors, case.attend.unsqueeze(1), scale=case.scale)
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, msg=name)
    torch.testing.assert_close(mapped.squeeze(1), expected["output"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_masked_attention_in_half_precision(dtype):
    """No worse than PyTorch's own, cast or under autocast, which on GPUs makes softmax float32."""
    case = masked_attention_cases.make_case(s=150)
    expected = masked_attention_cases.truth(case)["output"]
    theirs = torch.nn.functional.scaled_dot_product_attention(
        *(x.to(dtype) for x in case.tensors.values()),
        masked_attention_cases.row_rule(case.attend)[:, None],
        scale=case.scale,
    )
    with m2f_kernels.use_backend("fallback"):
        found = case.call(*(x.to(dtype) for x in case.tensors.values()))
        leaves = [x.clone().requires_grad_() for x in case.tensors.values()]
        with torch.autocast("cpu", dtype):
            under = case.call(*leaves)
        gradients = torch.autograd.grad(under.float().square().sum(), leaves)
    bound = 2 * relative_error(theirs, expected) + torch.finfo(dtype).eps
    for x in (found, under):
        assert x.dtype == dtype
        assert relative_error(x, expected) < bound
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in gradients)


def test_masked_attention_is_differentiable_once():
    case = masked_attention_cases.make_case(n=1, s=8)
    query = case.tensors["query"].requires_grad_()
    with m2f_kernels.use_backend("fallback"):
        output = case.call(query, case.tensors["key"], case.tensors["value"])
        (first,) = torch.autograd.grad(output.square().sum(), query, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiable once"):
            first.sum().backward()


# ---------------------------------------------------------------- points


def points_outside(*shape):
    """Points of which some are outside, not finite, or as large as floats become."""
    points = torch.rand(*shape, 2, generator=torch.Generator().manual_seed(1)) * 1.2 - 0.1
    for i, x in enumerate((*NOT_FINITE, 3e38, -3e38, 1e30)):
        points[:, i, 0] = points[:, 10 + i, 1] = x
    return points


FEATURES = torch.randn(2, 3, 16, 12, generator=torch.Generator().manual_seed(2))
IMAGES = {
    "float32": FEATURES, "bfloat16": FEATURES.bfloat16(), "bool": FEATURES > 0, "uint8": (FEATURES > 0).byte() * 255,
    "one pixel": FEATURES[..., :1, :1], "no channels": FEATURES[:, :0], "no images": FEATURES[:0],
}  # fmt: skip


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_point_sample(name, dtype):
    images = IMAGES[name].clone().requires_grad_(IMAGES[name].is_floating_point())
    points = points_outside(2, 40)[: len(images)].to(dtype)

    def call():
        found = m2f_kernels.point_sample(images, points)
        return found, torch.autograd.grad(found.sum(), images) if images.requires_grad else None

    assert_same(call)


def test_factored_masks_are_sampled():
    masks = FactoredMasks(torch.randn(2, 6, 3), FEATURES)
    assert_same(lambda: m2f_kernels.point_sample(masks, points_outside(2, 40)), rtol=1e-5, atol=1e-5)


def generator():
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize("masks", [FEATURES, FEATURES[:0], FactoredMasks(torch.randn(2, 6, 3), FEATURES)])
def test_uncertain_points_are_the_same(masks):
    """Bit for bit: random numbers are a function of the seed on every device."""
    assert_same(lambda: m2f_kernels.uncertain_points(masks, 50, generator=generator()), rtol=0, atol=0)


TARGETS = {
    "of two sizes": [torch.rand(3, 16, 12) < 0.5, torch.rand(2, 8, 9) < 0.5],
    "of two dtypes": [torch.rand(3, 16, 12) < 0.5, torch.rand(2, 16, 12)],
    "of one size": [(torch.rand(3, 16, 12) < 0.5).byte() * 7, (torch.rand(2, 16, 12) < 0.5).byte()],
    "none in one image": [torch.rand(3, 16, 12) < 0.5, torch.rand(0, 16, 12) < 0.5],
    "a map": [InstanceMap(torch.randint(0, 4, (16, 12)), torch.arange(3)), torch.rand(2, 8, 9) < 0.5],
}


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_matching_cost_and_losses(targets):
    factors = torch.randn(2, 6, 3, requires_grad=True), FEATURES.clone().requires_grad_()
    logits = FactoredMasks(*factors).logits().detach().requires_grad_()
    counts = [len(x.ids) if isinstance(x, InstanceMap) else len(x) for x in targets]
    matches = [(torch.tensor([4, 0, 4])[:m], torch.arange(m).flip(0)) for m in counts]
    points = points_outside(sum(counts), 40)

    def losses(inputs, masks, drawn):
        if drawn:
            found = uncertain_point_mask_loss(masks, targets, matches, 50, generator=generator())
        else:
            found = m2f_kernels.point_mask_loss(masks, targets, points, matches=matches)
        return found, torch.autograd.grad(found[0].sum() + 2 * found[1].sum(), inputs)

    for inputs, masks in (((logits,), logits), (factors, FactoredMasks(*factors))):
        assert_same(
            lambda m=masks: m2f_kernels.mask_matching_cost(m, targets, points_outside(2, 40)), rtol=1e-5, atol=1e-5
        )
        for drawn in (False, True):
            assert_same(lambda i=inputs, m=masks, d=drawn: losses(i, m, d), rtol=1e-5, atol=1e-5)


def test_nothing_matched():
    none = [(torch.zeros(0, dtype=torch.int64),) * 2] * 2
    masks = FactoredMasks(torch.randn(2, 6, 3, requires_grad=True), FEATURES)
    targets = [torch.rand(0, 4, 4) < 0.5, torch.rand(2, 8, 9) < 0.5]

    def call():
        found = uncertain_point_mask_loss(masks, targets, none, 50)
        return found, torch.autograd.grad(sum(found).sum(), masks.mask_embed)

    assert_same(call)


def test_losses_compiled():
    """Into one graph."""
    torch._dynamo.reset()
    masks = FEATURES.clone().requires_grad_()
    targets, points = [torch.rand(3, 16, 12) < 0.5, torch.rand(3, 8, 9) < 0.5], points_outside(6, 40)

    def call(masks):
        return (
            sum(m2f_kernels.point_mask_loss(masks, targets, points)).sum()
            + m2f_kernels.point_sample(masks, points[:2]).sum()
        )

    with m2f_kernels.use_backend("fallback"):
        (expected,) = torch.autograd.grad(call(masks), masks)
        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
        (found,) = torch.autograd.grad(compiled(masks), masks)
    torch.testing.assert_close(found, expected)


# ---------------------------------------------------------------- registered operators, called directly


def direct(name):
    """`torch.ops.m2f.<name>` as an exported program calls it on a device that no kernel serves."""
    return dispatch.ON_CUDA[name]


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_registered_losses(targets):
    """Masks of images in any order, some without a target."""
    tensors = m2f_kernels.masks.listed(check_targets("targets", targets, 2, FEATURES))
    count = sum(len(x.pixels) for x in m2f_kernels.masks.grouped(tensors))
    target_rows = torch.arange(count).flip(0)
    rows, points = torch.arange(count) % 6, points_outside(count, 40)
    planes = FEATURES.flatten(0, 1)

    def losses():
        found = direct("point_mask_loss")(planes, rows, tensors, target_rows, points)
        grads = torch.linspace(1, 2, count), torch.linspace(-1, 1, count)
        return found, direct("point_mask_loss_backward")(*grads, rows, points, *found[2:], 6, 16, 12)

    assert_same(losses, rtol=1e-5, atol=1e-6)


def test_registered_operators_on_points():
    points, planes = points_outside(2, 40), FEATURES.flatten(0, 1)
    pixels, marks = torch.randint(0, 4, (1, 16, 12)).expand(3, -1, -1), torch.arange(3)
    for images in IMAGES.values():
        if images.numel():
            assert_same(lambda x=images: direct("point_sample")(x, points[: len(x)], True))
    assert_same(lambda: direct("point_sample_backward")(torch.ones(2, 3, 40), points, 16, 12))
    assert_same(lambda: direct("sample_targets")(pixels, marks, points[0]))
    seed = torch.tensor([5])
    assert_same(lambda: direct("uncertain_points")(planes, torch.arange(6), seed, 0, 50, 20, 5), rtol=0, atol=0)
    assert_same(lambda: direct("mask_matching_cost")(planes.flatten(1), planes.flatten(1).sigmoid()))


def test_registered_operators_do_not_run_the_reference(monkeypatch):
    """The reference runs only where it is asked for."""
    for module in ("points", "masked_attention"):
        reference = importlib.import_module(f"m2f_kernels.ops.{module}.reference")
        for name in dispatch.OPERATORS:
            monkeypatch.setattr(reference, name, None, raising=False)
    points, rows, ones = points_outside(2, 40), torch.arange(2), torch.ones(2)
    with m2f_kernels.use_backend("fallback"):
        direct("point_sample")(FEATURES, points, False)
        direct("point_sample_backward")(torch.ones(2, 3, 40), points, 16, 12)
        direct("uncertain_points")(FEATURES[0], rows, torch.tensor([5]), 0, 50, 20, 5)
        direct("mask_matching_cost")(FEATURES[0, 0], FEATURES[1, 0])
        targets = [torch.rand(3, 8, 9) < 0.5]
        case = masked_attention_cases.make_case(s=40)
        mask = m2f_kernels.pack_attention_mask(case.attend)
        found = direct("masked_attention")(*case.tensors.values(), *mask[:2], 0.3)
        direct("masked_attention_backward")(found[0], *case.tensors.values(), *mask[:2], *found, 0.3)
        found = direct("point_mask_loss")(FEATURES[0], rows, targets, rows, points)
        direct("point_mask_loss_backward")(ones, ones, rows, points, *found[2:], 3, 16, 12)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_registered_attention(dtype, biased):
    """A mask of the first queries only, and one of which a row is empty; gradients from what the forward returned."""
    case = masked_attention_cases.make_case(q=9, s=150)
    case.attend[:, 2] = False
    heads = [x.to(dtype) for x in case.tensors.values()]
    mask = m2f_kernels.pack_attention_mask(case.attend[:, :7])
    n, h, q = heads[0].shape[:3]
    sides = [torch.randn(n, h, q, side).to(dtype) for side in (10, 15)] if biased else []
    name = "masked_attention_with_bias" if biased else "masked_attention"

    def run():
        output, logsumexp = direct(name)(*heads, *mask[:2], *sides, 0.3)
        grad = torch.linspace(-1, 1, output.numel()).view_as(output).to(dtype)
        gradients = direct(f"{name}_backward")(grad, *heads, *mask[:2], *sides, output, logsumexp, 0.3)
        return output, logsumexp, gradients

    # In bfloat16 the fallback rounds scores, weights and sums to 8 bits each, 4e-3; the reference the result only.
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    for found, expected in zip(*(torch.utils._pytree.tree_leaves(x) for x in both(run)), strict=True):
        assert found.shape == expected.shape
        assert found.dtype == expected.dtype
        assert relative_error(found.float(), expected.float()) < tolerance
