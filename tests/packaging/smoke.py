"""Run an installed m2f-kernels: each operator, forward and backward, against its reference. Needs no source tree."""

import torch

import m2f_kernels
from m2f_kernels._library import LIBRARIES


def main() -> None:
    """Print what is in use and the largest relative error; raise if anything is missing or wrong."""
    assert LIBRARIES["cpu"].loaded, LIBRARIES["cpu"].problem
    torch.manual_seed(0)
    shapes = [(6, 9), (3, 4)]
    inputs = [
        torch.randn(2, 66, 4, 32),
        torch.rand(2, 66, 2, 2),
        torch.randn(2, 66, 4, 2, 4, 2),
        torch.randn(2, 66, 4, 2, 4),
    ]

    def run(backend: str) -> list[torch.Tensor]:
        leaves = [x.clone().requires_grad_() for x in inputs]
        with m2f_kernels.use_backend(backend):
            output = m2f_kernels.ms_deform_attn_from_offsets(leaves[0], shapes, *leaves[1:])
            return [output, *torch.autograd.grad(output.square().sum(), leaves)]

    pairs = zip(run("auto"), run("reference"), strict=True)
    pairs = [(a.detach(), b.detach()) for a, b in pairs]
    error = max(float((a - b).norm() / b.norm()) for a, b in pairs)
    print(f"torch {torch.__version__}, m2f-kernels {m2f_kernels.__version__}")
    for device, library in LIBRARIES.items():
        print(f"lib{library.name}.so: {'loaded' if library.loaded else library.problem}")
        if library.loaded:
            print(f"  {m2f_kernels.dispatch.choose('ms_deform_attn_from_offsets', device)}")
    print(f"largest relative difference to the reference, output and gradients: {error:.1e}")
    assert error < 1e-5, error


if __name__ == "__main__":
    main()
