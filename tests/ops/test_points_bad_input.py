"""Bad input of the operators on points: the right exception, naming the argument, before any kernel runs."""

import pytest
import torch

import m2f_kernels
from m2f_kernels import FactoredMasks

N, Q, C, T, K = 2, 4, 3, 3, 10


def arguments(op):
    """Good arguments, by name."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(N, Q, 6, 5, generator=g)
    targets = [torch.rand(T + i, 8, 9 + i, generator=g) > 0.5 for i in range(N)]
    points = torch.rand(N, K, 2, generator=g)
    matches = [(torch.tensor([0, 3]), torch.tensor([2, 1])), (torch.tensor([1]), torch.tensor([3]))]
    return {
        "point_sample": {"input": logits, "points": points},
        "uncertain_points": {"mask_logits": logits, "num_points": K},
        "mask_matching_cost": {"mask_logits": logits, "target_masks": targets, "points": points},
        "point_mask_loss": {
            "mask_logits": logits,
            "target_masks": targets,
            "points": torch.rand(3, K, 2, generator=g),
            "matches": matches,
        },
    }[op]


def check(error, op, named, **changes):
    """The error's type, and that its message begins with the argument's name."""
    with pytest.raises(error, match=rf"^{named}: expected .*"):
        getattr(m2f_kernels, op)(**{**arguments(op), **changes})


OPS = ("point_sample", "uncertain_points", "mask_matching_cost", "point_mask_loss")
WITH_POINTS = ("point_sample", "mask_matching_cost", "point_mask_loss")
WITH_TARGETS = ("mask_matching_cost", "point_mask_loss")


def masks_name(op):
    return "input" if op == "point_sample" else "mask_logits"


@pytest.mark.parametrize("op", OPS)
def test_good_arguments_are_good(op):
    """The arguments of which the other tests change one are accepted, as logits and as factors."""
    good = arguments(op)
    getattr(m2f_kernels, op)(**good)
    factored = FactoredMasks(torch.zeros(N, Q, C), torch.zeros(N, C, 6, 5))
    getattr(m2f_kernels, op)(**{**good, masks_name(op): factored})


# ---------------------------------------------------------------- masks
@pytest.mark.parametrize("op", OPS)
class TestMasks:
    @pytest.mark.parametrize("junk", [None, 3.0, "abc", [[1.0]], object()], ids=type)
    def test_not_a_tensor(self, op, junk):
        check(TypeError, op, masks_name(op), **{masks_name(op): junk})

    @pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.complex64], ids=str)
    def test_dtype(self, op, dtype):
        check(TypeError, op, masks_name(op), **{masks_name(op): torch.zeros(N, Q, 6, 5, dtype=dtype)})

    @pytest.mark.parametrize("shape", [(6, 5), (N, Q, 6, 5, 1), (N, Q, 0, 5), (N, Q, 6, 0)], ids=str)
    def test_shape(self, op, shape):
        check(ValueError, op, masks_name(op), **{masks_name(op): torch.zeros(shape)})

    @pytest.mark.parametrize("dtype", [torch.bool, torch.uint8], ids=str)
    def test_bool_logits(self, op, dtype):
        """Masks that are bool may be sampled, but they are no logits."""
        masks = torch.zeros(N, Q, 6, 5, dtype=dtype)
        if op == "point_sample":
            assert m2f_kernels.point_sample(masks, arguments(op)["points"]).dtype == torch.float32
        else:
            check(TypeError, op, "mask_logits", mask_logits=masks)

    @pytest.mark.parametrize(
        ("embed", "features", "part"),
        [
            ((Q, C), (N, C, 6, 5), "mask_embed"),
            ((N, Q, C), (C, 6, 5), "mask_features"),
            ((N, Q, C), (N, C + 1, 6, 5), "mask_features"),
            ((N, Q, C), (N + 1, C, 6, 5), "mask_features"),
            ((N, Q, C), (N, C, 0, 5), "mask_features"),
        ],
    )
    def test_factors(self, op, embed, features, part):
        masks = FactoredMasks(torch.zeros(embed), torch.zeros(features))
        check(ValueError, op, rf"{masks_name(op)}\.{part}", **{masks_name(op): masks})

    def test_factors_on_two_devices(self, op):
        masks = FactoredMasks(torch.zeros(N, Q, C), torch.zeros(N, C, 6, 5, device="meta"))
        check(ValueError, op, rf"{masks_name(op)}\.mask_features", **{masks_name(op): masks})


def test_cost_needs_an_image_axis():
    check(ValueError, "mask_matching_cost", "mask_logits", mask_logits=torch.zeros(Q, 6, 5))


# ---------------------------------------------------------------- points
@pytest.mark.parametrize("op", WITH_POINTS)
class TestPoints:
    @pytest.mark.parametrize("junk", [None, 3.0, "abc", object()], ids=type)
    def test_not_a_tensor(self, op, junk):
        check(TypeError, op, "points", points=junk)

    @pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float16, torch.bfloat16], ids=str)
    def test_dtype(self, op, dtype):
        """16 bits are too few for a coordinate."""
        check(TypeError, op, "points", points=arguments(op)["points"].to(dtype))

    def test_shape(self, op):
        good = arguments(op)["points"]
        for wrong in (good[0], good[None], good[..., :1], torch.cat([good, good[:1]]), good[:0], good[:, :0]):
            check(ValueError, op, "points", points=wrong)

    def test_device(self, op):
        check(ValueError, op, "points", points=arguments(op)["points"].to("meta"))

    def test_gradient(self, op):
        check(ValueError, op, "points", points=arguments(op)["points"].requires_grad_())


# ---------------------------------------------------------------- targets
@pytest.mark.parametrize("op", WITH_TARGETS)
class TestTargets:
    @pytest.mark.parametrize("junk", [None, 3.0, "abc", object()], ids=type)
    def test_not_targets(self, op, junk):
        check(TypeError, op, "target_masks", target_masks=junk)

    @pytest.mark.parametrize("junk", [None, 3.0, torch.zeros(T, 8, 9, dtype=torch.int64)], ids=str)
    def test_not_a_target(self, op, junk):
        check(TypeError, op, r"target_masks\[1\]", target_masks=[arguments(op)["target_masks"][0], junk])

    @pytest.mark.parametrize("shape", [(8, 9), (1, T, 8, 9), (T, 0, 9), (T, 8, 0)], ids=str)
    def test_shape_of_a_target(self, op, shape):
        targets = [arguments(op)["target_masks"][0], torch.zeros(shape, dtype=torch.bool)]
        check(ValueError, op, r"target_masks\[1\]", target_masks=targets)

    def test_number_of_images(self, op):
        targets = arguments(op)["target_masks"]
        for wrong in (targets[:1], [*targets, targets[0]], torch.zeros(N + 1, T + 1, 8, 9)):
            check(ValueError, op, "target_masks", target_masks=wrong)

    def test_device(self, op):
        targets = [x.to("meta") for x in arguments(op)["target_masks"]]
        check(ValueError, op, r"target_masks\[0\]", target_masks=targets)

    def test_gradient(self, op):
        targets = [torch.zeros(x.shape, requires_grad=True) for x in arguments(op)["target_masks"]]
        check(ValueError, op, r"target_masks\[0\]", target_masks=targets)


# ---------------------------------------------------------------- matches and queries
INDICES = [
    (TypeError, [0, 1]),
    (TypeError, torch.tensor([0.0, 1.0])),
    (TypeError, torch.tensor([0, 1], dtype=torch.int32)),
    (TypeError, torch.tensor([[0, 1]])),
    (ValueError, torch.tensor([0, -1])),
    (ValueError, torch.tensor([0, 100])),
]


@pytest.mark.parametrize(("error", "wrong"), INDICES)
def test_queries(error, wrong):
    check(error, "uncertain_points", r"queries\[1\]", queries=[torch.tensor([0]), wrong])
    good = arguments("point_mask_loss")["matches"]
    chosen = torch.zeros(wrong.numel() if torch.is_tensor(wrong) else 2, dtype=torch.int64)
    check((TypeError, ValueError), "point_mask_loss", r"matches\[1\]", matches=[good[0], (wrong, chosen)])


@pytest.mark.parametrize(("error", "wrong"), INDICES)
def test_targets_of_matches(error, wrong):
    good = arguments("point_mask_loss")["matches"]
    check(error, "point_mask_loss", r"matches\[1\]", matches=[good[0], (torch.tensor([0, 1]), wrong)])


def test_numbers_of_matches():
    good = arguments("point_mask_loss")["matches"]
    check(ValueError, "point_mask_loss", "matches", matches=good[:1])
    check(ValueError, "point_mask_loss", r"matches\[1\]", matches=[good[0], (torch.tensor([0]), torch.tensor([0, 1]))])
    check(ValueError, "uncertain_points", "queries", queries=[torch.tensor([0])])
    check(ValueError, "point_mask_loss", r"target_masks\[0\]", matches=None)


# ---------------------------------------------------------------- numbers
@pytest.mark.parametrize(
    ("name", "error", "wrong"),
    [
        *(("num_points", TypeError, x) for x in (1.5, "a", None, True)),
        *(("num_points", ValueError, x) for x in (0, -3)),
        *(("oversample_ratio", TypeError, x) for x in ("a", None, True)),
        *(("oversample_ratio", ValueError, x) for x in (0.5, -1.0, float("nan"), float("inf"), 1e12)),
        *(("importance_sample_ratio", TypeError, x) for x in ("a", None, True)),
        *(("importance_sample_ratio", ValueError, x) for x in (-0.1, 1.1, float("nan"))),
    ],
)
def test_numbers(name, error, wrong):
    check(error, "uncertain_points", name, **{name: wrong})


def test_direct_calls_of_the_operators_are_guarded():
    """Direct calls, which skip Python's checks, are checked by the kernels before they touch memory."""
    logits, seed = torch.zeros(2, 4, 4), torch.tensor([1])
    ops, rows, points = torch.ops.m2f, torch.tensor([0, 2]), torch.zeros(2, 5, 2)
    for call in (
        lambda: ops.uncertain_points(logits, rows, seed, 0, 9, 3, 1),
        lambda: ops.uncertain_points(logits, rows[:1], seed, 0, 2, 3, 1),
        lambda: ops.point_mask_loss(logits, rows, [torch.zeros(3, 4, 4)], rows, points),
        lambda: ops.point_mask_loss(logits, rows[:1], [torch.zeros(3, 4, 4)], rows[1:] + 1, points[:1]),
        lambda: ops.point_mask_loss(logits, rows[:1], [torch.zeros(3, 4, 4)], rows[:1], points),
        lambda: ops.point_sample(torch.zeros(1, 1, 4, 4), points, False),
        lambda: ops.point_sample(torch.zeros(2, 1, 4, 4, dtype=torch.int64), points, False),
        lambda: ops.mask_matching_cost(torch.zeros(2, 5), torch.zeros(2, 6)),
    ):
        with pytest.raises(RuntimeError):
            call()


@pytest.mark.parametrize("op", OPS)
def test_dtypes_of_factors(op):
    """16 and 32 bits may be mixed, as autocast leaves them; float64 with another may not."""
    good = arguments(op)
    embed, features = torch.zeros(N, Q, C), torch.zeros(N, C, 6, 5)
    mixed = FactoredMasks(embed.bfloat16(), features)
    getattr(m2f_kernels, op)(**{**good, masks_name(op): mixed})
    name = rf"{masks_name(op)}\.mask_features"
    check(TypeError, op, name, **{masks_name(op): FactoredMasks(embed.double(), features)})
    check(TypeError, op, name, **{masks_name(op): FactoredMasks(embed, features.double())})
