"""Runs the Triton kernels on a GPU if there is one, otherwise in Triton's interpreter on CPU tensors."""

import importlib.util
import math
from functools import cache

import pytest
import torch


def _spare_the_interpreter():
    """Leave out what Triton's interpreter does again and again, more than half of its time.

    Every call of a kernel's function patches the language, which the kernel's launch has done already; every operation
    builds a table of NumPy's types, the types of its operands and their shapes anew.
    """
    import triton.language as tl
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    patch, numpy_type = interpreter._patch_lang, interpreter._get_np_dtype
    block_type, broadcast = tl.block_type.__init__, TritonSemantic.broadcast_impl_value
    of_scalar, of_blocks, of_tensors = cache(numpy_type), {}, {}

    @cache
    def modules(function):
        return [module for module in (tl, tl.core) if any(module is seen for seen in function.__globals__.values())]

    def patch_once(function):
        unpatched = any(tl.core.is_builtin(module.load) for module in modules(function))
        return patch(function) if unpatched else interpreter._LangPatchScope()

    def known_numpy_type(kind):
        return of_scalar(kind.scalar) if type(kind.scalar) is tl.dtype else numpy_type(kind)

    def known_block_type(self, element_ty, shape):
        space = getattr(element_ty, "address_space", None)  # of a pointer, which its name does not say
        key = (element_ty.name, space, *(getattr(size, "value", size) for size in shape))
        if key not in of_blocks:
            block_type(self, element_ty, shape)
            of_blocks[key] = dict(vars(self))
        vars(self).update(of_blocks[key])

    def known_tensor(self, handle, type):
        shape = tuple(type.shape) if type.is_block() else ()
        if shape not in of_tensors:
            of_tensors[shape] = tl.constexpr(math.prod(shape)), tl.tuple([tl.constexpr(size) for size in shape])
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = of_tensors[shape]

    def broadcast_if_shapes_differ(self, lhs, rhs):
        return (lhs, rhs) if lhs.shape is rhs.shape else broadcast(self, lhs, rhs)

    interpreter._patch_lang, interpreter._get_np_dtype = patch_once, known_numpy_type
    tl.block_type.__init__, tl.tensor.__init__ = known_block_type, known_tensor
    TritonSemantic.broadcast_impl_value = broadcast_if_shapes_differ


if not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
    _spare_the_interpreter()


@pytest.fixture(scope="session")
def device():
    """The device to put tensors on; no test here may pass on anything but a kernel of ours."""
    from m2f_kernels import _triton

    assert torch.cuda.is_available() != _triton.INTERPRETED, "kernels were imported before the interpreter was chosen"
    return torch.device("cpu" if _triton.INTERPRETED else "cuda")
