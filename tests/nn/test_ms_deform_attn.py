"""The module: parameters that published checkpoints load into, their initialisation, masks and errors."""

import copy
import math
import pickle

import pytest
import torch
from torch.nn import functional as F

from m2f_kernels.nn import MSDeformAttn
from tests.numerics import relative_error
from tests.ops.ms_deform_attn_cases import Case, grid_sample_form

SIZES = [(5, 9), (3, 4)]
S = 57


def make(device="cpu", q=11, coordinates=2, dtype=torch.float32, **options):
    """A module whose projections are not the trivial ones of initialisation, and inputs for it."""
    torch.manual_seed(0)
    options = {"embed_dim": 32, "num_levels": 2, "num_heads": 4, "num_points": 3, **options}
    module = MSDeformAttn(**options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    inputs = (torch.randn(2, q, 32), torch.rand(2, q, 2, coordinates) * 0.8 + 0.1, torch.randn(2, S, 32))
    return module.to(device, dtype), tuple(x.to(device, dtype) for x in inputs)


def eager(module, query, points, value, padding_mask=None, sizes=SIZES):
    """The same from PyTorch's parts, level by level on grid_sample."""
    n, q, _ = query.shape
    k = sum(module.points_per_level)
    value = F.linear(value, module.value_proj.weight, module.value_proj.bias)
    if padding_mask is not None:
        value = value * ~padding_mask[..., None]
    offsets = F.linear(query, module.sampling_offsets.weight, module.sampling_offsets.bias)
    logits = F.linear(query, module.attention_weights.weight, module.attention_weights.bias)
    mode = "offsets2" if points.shape[-1] == 2 else "offsets4"
    case = Case(mode, sizes, module.points_per_level, {}, torch.empty(0))
    value = value.view(n, -1, module.num_heads, value.shape[-1] // module.num_heads)
    offsets, logits = offsets.view(n, q, module.num_heads, k, 2), logits.view(n, q, module.num_heads, k)
    return module.output_proj(grid_sample_form(case, value, points, offsets, logits))


def test_parameters_are_those_of_published_checkpoints():
    """Names and shapes of Deformable DETR's and Mask2Former's multi-scale deformable attention."""
    expected = {
        "sampling_offsets.weight": (192, 256),
        "sampling_offsets.bias": (192,),
        "attention_weights.weight": (96, 256),
        "attention_weights.bias": (96,),
        "value_proj.weight": (256, 256),
        "value_proj.bias": (256,),
        "output_proj.weight": (256, 256),
        "output_proj.bias": (256,),
    }
    state = MSDeformAttn(embed_dim=256, num_levels=3, num_heads=8, num_points=4).state_dict()
    assert {name: tuple(x.shape) for name, x in state.items()} == expected


@pytest.mark.parametrize("heads", [8, 6])
def test_initialisation(heads):
    """Each head looks into its own direction, the i-th point i pixels away; attention is uniform."""
    module = MSDeformAttn(embed_dim=48, num_levels=3, num_heads=heads, num_points=4)
    assert (module.sampling_offsets.weight == 0).all()
    assert (module.attention_weights.weight == 0).all()
    assert (module.attention_weights.bias == 0).all()
    bias = module.sampling_offsets.bias.view(heads, 3, 4, 2)
    for h in range(heads):
        x, y = math.cos(2 * math.pi * h / heads), math.sin(2 * math.pi * h / heads)
        largest = max(abs(x), abs(y))
        for point in range(4):
            wish = torch.tensor([x / largest, y / largest]) * (point + 1)
            assert torch.allclose(bias[h, :, point], wish.expand(3, 2), atol=1e-5)
    for projection in (module.value_proj, module.output_proj):
        assert (projection.bias == 0).all()
        limit = math.sqrt(6 / (48 + 48))
        assert limit * 0.9 < projection.weight.abs().max() <= limit
    bias.data.fill_(7)
    module.reset_parameters()
    assert module.sampling_offsets.bias.abs().max() <= 4 + 1e-5


def test_initialisation_with_points_per_level():
    module = MSDeformAttn(embed_dim=16, num_levels=3, num_heads=2, num_points=[3, 6, 1])
    bias = module.sampling_offsets.bias.view(2, 10, 2)
    assert torch.allclose(bias[0, :, 0], torch.tensor([1.0, 2, 3, 1, 2, 3, 4, 5, 6, 1]))
    assert torch.allclose(bias[1, :, 0], -bias[0, :, 0])


@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("points", [3, [1, 4]], ids=str)
def test_equals_the_eager_composition(device, coordinates, points):
    """Output and the gradient of every parameter, on levels that are not square."""
    module, inputs = make(device, coordinates=coordinates, num_points=points)
    exact, exact_inputs = copy.deepcopy(module).cpu().double(), [x.cpu().double() for x in inputs]
    weight = torch.randn(2, 11, 32)
    out, expected = module(*inputs, SIZES), eager(exact, *exact_inputs)
    assert relative_error(out, expected) < 1e-5
    (out * weight.to(device)).sum().backward()
    (expected * weight).sum().backward()
    for (name, x), y in zip(module.named_parameters(), exact.parameters(), strict=True):
        assert relative_error(x.grad, y.grad) < 1e-4, name


def test_ways_to_say_the_sizes(device):
    module, inputs = make(device)
    out = module(*inputs, SIZES)
    assert torch.equal(out, module(*inputs, torch.tensor(SIZES, device=device)))
    assert torch.equal(out, module(*inputs, torch.tensor(SIZES), torch.tensor([0, 45])))
    assert torch.equal(out, module(*inputs, SIZES, [0, 45]))


def test_shared_reference_points(device):
    module, (query, points, value) = make(device)
    out = module(query, points[:, :, :1], value, SIZES)
    assert torch.equal(out, module(query, points[:, :, :1].repeat(1, 1, 2, 1), value, SIZES))


def test_padding_mask(device):
    """Padded positions count as zero after the projection: its bias does not come through, nor does what lies there."""
    module, (query, points, value) = make(device)
    mask = torch.zeros(2, S, dtype=torch.bool, device=device)
    mask[0, 20:45] = True
    mask[1, ::3] = True
    out = module(query, points, value, SIZES, padding_mask=mask)
    assert relative_error(out, eager(module.cpu(), query.cpu(), points.cpu(), value.cpu(), mask.cpu())) < 1e-5
    module.to(device)
    garbage = torch.where(mask[..., None], torch.full_like(value, float("nan")), value)
    assert torch.equal(out, module(query, points, garbage, SIZES, padding_mask=mask))
    assert not torch.equal(out, module(query, points, value, SIZES))


def test_state_dict_round_trip():
    module, inputs = make()
    other = MSDeformAttn(32, 2, 4, 3)
    assert not torch.equal(other(*inputs, SIZES), module(*inputs, SIZES))
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(*inputs, SIZES), module(*inputs, SIZES))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies(copied):
    module, inputs = make()
    assert torch.equal(copied(module)(*inputs, SIZES), module(*inputs, SIZES))


def test_autocast(device):
    """bfloat16 autocast around a float32 module: close to float32, gradients in float32."""
    module, inputs = make(device)
    with torch.autocast(device.type, torch.bfloat16):
        out = module(*inputs, SIZES)
    assert out.dtype == torch.bfloat16
    assert relative_error(out, module(*inputs, SIZES)) < 0.05
    out.float().square().sum().backward()
    for name, x in module.named_parameters():
        assert x.grad.dtype == torch.float32, name
        assert torch.isfinite(x.grad).all(), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(device, dtype):
    module, inputs = make(device, dtype=dtype)
    out = module(*inputs, SIZES)
    assert out.dtype == dtype
    expected = eager(copy.deepcopy(module).cpu().double(), *(x.cpu().double() for x in inputs))
    assert relative_error(out, expected) < (1e-12 if dtype == torch.float64 else 0.1)


@pytest.mark.parametrize("n", [0, 2])
def test_no_queries(device, n):
    module, (query, points, value) = make(device)
    out = module(query[:n, :0], points[:n, :0], value[:n], SIZES)
    assert out.shape == (n, 0, 32)
    out.sum().backward()
    assert (module.value_proj.weight.grad == 0).all()


def test_compiles(device):
    module, inputs = make(device)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(*inputs, SIZES), module(*inputs, SIZES)) < 1e-6


def test_meta_device():
    """Built without memory, materialised later, as loaders of large checkpoints do."""
    with torch.device("meta"):
        module = MSDeformAttn(32, 2, 4, 3)
    module = module.to_empty(device="cpu")
    module.reset_parameters()
    torch.manual_seed(0)
    reference = MSDeformAttn(32, 2, 4, 3)
    assert torch.equal(module.sampling_offsets.bias, reference.sampling_offsets.bias)


# ---------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("named", "options"),
    [
        ("embed_dim", {"embed_dim": 30, "num_heads": 4}),
        ("embed_dim", {"embed_dim": 0}),
        (r"(embed_dim|num_heads)", {"num_heads": 0}),
        (r"(embed_dim|num_heads)", {"num_heads": -8}),
        ("num_points", {"num_points": 0}),
        ("num_points", {"num_points": -1}),
        ("num_points", {"num_points": [4, 4]}),
        ("num_points", {"num_points": [4, 4, 0, 4]}),
        ("num_levels", {"num_levels": 0}),
        ("num_levels", {"num_levels": -1}),
        ("num_levels", {"num_levels": 17}),
    ],
)
def test_bad_construction(named, options):
    with pytest.raises(ValueError, match=rf"^{named}: expected"):
        MSDeformAttn(**options)


@pytest.mark.parametrize("points", [4.0, "4", None, [4.0, 4.0, 4.0, 4.0]], ids=str)
def test_number_of_points_of_a_wrong_type(points):
    with pytest.raises((TypeError, ValueError), match=r"^num_points: expected"):
        MSDeformAttn(num_points=points)


@pytest.mark.parametrize(
    ("error", "named", "changes"),
    [
        (ValueError, "query", {"query": torch.rand(2, 11, 31)}),
        (ValueError, "query", {"query": torch.rand(11, 32)}),
        (TypeError, "query", {"query": None}),
        (TypeError, "query", {"query": torch.zeros(2, 11, 32, dtype=torch.int64)}),
        (ValueError, "value", {"value": torch.rand(2, S, 31)}),
        (ValueError, "value", {"value": torch.rand(3, S, 32)}),
        (ValueError, "value", {"value": torch.rand(S, 32)}),
        (TypeError, "value", {"value": "abc"}),
        (ValueError, "spatial_shapes", {"value": torch.rand(2, S - 1, 32)}),
        (ValueError, "spatial_shapes", {"spatial_shapes": SIZES[:1]}),
        (ValueError, "spatial_shapes", {"spatial_shapes": [(5, 9), (3, 2), (3, 2)]}),
        (ValueError, "reference_points", {"reference_points": torch.rand(2, 11, 2, 3)}),
        (ValueError, "reference_points", {"reference_points": torch.rand(2, 11, 3, 2)}),
        (ValueError, "reference_points", {"reference_points": torch.rand(2, 11, 2)}),
        (TypeError, "reference_points", {"reference_points": None}),
        (TypeError, "padding_mask", {"padding_mask": torch.zeros(2, S)}),
        (TypeError, "padding_mask", {"padding_mask": "abc"}),
        (ValueError, "padding_mask", {"padding_mask": torch.zeros(2, S - 1, dtype=torch.bool)}),
        (ValueError, "padding_mask", {"padding_mask": torch.zeros(S, dtype=torch.bool)}),
        (ValueError, "padding_mask", {"padding_mask": torch.zeros(2, S, dtype=torch.bool, device="meta")}),
    ],
)
def test_bad_calls(error, named, changes):
    module, (query, points, value) = make()
    arguments = {"query": query, "reference_points": points, "value": value, "spatial_shapes": SIZES}
    with pytest.raises(error, match=rf"^{named}: expected"):
        module(**{**arguments, **changes})
