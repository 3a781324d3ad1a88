"""The former name of :mod:`m2f_kernels.integrations.extension`; its functions stay here for one more release."""

from m2f_kernels._moved import forwarder

_MODULE = "m2f_kernels.integrations.extension"
__getattr__ = forwarder(__name__, {"install": f"{_MODULE}.patch", "uninstall": f"{_MODULE}.unpatch"})
