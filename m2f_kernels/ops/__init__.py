"""One folder per operator or family: schema, checks and autograd in `interface.py`, the mathematical truth in
`reference.py`, plain PyTorch for devices without a kernel in `fallback.py`, kernels for GPUs in `triton.py`."""
