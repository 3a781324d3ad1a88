"""Every operator, forward and backward, on arguments of random shapes, dtypes and layouts, against the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree

import m2f_kernels
from m2f_kernels._dtypes import accumulation_dtype
from m2f_kernels.ops.points import reference as sampling
from tests.fuzz.conftest import PROFILE
from tests.fuzz.inputs import OPERATORS, Arguments, arguments
from tests.numerics import FORWARD, GRADIENT, tolerance

#: Arguments that gradients are compared of.
DIFFERENTIABLE = {
    "masked_attention": ("query", "key", "value", "bias"),
    "ms_deform_attn": ("value", "sampling_locations", "attention_weights"),
    "ms_deform_attn_from_offsets": ("value", "reference_points", "sampling_offsets", "attention_logits"),
    "point_sample": ("input",),
    "point_mask_loss": ("mask_logits",),
}


def error(actual: Tensor, expected: Tensor, natural: float) -> float:
    """Relative to the norm of the truth, or to that of a tensor of `natural` where the truth happens to be smaller:
    with one element or a few, terms of order `natural` may cancel. Inf for a NaN."""
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape
    if not bool(actual.isfinite().all()):
        return float("inf")
    size = max(float(expected.norm()), natural * expected.numel() ** 0.5)
    return float((actual - expected).norm()) / size if size else float((actual - expected).norm())


def exact(x: Any) -> Any:
    """Masks and coordinates in float64 and contiguous; other things as they are."""
    return x.detach().double().contiguous() if isinstance(x, Tensor) and x.is_floating_point() else x


def run(op: str, given_arguments: Arguments, grads: list[Tensor] | None) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and the gradients of the leaves of the differentiable arguments."""
    named, leaves = dict(given_arguments), []
    for name in (x for x in DIFFERENTIABLE.get(op, ()) if x in named):
        flat, spec = _pytree.tree_flatten(named[name])
        flat = [x.detach().requires_grad_(x.is_floating_point()) for x in flat]
        leaves += [x for x in flat if x.requires_grad]
        named[name] = _pytree.tree_unflatten(flat, spec)
    result = _pytree.tree_flatten(getattr(m2f_kernels, op)(**named))[0]
    outputs = [x for x in result if isinstance(x, Tensor)]
    used = [x for x in outputs if x.requires_grad]
    if not used or grads is None:
        return outputs, []
    weighted = [(x * g.to(x.dtype)).sum() for x, g in zip(outputs, grads, strict=True)]
    return outputs, list(torch.autograd.grad(torch.stack([x.double() for x in weighted]).sum(), leaves))


def dtype_of(op: str, named: Arguments) -> torch.dtype:
    """That of the first floating point argument, which decides the arithmetic."""
    first = next(x for x in _pytree.tree_flatten(list(named.values()))[0] if isinstance(x, Tensor))
    return first.dtype if first.is_floating_point() else torch.float32


def check(op: str, named: Arguments, seed: int) -> None:
    truth_of = {name: _pytree.tree_map(exact, x) for name, x in named.items()}
    with m2f_kernels.use_backend("reference"):
        shapes = [x.shape for x in run(op, truth_of, None)[0]]
        g = torch.Generator().manual_seed(seed)
        # Zeros and ones keep the sum exact in 16 bits.
        grads = [torch.randint(0, 2, shape, generator=g).double() for shape in shapes]
        expected, expected_grads = run(op, truth_of, grads)
    actual, actual_grads = run(op, named, grads)
    dtype = dtype_of(op, named)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        if not a.is_floating_point():
            assert torch.equal(a, e), f"output {i}"
            continue
        bound = tolerance(FORWARD, dtype, a.dtype)
        found = error(a, e, 1.0)
        assert found <= bound, f"output {i}: {found:.3g} > {bound:.3g}"
    natural = 1.0
    if op == "point_mask_loss":  # a mean over points
        natural = 1.0 / named["points"].shape[1]
    if op == "masked_attention" and named["scale"] is not None:  # a factor of its gradients; the default is 1/sqrt(D)
        natural = max(1.0, abs(named["scale"]) * named["query"].shape[3] ** 0.5)
    for i, (a, e) in enumerate(zip(actual_grads, expected_grads, strict=True)):
        bound = tolerance(GRADIENT, dtype, a.dtype)
        if op == "masked_attention" and accumulation_dtype(dtype) != dtype:
            bound *= 2  # computed from the rounded output that was saved
        found = error(a, e, natural)
        assert found <= bound, f"gradient {i}: {found:.3g} > {bound:.3g}"


@pytest.mark.parametrize("op", [op for op in OPERATORS if op != "uncertain_points"])
def test_against_the_reference(op: str, count_case: Callable[[], None]) -> None:
    @PROFILE
    @given(named=arguments(op), seed=st.integers(0, 2**32 - 1))
    def fuzz(named: Arguments, seed: int) -> None:
        count_case()
        check(op, named, seed)

    fuzz()


def test_uncertain_points(count_case: Callable[[], None]) -> None:
    """Rounding may choose another of two candidates that are equally uncertain: the uncertainties are compared, and
    that the points are candidates; fresh points are the same bits."""

    @PROFILE
    @given(named=arguments("uncertain_points"))
    def fuzz(named: Arguments) -> None:
        count_case()
        generator = named.pop("generator")
        state = generator.get_state()
        actual = m2f_kernels.uncertain_points(**named, generator=generator)
        generator.set_state(state)
        seed = torch.randint(0, 2**63 - 1, (1,), generator=generator)
        masks = named["mask_logits"]
        logits = masks.logits() if isinstance(masks, m2f_kernels.FactoredMasks) else masks
        if isinstance(masks, m2f_kernels.FactoredMasks):
            logits = m2f_kernels.FactoredMasks(*(x.double() for x in masks)).logits()
        n, q, h, w = logits.shape
        queries = named["queries"] if named["queries"] is not None else [torch.arange(q)] * n
        rows = torch.cat([x + i * q for i, x in enumerate(queries)]) if n else torch.zeros(0, dtype=torch.int64)
        planes = logits.reshape(n * q, h, w).double()[rows, None]
        k = named["num_points"]
        candidates, keep = int(named["oversample_ratio"] * k), int(named["importance_sample_ratio"] * k)
        assert actual.shape == (len(rows), k, 2)
        drawn = sampling.uniform_points(seed, torch.arange(len(rows)), 0, candidates + k - keep)
        assert torch.equal(actual[:, keep:], drawn[:, candidates:])
        uncertainty = sampling.point_sample(planes, drawn[:, :candidates].double())[:, 0].abs()
        wanted = uncertainty.sort(1).values[:, :keep]
        chosen = sampling.point_sample(planes, actual[:, :keep].double())[:, 0].abs().sort(1).values
        assert torch.allclose(chosen, wanted, rtol=1e-5, atol=1e-5)
        for row in range(len(rows)):
            given_points = {tuple(p) for p in drawn[row, :candidates].tolist()}
            kept = [tuple(p) for p in actual[row, :keep].tolist()]
            assert given_points.issuperset(kept)
            assert len(set(kept)) == keep

    fuzz()
