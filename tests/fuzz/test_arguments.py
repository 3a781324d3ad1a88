"""Arguments with something wrong: an operator says which, or does its work; it never does anything else.

One or two changes are made to good arguments. Where the result is still good, the reference has to agree on its shape.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree

import m2f_kernels
from m2f_kernels import FactoredMasks, PackedMask
from tests.fuzz.conftest import PROFILE
from tests.fuzz.inputs import OPERATORS, Arguments, arguments

JUNK = (
    None,
    True,
    0,
    3,
    -1,
    2**31,
    2**70,
    0.5,
    math.nan,
    math.inf,
    1e300,
    "",
    "abc",
    b"x",
    (),
    [],
    [None],
    [[1, 2]],
    [(0, 1)],
    [(2**40, 2**40)],
    {},
    {"a": 1},
    object(),
    torch.float32,
    np.zeros((2, 2), dtype=np.float32),
    torch.tensor(1.0),
    torch.zeros(0),
    torch.zeros(2, 3, 4, 5),
    torch.zeros(2, 3, 4, 5, dtype=torch.int64),
    torch.Generator(),
)
DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn),
    *(torch.int64, torch.int32, torch.uint8, torch.int8, torch.bool, torch.complex64),
)


def change_tensor(x: Tensor, how: str, draw: Any) -> Any:
    if x.layout != torch.strided or x.is_meta:  # changed before
        return x
    axis = draw(st.integers(0, max(0, x.dim() - 1)))
    if how == "dtype":
        return x.to(draw(st.sampled_from(DTYPES)))
    if how == "meta":
        return x.to("meta")
    if how == "sparse":
        return x if x.dtype == torch.float8_e4m3fn else x.detach().to_sparse()
    if how == "gradient":
        return x.detach().clone().requires_grad_() if x.is_floating_point() else x
    if how == "scalar":
        return x.flatten()[0] if x.numel() else x.new_zeros(())
    if how == "numpy":
        return x.detach().float().numpy()
    if how == "list":
        return x.tolist()
    if how == "unsqueeze":
        return x.unsqueeze(axis)
    if how == "poison":
        if not x.is_floating_point():
            return x
        y = x.detach().clone()
        y[torch.rand(x.shape) < 0.3] = draw(st.sampled_from((math.nan, math.inf, -math.inf, 1e30, -1e30)))
        return y
    if how == "large" and not x.is_floating_point() and x.dtype != torch.bool:
        return x.clone().fill_(draw(st.sampled_from((-1, 0, 100, 2**31 - 1))) if x.dtype != torch.uint8 else 255)
    if x.dim() == 0:
        return x
    if how == "index":
        return x.select(axis, 0) if x.shape[axis] else x
    if how == "shorter":
        return x.narrow(axis, 0, max(0, x.shape[axis] - 1))
    if how == "longer":
        return torch.cat([x, x.narrow(axis, 0, min(1, x.shape[axis]))], axis)
    if how == "empty":
        return x.narrow(axis, 0, 0)
    if how == "swap":
        return x.transpose(axis, draw(st.integers(0, x.dim() - 1)))
    return x


TENSOR_CHANGES = (
    *("dtype", "meta", "sparse", "gradient", "scalar", "numpy", "list", "unsqueeze", "poison", "large"),
    *("index", "shorter", "longer", "empty", "swap"),
)


def change(x: Any, draw: Any) -> Any:
    """Something else instead of `x`, near it or not."""
    if draw(st.integers(0, 4)) == 0:
        return draw(st.sampled_from(JUNK))
    if isinstance(x, Tensor):
        return change_tensor(x, draw(st.sampled_from(TENSOR_CHANGES)), draw)
    if isinstance(x, FactoredMasks | PackedMask):
        field = draw(st.sampled_from(x._fields))
        return x._replace(**{field: change(getattr(x, field), draw)})
    if isinstance(x, list | tuple) and x:
        items = list(x)
        how = draw(st.sampled_from(("item", "drop", "repeat", "tuple")))
        i = draw(st.integers(0, len(items) - 1))
        if how == "item":
            items[i] = change(items[i], draw)
        elif how == "drop":
            del items[i]
        elif how == "repeat":
            items.append(items[i])
        return tuple(items) if how == "tuple" else items
    if isinstance(x, float | int) and not isinstance(x, bool):
        return draw(st.sampled_from((-x, 0, x + 1, float(x), str(x), -1, math.nan, math.inf, 2**31, 1e12, 1e300)))
    return draw(st.sampled_from(JUNK))


def is_small(named: Arguments) -> bool:
    """Not a demand for terabytes that is good in itself."""
    count = named.get("num_points", 0)
    ratio = named.get("oversample_ratio", 1)
    if isinstance(count, int) and isinstance(ratio, int | float) and count * ratio > 10**5:
        return count * ratio >= 2**31
    sizes = named.get("sizes")
    flat = _pytree.tree_flatten(sizes)[0] if isinstance(sizes, list | tuple) else []
    return all(not isinstance(x, int) or isinstance(x, bool) or x < 10**3 for x in flat)


def shapes(result: Any) -> list[Any]:
    return [(x.shape, x.dtype) if isinstance(x, Tensor) else x for x in _pytree.tree_flatten(result)[0]]


@pytest.mark.parametrize("op", OPERATORS)
def test_bad_arguments(op: str, count_case: Callable[[], None]) -> None:
    function = getattr(m2f_kernels, op)

    @PROFILE
    @given(named=arguments(op), data=st.data())
    def fuzz(named: Arguments, data: st.DataObject) -> None:
        for _ in range(data.draw(st.integers(1, 2))):
            name = data.draw(st.sampled_from(sorted(named)))
            named[name] = change(named[name], data.draw)
        if not is_small(named):
            return
        count_case()
        try:
            result = function(**named)
        except (ValueError, TypeError, NotImplementedError) as error:
            message = str(error)
            assert re.match(rf"({'|'.join(named)})\b[^ ]*: expected .*; ", message, re.DOTALL), message
            return
        with m2f_kernels.use_backend("reference"):
            assert shapes(result) == shapes(function(**named))

    fuzz()
