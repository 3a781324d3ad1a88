"""Runs the Triton kernels on a GPU if there is one, otherwise in Triton's interpreter on CPU tensors."""

import pytest
import torch


@pytest.fixture(scope="session")
def device():
    """The device to put tensors on; no test here may pass on anything but a kernel of ours."""
    from m2f_kernels import _triton

    assert torch.cuda.is_available() != _triton.INTERPRETED, "kernels were imported before the interpreter was chosen"
    return torch.device("cpu" if _triton.INTERPRETED else "cuda")
