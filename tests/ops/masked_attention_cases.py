"""Inputs for the tests of masked attention, and the reference results."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

import m2f_kernels
from m2f_kernels.ops.masked_attention import reference
from tests.numerics import FORWARD, GRADIENT, relative_error, tolerance

NAMES = ("query", "key", "value")
BIAS = ("by_row", "by_column")
DENSITIES = {"open": 1.0, "most": 0.7, "few": 0.05, "blocked": 0.0}


@dataclass
class Case:
    """Inputs of one call."""

    tensors: dict  # query, key, value; where there is a bias, by_row and by_column
    attend: torch.Tensor  # bool [N, Q, S] as given: rows may be empty
    grad_output: torch.Tensor
    scale: float | None = None

    def to(self, device):
        tensors = {name: x.to(device) for name, x in self.tensors.items()}
        return replace(self, tensors=tensors, attend=self.attend.to(device), grad_output=self.grad_output.to(device))

    @property
    def mask(self):
        return m2f_kernels.pack_attention_mask(self.attend)

    def call(self, *tensors):
        return m2f_kernels.masked_attention(*tensors[:3], self.mask, bias=tensors[3:] or None, scale=self.scale)


def row_rule(attend):
    """A query that attends nowhere attends everywhere."""
    return attend | ~attend.any(-1, keepdim=True)


def value_and_gradients(function, case):
    """{"output": ..., and the gradient of each tensor}."""
    leaves = [x.detach().requires_grad_() for x in case.tensors.values()]
    output = function(*leaves)
    gradients = torch.autograd.grad(output, leaves, case.grad_output.to(output.dtype))
    return {"output": output.detach(), **dict(zip(case.tensors, gradients, strict=True))}


def truth(case):
    """Output and gradients of the reference in float64 on the host."""
    exact = replace(case, tensors={name: x.detach().double() for name, x in case.tensors.items()}).to("cpu")
    scale = case.tensors["query"].shape[-1] ** -0.5 if case.scale is None else case.scale
    attend = row_rule(exact.attend)
    exact.grad_output = exact.grad_output.double()
    return value_and_gradients(
        lambda q, k, v, *bias: reference.masked_attention(q, k, v, attend, scale, *bias)[0], exact
    )


def sdpa(case):
    """Output and gradients of PyTorch's attention, in the case's dtype on its device."""
    mask = row_rule(case.attend)[:, None]

    def attend(query, key, value, by_row=None, by_column=None):
        scores = mask
        if by_row is not None:
            scores = (by_row.unsqueeze(-1) + by_column.unsqueeze(-2)).flatten(-2).masked_fill(~mask, -torch.inf)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=scores, scale=case.scale)

    return value_and_gradients(attend, case)


def sdpa_bound(case, name, expected):
    """Twice the error of PyTorch's attention."""
    return 2 * relative_error(joined(sdpa(case))[name], expected[name])


def joined(results):
    """`results` with the two gradients of a bias as one, "bias": that of `by_row` alone is a sum that cancels to zero
    where all attended keys lie in one row, and has no relative error then; likewise columns."""
    rest = {name: x for name, x in results.items() if name not in BIAS}
    if len(rest) == len(results):
        return rest
    return {**rest, "bias": torch.cat([results[name].flatten() for name in BIAS])}


def assert_matches(case, expected=None):
    """Output and gradients of the operator against the float64 truth.

    In low precision the gradients are computed from the rounded output that was saved: one more rounding. A GPU's
    exponentials are approximate and its sums in another order: where that takes more than the bound, twice the error
    that PyTorch's own attention makes there on the same inputs is allowed."""
    actual = joined(value_and_gradients(case.call, case))
    expected = joined(expected or truth(case))
    dtype = case.tensors["query"].dtype
    for name, x in actual.items():
        assert x.dtype == dtype
        bound = tolerance(FORWARD if name == "output" else GRADIENT, dtype, dtype)
        if name in ("query", "key", "bias") and dtype in (torch.bfloat16, torch.float16):
            bound *= 2
        error = relative_error(x, expected[name])
        if error > bound and x.is_cuda:
            bound = max(bound, sdpa_bound(case, name, expected))
        assert error <= bound, f"{name}: relative error {error:.3g} > {bound:.3g}"


def make_case(
    n=2, h=2, q=7, s=70, d=32, dtype=torch.float32, density=0.4, interleaved=True, scale=None, seed=0, sides=None
):
    """Random inputs; interleaved: heads cut out of [N, *, H*D], as a model has them; sides: rows and columns of keys,
    for a bias of them."""
    if sides:
        s = sides[0] * sides[1]
    g = torch.Generator().manual_seed(seed)

    def heads(length):
        if interleaved:
            return torch.randn(n, length, h * d, generator=g).to(dtype).unflatten(-1, (h, d)).transpose(1, 2)
        return torch.randn(n, h, length, d, generator=g).to(dtype)

    tensors = dict(zip(NAMES, (heads(q), heads(s), heads(s)), strict=True))
    attend = torch.rand(n, q, s, generator=g) < density
    grad_output = torch.randn(n, h, q, d, generator=g).to(dtype)
    for name, side in zip(BIAS, sides or (), strict=False):
        bias = torch.randn(n, q, side, h, generator=g).to(dtype).permute(0, 3, 1, 2)
        tensors[name] = bias if interleaved else bias.contiguous()
    return Case(tensors, attend, grad_output, scale)
