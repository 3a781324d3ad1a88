"""The reference itself against an independently written form on torch.nn.functional.grid_sample."""

import pytest
import torch

from tests.numerics import relative_error
from tests.ops.ms_deform_attn_cases import MODES, grid_sample_form, make_case, truth, value_and_gradients


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sizes", [((5, 7), (3, 4)), ((1, 1), (1, 6)), ((17, 2), (16, 16))])
def test_equals_the_grid_sample_form(mode, sizes):
    """Two truths that share no code agree in value and in every gradient."""
    case = make_case(mode, sizes=sizes, q=40, dtype=torch.float64)
    other = truth(case, lambda *tensors: grid_sample_form(case, *tensors))
    for name, expected in truth(case).items():
        assert relative_error(other[name], expected) < 1e-12, name


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("mode", MODES)
def test_non_finite_coordinates_have_no_gradient(mode, bad):
    """In the reference as in the kernels, a sample at a non-finite place adds nothing to any gradient."""
    case = make_case(mode, dtype=torch.float64)
    case.tensors["samples"][0, 2, 1, 3, 0] = bad
    result = value_and_gradients(case.run_reference, case.tensors, case.grad_output)
    for name, x in result.items():
        assert torch.isfinite(x).all(), name
    assert (result["samples"][0, 2, 1, 3] == 0).all()
