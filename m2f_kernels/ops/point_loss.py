"""The former name of a part of :mod:`m2f_kernels.ops.points`; its names stay here for one more release."""

from m2f_kernels._moved import forwarder
from m2f_kernels.ops import points

__getattr__ = forwarder(__name__, {name: f"m2f_kernels.ops.points.{name}" for name in points.__all__})
