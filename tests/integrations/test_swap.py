"""Accelerating leaves identity, names and state as they were, survives copies and pickles, and is taken back."""

import copy
import importlib
import inspect
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import m2f_kernels
from m2f_kernels.integrations.transformers import Report, _swap, patch, unpatch
from tests.integrations.families import FAMILIES, modeling

FAMILY = FAMILIES["deformable_detr"]


@pytest.fixture
def model():
    return FAMILY.make()


@pytest.fixture
def patched():
    yield patch("deformable_detr", "rt_detr")
    unpatch()


def outputs(model, family=FAMILY):
    with torch.no_grad():
        found = model(**family.inputs(dtype=next(model.parameters()).dtype))
    return torch.cat([found[name].flatten() for name in family.outputs])


def classes(model):
    return [type(module) for module in model.modules()]


def accelerated_modules(model):
    return [module for module in model.modules() if isinstance(module, _swap._Accelerated)]


# ---------------------------------------------------------------- accelerate, restore, with
def test_accelerate_and_restore(model):
    before = classes(model)
    expected = outputs(model)
    returned, report = m2f_kernels.accelerate(model)
    assert returned is model
    assert isinstance(report, Report)
    assert len(accelerated_modules(model)) == len(report.replaced) == 8
    assert (outputs(model) - expected).abs().max() < 1e-5
    assert not torch.equal(outputs(model), expected), "the same code still runs"
    assert m2f_kernels.restore(model) is model
    assert classes(model) == before
    assert torch.equal(outputs(model), expected)
    m2f_kernels.restore(model)  # nothing to do
    assert classes(model) == before


def test_twice(model):
    m2f_kernels.accelerate(model)
    once = classes(model)
    report = m2f_kernels.accelerate(model).report
    assert classes(model) == once
    assert not report.replaced
    assert len(report.already_accelerated) == 8
    m2f_kernels.restore(model)
    assert not accelerated_modules(model)


def test_context_manager(model):
    with m2f_kernels.accelerate(model) as acceleration:
        assert acceleration.model is model
        assert len(accelerated_modules(model)) == len(acceleration.report.replaced) == 8
    assert not accelerated_modules(model)
    with pytest.raises(KeyError), m2f_kernels.accelerate(model):
        raise KeyError
    assert not accelerated_modules(model)


def test_context_manager_undoes_only_its_own(model):
    m2f_kernels.accelerate(model.model.encoder)
    with m2f_kernels.accelerate(model) as acceleration:
        assert len(acceleration.report.already_accelerated) == 4
    assert len(accelerated_modules(model)) == 4


def test_report(model):
    report = m2f_kernels.accelerate(model).report
    text = str(report)
    assert text.startswith("8 replaced, 0 left alone, 0 already replaced before\n")
    assert "replaced: 4 x DeformableDetrMultiscaleDeformableAttention (model.encoder.layers.0.self_attn, ...): " in text
    assert report.replaced[0].name == "model.encoder.layers.0.self_attn"
    assert "Acceleration of DeformableDetrForObjectDetection: 0 replaced" in repr(m2f_kernels.accelerate(model))
    assert "AcceleratedDeformableDetrMultiscaleDeformableAttention(" in repr(model)


# ---------------------------------------------------------------- what stays
def test_parameters_hooks_and_names_stay(model):
    calls = []
    attention = model.model.encoder.layers[0].self_attn
    attention.register_forward_hook(lambda *_: calls.append(1))
    parameters, buffers, modules = (
        dict(get()) for get in (model.named_parameters, model.named_buffers, model.named_modules)
    )
    state = model.state_dict()
    m2f_kernels.accelerate(model)
    assert {n: id(p) for n, p in model.named_parameters()} == {n: id(p) for n, p in parameters.items()}
    assert {n: id(b) for n, b in model.named_buffers()} == {n: id(b) for n, b in buffers.items()}
    assert {n: id(m) for n, m in model.named_modules()} == {n: id(m) for n, m in modules.items()}
    assert list(model.state_dict()) == list(state)
    outputs(model)
    assert calls
    # Names of classes carry meaning in transformers; the accelerated class has the original's.
    original = _swap._PAIRS[type(attention)].original
    assert isinstance(attention, original)
    assert (type(attention).__name__, type(attention).__module__) == (original.__name__, original.__module__)


def test_state_dict_moves_between(model):
    expected = outputs(model)
    m2f_kernels.accelerate(model)
    state = copy.deepcopy(model.state_dict())
    other = FAMILY.make()
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    other.load_state_dict(state)
    assert torch.equal(outputs(other), expected)
    model.load_state_dict(other.state_dict())


def test_save_pretrained(tmp_path):
    family = FAMILIES["rt_detr"]
    model = family.make()
    expected = outputs(model, family)
    m2f_kernels.accelerate(model)
    model.save_pretrained(tmp_path)
    assert "m2f" not in (tmp_path / "config.json").read_text()
    assert '"RTDetrForObjectDetection"' in (tmp_path / "config.json").read_text()
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert not accelerated_modules(loaded)
    assert torch.equal(outputs(loaded, family), expected)
    m2f_kernels.accelerate(loaded)
    assert torch.equal(outputs(loaded, family), outputs(model, family))


def _torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "torch.save": _torch_save} | {
    f"pickle {i}": lambda model, i=i: pickle.loads(pickle.dumps(model, i)) for i in (0, 2, 5)
}


@pytest.mark.parametrize("how", COPIES)
def test_copies(model, how):
    m2f_kernels.accelerate(model)
    other = COPIES[how](model)
    assert len(accelerated_modules(other)) == 8
    assert classes(other) == classes(model)
    assert torch.equal(outputs(other), outputs(model))
    m2f_kernels.restore(other)
    assert not accelerated_modules(other)
    assert len(accelerated_modules(model)) == 8


def test_dtype_and_device(model):
    m2f_kernels.accelerate(model)
    expected = outputs(model)
    double = outputs(copy.deepcopy(model).to(torch.float64))
    assert double.dtype == torch.float64
    assert (double - expected).abs().max() < 1e-4
    assert len(accelerated_modules(model.to(torch.bfloat16))) == 8
    assert outputs(model).isfinite().all()


def test_meta_device():
    """Accelerated without data, then given some."""
    source = FAMILY.make()
    with torch.device("meta"):
        empty = type(source)(source.config).eval()
    assert len(m2f_kernels.accelerate(empty).report.replaced) == 8
    attention = empty.model.encoder.layers[0].self_attn
    points = torch.empty(1, 20, 4, 2, device="meta")
    states = torch.empty(1, 20, 32, device="meta")
    shapes = [(3, 4), (2, 2), (1, 2), (1, 2)]
    out, _ = attention(states, encoder_hidden_states=states, reference_points=points, spatial_shapes_list=shapes)
    assert out.shape == (1, 20, 32)
    assert out.is_meta
    filled = empty.to_empty(device="cpu")
    filled.load_state_dict(source.state_dict())
    for (_, buffer), (_, original) in zip(filled.named_buffers(), source.named_buffers(), strict=True):
        buffer.copy_(original)
    assert (outputs(filled) - outputs(source)).abs().max() < 1e-5


def test_gradient_checkpointing(model):
    """The same gradients with and without, and as the original's."""
    gradients = {}
    for name, checkpointing, accelerated in (
        ("original", False, False),
        ("plain", False, True),
        ("less memory", True, True),
    ):
        trained = copy.deepcopy(model).train()
        if accelerated:
            m2f_kernels.accelerate(trained)
        if checkpointing:
            trained.gradient_checkpointing_enable()
            assert trained.is_gradient_checkpointing
        torch.manual_seed(1)
        trained(**FAMILY.inputs(labels=True)).loss.backward()
        gradients[name] = torch.cat([p.grad.flatten() for p in trained.parameters() if p.grad is not None])
    for name in ("plain", "less memory"):
        torch.testing.assert_close(gradients[name], gradients["original"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("first", ["accelerate", "peft"])
def test_lora(first):
    """Projections wrapped by PEFT, before or after; merged, too. PEFT itself refuses Deformable DETR."""
    from peft import LoraConfig, get_peft_model

    family = FAMILIES["rt_detr"]
    names = ["sampling_offsets", "attention_weights", "value_proj", "output_proj"]
    config = LoraConfig(target_modules=names, init_lora_weights=False, r=4)
    results = {}
    for accelerated in (False, True):
        wrapped = family.make()
        if accelerated and first == "accelerate":
            m2f_kernels.accelerate(wrapped)
        torch.manual_seed(3)
        wrapped = get_peft_model(wrapped, config).eval()
        if accelerated and first == "peft":
            m2f_kernels.accelerate(wrapped)
        assert len(accelerated_modules(wrapped)) == 4 * accelerated
        wrapped(**family.inputs()).logits.square().sum().backward()
        gradients = {name: p.grad for name, p in wrapped.named_parameters() if p.grad is not None}
        assert len(gradients) == 2 * len(names) * 2
        results[accelerated] = outputs(wrapped, family), gradients, outputs(wrapped.merge_and_unload(), family)
    (plain, gradients, merged), (plain_after, gradients_after, merged_after) = results[False], results[True]
    assert (plain - outputs(family.make(), family)).abs().max() > 1e-2, "the adapters do nothing"
    assert (plain - plain_after).abs().max() < 1e-4
    assert (merged - merged_after).abs().max() < 1e-4
    assert gradients.keys() == gradients_after.keys()
    for name, gradient in gradients.items():
        assert (gradients_after[name] - gradient).norm() <= 1e-3 * gradient.norm(), name


@pytest.mark.parametrize("name", ["deformable_detr", "mask2former", "oneformer"])
def test_signatures(name):
    """Of every module's `forward`, as published."""
    family = FAMILIES[name]
    plain, model = family.make(), m2f_kernels.accelerate(family.make()).model
    for (where, one), other in zip(plain.named_modules(), model.modules(), strict=True):
        assert inspect.signature(one.forward) == inspect.signature(other.forward), where


def test_a_helper_that_a_subclass_overrides():
    """It is left alone: the fused code does not call the helper."""

    class Own(modeling("mask2former").Mask2FormerMaskedAttentionDecoderLayer):
        def with_pos_embed(self, tensor, positions):
            return tensor

    layer = Own(FAMILIES["mask2former"].make().config)
    with pytest.warns(UserWarning, match="overrides with_pos_embed"):
        m2f_kernels.accelerate(layer)
    assert type(layer) is Own


def test_parametrized_weights(model):
    """torch's parametrizations change the class of a module themselves."""
    from torch.nn.utils.parametrizations import weight_norm

    weight_norm(model.model.encoder.layers[0].self_attn.value_proj)
    expected = outputs(model)
    m2f_kernels.accelerate(model)
    assert (outputs(model) - expected).abs().max() < 1e-5
    assert (outputs(copy.deepcopy(model)) - expected).abs().max() < 1e-5


# ---------------------------------------------------------------- torch.compile
def test_compile(model):
    """The whole model in one graph, as the original; accelerating afterwards is noticed."""
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    expected = outputs(compiled)
    m2f_kernels.accelerate(compiled)
    assert len(accelerated_modules(model)) == 8
    after = outputs(compiled)
    assert torch.equal(after, outputs(model))
    assert not torch.equal(after, expected), "the old graph still runs"
    m2f_kernels.restore(compiled)
    assert torch.equal(outputs(compiled), expected)


@pytest.mark.slow
@pytest.mark.parametrize("family", [f for f in FAMILIES.values() if f.installed], ids=lambda family: family.name)
def test_compile_every_family(family):
    if family.name == "omdet_turbo":
        pytest.skip("the original does not compile into one graph: sizes depend on data")
    model = family.make()
    m2f_kernels.accelerate(model)
    torch._dynamo.reset()
    expected = outputs(model, family)
    assert torch.equal(outputs(torch.compile(model, fullgraph=True, backend="eager"), family), expected)


# ---------------------------------------------------------------- patch and unpatch
def test_patch(model, patched):
    assert sum("eformableAttention" in entry.name for entry in patched.replaced) == len(patched.replaced) == 4
    expected = outputs(model)
    assert not accelerated_modules(model), "a model that existed before has changed"
    new = FAMILY.make()
    assert len(accelerated_modules(new)) == 8
    assert (outputs(new) - expected).abs().max() < 1e-5
    assert not patch("rt_detr").replaced
    assert len(patch("rt_detr").already_accelerated) == 2
    for how in COPIES.values():
        assert len(accelerated_modules(how(new))) == 8
    assert len(m2f_kernels.accelerate(new).report.already_accelerated) == 8
    assert len(m2f_kernels.accelerate(model).report.replaced) == 8
    m2f_kernels.restore(new)
    assert not accelerated_modules(new)
    unpatch()
    assert not accelerated_modules(FAMILY.make())
    assert torch.equal(outputs(FAMILY.make()), expected)


def test_patch_checks_what_is_made(patched):
    """A patched class makes modules that `accelerate` would leave alone as published; they count as its instances."""
    family = FAMILIES["rt_detr"]
    name = "RTDetrMultiscaleDeformableAttention"
    attention = getattr(modeling("rt_detr"), name)
    levels = dict.fromkeys(("n_levels", "num_feature_levels"), 17)
    config = family.config(lambda name: getattr(transformers, name))
    vars(config).update(levels)
    made = attention(config, num_heads=2, n_points=1)
    assert type(made).__name__ == name
    assert made not in accelerated_modules(made)
    assert isinstance(made, attention)
    assert "17 levels" in m2f_kernels.accelerate(nn.ModuleList([made, family.make()])).report.skipped[0].text


def test_patch_initialises_alike(patched):
    """The original sets the offsets' biases by the class of the module."""
    config = FAMILY.config(lambda name: getattr(transformers, name))
    torch.manual_seed(1)
    patched_model = transformers.DeformableDetrForObjectDetection(config)
    unpatch()
    torch.manual_seed(1)
    original = transformers.DeformableDetrForObjectDetection(config)
    for (name, first), (_, second) in zip(patched_model.named_parameters(), original.named_parameters(), strict=True):
        assert torch.equal(first, second), name
    assert original.model.encoder.layers[0].self_attn.sampling_offsets.bias.any()


def test_patch_everything():
    try:
        report = patch()
        families = {entry.name.split(".")[2] for entry in report.replaced}
        others = {
            name
            for name in ("eomt", "eomt_dinov3", "videomt", "sam3", "sam3_lite_text")
            if _imports(f"transformers.models.{name}.modeling_{name}")
        }
        assert families == {name for name, family in FAMILIES.items() if family.installed} | others
    finally:
        unpatch()
    assert not any(_swap.qualified_name(cls) for cls, _ in _swap.patched_classes() if _named(cls))


def _imports(name):
    """False also where the module needs a package that is not there, as SAM-3 in transformers 5.0 torchvision."""
    try:
        return importlib.import_module(name) is not None
    except ModuleNotFoundError:
        return False


def test_a_family_that_needs_a_missing_package(monkeypatch):
    """It stops nobody who did not ask for it."""
    original = _swap.import_module

    def without_torchvision(name, *args):
        if name.startswith("transformers.models.deformable_detr"):
            raise ModuleNotFoundError("No module named 'torchvision'", name="torchvision")
        return original(name, *args)

    monkeypatch.setattr(_swap, "import_module", without_torchvision)
    try:
        families = {entry.name.split(".")[2] for entry in patch().replaced}
    finally:
        unpatch()
    assert "mask2former" in families
    assert "deformable_detr" not in families
    with pytest.raises(ModuleNotFoundError, match="torchvision"):
        patch("deformable_detr")


def _named(cls):
    """True if a module of transformers has this very class."""
    return any(
        vars(module).get(cls.__name__) is cls
        for name, module in list(sys.modules.items())
        if name.startswith("transformers.") and module is not None
    )


def test_unknown_family():
    with pytest.raises(ValueError, match=r"^families: expected some of d_fine, .*; got swin"):
        patch("swin", "rt_detr")
    assert not accelerated_modules(FAMILY.make())


# ---------------------------------------------------------------- what is left alone
def attention_class():
    return modeling("deformable_detr").DeformableDetrMultiscaleDeformableAttention


def test_a_subclass_that_overrides_forward(model):
    class Own(attention_class()):
        def forward(self, *args, **kwargs):
            output, weights = super().forward(*args, **kwargs)
            return 2 * output, weights

    model.model.encoder.layers[0].self_attn.__class__ = Own
    expected = outputs(model)
    report = m2f_kernels.accelerate(model).report
    (left,) = report.skipped
    assert left.name == "model.encoder.layers.0.self_attn"
    assert "Own overrides forward" in left.text
    assert type(model.model.encoder.layers[0].self_attn) is Own
    assert len(report.replaced) == 7
    assert (outputs(model) - expected).abs().max() < 1e-5


def test_a_subclass_that_does_not(model):
    class Own(attention_class()):
        def extra_repr(self):
            return "mine"

    attention = model.model.encoder.layers[0].self_attn
    attention.__class__ = Own
    expected = outputs(model)
    assert len(m2f_kernels.accelerate(model).report.replaced) == 8
    assert isinstance(attention, Own)
    assert "AcceleratedOwn" in repr(attention)
    assert len(m2f_kernels.accelerate(model).report.already_accelerated) == 8
    assert (outputs(copy.deepcopy(model)) - expected).abs().max() < 1e-5
    with pytest.raises(pickle.PicklingError, match="Own"):
        pickle.dumps(model)  # as without acceleration: a class inside a function has no name
    m2f_kernels.restore(model)
    assert type(attention) is Own


def test_a_subclass_of_an_accelerated_class(patched, model):
    """Written while the class is patched: it inherits the fast forward, or overrides it."""

    class Inherits(attention_class()):
        pass

    class Overrides(attention_class()):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    expected = outputs(model)
    first, second = (model.model.encoder.layers[i].self_attn for i in (0, 1))
    first.__class__, second.__class__ = Inherits, Overrides
    assert (outputs(model) - expected).abs().max() < 1e-5
    report = m2f_kernels.accelerate(model).report
    assert "model.encoder.layers.0.self_attn" in [entry.name for entry in report.already_accelerated]
    assert [entry.name for entry in report.skipped] == ["model.encoder.layers.1.self_attn"]
    assert (outputs(model) - expected).abs().max() < 1e-5
    with pytest.warns(UserWarning, match="Inherits.*Overrides"):
        m2f_kernels.restore(model)
    assert len(accelerated_modules(model)) == 2


def test_a_forward_of_the_instance(model):
    """Device maps and the like replace `forward` on instances; they would go on calling the old one."""
    attention = model.model.encoder.layers[0].self_attn
    attention.forward = attention.forward
    (left,) = m2f_kernels.accelerate(model).report.skipped
    assert "this instance has its own forward" in left.text


def test_a_core_of_somebody_else(model):
    class Core(nn.Module):
        def forward(self, value, *args):
            return value.flatten(2)[:, : args[3].shape[1]]

    model.model.decoder.layers[1].encoder_attn.attn = Core()
    kernel = model.model.decoder.layers[0].encoder_attn.attn
    kernel.forward = lambda value, *args: value.flatten(2)[:, : args[3].shape[1]]
    expected = outputs(model)
    report = m2f_kernels.accelerate(model).report
    reasons = {entry.name: entry.text for entry in report.skipped}
    assert "Core, unknown to m2f_kernels" in reasons["model.decoder.layers.1.encoder_attn"]
    assert "its core is left alone" in reasons["model.decoder.layers.0.encoder_attn"]
    assert (outputs(model) - expected).abs().max() < 1e-5


def test_a_forward_with_unknown_arguments(model, monkeypatch):
    """A later version may take more than this package knows."""
    cls = attention_class()
    original = cls.forward

    def forward(self, hidden_states, temperature=1.0, **kwargs):
        return original(self, hidden_states, **kwargs)

    monkeypatch.setattr(cls, "forward", forward)
    report = m2f_kernels.accelerate(model).report
    assert len(report.skipped) == 4
    assert all("takes temperature, unknown" in entry.text for entry in report.skipped)


WITHOUT_LIBRARY = """
import json, pickle, sys, warnings
import torch
torch.set_num_threads(1)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    with open(sys.argv[1], "rb") as file:
        model, inputs = pickle.load(file)
    import m2f_kernels
    with torch.no_grad():
        found = [model(**inputs).logits for _ in range(2)]
print(json.dumps({
    "where": m2f_kernels.__file__,
    "logits": found[-1].tolist(),
    "accelerated": len(m2f_kernels.accelerate(model).report.already_accelerated),
    "warnings": [str(w.message) for w in caught if "m2f_kernels" in str(w.message)],
}))
"""


def test_an_accelerated_model_where_the_library_is_missing(model, tmp_path):
    """Unpickled where nothing was compiled: plain PyTorch, with one warning for each operator."""
    package = Path(m2f_kernels.__file__).parent
    shutil.copytree(package, tmp_path / "m2f_kernels", ignore=shutil.ignore_patterns("lib", "__pycache__"))
    m2f_kernels.accelerate(model)
    (tmp_path / "model.pickle").write_bytes(pickle.dumps((model, FAMILY.inputs())))
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_LIBRARY, str(tmp_path / "model.pickle")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert Path(answer["where"]).is_relative_to(tmp_path)
    assert answer["accelerated"] == 8
    named = sorted(warning.split(" runs on plain PyTorch on 'cpu'")[0] for warning in answer["warnings"])
    assert named == ["m2f_kernels.ms_deform_attn", "m2f_kernels.ms_deform_attn_from_offsets"]
    with torch.no_grad():
        logits = model(**FAMILY.inputs()).logits
    assert (torch.tensor(answer["logits"]) - logits).abs().max() < 1e-4


# ---------------------------------------------------------------- bad input
@pytest.mark.parametrize("call", [m2f_kernels.accelerate, m2f_kernels.restore])
@pytest.mark.parametrize("model", [None, "facebook/mask2former", torch.zeros(1), nn.Linear])
def test_no_module(call, model):
    with pytest.raises(TypeError, match=r"^model: expected a torch.nn.Module; got"):
        call(model)


def test_nothing_known():
    with pytest.raises(
        ValueError, match=r"^model: expected a model of transformers .* Sequential has no module that .*rt_detr_v2"
    ):
        m2f_kernels.accelerate(nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize("version", ["4.56.2", "3.5.1", "6.0.0", "6.0.0.dev0", "nonsense"])
def test_unsupported_version(model, version, monkeypatch):
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)  # it may have been imported twice
    for call in (lambda: m2f_kernels.accelerate(model), patch):
        with pytest.raises(
            ImportError, match=rf"^transformers: expected a version from 4.57 to below 6.0; {version} is"
        ):
            call()
    assert not accelerated_modules(model)


@pytest.mark.parametrize("version", ["4.57.0", "4.57.6", "5.0.0rc1", "5.99.0"])
def test_supported_version(model, version, monkeypatch):
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)  # it may have been imported twice
    assert m2f_kernels.accelerate(model).report.replaced


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        ImportError, match=r"^transformers: expected a version from 4.57 to below 6.0; none can be imported"
    ):
        m2f_kernels.accelerate(nn.Linear(2, 2))


def test_models_made_before_patch_stay_instances():
    from transformers.models.rt_detr import modeling_rt_detr

    family = FAMILIES["rt_detr"]
    name = "RTDetrMultiscaleDeformableAttention"
    before = [x for x in family.make().modules() if type(x).__name__ == name]
    patch("rt_detr")
    try:
        patched = getattr(modeling_rt_detr, name)
        after = [x for x in family.make().modules() if type(x).__name__ == name]
        assert type(after[0]) is patched is not type(before[0])
        assert all(isinstance(x, patched) for x in (*before, *after))
        assert not isinstance(torch.nn.Linear(1, 1), patched)

        class Derived(patched):
            pass

        assert not isinstance(before[0], Derived)
    finally:
        unpatch()
