"""Errors and tolerances of the whole suite, in one place."""

import torch

#: Bound of the relative L2 error by the type that arithmetic is done in.
FORWARD = {torch.float64: 1e-12, torch.float32: 1e-5}
GRADIENT = {torch.float64: 1e-12, torch.float32: 1e-4}


def relative_error(actual, expected):
    """||actual - expected|| / ||expected|| in float64; the absolute norm where the truth is zero; inf for a NaN."""
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    assert actual.shape == expected.shape, f"shapes differ: {list(actual.shape)} and {list(expected.shape)}"
    if not bool(torch.isfinite(actual).all()):
        return float("inf")
    error, norm = (actual - expected).norm().item(), expected.norm().item()
    return error / norm if norm > 0 else error


def rounding(dtype):
    """Relative error of one rounding to nearest."""
    return torch.finfo(dtype).eps / 2


def tolerance(bounds, arithmetic, stored):
    """Bound for a result computed in the accumulation type of `arithmetic` and stored as `stored`.

    For low precision that is one rounding of an accurate result: far inside "twice the error of PyTorch's own path".
    """
    accumulation = torch.float64 if arithmetic == torch.float64 else torch.float32
    bound = bounds[accumulation]
    return bound if rounding(stored) <= rounding(accumulation) else bound + rounding(stored)
