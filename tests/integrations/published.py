"""Shared by the tests of Mask2Former and of OneFormer: comparing nested outputs and gradients, and watching sizes."""

import copy

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import m2f_kernels

OUTPUT, GRADIENT = 1e-4, 1e-3
#: The reasons why the pixel decoder of OneFormer and its encoder are left alone in transformers before 5.18.
BEFORE_LISTS_OF_SIZES = {
    "its encoder takes the sizes of the levels as a tensor alone",
    "its reference points are made from spatial_shapes, valid_ratios, device",
}


def assert_same(before, after, tolerance=OUTPUT, where="outputs"):
    """The same structure, types and values; tensors agree relative to the largest number, or 1."""
    if isinstance(before, torch.Tensor):
        assert before.shape == after.shape, where
        assert before.dtype == after.dtype, where
        assert before.isfinite().all(), where
        error = (before - after).abs().max() / before.abs().max().clamp(min=1) if before.numel() else 0
        assert error <= tolerance, f"{where}: {error}"
    elif isinstance(before, dict):
        assert isinstance(after, dict), where
        assert list(before) == list(after), where
        for key in before:
            assert_same(before[key], after[key], tolerance, f"{where}.{key}")
    elif isinstance(before, (tuple, list)):
        assert type(before) is type(after), where
        assert len(before) == len(after), where
        for i, (first, second) in enumerate(zip(before, after, strict=True)):
            assert_same(first, second, tolerance, f"{where}[{i}]")
    else:
        assert before is None, where
        assert after is None, where


def train(model, seed=0, **inputs):
    """Loss and gradients of a copy of `model` in training mode; drop path off, dropout as `seed` makes it."""
    model = copy.deepcopy(model).train()
    for module in model.modules():
        if "DropPath" in type(module).__name__:
            module.drop_prob = 0.0
    torch.manual_seed(seed)
    outputs = model(**inputs)
    outputs.loss.sum().backward()
    return outputs, {name: p.grad for name, p in model.named_parameters()}


def assert_same_gradients(before, after, tolerance=GRADIENT):
    """Of every parameter, relative to its norm. Some are zero but for rounding (biases before a softmax or a norm):
    those are compared with all the others."""
    assert {name for name, g in before.items() if g is not None} == {n for n, g in after.items() if g is not None}
    total = torch.stack([g.norm() for g in before.values() if g is not None]).norm()
    for name, gradient in before.items():
        if gradient is not None:
            error = (gradient - after[name]).norm()
            assert error <= tolerance * gradient.norm() + tolerance * 1e-3 * total, f"{name}: {error / gradient.norm()}"


def targets(counts, sizes, generator, labels=5, dtype=torch.float32):
    """`mask_labels` and `class_labels`."""
    masks = [(torch.rand(t, *size, generator=generator) > 0.6).to(dtype) for t, size in zip(counts, sizes, strict=True)]
    return {
        "mask_labels": masks,
        "class_labels": [torch.randint(0, labels, (t,), generator=generator) for t in counts],
    }


def compact(form, sizes, generator):
    """`mask_labels` of two images as "maps" of ids, "runs" (lengths that overlap) or "COCO"'s dicts, and dense.

    Three targets and two, one of them without pixels.
    """
    if form == "maps":
        found = [
            m2f_kernels.InstanceMap(torch.randint(0, 5, size, generator=generator), torch.tensor(ids))
            for size, ids in zip(sizes, ([4, 0, 2], [1, 9]), strict=True)
        ]
        return found, [one.masks().float() for one in found]
    dense = [torch.rand(t, *size, generator=generator) > 0.6 for t, size in zip((3, 2), sizes, strict=True)]
    dense[1][1] = False
    found = [m2f_kernels.RunLengths.from_masks(masks) for masks in dense]
    if form == "COCO":
        found = [as_coco(masks) for masks in dense]
    return found, [masks.float() for masks in dense]


def as_coco(masks):
    """Uncompressed run lengths."""
    encoded = []
    for mask in masks:
        pixels = torch.cat([torch.zeros(1, dtype=torch.bool), mask.T.flatten()])
        changes = (pixels[1:] != pixels[:-1]).nonzero()[:, 0]
        ends = torch.cat([torch.zeros(1, dtype=torch.int64), changes, torch.tensor([mask.numel()])])
        encoded.append({"size": list(mask.shape), "counts": ends.diff().tolist()})
    return encoded


def assert_compact_targets_serve(accelerated, form, sizes, generator, **inputs):
    """The same loss and gradients, to the last bit, as from the dense masks."""
    given, dense = compact(form, sizes, generator)
    labels = [torch.tensor([0, 3, 1]), torch.tensor([2, 2])]
    (first, gradients), (second, expected) = (
        train(accelerated, mask_labels=masks, class_labels=labels, **inputs) for masks in (given, dense)
    )
    assert torch.equal(first.loss, second.loss)
    assert first.loss.isfinite().all()
    for name, gradient in gradients.items():
        assert gradient is None or torch.equal(gradient, expected[name]), name


class Sizes(TorchDispatchMode):
    """Counts the tensors of `elements` elements that operators make, views apart."""

    def __init__(self, elements):
        super().__init__()
        self.elements, self.count = elements, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.numel() == self.elements:
                self.count += x.untyped_storage().data_ptr() not in given
        return result


#: Operators of the decoder, which a traced model has to contain.
OPERATORS = {"masked_attention", "ms_deform_attn_from_offsets", "predict_attention_mask", "resize_mask_features"}


def operators(graph):
    """Names of this package's operators in an fx graph."""
    return {str(n.target).split(".")[1] for n in graph.nodes if str(n.target).startswith("m2f.")}


def compile_whole(model, seen):
    """`model` compiled as one graph; `seen` receives the operators in it."""
    backend = torch._dynamo.lookup_backend("aot_eager")

    def record(graph_module, inputs):
        seen.update(operators(graph_module.graph))
        return backend(graph_module, inputs)

    torch._dynamo.reset()
    return torch.compile(model, backend=record, fullgraph=True)
