"""The former name of :mod:`m2f_kernels.dispatch`; its public names stay here for one more release."""

from m2f_kernels._moved import forwarder

_NAMES = ("BACKENDS", "BackendChoice", "choose", "explain", "use_backend")
__getattr__ = forwarder(__name__, {name: f"m2f_kernels.dispatch.{name}" for name in _NAMES})
