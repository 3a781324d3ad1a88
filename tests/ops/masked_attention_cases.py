"""Inputs for the tests of masked attention, and the reference results."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

import m2f_kernels
from m2f_kernels.ops.masked_attention import reference
from tests.numerics import FORWARD, GRADIENT, relative_error, tolerance

NAMES = ("query", "key", "value")
DENSITIES = {"open": 1.0, "most": 0.7, "few": 0.05, "blocked": 0.0}


@dataclass
class Case:
    """Inputs of one call."""

    tensors: dict  # query, key, value
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
        return m2f_kernels.masked_attention(*tensors, self.mask, scale=self.scale)


def row_rule(attend):
    """A query that attends nowhere attends everywhere."""
    return attend | ~attend.any(-1, keepdim=True)


def value_and_gradients(function, case):
    """{"output": ..., and the gradient of query, key and value}."""
    leaves = [x.detach().requires_grad_() for x in case.tensors.values()]
    output = function(*leaves)
    gradients = torch.autograd.grad(output, leaves, case.grad_output.to(output.dtype))
    return {"output": output.detach(), **dict(zip(NAMES, gradients, strict=True))}


def truth(case):
    """Output and gradients of the reference in float64 on the host."""
    exact = replace(case, tensors={name: x.detach().double() for name, x in case.tensors.items()}).to("cpu")
    scale = case.tensors["query"].shape[-1] ** -0.5 if case.scale is None else case.scale
    attend = row_rule(exact.attend)
    exact.grad_output = exact.grad_output.double()
    return value_and_gradients(lambda q, k, v: reference.masked_attention(q, k, v, attend, scale)[0], exact)


def sdpa(case):
    """Output and gradients of PyTorch's attention, in the case's dtype on its device."""
    mask = row_rule(case.attend)[:, None]
    return value_and_gradients(lambda *x: F.scaled_dot_product_attention(*x, attn_mask=mask, scale=case.scale), case)


def sdpa_bound(case, name, expected):
    """Twice the error of PyTorch's attention."""
    return 2 * relative_error(sdpa(case)[name], expected[name])


def assert_matches(case, expected=None):
    """Output and gradients of the operator against the float64 truth.

    In low precision the gradients are computed from the rounded output that was saved: one more rounding. A GPU's
    exponentials are approximate and its sums in another order: where that takes more than the bound, twice the error
    that PyTorch's own attention makes there on the same inputs is allowed."""
    actual = value_and_gradients(case.call, case)
    expected = expected or truth(case)
    dtype = case.tensors["query"].dtype
    for name, x in actual.items():
        assert x.dtype == dtype
        bound = tolerance(FORWARD if name == "output" else GRADIENT, dtype, dtype)
        if name in ("query", "key") and dtype in (torch.bfloat16, torch.float16):
            bound *= 2
        error = relative_error(x, expected[name])
        if error > bound and x.is_cuda:
            bound = max(bound, sdpa_bound(case, name, expected))
        assert error <= bound, f"{name}: relative error {error:.3g} > {bound:.3g}"


def make_case(n=2, h=2, q=7, s=70, d=32, dtype=torch.float32, density=0.4, interleaved=True, scale=None, seed=0):
    """Random inputs; interleaved: heads cut out of [N, *, H*D], as a model has them."""
    g = torch.Generator().manual_seed(seed)

    def heads(length):
        if interleaved:
            return torch.randn(n, length, h * d, generator=g).to(dtype).unflatten(-1, (h, d)).transpose(1, 2)
        return torch.randn(n, h, length, d, generator=g).to(dtype)

    tensors = dict(zip(NAMES, (heads(q), heads(s), heads(s)), strict=True))
    attend = torch.rand(n, q, s, generator=g) < density
    return Case(tensors, attend, torch.randn(n, h, q, d, generator=g).to(dtype), scale)
