"""Mask2Former of `transformers` before and after: what it returns, its loss and gradients, and what it never makes."""

import copy
import pickle
import warnings
from functools import partial

import pytest
import torch
import transformers
from torch.utils.checkpoint import checkpoint

import m2f_kernels
from m2f_kernels.integrations.transformers import mask2former, patch, unpatch
from m2f_kernels.integrations.transformers.mask_classification import _num_masks
from m2f_kernels.integrations.transformers.pixel_decoder import clamp_overflow
from m2f_kernels.nn import HungarianMatcher
from tests.integrations.published import (
    OPERATORS,
    OUTPUT,
    Sizes,
    assert_compact_targets_serve,
    assert_same,
    assert_same_gradients,
    compile_whole,
    operators,
    targets,
    train,
)
from tests.model import peers
from tests.model.peers import photograph, published

SIZE = (96, 128)
CONFIGS = {
    **peers.CONFIGS,
    "pre_norm": ("swin", {"pre_norm": True, "num_queries": 9}),
    "one_layer": ("resnet", {"decoder_layers": 2, "activation_function": "gelu"}),
    "no_layer": ("resnet", {"decoder_layers": 1}),
}


def make(name="swin", **changes):
    backbone, own = CONFIGS[name]
    with pytest.MonkeyPatch.context() as patcher:
        patcher.setitem(peers.CONFIGS, name, (backbone, {**own, **changes}))
        return peers.their_model(name)


def both(name="swin", **changes):
    """The same model, as it is and accelerated."""
    model = make(name, **changes)
    accelerated, report = m2f_kernels.accelerate(copy.deepcopy(model))
    assert not report.skipped
    return model, accelerated


@pytest.fixture(scope="module")
def pixels():
    return torch.cat([photograph("astronaut", *SIZE), photograph("coffee", *SIZE)])


@pytest.fixture
def fixed_points(monkeypatch):
    peers.fix_points(monkeypatch.setattr)


# ---------------------------------------------------------------- outputs
FLAGS = {
    "plain": {},
    "auxiliary": {"output_auxiliary_logits": True},
    "hidden": {"output_hidden_states": True},
    "attentions": {"output_attentions": True},
    "everything": {"output_auxiliary_logits": True, "output_hidden_states": True, "output_attentions": True},
    "tuple": {"return_dict": False, "output_hidden_states": True},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_outputs(name, pixels):
    model, accelerated = both(name)
    flags = {"output_auxiliary_logits": True, "output_hidden_states": True}
    with torch.no_grad():
        assert_same(model(pixels, **flags), accelerated(pixels, **flags))


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_output_contract(flags, pixels):
    model, accelerated = both()
    with torch.no_grad():
        before, after = model(pixels, **flags), accelerated(pixels, **flags)
    assert type(before) is type(after)
    assert_same(before, after)
    for name, value in flags.items():
        setattr(model.config, name, value)
        setattr(accelerated.config, name, value)
    with torch.no_grad():
        assert_same(model(pixels), accelerated(pixels))


def test_this_test_can_fail(pixels, monkeypatch):
    """A wrong result of an operator reaches the outputs."""
    model, accelerated = both()
    for name in ("attention_mask_levels", "predict_attention_mask"):
        operator = getattr(mask2former, name)

        def wrong(*args, operator=operator):
            found = operator(*args)
            if isinstance(found, m2f_kernels.PackedMask):
                return found._replace(bits=found.bits ^ 5)
            return [x.flip(-1) for x in found[0]], found[1]

        with monkeypatch.context() as patcher, torch.no_grad():
            patcher.setattr(mask2former, name, wrong)
            with pytest.raises(AssertionError):
                assert_same(model(pixels), accelerated(pixels), 10 * OUTPUT)


def test_parts_return_logits_of_every_layer(pixels):
    """Whoever calls less than the whole gets tensors, as before."""
    model, accelerated = both()
    with torch.no_grad():
        before = model.model(pixels, output_hidden_states=True)
        assert_same(before, accelerated.model(pixels, output_hidden_states=True))
        given = (before.pixel_decoder_hidden_states, before.pixel_decoder_last_hidden_state)
        assert_same(model.model.transformer_module(*given), accelerated.model.transformer_module(*given))
        assert_same(tuple(model.model(pixels, return_dict=False)), accelerated.model(pixels, return_dict=False))


def test_copies_pickles_and_takes_back(pixels):
    model, accelerated = both("resnet")  # Swin in transformers has hooks that cannot be pickled
    others = copy.deepcopy(accelerated), pickle.loads(pickle.dumps(accelerated))
    with torch.no_grad():
        expected = accelerated(pixels).masks_queries_logits
        for other in others:
            assert torch.equal(other(pixels).masks_queries_logits, expected)
        assert list(accelerated.state_dict()) == list(model.state_dict())
        restored = m2f_kernels.restore(accelerated)
        assert torch.equal(restored(pixels).masks_queries_logits, model(pixels).masks_queries_logits)


def test_patched_classes(pixels):
    model = make()
    report = patch("mask2former")
    try:
        patched = published.Mask2FormerForUniversalSegmentation(model.config).eval()
    finally:
        unpatch()
    assert len(report.replaced) == len(mask2former.REPLACEMENTS) + 1
    patched.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert_same(model(pixels), patched(pixels))
    assert type(make()) is transformers.Mask2FormerForUniversalSegmentation


# ---------------------------------------------------------------- what never exists
def test_no_logits_of_intermediate_layers(pixels, generator):
    model, accelerated = both(num_queries=13)
    n, q = 2, model.config.num_queries
    logits = n * q * (SIZE[0] // 4) * (SIZE[1] // 4)
    keys = n * model.config.num_attention_heads * q * (SIZE[0] // 16) * (SIZE[1] // 16)
    labels = targets((3, 2), [SIZE] * 2, generator)

    def count(module, elements, **inputs):
        with torch.set_grad_enabled(bool(inputs)), Sizes(elements) as sizes:
            output = module(pixels, **inputs)
            if inputs:
                output.loss.backward()
        return sizes.count

    assert count(model, logits) > 8
    assert count(accelerated, logits) == 1, "the returned ones alone"
    assert count(model, keys) > 8
    assert count(accelerated, keys) == 0, "neither scores nor masks per head"
    assert count(model.train(), logits, **labels) > 16
    assert count(accelerated.train(), logits, **labels) == 1, "nor a gradient of that size"
    with torch.no_grad(), Sizes(logits) as sizes:
        accelerated.eval()(pixels, output_auxiliary_logits=True)
    assert sizes.count == 8, "one product for each output"


def test_projections_and_resizing_happen_once_per_level(pixels, monkeypatch):
    _, accelerated = both()
    calls = {"attention_mask_levels": 0, "project_keys_values": 0}

    def counted(name, function):
        def call(*args):
            calls[name] += 1
            return function(*args)

        return call

    from m2f_kernels.integrations.transformers import mask_classification

    for module, name in ((mask2former, "attention_mask_levels"), (mask_classification, "project_keys_values")):
        monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
    with torch.no_grad():
        accelerated(pixels)
    assert calls == {"attention_mask_levels": 1, "project_keys_values": 3}


# ---------------------------------------------------------------- loss and gradients
CASES = {
    "targets": ((3, 2), [SIZE] * 2),
    "an image without targets": ((3, 0), [SIZE] * 2),
    "no targets": ((0, 0), [SIZE] * 2),
    "more targets than queries": ((13, 1), [SIZE] * 2),
    "targets of different sizes": ((2, 3), [SIZE, (60, 140)]),
}


@pytest.mark.usefixtures("fixed_points")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("name", ["resnet", "pre_norm"])
def test_loss_and_gradients(name, case, pixels, generator):
    model, accelerated = both(name)
    labels = targets(*case, generator)
    before, gradients = train(model, pixel_values=pixels, **labels)
    after, found = train(accelerated, pixel_values=pixels, **labels)
    assert_same(before, after)
    assert_same_gradients(gradients, found)


@pytest.mark.usefixtures("fixed_points")
@pytest.mark.parametrize(("form", "known"), [("maps", True), ("maps", False), ("runs", True), ("COCO", False)])
def test_compact_targets(form, known, pixels, generator):
    """Of different sizes, which are padded for the loss; also where the original's criterion serves."""
    _, accelerated = both("pre_norm")
    if not known:
        m2f_kernels.restore(accelerated.criterion)
    assert_compact_targets_serve(accelerated, form, [SIZE, (60, 140)], generator, pixel_values=pixels)


@pytest.mark.usefixtures("fixed_points")
@pytest.mark.parametrize("name", ["swin", "bottleneck", "pre_norm"])
def test_loss_and_gradients_in_float64(name, pixels, generator, monkeypatch):
    """Without rounding that decides about bits and kinks: the same function."""
    sample = published.sample_point
    monkeypatch.setattr(published, "sample_point", lambda x, p, **kw: sample(x, p.to(x.dtype), **kw))
    model, accelerated = (x.double() for x in both(name))
    labels = targets((3, 2), [SIZE] * 2, generator, dtype=torch.float64)
    before, gradients = train(model, pixel_values=pixels.double(), **labels)
    after, found = train(accelerated, pixel_values=pixels.double(), **labels)
    # The criterion takes class logits in float32.
    assert_same(before.loss, after.loss, 1e-6)
    for name in ("masks_queries_logits", "class_queries_logits", "transformer_decoder_last_hidden_state"):
        assert_same(before[name], after[name], 1e-10)
    assert_same_gradients(gradients, found, 1e-5)


@pytest.mark.usefixtures("fixed_points")
def test_names_and_values_of_each_loss(pixels, generator):
    """The criterion by itself, from factored masks and from logits."""
    model, accelerated = both()
    n, q, classes = 2, 11, 6
    masks = [m2f_kernels.FactoredMasks(torch.randn(n, q, 8), torch.randn(n, 8, 24, 32)) for _ in range(3)]
    logits = [torch.randn(n, q, classes) for _ in range(3)]
    labels = targets((3, 2), [SIZE] * 2, generator)

    def losses(criterion, masks):
        pairs = [{"masks_queries_logits": m, "class_queries_logits": c} for m, c in zip(masks, logits, strict=True)]
        return criterion(*pairs[-1].values(), **labels, auxiliary_predictions=pairs[:-1])

    expected = losses(model.criterion, [m.logits() for m in masks])
    assert len(expected) == 9
    assert_same(expected, losses(accelerated.criterion, masks))
    assert_same(expected, losses(accelerated.criterion, [m.logits() for m in masks]))
    weighted = accelerated.get_loss_dict(masks[-1], logits[-1], *labels.values(), None)
    assert_same(model.get_loss_dict(masks[-1].logits(), logits[-1], *labels.values(), None), weighted)


def test_points_are_drawn_as_published(pixels, generator, monkeypatch):
    """New ones for the matching of every output and image, and for the loss of every mask."""
    model, accelerated = both("resnet")
    labels = targets((3, 2), [SIZE] * 2, generator)
    drawn = []
    points = HungarianMatcher._points
    monkeypatch.setattr(HungarianMatcher, "_points", lambda *a: drawn.append(points(*a)) or drawn[-1])
    torch.manual_seed(0)
    losses = [accelerated(pixels, **labels).loss for _ in range(2)]
    assert len(drawn) == 2 * 5 * 2
    assert all(x.shape == (model.config.train_num_points, 2) for x in drawn)
    assert not any(torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])
    assert losses[0] != losses[1]
    # Their spread is that of the original's.
    with torch.no_grad():
        spread = [[x(pixels, **labels).loss.item() for _ in range(12)] for x in (model, accelerated)]
    (mean, other), deviation = (torch.tensor(spread).mean(1), torch.tensor(spread).std(1))
    assert (mean - other).abs() < 4 * deviation.max() / 12**0.5
    assert 0.25 < deviation[1] / deviation[0] < 4


@pytest.mark.usefixtures("fixed_points")
def test_masks_are_counted_as_accelerate_does(pixels, generator, monkeypatch):
    """Over all processes, where `accelerate` runs some; not where torch.distributed alone does."""

    class State:
        _shared_state = {"initialised": True}  # noqa: RUF012
        num_processes = 2

    monkeypatch.setattr(published, "is_accelerate_available", lambda: True)
    monkeypatch.setattr(published, "PartialState", State, raising=False)
    monkeypatch.setattr(published, "reduce", lambda x: x * 6, raising=False)
    model, accelerated = both("resnet")
    labels = targets((3, 2), [SIZE] * 2, generator)
    with torch.no_grad():
        before = model(pixels, **labels).loss
        assert_same(before, accelerated(pixels, **labels).loss)
        monkeypatch.setattr(published, "reduce", lambda x: x * 2)
        assert accelerated(pixels, **labels).loss > 1.5 * before


@pytest.mark.parametrize(("processes", "device"), [(1, "cpu"), (2, "meta")])
def test_masks_of_several_processes_are_counted_on_the_labels_device(processes, device, monkeypatch):
    """A derived criterion may sum over processes with a backend that takes a GPU's tensors only."""
    given = []

    class Derived:
        def get_num_masks(self, class_labels, device):
            given.append(device.type)
            return torch.as_tensor(len(class_labels[0]), dtype=torch.float32, device=device)

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: processes)
    assert _num_masks(Derived(), [torch.zeros(3, device="meta")]).device.type == "meta"
    assert given == [device]


# ---------------------------------------------------------------- dtypes
@pytest.mark.usefixtures("fixed_points")
def test_bfloat16_with_labels(pixels, generator):
    """The original raises; accelerated, the loss is near the one in float32, and gradients are finite."""
    model, accelerated = both("resnet")
    labels = targets((3, 2), [SIZE] * 2, generator)
    truth, _ = train(model, pixel_values=pixels, **labels)
    low = {**labels, "pixel_values": pixels.bfloat16()}
    with pytest.raises(RuntimeError):
        train(copy.deepcopy(model).bfloat16(), **low)
    outputs, gradients = train(accelerated.bfloat16(), **low)
    assert outputs.masks_queries_logits.dtype == torch.bfloat16
    assert (outputs.loss - truth.loss).abs() < 0.1 * truth.loss
    assert all(g.isfinite().all() and g.dtype == torch.bfloat16 for g in gradients.values() if g is not None)


@pytest.mark.usefixtures("fixed_points")
def test_masks_may_be_bool(pixels, generator):
    _, accelerated = both("resnet")
    labels = targets((3, 2), [SIZE] * 2, generator)
    with torch.no_grad():
        loss = accelerated(pixels, **labels).loss
        labels["mask_labels"] = [x.bool() for x in labels["mask_labels"]]
        assert accelerated(pixels, **labels).loss == loss


def test_low_precision_and_autocast(pixels):
    """As near to float32 as the original is."""
    model, accelerated = both("resnet")
    with torch.no_grad():
        truth = model(pixels).class_queries_logits
        for autocast in (False, True):
            errors = []
            for x in (model, accelerated):
                x = copy.deepcopy(x) if autocast else copy.deepcopy(x).bfloat16()
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    found = x(pixels if autocast else pixels.bfloat16()).class_queries_logits
                errors.append((found.float() - truth).norm() / truth.norm())
            assert errors[1] < 2 * errors[0]


# ---------------------------------------------------------------- training modes, compilation
@pytest.mark.usefixtures("fixed_points")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant, pixels, generator):
    model, accelerated = both("resnet")
    labels = targets((3, 2), [SIZE] * 2, generator)
    before, gradients = train(model, pixel_values=pixels, **labels)
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        return checkpoint(*args, use_reentrant=reentrant, **kwargs)

    for layer in accelerated.model.transformer_module.decoder.layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(counted)
    after, found = train(accelerated, pixel_values=pixels, **labels)
    assert len(calls) == 4
    assert_same(before.loss, after.loss)
    assert_same_gradients(gradients, found)


def test_compiled(pixels):
    _, accelerated = both("one_layer", encoder_layers=1)
    flags, seen = {"output_auxiliary_logits": True}, set()
    with torch.no_grad():
        expected = accelerated(pixels, **flags)
        assert_same(expected, compile_whole(accelerated, seen)(pixels, **flags))
    assert seen == OPERATORS


def test_exported(pixels):
    _, accelerated = both("one_layer", encoder_layers=1)
    program = torch.export.export(accelerated, (pixels,))
    assert operators(program.graph) == OPERATORS
    with torch.no_grad():
        assert_same(accelerated(pixels).masks_queries_logits, program.module()(pixels).masks_queries_logits)


# ---------------------------------------------------------------- what takes the original's way
@pytest.mark.usefixtures("fixed_points")
@pytest.mark.parametrize("only", ["everything", "activations"])
def test_dropout_in_training(only, pixels, generator):
    """Dropped attention weights are the original's; layers are then skipped at random too, which fails in it, so the
    decoder's layers get the dropout alone."""
    model, accelerated = both("resnet")
    labels = targets((3, 2), [SIZE] * 2, generator)
    for x in (model, accelerated):
        for layer in x.model.transformer_module.decoder.layers:
            layer.dropout = layer.activation_dropout = 0.1
            if only == "everything":
                layer.cross_attn.dropout = layer.self_attn.dropout = 0.1
    before, gradients = train(model, pixel_values=pixels, **labels)
    with pytest.warns(RuntimeWarning, match="attention weights or activations are dropped out"):
        after, found = train(accelerated, pixel_values=pixels, **labels)
    assert_same(before, after)
    assert_same_gradients(gradients, found)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(model(pixels), accelerated(pixels))
    accelerated.model.transformer_module.decoder.layerdrop = 1.0
    with pytest.warns(RuntimeWarning, match="skips layers at random"):
        train(accelerated, pixel_values=pixels, **labels)


class Wrapped(torch.nn.Module):
    """Stands around a module, as adapters do."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, *args, **kwargs):
        found = self.base(*args, **kwargs)
        return (found[0] * 1.5, *found[1:]) if isinstance(found, tuple) else found * 1.5


def test_wrapped_projections(pixels):
    """Adapters around linear layers are called."""
    model = make("resnet")
    layer = model.model.transformer_module.decoder.layers[1]
    layer.self_attn.q_proj, layer.fc1 = Wrapped(layer.self_attn.q_proj), Wrapped(layer.fc1)
    encoder = model.model.pixel_level_module.decoder.encoder.layers[0]
    encoder.fc1, encoder.self_attn.value_proj = Wrapped(encoder.fc1), Wrapped(encoder.self_attn.value_proj)
    accelerated, report = m2f_kernels.accelerate(copy.deepcopy(model))
    assert not report.skipped
    with torch.no_grad():
        assert_same(model(pixels), accelerated(pixels))


@pytest.mark.parametrize("names", [["q_proj", "fc1", "value_proj"], ["out_proj"], ["cross_attn"]], ids="+".join)
def test_lora(names, pixels):
    """The real thing; around the attention as a whole it leaves the layers alone."""
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    torch.manual_seed(3)
    config = peft.LoraConfig(target_modules=names, init_lora_weights=False, r=4)
    model = peft.inject_adapter_in_model(config, make("resnet")).eval()
    accelerated, report = m2f_kernels.accelerate(copy.deepcopy(model))
    assert bool(report.skipped) == (names == ["cross_attn"])
    with torch.no_grad():
        assert_same(model(pixels), accelerated(pixels))


def test_sharded_projections(pixels):
    """A shard of a parameter (FSDP2's have `to_local`) is put together by the module's own call."""
    model, accelerated = both("resnet")
    weight = accelerated.model.transformer_module.decoder.layers[1].cross_attn.in_proj_weight
    weight.to_local = None
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="projections are sharded"):
        assert_same(model(pixels), accelerated(pixels))


def test_wrapped_attention(pixels):
    """An adapter around the attention itself leaves layer and decoder alone; what is wrapped later warns."""
    model = make("resnet")
    layer = model.model.transformer_module.decoder.layers[1]
    layer.cross_attn = Wrapped(layer.cross_attn)
    accelerated, report = m2f_kernels.accelerate(copy.deepcopy(model))
    reasons = {entry.cls: entry.text for entry in report.skipped}
    assert (
        "attention is tests.integrations.test_mask2former.Wrapped" in reasons["Mask2FormerMaskedAttentionDecoderLayer"]
    )
    assert "its layer is left alone" in reasons["Mask2FormerMaskedAttentionDecoder"]
    with torch.no_grad():
        assert_same(model(pixels, output_hidden_states=True), accelerated(pixels, output_hidden_states=True))

    model, accelerated = both("resnet")
    for x in (model, accelerated):
        layer = x.model.transformer_module.decoder.layers[1]
        layer.cross_attn = Wrapped(layer.cross_attn)
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="runs as in transformers: its attention is"):
        assert_same(model(pixels), accelerated(pixels))


def test_hooks_are_served(pixels):
    model, accelerated = both("resnet")
    seen = []
    for x in (model, accelerated):
        layer = x.model.transformer_module.decoder.layers[0]
        layer.cross_attn.register_forward_hook(lambda *_: seen.append(1))
        x.model.pixel_level_module.decoder.encoder.layers[0].fc1.register_forward_hook(
            lambda module, args, out: seen.append(out)
        )
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        assert_same(model(pixels), accelerated(pixels))
    before, after = (x for x in seen if isinstance(x, torch.Tensor))
    assert_same(before, after.view(before.shape))
    assert len(seen) == 4


def test_subclasses_are_left_alone(pixels, generator):
    """Those that override what the fused path would not call, or would call with factored masks."""

    class OwnLoss(transformers.Mask2FormerForUniversalSegmentation):
        def get_loss_dict(self, **kwargs):
            return {"loss_mask": kwargs["masks_queries_logits"].mean()}

    model = OwnLoss(make("resnet").config).eval()
    accelerated, report = m2f_kernels.accelerate(copy.deepcopy(model))
    reasons = {entry.cls: entry.text for entry in report.skipped}
    assert "overrides get_loss_dict" in reasons["OwnLoss"]
    labels = targets((3, 2), [SIZE] * 2, generator)
    with torch.no_grad():
        assert_same(model(pixels, **labels), accelerated(pixels, **labels))


@pytest.mark.usefixtures("fixed_points")
def test_another_criterion_gets_logits(pixels, generator):
    model, accelerated = both("resnet")
    accelerated.criterion = copy.deepcopy(model.criterion)
    labels = targets((3, 2), [SIZE] * 2, generator)
    with torch.no_grad():
        assert_same(model(pixels, **labels), accelerated(pixels, **labels))


@pytest.mark.usefixtures("fixed_points")
def test_another_matcher_gets_logits(pixels, generator):
    """One that was put there after acceleration."""
    model, accelerated = both("resnet")

    class Fixed(torch.nn.Module):
        def forward(self, masks, *_):
            assert isinstance(masks, torch.Tensor)
            return [(torch.tensor([0, 1]), torch.tensor([1, 0]))] * 2

    labels = targets((2, 2), [SIZE] * 2, generator)
    losses = []
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        for x in (model, accelerated):
            x.criterion.matcher = Fixed()
            torch.manual_seed(1)
            losses.append(x(pixels, **labels).loss)
    assert_same(*losses)
    assert any("its matcher is" in str(x.message) for x in caught)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("value", [1.0, float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_overflow_is_clamped_without_asking_the_host(dtype, value, in_place):
    """Values and gradients as the original's, which asks whether all are finite."""
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[1, 2], x[2, 0] = value, torch.finfo(dtype).max
    grad = torch.randn(3, 4).to(dtype)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    given = leaves[0] * 1
    found = clamp_overflow(given, in_place)
    expected = leaves[1] * 1
    if not torch.isfinite(expected).all():
        limit = torch.finfo(dtype).max - 1000
        expected = expected.clamp(-limit, limit)
    assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))
    found.backward(grad)
    expected.backward(grad)
    finite = x.abs() < torch.finfo(dtype).max
    assert torch.equal(leaves[0].grad[finite], leaves[1].grad[finite])
