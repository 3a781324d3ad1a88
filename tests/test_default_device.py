"""The package computes where its inputs are, whatever `torch.set_default_device` says."""

import ast
from pathlib import Path

import pytest
import torch

import m2f_kernels as m
import m2f_model
from m2f_model.data import Shapes
from tests.integrations.families import FAMILIES, quick

#: What makes a tensor from nothing, on the default device where no other is named.
FACTORIES = {
    *("arange", "as_tensor", "asarray", "empty", "eye", "full", "linspace", "logspace", "normal", "ones", "rand"),
    *("randint", "randn", "randperm", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros"),
}


def factories_without_device(source, name):
    """Calls such as `torch.zeros(3)`; a module's parameters, made in `__init__`, belong on the default device."""
    found = []

    def visit(node, inside):
        if isinstance(node, ast.ClassDef):
            inside = any(ast.unparse(base).split(".")[-1] in ("Module", "CheckpointedLayer") for base in node.bases)
        if isinstance(node, ast.FunctionDef):
            inside = inside and node.name == "__init__"
        if isinstance(node, ast.Call) and not inside:
            function, keywords = node.func, {keyword.arg for keyword in node.keywords}
            made = isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name)
            if (
                made
                and function.value.id == "torch"
                and function.attr in FACTORIES
                and not keywords & {"device", "out"}
            ):
                found.append(f"{name}:{node.lineno}: {ast.unparse(node)}")
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(source), False)
    return found


def test_what_is_forbidden_is_found():
    assert factories_without_device("x = torch.zeros(3)\ny = torch.zeros(3, device='cpu')\n", "f") == [
        "f:1: torch.zeros(3)"
    ]
    assert not factories_without_device("class A(nn.Module):\n def __init__(self):\n  self.x = torch.ones(3)\n", "f")
    assert factories_without_device("class A(nn.Module):\n def forward(self):\n  return torch.ones(3)\n", "f")


@pytest.mark.parametrize("package", [m, m2f_model], ids=lambda package: package.__name__)
def test_no_factory_without_a_device(package):
    root = Path(package.__file__).parent
    found = [x for path in sorted(root.rglob("*.py")) for x in factories_without_device(path.read_text(), path.name)]
    assert not found, "\n".join(found)


# With the meta device as default, whatever is made without a device has no values, and says so when it meets others.


def test_operators():
    generator = torch.Generator().manual_seed(0)
    value, locations = torch.randn(1, 12, 2, 4, generator=generator), torch.rand(1, 3, 2, 2, 2, 2, generator=generator)
    weights, embed = torch.rand(1, 3, 2, 2, 2, generator=generator), torch.randn(1, 3, 4, generator=generator)
    pixels, at = torch.randn(1, 4, 6, 5, generator=generator), torch.rand(1, 7, 2, generator=generator)
    query = torch.randn(1, 2, 3, 4, generator=generator)
    targets = torch.rand(1, 2, 5, 5, generator=generator) > 0.5
    matches = [(torch.tensor([0, 2]), torch.tensor([1, 0]))]

    def run():
        factored = m.FactoredMasks(embed, pixels)
        mask = m.predict_attention_mask(embed, m.resize_mask_features(pixels, [(3, 4)])[0])
        points = at.expand(2, -1, -1)
        torch.manual_seed(0)
        return [
            m.ms_deform_attn(value, [(2, 3), (3, 2)], None, locations, weights),
            m.masked_attention(query, value.transpose(1, 2), value.transpose(1, 2), mask),
            mask.to_bool(),
            m.point_sample(pixels, at),
            m.uncertain_points(factored, 5),
            *m.mask_matching_cost(factored, targets, at),
            *m.point_mask_loss(factored, targets, points, matches=matches),
            *m.point_mask_loss(pixels, targets, points, matches=matches),
            *m.point_mask_loss(pixels[:0], [], points[:0], matches=[]),
        ]

    for backend in ("auto", "reference"):
        with m.use_backend(backend):
            expected = run()
            with torch.device("meta"):
                found = run()
        torch.testing.assert_close(found, expected)


def test_losses():
    criterion = m.nn.PointMaskCriterion(3, num_points=16)
    masks = torch.randn(1, 5, 8, 8)
    predictions = [{"class_logits": torch.randn(1, 5, 4), "masks": masks}] * 2
    targets = [{"labels": torch.tensor([1, 2]), "masks": masks[0, :2] > 0}]
    torch.manual_seed(0)
    expected = criterion(predictions, targets)
    torch.manual_seed(0)
    with torch.device("meta"):
        found = criterion(predictions, targets)
    torch.testing.assert_close(found, expected)


def test_model_and_data():
    model = m2f_model.Mask2Former(m2f_model.Mask2FormerConfig.tiny(3)).eval()
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(pixels)
        sample = Shapes(2, seed=1)[0]
        with torch.device("meta"):
            found = model(pixels)
            same = Shapes(2, seed=1)[0]
    torch.testing.assert_close(found.class_logits, expected.class_logits)
    torch.testing.assert_close(same, sample)


@pytest.mark.parametrize("family", quick([x for x in FAMILIES.values() if x.installed]), ids=lambda family: family.name)
def test_families(family):
    """Accelerated models with another default device, where the untouched ones have none that matters either."""
    model = family.make()
    inputs = {key: value[:1] if isinstance(value, torch.Tensor) else value for key, value in family.inputs().items()}

    def run():
        with torch.no_grad(), torch.device("meta"):
            return model(**inputs)

    try:
        expected = run()
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"the untouched model fails: {error}".splitlines()[0])
    m.accelerate(model)
    found = run()
    for name in family.outputs:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-3)
