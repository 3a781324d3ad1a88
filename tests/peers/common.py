"""transformers' tests of any model (`tests/test_modeling_common.py`) on a small model of every accelerated family.

Run by `python -m tests.peers`, not by `make test`. The source distribution has this file and not the tests of single
models, nor two modules that it takes tests of generation and export from: those are left out.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import types
import unittest
from typing import Any

from m2f_kernels.integrations.transformers import patch
from tests.integrations.families import FAMILIES, Family

if os.environ.get("M2F_PEERS_PATCHED") == "1":
    patch()


def _common() -> Any:
    """The module, in a package of another name than this project's `tests`."""
    package = types.ModuleType("peers_tests")
    package.__path__ = [os.environ["M2F_PEERS_TESTS"]]
    sys.modules["peers_tests"] = package
    for name, mixin in (
        ("exporters.test_export", "ExportTesterMixin"),
        ("generation.test_utils", "GenerationTesterMixin"),
    ):
        try:
            found = importlib.util.find_spec(f"peers_tests.{name}") is not None
        except ModuleNotFoundError:
            found = False
        if not found:
            sys.modules.setdefault(f"peers_tests.{name.partition('.')[0]}", types.ModuleType("absent"))
            stub = types.ModuleType(f"peers_tests.{name}")
            setattr(stub, mixin, type(mixin, (), {}))
            sys.modules[stub.__name__] = stub
    return importlib.import_module("peers_tests.test_modeling_common")


class _Tester:
    """The tester that `transformers`' common tests expect of a family."""

    is_training = True
    batch_size = 2
    seq_length = 12
    num_hidden_layers = 2

    def __init__(self, family: Family) -> None:
        self.family = family

    def get_config(self) -> Any:
        import transformers

        return self.family.config(lambda name: getattr(transformers, name))

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Any]]:
        return self.get_config(), self.family.inputs()


def _case(family: Family, mixin: type) -> type:
    import transformers

    def setup(self: Any) -> None:
        self.model_tester = _Tester(family)

    def prepare(self: Any, inputs: Any, model_class: type, return_labels: bool = False) -> dict[str, Any]:
        return family.inputs(labels=return_labels)

    names = {
        "_prepare_for_class": prepare,
        "all_model_classes": (getattr(transformers, family.model),),
        "setUp": setup,
        "is_encoder_decoder": True,
        "test_resize_embeddings": False,
        "has_attentions": True,
    }
    return type(f"Test_{family.name}", (mixin, unittest.TestCase), names)


_mixin = _common().ModelTesterMixin
globals().update({f"Test_{f.name}": _case(f, _mixin) for f in FAMILIES.values() if f.installed})
