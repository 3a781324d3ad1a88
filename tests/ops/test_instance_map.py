"""Targets as a map of ids or as run lengths: what is computed from them has the bits of the dense masks, and nothing
dense exists."""

import copy
import pickle
import re

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_map

import m2f_kernels
from m2f_kernels import FactoredMasks, InstanceMap, RunLengths, masks
from m2f_kernels.nn import PointMaskCriterion
from m2f_kernels.ops.points import check_targets, fallback, reference
from m2f_kernels.ops.points import reference as loss_reference
from tests.watching import Largest

try:
    from pycocotools.mask import encode
except ImportError:
    encode = None

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
Q, T, K = 9, 5, 301


def make(generator, size=(37, 53), ids=(7, 3, 250, 0, 90), dtype=torch.int32):
    """A map of patches; id 12 belongs to no target, and the last target has no pixel."""
    choices = torch.tensor([*ids[:-1], 12])
    id_map = choices[torch.randint(0, len(choices), size, generator=generator)].to(dtype)
    return InstanceMap(id_map, torch.tensor(ids))


def make_runs(generator, size=(37, 53)):
    """Overlapping; of five targets one has no pixel, one has all, and one has the first and the last one."""
    dense = torch.rand(T, *size, generator=generator) > 0.4
    dense[1], dense[3] = False, True
    dense[2, [0, -1], [0, -1]] = True
    return RunLengths.from_masks(dense)


def as_coco(runs):
    """As COCO's files have them: a list of lengths, or text."""
    dense = runs.masks()
    if encode is None:
        return [{"size": list(dense.shape[1:]), "counts": counts(x)} for x in dense]
    forms = [encode(np.asfortranarray(x.numpy().astype(np.uint8))) for x in dense]
    return [
        forms[0],
        {"size": list(dense.shape[1:]), "counts": counts(dense[1])},
        *({**x, "counts": x["counts"].decode()} for x in forms[2:]),
    ]


def counts(mask):
    """Run lengths of one mask, by a loop over its pixels."""
    found, value = [0], False
    for pixel in mask.T.flatten().tolist():
        if pixel != value:
            found.append(0)
            value = pixel
        found[-1] += 1
    return found


FORMS = {"map": make, "run lengths": make_runs, "COCO": lambda *given: as_coco(make_runs(*given))}
forms = pytest.mark.parametrize("form", FORMS)


def dense_of(one):
    return (RunLengths.from_coco(one) if isinstance(one, list) else one).masks()


def both(form, generator, device, sizes=((37, 53), (20, 11))):
    """Targets of two images, and the dense masks."""
    found = [FORMS[form](generator, size) for size in sizes]
    dense = [dense_of(one).to(device) for one in found]
    return [one if isinstance(one, list) else one.to(device) for one in found], dense


def predictions(generator, device, dtype=F32, factored=False):
    """Masks of two images as leaves, a function that makes the operators' argument of them."""
    if factored:
        leaves = [torch.randn(2, Q, 8, generator=generator), torch.randn(2, 8, 12, 14, generator=generator)]
    else:
        leaves = [torch.randn(2, Q, 12, 14, generator=generator)]
    leaves = [x.to(device, dtype).requires_grad_() for x in leaves]
    return leaves, FactoredMasks(*leaves) if factored else leaves[0]


def points(generator, device, *shape):
    """Beyond the image and on its edges, too."""
    found = torch.rand(*shape, 2, generator=generator) * 1.2 - 0.1
    found[..., 0, :] = torch.nan
    found[..., 1, :] = 1.0
    found[..., 2, :] = 0.0
    return found.to(device)


# ---------------------------------------------------------------- the same bits
@pytest.mark.parametrize("size", [(37, 53), (1, 1), (1, 3), (2, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8], ids=str)
def test_maps_of_every_dtype(implementation, dtype, size, generator):
    """Read in place; an id beyond the map's dtype, or that only its low bits are like, belongs to no pixel."""
    ids = torch.tensor([7, 3, 250, 256 + 7, 2**32 + 3, -6])
    choices = torch.tensor([7, 3, 250, 0] if dtype == torch.uint8 else [7, 3, 250, -6])
    one = InstanceMap(choices[torch.randint(0, 4, size, generator=generator)].to(dtype), ids)
    dense = torch.stack([one.id_map.long() == i for i in ids.tolist()])
    assert torch.equal(one.masks(), dense)
    logits, at = torch.randn(1, 6, 5, 4, generator=generator), points(generator, "cpu", 1, 70)
    own = points(generator, "cpu", 6, 70)
    given = [x.to(implementation) for x in (logits, at, own, dense)]
    one = one.to(implementation)
    (found,), _ = m2f_kernels.mask_matching_cost(given[0], [one], given[1])
    (expected,), _ = m2f_kernels.mask_matching_cost(given[0], [given[3]], given[1])
    assert torch.equal(found, expected)
    for found, expected in zip(
        m2f_kernels.point_mask_loss(given[0], [one], given[2]),
        m2f_kernels.point_mask_loss(given[0], [given[3]], given[2]),
        strict=True,
    ):
        assert torch.equal(found, expected)


def test_a_map_of_any_strides(generator):
    one = make(generator)
    logits, at = torch.randn(1, Q, 5, 4, generator=generator), points(generator, "cpu", 1, K)
    turned = InstanceMap(one.id_map.T.contiguous().T, one.ids.repeat_interleave(2)[::2])
    assert not turned.id_map.is_contiguous()
    found, expected = (m2f_kernels.mask_matching_cost(logits, [x], at)[0][0] for x in (turned, one))
    assert torch.equal(found, expected)


@forms
@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
def test_matching_cost(implementation, dtype, factored, form, generator):
    maps, dense = both(form, generator, implementation)
    _, given = predictions(generator, implementation, dtype, factored)
    at = points(generator, implementation, 2, K)
    for first, second in zip(
        m2f_kernels.mask_matching_cost(given, maps, at), m2f_kernels.mask_matching_cost(given, dense, at), strict=True
    ):
        for a, b in zip(first, second, strict=True):
            assert a.shape == (Q, T)
            assert torch.equal(a, b)


@forms
@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
def test_loss_and_gradients(implementation, dtype, factored, form, generator):
    maps, dense = both(form, generator, implementation)
    matches = [(torch.tensor([0, 4, 8, 2]), torch.tensor([1, 4, 0, 2])), (torch.tensor([3]), torch.tensor([3]))]
    at = points(generator, implementation, 5, K)
    leaves, given = predictions(generator, implementation, dtype, factored)
    results = []
    for targets in (maps, dense):
        losses = m2f_kernels.point_mask_loss(given, targets, at, matches=matches)
        results.append((*losses, *torch.autograd.grad(losses[0].sum() + (losses[1] ** 2).sum(), leaves)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())
    assert results[0][0].std() > 0


@forms
@pytest.mark.parametrize("mixed", [False, True])
def test_criterion(implementation, mixed, form, generator):
    """Matching and losses of several outputs; images may mix both forms."""
    maps, dense = both(form, generator, implementation)
    leaves, given = predictions(generator, implementation, factored=True)
    classes = torch.randn(2, Q, 4, generator=generator).to(implementation)
    labels = [torch.randint(0, 3, (T,), generator=generator).to(implementation) for _ in range(2)]
    results = []
    for targets in ([maps[0], dense[1]] if mixed else maps, dense):
        torch.manual_seed(0)
        losses = PointMaskCriterion(3, num_points=200).to(implementation)(
            [{"class_logits": classes, "masks": given}] * 2,
            [{"labels": x, "masks": y} for x, y in zip(labels, targets, strict=True)],
        )
        results.append((*losses.values(), *torch.autograd.grad(sum(losses.values()), leaves)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@forms
def test_reference(form, generator):
    """The truth itself, against dense masks."""
    one = FORMS[form](generator)
    dense, at = dense_of(one), points(generator, "cpu", 1, K)
    (targets,) = check_targets("targets", [one], 1, dense)
    expected = reference.point_sample(dense[None], at, True)[0]
    assert torch.equal(reference.sample_targets(targets, at[0]), expected)
    assert torch.equal(reference.sample_targets(masks.Targets(dense), at[0]), expected)
    rows, own = torch.tensor([9, 0, 2, 6]), points(generator, "cpu", 4, K)
    found, expected = (
        loss_reference.sampled_targets(masks.listed([x, x]), rows, own) for x in (targets, masks.Targets(dense))
    )
    assert torch.equal(found, expected)


@forms
@pytest.mark.parametrize("backend", ["fallback", "reference"])
@pytest.mark.parametrize("factored", [False, True])
def test_plain_pytorch(form, backend, factored, generator, monkeypatch):
    """The fallback and the reference give the same as dense masks; a few masks are dense at a time."""
    monkeypatch.setattr(fallback, "CHUNK_BYTES", 2 * 8 * 37 * 53)
    given, dense = both(form, generator, "cpu")
    leaves, logits = predictions(generator, "cpu", factored=factored)
    matches = [(torch.tensor([0, 4, 8, 2]), torch.tensor([1, 4, 0, 2])), (torch.tensor([3]), torch.tensor([3]))]
    uniform, own = points(generator, "cpu", 2, K), points(generator, "cpu", 5, K)
    results = []
    with m2f_kernels.use_backend(backend):
        for targets in (given, dense):
            costs = m2f_kernels.mask_matching_cost(logits, targets, uniform)
            losses = m2f_kernels.point_mask_loss(logits, targets, own, matches=matches)
            gradients = torch.autograd.grad(losses[0].sum() + (losses[1] ** 2).sum(), leaves)
            results.append([*costs[0], *costs[1], *losses, *gradients])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


EMPTY = {
    "map": InstanceMap(torch.zeros(8, 8, dtype=torch.int32), torch.zeros(0, dtype=torch.int64)),
    "run lengths": RunLengths.from_coco([], (8, 8)),
    "COCO": [],
}


@forms
def test_no_targets(device, form, generator):
    empty = EMPTY[form] if form == "COCO" else EMPTY[form].to(device)
    _, given = predictions(generator, device)
    cross_entropy, _ = m2f_kernels.mask_matching_cost(given, [empty, empty], points(generator, device, 2, K))
    assert [x.shape for x in cross_entropy] == [(Q, 0)] * 2


# ---------------------------------------------------------------- nothing dense
def test_nothing_dense(generator):
    """200 targets of 256 x 256: dense they take 12.5 MiB, here no tensor takes more than one for the points."""
    ids = torch.arange(200)
    one = InstanceMap(torch.randint(0, 200, (256, 256), generator=generator, dtype=torch.int32), ids)
    classes = torch.randn(1, 220, 4, generator=generator)
    given = FactoredMasks(*(torch.randn(*s, generator=generator) for s in ((1, 220, 4), (1, 4, 16, 16))))
    labels = torch.randint(0, 3, (200,), generator=generator)
    sizes = []
    for target in (one, one.masks(), RunLengths.from_masks(one.masks())):
        with Largest() as seen:
            PointMaskCriterion(3, num_points=64)(
                [{"class_logits": classes, "masks": given}], [{"labels": labels, "masks": target}]
            )
        sizes.append(seen.bytes)
    assert sizes[1] >= 200 * 256 * 256
    # No copy of the map; runs as many as there are pixels, as they are here, take four bytes each.
    assert sizes[0] <= 4 * 256 * 256
    assert sizes[2] <= 8 * 256 * 256


# ---------------------------------------------------------------- on the way to the loss
@pytest.mark.parametrize("form", ["map", "run lengths", "COCO"])
def test_what_trainers_do_to_batches(form, generator):
    """Nested batches are rebuilt: from a generator, as the Trainer of transformers does, and as pytrees."""

    def moved(data):
        if isinstance(data, dict):
            return type(data)({k: moved(v) for k, v in data.items()})
        if isinstance(data, (tuple, list)):
            return type(data)(moved(v) for v in data)
        return data.clone() if isinstance(data, torch.Tensor) else data

    one = FORMS[form](generator)
    dense = dense_of(one)
    others = [moved({"mask_labels": [one]})["mask_labels"][0], copy.deepcopy(one), pickle.loads(pickle.dumps(one))]
    if form != "COCO":
        others += [tree_map(lambda x: x, one), one._replace()]
        with pytest.raises(TypeError, match="missing"):
            type(one)(one[0])
    for other in others:
        assert type(other) is type(one)
        assert torch.equal(dense_of(other), dense)


@pytest.mark.parametrize("form", ["map", "run lengths"])
def test_compiles_as_one_graph(form, generator):
    one = FORMS[form](generator)
    logits = torch.randn(1, T, 6, 7, generator=generator).requires_grad_()
    uniform, own = (points(generator, "cpu", n, 40) for n in (1, T))

    def run(logits, target):
        (cost,), _ = m2f_kernels.mask_matching_cost(logits.detach(), [target], uniform)
        return cost, *m2f_kernels.point_mask_loss(logits, [target], own)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    results = [
        [*f(logits, one), torch.autograd.grad(sum(f(logits, one)[1:]).sum(), logits)[0]] for f in (run, compiled)
    ]
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


# ---------------------------------------------------------------- bad input
GOOD = InstanceMap(torch.zeros(8, 8, dtype=torch.int32), torch.tensor([0, 1]))
BAD = {
    "map of floats": ({"id_map": torch.zeros(8, 8)}, TypeError, "target_masks[0].id_map: expected int64, int32"),
    "map of rank 3": ({"id_map": torch.zeros(1, 8, 8).int()}, ValueError, "target_masks[0].id_map: expected [H, W]"),
    "no pixels": (
        {"id_map": torch.zeros(0, 8).int()},
        ValueError,
        "target_masks[0].id_map: expected at least one pixel",
    ),
    "ids of rank 2": ({"ids": torch.zeros(1, 2).long()}, ValueError, "target_masks[0].ids: expected [T]"),
    "ids in a list": ({"ids": [0, 1]}, TypeError, "target_masks[0].ids: expected int64"),
    "equal ids": ({"ids": torch.tensor([3, 3])}, ValueError, "target_masks[0].ids: expected different ids; got [3, 3]"),
    "map elsewhere": ({"id_map": GOOD.id_map.to("meta")}, ValueError, "target_masks[0].id_map: expected it on cpu"),
}


@pytest.mark.parametrize(("change", "error", "words"), BAD.values(), ids=BAD)
def test_bad_input(change, error, words):
    with pytest.raises(error, match=re.escape(words)):
        m2f_kernels.mask_matching_cost(torch.zeros(1, 2, 4, 4), [GOOD._replace(**change)], torch.rand(1, 3, 2))


def test_a_map_alone_is_no_list():
    with pytest.raises(TypeError, match="one tensor"):
        m2f_kernels.mask_matching_cost(torch.zeros(1, 2, 4, 4), GOOD, torch.rand(1, 3, 2))


def test_integers_are_no_masks():
    """A user's int32 masks are refused, though the operators use int32 internally for maps of instances."""
    with pytest.raises(TypeError, match="floating point, bool or uint8"):
        m2f_kernels.mask_matching_cost(torch.zeros(1, 2, 4, 4), [torch.ones(2, 8, 8).int()], torch.rand(1, 3, 2))
