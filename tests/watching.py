"""Modes that see what operators make, and which of them run, under `with`."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Largest(TorchDispatchMode):
    """The largest tensor that operators make, of some dtypes or of any: its elements in memory, and its bytes."""

    def __init__(self, *dtypes):
        super().__init__()
        self.dtypes = dtypes
        self.elements = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and (not self.dtypes or x.dtype in self.dtypes):
                held = x.untyped_storage().nbytes()
                self.bytes = max(self.bytes, held)
                self.elements = max(self.elements, min(x.numel(), held // x.element_size()))
        return result


class Operators(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    @property
    def own(self):
        """Those of this package, without its namespace."""
        return {name.removeprefix("m2f::") for name in self.names if name.startswith("m2f::")}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))
