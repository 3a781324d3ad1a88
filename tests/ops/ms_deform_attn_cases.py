"""Inputs for the tests of multi-scale deformable attention, and the two references that they are compared with."""

from dataclasses import dataclass, field, replace

import torch
from torch.nn import functional as F

import m2f_kernels
from m2f_kernels.ops.ms_deform_attn import reference
from tests.numerics import FORWARD, GRADIENT, relative_error, tolerance

#: Which operator, and with which reference points.
MODES = ("locations", "offsets2", "offsets4")
#: Results are not smooth where a sample crosses a pixel centre; random inputs keep this far from them, in pixels.
MARGIN = 0.02


@dataclass
class Case:
    """Inputs of one call. The sampling tensors are flat over levels and points: K = sum(points)."""

    mode: str
    sizes: list
    points: list
    tensors: dict  # value, reference_points (offsets only), samples, weights: in the order of the schema
    grad_output: torch.Tensor
    options: dict = field(default_factory=dict)

    @property
    def value(self):
        return self.tensors["value"]

    @property
    def levels(self):
        flat, start = [], 0
        for h, w in self.sizes:
            flat += [h, w, start]
            start += h * w
        return flat

    def to(self, device):
        tensors = {name: x.to(device) for name, x in self.tensors.items()}
        return replace(self, tensors=tensors, grad_output=self.grad_output.to(device))

    def call(self, value, *rest, sizes=None):
        """The public function on these tensors."""
        sizes = self.sizes if sizes is None else sizes
        options = {"points_per_level": self.points, **self.options}
        if self.mode == "locations":
            return m2f_kernels.ms_deform_attn(value, sizes, None, *rest, **options)
        return m2f_kernels.ms_deform_attn_from_offsets(value, sizes, *rest, **options)

    def run(self):
        return self.call(*self.tensors.values())

    def run_reference(self, *tensors):
        """The reference, in float64 where the tensors are."""
        if self.mode == "locations":
            return reference.ms_deform_attn(tensors[0], self.levels, *tensors[1:], self.points)
        scale = self.options.get("offset_scale", 0.5)
        return reference.ms_deform_attn_from_offsets(tensors[0], self.levels, *tensors[1:], self.points, scale)


def value_and_gradients(function, tensors, grad_output, needs=None):
    """{"output": ..., and the gradient of each tensor named in `needs` (default all)}."""
    needs = list(tensors) if needs is None else needs
    leaves = {name: x.detach().requires_grad_(name in needs) for name, x in tensors.items()}
    output = function(*leaves.values())
    gradients = torch.autograd.grad(output, [leaves[name] for name in needs], grad_output.to(output.dtype))
    return {"output": output.detach(), **dict(zip(needs, gradients, strict=True))}


def truth(case, function=None):
    """Output and gradients in float64 on the host."""
    tensors = {name: x.detach().cpu().double() for name, x in case.tensors.items()}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # hundreds of tiny operations
    try:
        return value_and_gradients(function or case.run_reference, tensors, case.grad_output.cpu().double())
    finally:
        torch.set_num_threads(threads)


def assert_matches(case, needs=None, expected=None):
    """Output and gradients of the operator against the float64 truth."""
    actual = value_and_gradients(case.call, case.tensors, case.grad_output, needs)
    expected = expected or truth(case)
    for name, x in actual.items():
        stored = case.value.dtype if name == "output" else case.tensors[name].dtype
        assert x.dtype == stored
        bound = tolerance(FORWARD if name == "output" else GRADIENT, case.value.dtype, stored)
        error = relative_error(x, expected[name])
        assert error <= bound, f"{name}: relative error {error:.3g} > {bound:.3g}"


def make_case(
    mode="locations",
    sizes=((5, 7), (3, 4)),
    points=(3, 2),
    n=2,
    q=7,
    heads=2,
    d=16,
    dtype=torch.float32,
    samples_dtype=None,
    weights_dtype=None,
    reference_dtype=None,
    margin=MARGIN,
    seed=0,
    **options,
):
    """Random inputs; a good part of the samples lies outside the levels. q None: the queries are the positions."""
    g = torch.Generator().manual_seed(seed)
    sizes, points = [tuple(size) for size in sizes], list(points)
    length, k = sum(h * w for h, w in sizes), sum(points)
    q = length if q is None else q
    wh = torch.tensor([(w, h) for (h, w), p in zip(sizes, points, strict=True) for _ in range(p)], dtype=torch.float64)
    tensors = {"value": torch.randn(n, length, heads, d, generator=g).to(dtype)}
    if mode == "offsets2":
        tensors["reference_points"] = torch.rand(n, q, len(sizes), 2, generator=g)
    elif mode == "offsets4":
        tensors["reference_points"] = torch.rand(n, q, len(sizes), 4, generator=g) * 0.9 + 0.1
    if mode != "locations":
        tensors["reference_points"] = tensors["reference_points"].to(reference_dtype or samples_dtype or dtype)

    def draw():
        if mode == "locations":
            # Pixel coordinates from -2 to size + 1.
            x = (torch.rand(n, q, heads, k, 2, generator=g, dtype=torch.float64) * (wh + 3) - 1.5) / wh
        else:
            x = torch.randn(n, q, heads, k, 2, generator=g, dtype=torch.float64) * 2
        return x.to(samples_dtype or dtype)

    def too_close(samples):
        locations = samples.double()
        if mode != "locations":
            levels = [v for h, w in sizes for v in (h, w, 0)]
            scale = options.get("offset_scale", 0.5)
            ref = tensors["reference_points"].double()
            locations = reference.locations_from_offsets(levels, ref, locations, points, scale)
        pixel = locations * wh - 0.5
        return (pixel - pixel.round()).abs() < margin

    samples = draw()
    for _ in range(200):
        bad = too_close(samples)
        if not bad.any():
            break
        samples = torch.where(bad, draw(), samples)
    else:
        raise AssertionError("could not keep the samples away from pixel centres")
    weights = torch.randn(n, q, heads, k, generator=g)
    tensors["samples"] = samples
    tensors["weights"] = (weights.softmax(-1) if mode == "locations" else 2 * weights).to(weights_dtype or dtype)
    grad_output = torch.randn(n, q, heads * d, generator=g).to(dtype)
    return Case(mode, sizes, points, tensors, grad_output, options)


def grid_sample_form(case, value, *rest):
    """The composition that published models use, in the dtype of its inputs: the second truth, and PyTorch's own path
    in low precision. Written apart from reference.py, level by level on torch.nn.functional.grid_sample."""
    n, _, heads, d = value.shape
    if case.mode == "locations":
        locations, weights = rest
    else:
        points, offsets, logits = rest
        weights = F.softmax(logits, -1)
        pieces, first = [], 0
        for level, ((h, w), count) in enumerate(zip(case.sizes, case.points, strict=True)):
            offset = offsets[:, :, :, first : first + count]
            point = points[:, :, None, None, level]
            if points.shape[-1] == 2:
                pieces.append(point + offset / torch.tensor([w, h], dtype=offset.dtype))
            else:
                scale = case.options.get("offset_scale", 0.5)
                pieces.append(point[..., :2] + offset / count * point[..., 2:] * scale)
            first += count
        locations = torch.cat(pieces, 3)
    sampled, first, start = [], 0, 0
    for (h, w), count in zip(case.sizes, case.points, strict=True):
        image = value[:, start : start + h * w].permute(0, 2, 3, 1).reshape(n * heads, d, h, w)
        grid = (2 * locations[:, :, :, first : first + count] - 1).transpose(1, 2).flatten(0, 1)
        sampled.append(F.grid_sample(image, grid.to(image.dtype), padding_mode="zeros", align_corners=False))
        first, start = first + count, start + h * w
    weights = weights.transpose(1, 2).flatten(0, 1).unsqueeze(1).to(value.dtype)
    out = (torch.cat(sampled, -1) * weights).sum(-1)
    return out.view(n, heads, d, -1).permute(0, 3, 1, 2).flatten(2)
