"""Runs the Triton kernels on a GPU if there is one, otherwise in Triton's interpreter on CPU tensors."""

from functools import cache

import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter


def _spare_the_interpreter():
    """Leave out what Triton's interpreter does again and again, nearly half of its time.

    Every call of a kernel's function patches the language, which the kernel's launch has done already; every operation
    builds a table of NumPy's types.
    """
    patch, numpy_type = interpreter._patch_lang, interpreter._get_np_dtype
    of_scalar = cache(numpy_type)

    @cache
    def modules(function):
        return [module for module in (tl, tl.core) if any(module is seen for seen in function.__globals__.values())]

    def patch_once(function):
        unpatched = any(tl.core.is_builtin(module.load) for module in modules(function))
        return patch(function) if unpatched else interpreter._LangPatchScope()

    def known_numpy_type(kind):
        return of_scalar(kind.scalar) if type(kind.scalar) is tl.dtype else numpy_type(kind)

    interpreter._patch_lang, interpreter._get_np_dtype = patch_once, known_numpy_type


if not torch.cuda.is_available():
    _spare_the_interpreter()


@pytest.fixture(scope="session")
def device():
    """The device to put tensors on; no test here may pass on anything but a kernel of ours."""
    from m2f_kernels import _triton

    assert torch.cuda.is_available() != _triton.INTERPRETED, "kernels were imported before the interpreter was chosen"
    return torch.device("cpu" if _triton.INTERPRETED else "cuda")
