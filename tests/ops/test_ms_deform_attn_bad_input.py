"""Bad input of multi-scale deformable attention: the right exception, naming the argument, before any kernel runs."""

import pytest
import torch

import m2f_kernels

N, Q, H, D, K = 2, 5, 3, 8, 4
SIZES = [(3, 4), (2, 5)]
S = 22


def arguments(op):
    """Good arguments, by name."""
    g = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.rand(*shape, generator=g)

    common = {"value": random(N, S, H, D), "spatial_shapes": SIZES, "level_start_index": None}
    if op == "ms_deform_attn":
        sampling = {"sampling_locations": random(N, Q, H, 2, 2, 2), "attention_weights": random(N, Q, H, 2, 2)}
    else:
        sampling = {
            "reference_points": random(N, Q, 2, 2),
            "sampling_offsets": random(N, Q, H, 2, 2, 2),
            "attention_logits": random(N, Q, H, 2, 2),
        }
    return {**common, **sampling}


OPS = ("ms_deform_attn", "ms_deform_attn_from_offsets")
FLOATING = {op: [name for name, x in arguments(op).items() if isinstance(x, torch.Tensor)] for op in OPS}


def call(op, **changes):
    return getattr(m2f_kernels, op)(**{**arguments(op), **changes})


def check(error, op, named, **changes):
    """The error's type, and that its message begins with the argument's name."""
    with pytest.raises(error, match=rf"^{named}: expected .*"):
        call(op, **changes)


@pytest.mark.parametrize("op", OPS)
def test_good_arguments_are_good(op):
    """The arguments of which the other tests change one are accepted."""
    assert call(op).shape == (N, Q, H * D)
    assert call(op, level_start_index=[0, 12]).shape == (N, Q, H * D)


# ---------------------------------------------------------------- the floating tensors
@pytest.mark.parametrize(("op", "name"), [(op, name) for op in OPS for name in FLOATING[op]])
class TestFloating:
    @pytest.mark.parametrize("junk", [None, 3.0, "abc", [[1.0]], object()], ids=type)
    def test_not_a_tensor(self, op, name, junk):
        check(TypeError, op, name, **{name: junk})

    @pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64], ids=str)
    def test_dtype(self, op, name, dtype):
        check(TypeError, op, name, **{name: arguments(op)[name].to(dtype)})

    def test_rank(self, op, name):
        x = arguments(op)[name]
        for wrong in (x[0], x[None], x.flatten(), x.flatten()[0]):
            check(ValueError, op, name, **{name: wrong})

    def test_sizes(self, op, name):
        """One more and one less along every axis but those that value defines."""
        x = arguments(op)[name]
        free = (0, 2, 3) if name == "value" else ()
        for axis in range(x.dim()):
            if axis in free:
                continue
            for wrong in (torch.cat([x, x.narrow(axis, 0, 1)], axis), x.narrow(axis, 1, x.shape[axis] - 1)):
                if name == "reference_points" and axis == 2 and wrong.shape[2] == 1:
                    continue  # shared by all levels: good
                named = "spatial_shapes" if name == "value" else r"\w+"
                check(ValueError, op, named, **{name: wrong})

    def test_heads_and_batch_of_value(self, op, name):
        """A mismatch is reported for the tensor that disagrees with value."""
        if name in ("value", "reference_points"):
            return
        for axis in (0, 2):
            x = arguments(op)[name]
            check(ValueError, op, name, **{name: torch.cat([x, x.narrow(axis, 0, 1)], axis)})

    def test_device(self, op, name):
        changes = {name: arguments(op)[name].to("meta")}
        check(ValueError, op, r"\w+", **changes)

    def test_empty_axes(self, op, name):
        """No heads, no channels, no points, no coordinates."""
        x = arguments(op)[name]
        for axis in range(2, x.dim()):
            check(ValueError, op, r"\w+", **{name: x.narrow(axis, 0, 0)})


def test_no_channels_and_no_heads():
    g = arguments("ms_deform_attn")
    check(ValueError, "ms_deform_attn", "value", value=g["value"][..., :0])
    changes = {name: g[name][:, :, :0] for name in ("value", "sampling_locations", "attention_weights")}
    check(ValueError, "ms_deform_attn", "value", **changes)


@pytest.mark.parametrize("last", [0, 1, 3, 5])
def test_reference_points_have_2_or_4_coordinates(last):
    points = torch.rand(N, Q, 2, last)
    check(ValueError, "ms_deform_attn_from_offsets", "reference_points", reference_points=points)


def test_no_points():
    """K = 0."""
    op = "ms_deform_attn"
    empty = {
        "sampling_locations": torch.rand(N, Q, H, 2, 0, 2),
        "attention_weights": torch.rand(N, Q, H, 2, 0),
    }
    check(ValueError, op, "sampling_locations", **empty)
    flat = {name: x.flatten(3, 4) for name, x in empty.items()}
    check(ValueError, op, "points_per_level", **flat, points_per_level=[0, 0])


@pytest.mark.parametrize("op", OPS)
class TestLevels:
    @pytest.mark.parametrize(
        "junk",
        [
            "abc",
            None,
            5,
            [3, 4],
            [(3, 4, 5), (2, 5, 1)],
            [(3.0, 4.0), (2.0, 5.0)],
            [("3", "4"), ("2", "5")],
            [(3, None), (2, 5)],
            torch.tensor(SIZES, dtype=torch.float32),
            torch.tensor(SIZES, dtype=torch.bool),
        ],
        ids=str,
    )
    def test_not_sizes(self, op, junk):
        check(TypeError, op, "spatial_shapes", spatial_shapes=junk)

    @pytest.mark.parametrize("shape", [(4,), (2, 3), (1, 2, 2), ()])
    def test_shape_of_the_tensor(self, op, shape):
        check(ValueError, op, "spatial_shapes", spatial_shapes=torch.ones(shape, dtype=torch.int64))

    @pytest.mark.parametrize("as_tensor", [False, True])
    @pytest.mark.parametrize(
        "sizes",
        [
            [(3, 4), (2, 6)],
            [(3, 4), (2, 4)],
            [(3, 4), (0, 5)],
            [(3, 4), (5, 0)],
            [(-3, -4), (2, 5)],
            [(3, 4), (-2, 5)],
            [(2**40, 2**40), (2, 5)],
        ],
        ids=str,
    )
    def test_sizes(self, op, sizes, as_tensor):
        """Levels that are too long, too short, empty, negative; a product that overflows 64 bits."""
        sizes = torch.tensor(sizes) if as_tensor else sizes
        with pytest.raises(ValueError, match=r"^spatial_shapes: expected .*"):
            call(op, spatial_shapes=sizes)

    def test_number_of_levels(self, op):
        for sizes in ([], [(1, 1)] * 17, torch.ones(17, 2, dtype=torch.int64), torch.ones(0, 2, dtype=torch.int64)):
            check(ValueError, op, "spatial_shapes", spatial_shapes=sizes)

    @pytest.mark.parametrize("as_tensor", [False, True])
    @pytest.mark.parametrize(
        "starts", [[0], [0, 12, 22], [0, 13], [-1, 12], [0, 2**62], [0, 22], [0, -(2**62)], []], ids=str
    )
    def test_starts(self, op, starts, as_tensor):
        """Level starts outside value, or too many, or too few."""
        starts = torch.tensor(starts, dtype=torch.int64) if as_tensor else starts
        check(ValueError, op, "level_start_index", level_start_index=starts)

    def test_overlapping_levels(self, op):
        """Levels that share positions leave others without a level: their gradient would never be written."""
        check(ValueError, op, "level_start_index", level_start_index=[0, 3])
        check(ValueError, op, "level_start_index", level_start_index=torch.tensor([8, 0]))

    @pytest.mark.parametrize(
        "junk",
        [5, "ab", [0.0, 12.0], ["0", "12"], [None, 12], torch.tensor([0.0, 12.0]), object()],
        ids=lambda x: type(x).__name__ if not isinstance(x, list) else str(x),
    )
    def test_starts_that_are_no_integers(self, op, junk):
        check(TypeError, op, "level_start_index", level_start_index=junk)

    def test_shape_of_the_starts(self, op):
        for starts in (torch.zeros(2, 1, dtype=torch.int64), torch.tensor(0)):
            check(ValueError, op, "level_start_index", level_start_index=starts)

    def test_device(self, op):
        """Level tensors live with value, or on the host."""
        with pytest.raises(ValueError, match=r"^spatial_shapes: expected .*"):
            call(op, spatial_shapes=torch.tensor(SIZES, device="meta"))

    def test_points_per_level(self, op):
        flat = {
            name: x.flatten(3, 4) for name, x in arguments(op).items() if isinstance(x, torch.Tensor) and x.dim() > 4
        }
        assert call(op, **flat, points_per_level=[1, 3]).shape == (N, Q, H * D)
        for wrong in ([4], [1, 1, 2], [0, 4], [-1, 5], [2.0, 2.0], ["2", "2"], []):
            check(ValueError, op, "points_per_level", **flat, points_per_level=wrong)
        for wrong in (4, object()):
            check(TypeError, op, "points_per_level", **flat, points_per_level=wrong)
        # A sum that is not the number of points that came.
        check(ValueError, op, r"sampling_\w+", **flat, points_per_level=[1, 2])
        # Written-out level axis together with points_per_level.
        check(ValueError, op, r"sampling_\w+", points_per_level=[2, 2])


def test_offset_scale():
    for wrong in ("a", None, [0.5]):
        check(TypeError, "ms_deform_attn_from_offsets", "offset_scale", offset_scale=wrong)


# ---------------------------------------------------------------- direct calls of torch.ops.m2f
def direct(backward=False, **changes):
    """torch.ops.m2f.ms_deform_attn on flat tensors."""
    g = arguments("ms_deform_attn")
    named = {
        "grad_output": torch.rand(N, Q, H * D),
        "value": g["value"],
        "levels": [3, 4, 0, 2, 5, 12],
        "spatial_shapes": None,
        "level_start_index": None,
        "sampling_locations": g["sampling_locations"].flatten(3, 4),
        "attention_weights": g["attention_weights"].flatten(3, 4),
        "points_per_level": [2, 2],
        "needs_value": True,
        "needs_sampling": True,
        **changes,
    }
    if backward:
        return torch.ops.m2f.ms_deform_attn_backward(**named)
    for name in ("grad_output", "needs_value", "needs_sampling"):
        del named[name]
    return torch.ops.m2f.ms_deform_attn(**named)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {"levels": []},
        {"levels": [3, 4, 0]},
        {"levels": [3, 4, 0, 2, 5, 13]},
        {"levels": [3, 4, -1, 2, 5, 12]},
        {"levels": [2**62, 4, 0, 2, 5, 12]},
        {"levels": [3, 4, 0, -2, -5, 12]},
        {"levels": [3, 0, 0, 2, 5, 12]},
        {"levels": [3, 4, 2**63 - 1, 2, 5, 12]},
        {"points_per_level": []},
        {"points_per_level": [2, 1]},
        {"points_per_level": [4, 0]},
        {"points_per_level": [5, -1]},
        {"points_per_level": [2**31 - 1, 2**31 - 1]},
        {"points_per_level": [2**32 + 2, 2]},
        {"points_per_level": [1] * 17},
        {"levels": [], "spatial_shapes": torch.tensor(SIZES)},
        {"levels": [], "spatial_shapes": torch.tensor(SIZES), "level_start_index": torch.tensor([0, 13])},
        {"levels": [], "spatial_shapes": torch.tensor(SIZES), "level_start_index": torch.tensor([0])},
        {"levels": [], "spatial_shapes": torch.tensor(SIZES).int(), "level_start_index": torch.tensor([0, 12]).int()},
        {"value": torch.rand(N, S, H)},
        {"value": torch.tensor(1.0)},
        {"value": torch.zeros(N, S, H, D, dtype=torch.int64)},
        {"sampling_locations": torch.rand(N, Q, H, K)},
        {"sampling_locations": torch.tensor(1.0)},
        {"sampling_locations": torch.rand(N, Q + 1, H, K, 2)},
        {"sampling_locations": torch.zeros(N, Q, H, K, 2, dtype=torch.int32)},
        {"attention_weights": torch.rand(N, Q, H, K, 1)},
        {"attention_weights": torch.tensor(1.0)},
        {"attention_weights": torch.rand(N, Q, H + 1, K)},
        {"attention_weights": torch.rand(N + 1, Q, H, K)},
        {"attention_weights": torch.zeros(N, Q, H, K, dtype=torch.bool)},
    ],
)
def test_direct_calls_raise(changes, backward):
    """Python's checks are not in the way here: the native ones must guard memory."""
    with pytest.raises(RuntimeError):
        direct(backward, **changes)


@pytest.mark.parametrize(
    "grad",
    [torch.rand(N, Q, H * D + 1), torch.rand(N, Q), torch.tensor(1.0), torch.rand(N, Q, H * D).double()],
    ids=lambda x: str(list(x.shape)),
)
def test_direct_calls_with_a_wrong_output_gradient(grad):
    with pytest.raises(RuntimeError):
        direct(True, grad_output=grad)


@pytest.mark.parametrize(
    "points",
    [torch.rand(N, Q, 2, 3), torch.rand(N, Q, 1, 2), torch.rand(N, Q, 2), torch.tensor(1.0)],
    ids=lambda x: str(list(x.shape)),
)
def test_direct_calls_with_wrong_reference_points(points):
    g = arguments("ms_deform_attn_from_offsets")
    offsets, logits = g["sampling_offsets"].flatten(3, 4), g["attention_logits"].flatten(3, 4)
    with pytest.raises(RuntimeError):
        torch.ops.m2f.ms_deform_attn_from_offsets(
            g["value"], [3, 4, 0, 2, 5, 12], None, None, points, offsets, logits, [2, 2], 0.5
        )


@pytest.mark.parametrize("levels", [[3, 4, 0, 2, 5, 3], [3, 4, 0, 2, 4, 12]], ids=["overlap", "too short"])
def test_positions_without_a_level(deterministic, levels):
    """A direct or compiled call may describe levels that leave positions out: refused, or a gradient of zero there."""
    try:
        grad, _, _ = direct(True, levels=levels)
    except RuntimeError:
        return
    assert torch.isfinite(grad).all()
    assert (grad[:, -1] == 0).all()
