"""Inputs of the attention module of mmcv and detrex, and its results with gradients; for stand-ins and real ones."""

import torch

from tests.numerics import FORWARD, GRADIENT, relative_error

SIZES = ((6, 5), (3, 4))
DIM, QUERIES, BATCH = 16, 9, 3


def make_inputs(batch_first, coordinates, options=(), dtype=torch.float32, seed=0):
    """Keyword arguments of the forward; `options` of value, identity, query_pos, padding."""
    g = torch.Generator().manual_seed(seed)
    length = sum(h * w for h, w in SIZES)
    q = QUERIES if "value" in options else length

    def tokens(count):
        x = torch.randn(BATCH, count, DIM, generator=g).to(dtype)
        return (x if batch_first else x.transpose(0, 1).contiguous()).requires_grad_()

    inputs = {"query": tokens(q)}
    for name, count in (("value", length), ("identity", q), ("query_pos", q)):
        if name in options:
            inputs[name] = tokens(count)
    if "padding" in options:
        inputs["key_padding_mask"] = torch.rand(BATCH, length, generator=g) < 0.3
    points = torch.rand(BATCH, q, len(SIZES), coordinates, generator=g).to(dtype)
    return {
        **inputs,
        "reference_points": points.requires_grad_(),
        "spatial_shapes": torch.tensor(SIZES),
        "level_start_index": torch.tensor([0, SIZES[0][0] * SIZES[0][1]]),
    }


def randomize(module):
    """Weights that send every query somewhere else; the published initialisation is one constant."""
    torch.manual_seed(1)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)


def results(module, inputs):
    """Output and gradients of inputs and parameters, by name."""
    leaves = {name: x for name, x in inputs.items() if isinstance(x, torch.Tensor) and x.requires_grad}
    leaves |= dict(module.named_parameters())
    output = module(**inputs)
    weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    gradients = torch.autograd.grad(output, list(leaves.values()), weight)
    return {"output": output.detach(), **dict(zip(leaves, gradients, strict=True))}


def assert_close(actual, expected):
    assert actual.keys() == expected.keys()
    for name, x in actual.items():
        assert x.dtype == expected[name].dtype
        bound = (FORWARD if name == "output" else GRADIENT)[x.dtype]
        assert relative_error(x, expected[name]) <= bound, name
