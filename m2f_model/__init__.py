"""A thin, complete Mask2Former on top of `m2f_kernels`. (Its architecture lands with its own milestone.)"""

from m2f_kernels import __version__

__all__ = ["__version__"]
