"""Run an installed m2f-kernels: operators of each kind, forward and backward, against the reference, without the tree.

`--without-libraries`: the wheel for systems where there are none.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch

import m2f_kernels
from m2f_kernels._library import LIBRARIES


def cases() -> dict[str, tuple[Callable[..., Any], list[torch.Tensor]]]:
    """A call of the tensors that follow it, by name; it is differentiated for all of them."""
    shapes = [(6, 9), (3, 4)]
    masks = torch.rand(5, 9, 12) < 0.5
    points = torch.rand(5, 20, 2)
    keep = torch.rand(2, 7, 33) < 0.5
    return {
        "ms_deform_attn_from_offsets": (
            lambda value, *rest: m2f_kernels.ms_deform_attn_from_offsets(value, shapes, *rest),
            [
                torch.randn(2, 66, 4, 32),
                torch.rand(2, 66, 2, 2),
                torch.randn(2, 66, 4, 2, 4, 2),
                torch.randn(2, 66, 4, 2, 4),
            ],
        ),
        "masked_attention": (
            lambda query, key, value: m2f_kernels.masked_attention(query, key, value, keep),
            [torch.randn(2, 4, 7, 32), torch.randn(2, 4, 33, 32), torch.randn(2, 4, 33, 32)],
        ),
        "point_sample": (lambda x: m2f_kernels.point_sample(x, points[:2]), [torch.randn(2, 3, 8, 9)]),
        "point_mask_loss": (
            lambda logits: sum(m2f_kernels.point_mask_loss(logits, masks, points)),
            [torch.randn(5, 9, 12)],
        ),
    }


def largest_error(call: Callable[..., Any], inputs: list[torch.Tensor]) -> float:
    """Output and gradients against the reference's."""

    def run(backend: str) -> list[torch.Tensor]:
        leaves = [x.clone().requires_grad_() for x in inputs]
        with m2f_kernels.use_backend(backend):
            output = call(*leaves)
            return [output, *torch.autograd.grad(output.square().sum(), leaves)]

    pairs = [(a.detach(), b.detach()) for a, b in zip(run("auto"), run("reference"), strict=True)]
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def main() -> None:
    """Print what is in use and the largest relative error; raise if anything is missing or wrong."""
    if "--without-libraries" in sys.argv:
        assert not LIBRARIES["cpu"].path.exists(), LIBRARIES["cpu"].path
    else:
        assert LIBRARIES["cpu"].loaded, LIBRARIES["cpu"].problem
    torch.manual_seed(0)
    error = max(largest_error(*case) for case in cases().values())
    print(f"torch {torch.__version__}, m2f-kernels {m2f_kernels.__version__}")
    for device, library in LIBRARIES.items():
        print(f"lib{library.name}.so: {'loaded' if library.loaded else library.problem}")
        if library.loaded:
            print(f"  {m2f_kernels.dispatch.choose('ms_deform_attn_from_offsets', device)}")
    print(f"largest relative difference to the reference, output and gradients: {error:.1e}")
    assert error < 1e-5, error


if __name__ == "__main__":
    main()
