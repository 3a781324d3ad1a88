"""A plugin of pytest: transformers' own tests of a model, with its classes patched."""

from m2f_kernels.integrations.transformers import patch

patch()
