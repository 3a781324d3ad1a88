"""The model package stands on public names of the kernel package only, as anybody's model could."""

import ast
import importlib
from pathlib import Path

import pytest

MODULES = sorted((Path(__file__).parents[2] / "m2f_model").glob("*.py"))


def names(tree):
    """Yields module and name (or None) of each import from m2f_kernels, and of each attribute of such a module."""
    modules = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "m2f_kernels":
            for alias in node.names:
                yield node.module, alias.name
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == "m2f_kernels":
                    modules[alias.asname or "m2f_kernels"] = alias.name
                    yield alias.name, None
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in {*modules, *modules.values()}:
            yield modules.get(ast.unparse(node.value), ast.unparse(node.value)), node.attr


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_public_names_only(path):
    for module, name in names(ast.parse(path.read_text())):
        private = [part for part in (*module.split("."), name or "") if part.startswith("_") and part != "__version__"]
        assert not private, f"{module}.{name}"
        if name is not None:
            public = getattr(importlib.import_module(module), "__all__", [name])
            assert name in public or _is_module(f"{module}.{name}"), f"{module}.{name} is not in its __all__"


def _is_module(name):
    return importlib.util.find_spec(name) is not None


def test_private_names_are_found():
    source = "import m2f_kernels\nfrom m2f_kernels._checks import describe\nm2f_kernels._library.LIBRARIES"
    assert set(names(ast.parse(source))) == {
        ("m2f_kernels", None), ("m2f_kernels._checks", "describe"), ("m2f_kernels", "_library"),
    }  # fmt: skip
