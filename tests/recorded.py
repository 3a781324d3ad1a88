"""A device that stands for CUDA in tests of graphs: it records the operators of a call, and runs them again.

As of a CUDA graph, what Python computed stays what it was, memory that was read is read again, and results lie where
they lay.
"""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def tensors_of(x):
    return [t for t in tree_leaves(x) if isinstance(t, torch.Tensor)]


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not func.is_view and func._schema.name not in ("aten::detach", "aten::empty_like", "aten::_unsafe_view"):
            self.calls.append((func, args, kwargs, out))
        return out

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, out in self.calls:
            read = {t.data_ptr() for t in tensors_of((args, kwargs))}
            for was, new in zip(tensors_of(out), tensors_of(func(*args, **kwargs)), strict=True):
                if was.data_ptr() not in read:
                    was.copy_(new)


class Device:
    type = "cpu"

    def __init__(self, size=10, error=None):
        self.size, self.error, self.busy = size, error, False
        self.log = []
        self.used = 0

    def reset(self):
        self.used = 0

    def on(self, device):
        return contextlib.nullcontext()

    def capturing(self, device):
        return self.busy

    def warm_up(self, run, times):
        self.log.append("warm up")
        random = torch.get_rng_state()
        for _ in range(times):
            run()
        torch.set_rng_state(random)

    def capture(self, run):
        assert not torch.is_autocast_cache_enabled()
        self.log.append("capture")
        if self.error:
            raise RuntimeError(self.error)
        self.used += self.size
        random = torch.get_rng_state()
        with Recorder() as recorder:
            result = run()
        torch.set_rng_state(random)

        def replay():
            self.log.append("replay")
            recorder.replay()

        return result, replay

    def bytes(self):
        return self.used

    def begin(self):
        self.log.append("begin")

    def end(self):
        self.log.append("end")
