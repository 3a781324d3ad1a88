"""OneFormer of `transformers` before and after: what it returns, its loss and gradients, and masks on demand."""

import copy
import inspect
import json
import pickle
import warnings

import pytest
import torch
import transformers
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint
from transformers.models.oneformer import modeling_oneformer as published

import m2f_kernels
from m2f_kernels.integrations.transformers import oneformer
from m2f_kernels.integrations.transformers.oneformer import AuxiliaryPrediction
from tests.integrations.published import (
    BEFORE_LISTS_OF_SIZES,
    OPERATORS,
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
from tests.model.peers import BACKBONES, STAGES, photograph
from tests.watching import Operators

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
SIZE = (96, 128)
TASK, QUERIES = 7, 13
SMALL = {
    "conv_dim": 64, "mask_dim": 64, "hidden_dim": 64, "num_attention_heads": 4, "encoder_feedforward_dim": 96,
    "dim_feedforward": 128, "encoder_layers": 2, "decoder_layers": 6, "query_dec_layers": 2, "num_queries": QUERIES,
    "num_labels": 5, "train_num_points": 400, "text_encoder_width": 64, "text_encoder_num_layers": 1,
    "text_encoder_vocab_size": 99, "text_encoder_context_length": TASK, "text_encoder_n_ctx": 4,
    "task_seq_len": TASK, "dropout": 0.0,
}  # fmt: skip
CONFIGS = {
    "default": {},
    "pre_norm": {"pre_norm": True, "decoder_layers": 3},
    "no_task_norm": {"use_task_norm": False, "enforce_input_proj": True, "num_attention_heads": 2},
    "no_auxiliary_loss": {"use_auxiliary_loss": False, "decoder_layers": 2, "query_dec_layers": 1},
}


def make(name="default", **changes):
    torch.manual_seed(0)
    backbone = transformers.AutoConfig.for_model("swin", **BACKBONES["swin"], drop_path_rate=0.0, out_features=STAGES)
    config = transformers.OneFormerConfig(backbone_config=backbone, **{**SMALL, **CONFIGS[name], **changes})
    model = transformers.OneFormerForUniversalSegmentation(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias") or "sampling_offsets" in parameter_name:
                parameter += 0.1 * torch.randn_like(parameter)
            elif "attention_weights" in parameter_name:
                parameter += 0.3 * torch.randn_like(parameter)
    return model


def both(name="default", **changes):
    """The same model, as it is and accelerated."""
    model = make(name, **changes)
    accelerated, report = m2f_kernels.accelerate(copy.deepcopy(model))
    assert {entry.text for entry in report.skipped} <= BEFORE_LISTS_OF_SIZES
    return model, accelerated


@pytest.fixture(scope="module")
def inputs():
    pixels = torch.cat([photograph("astronaut", *SIZE), photograph("coffee", *SIZE)])
    return {"pixel_values": pixels, "task_inputs": torch.rand(2, TASK, generator=torch.Generator().manual_seed(1))}


@pytest.fixture
def texts(generator):
    return {"text_inputs": torch.randint(0, 90, (2, QUERIES - 4, TASK), generator=generator)}


@pytest.fixture
def fixed_points(monkeypatch):
    with monkeypatch.context() as patcher:
        patcher.setattr(peers, "published", published)
        patcher.setattr(published, "Mask2FormerLoss", published.OneFormerLoss, raising=False)
        peers.fix_points(patcher.setattr)
        yield


# ---------------------------------------------------------------- outputs
FLAGS = {
    "plain": {},
    "no auxiliary": {"output_auxiliary_logits": False},
    "hidden": {"output_hidden_states": True},
    "attentions": {"output_attentions": True},
    "tuple": {"return_dict": False},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_outputs(name, inputs):
    """Every field, the masks of all decoder outputs among them."""
    model, accelerated = both(name)
    with torch.no_grad():
        before, after = model(**inputs), accelerated(**inputs)
    assert type(before) is type(after)
    assert_same(before, after)


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_output_contract(flags, inputs):
    model, accelerated = both()
    with torch.no_grad():
        assert_same(model(**inputs, **flags), accelerated(**inputs, **flags))
        flags = {name: value for name, value in flags.items() if name != "output_auxiliary_logits"}
        assert_same(model.model(**inputs, **flags), accelerated.model(**inputs, **flags))


def test_this_test_can_fail(inputs, monkeypatch):
    model, accelerated = both()
    operator = oneformer.predict_attention_mask
    monkeypatch.setattr(oneformer, "predict_attention_mask", lambda *a: (x := operator(*a))._replace(bits=x.bits ^ 5))
    with torch.no_grad(), pytest.raises(AssertionError):
        assert_same(model(**inputs), accelerated(**inputs), 1e-3)


def test_masks_are_multiplied_when_looked_at(inputs):
    model, accelerated = both()
    logits = 2 * QUERIES * (SIZE[0] // 4) * (SIZE[1] // 4)
    with torch.no_grad(), Sizes(logits) as sizes:
        outputs = accelerated(**inputs)
        assert sizes.count == 1, "the returned ones alone"
        auxiliary = outputs.auxiliary_predictions
        assert isinstance(auxiliary[0], dict)
        assert outputs.transformer_decoder_auxiliary_predictions is auxiliary
        first = auxiliary[0]["masks_queries_logits"]
        assert sizes.count == 2
        assert auxiliary[0]["masks_queries_logits"] is first, "and once"
    with torch.no_grad(), Sizes(logits) as sizes:
        model(**inputs)
    assert sizes.count > 6


LOOKS = {
    "item": lambda x: x["masks_queries_logits"],
    "get": lambda x: x.get("masks_queries_logits"),
    "values": lambda x: list(x.values())[1],
    "items": lambda x: list(x.items())[1][1],
    "dict": lambda x: dict(x)["masks_queries_logits"],
    "unpacked": lambda x: {**x}["masks_queries_logits"],
    "merged": lambda x: ({} | x)["masks_queries_logits"],
    "updated": lambda x: [d := {}, d.update(x)] and d["masks_queries_logits"],
    "copied": lambda x: x.copy()["masks_queries_logits"],
    "shallow": lambda x: copy.copy(x)["masks_queries_logits"],
    "deep": lambda x: copy.deepcopy(x)["masks_queries_logits"],
    "pickled": lambda x: pickle.loads(pickle.dumps(x))["masks_queries_logits"],
    "popped": lambda x: x.pop("masks_queries_logits"),
    "converted": lambda x: type(x)({k: v for k, v in x.items()})["masks_queries_logits"],
    "mapped": lambda x: tree_map(lambda y: y + 0, x)["masks_queries_logits"],
    "keywords": lambda x: (lambda **kw: kw)(**x)["masks_queries_logits"],
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_auxiliary_prediction_is_a_dictionary(look, generator):
    factors = m2f_kernels.FactoredMasks(
        torch.randn(1, 3, 4, generator=generator), torch.randn(1, 4, 5, 6, generator=generator)
    )
    prediction = AuxiliaryPrediction.factored(torch.zeros(1, 3, 2), factors)
    assert list(prediction) == list(prediction.keys()) == ["class_queries_logits", "masks_queries_logits"]
    assert len(prediction) == 2
    assert "masks_queries_logits" in prediction
    assert prediction.get("nothing", 3) == 3
    assert torch.equal(look(prediction), factors.logits())


def test_auxiliary_prediction_shows_its_masks(generator):
    factors = m2f_kernels.FactoredMasks(torch.ones(1, 1, 1), torch.full((1, 1, 1, 1), 7.0))
    assert "7." in repr(AuxiliaryPrediction.factored(torch.zeros(1, 1, 2), factors))
    assert json.dumps({k: v.tolist() for k, v in AuxiliaryPrediction.factored(torch.zeros(1), factors).items()})


# ---------------------------------------------------------------- loss and gradients
NEEDS_TEXT = pytest.mark.skipif(VERSION < (5, 23), reason="OneFormer before transformers 5.23 needs texts")


@pytest.mark.usefixtures("fixed_points")
@pytest.mark.parametrize("counts", [(3, 2), (3, 0), (0, 0)], ids=str)
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        pytest.param("default", {}, marks=NEEDS_TEXT),
        ("pre_norm", {"is_training": True}),
        ("no_task_norm", {"is_training": True, "dropout": 0.1}),
    ],
    ids=["without text", "text", "dropout"],
)
def test_loss_and_gradients(name, changes, counts, inputs, texts, generator):
    """Dropout is that of the pixel decoder and of the layers that make the queries, which is fused all the same: the
    same random numbers."""
    model, accelerated = both(name, **changes)
    given = {**inputs, **texts, **targets(counts, [SIZE] * 2, generator)}
    before, gradients = train(model, **given)
    after, found = train(accelerated, **given)
    assert_same(before, after)
    assert_same_gradients(gradients, found)


@NEEDS_TEXT
@pytest.mark.usefixtures("fixed_points")
def test_loss_and_gradients_in_float64(inputs, generator, monkeypatch):
    """Without rounding that decides about bits and kinks: the same function."""
    sample = published.sample_point
    monkeypatch.setattr(published, "sample_point", lambda x, p, **kw: sample(x, p.to(x.dtype), **kw))
    model, accelerated = (x.double() for x in both())
    given = {**inputs, **targets((3, 2), [SIZE] * 2, generator, dtype=torch.float64)}
    given["pixel_values"] = given["pixel_values"].double()
    before, gradients = train(model, **given)
    after, found = train(accelerated, **given)
    # The criterion takes class logits in float32.
    assert_same(before.loss, after.loss, 1e-6)
    assert_same(before.masks_queries_logits, after.masks_queries_logits, 1e-10)
    assert_same_gradients(gradients, found, 1e-5)


@pytest.mark.usefixtures("fixed_points")
def test_targets_of_different_sizes(inputs, texts, generator):
    model, accelerated = both("no_auxiliary_loss", is_training=True)
    given = {**inputs, **texts, **targets((2, 3), [SIZE, (60, 140)], generator)}
    before, gradients = train(model, **given)
    after, found = train(accelerated, **given)
    assert_same(before, after)
    assert_same_gradients(gradients, found)


@pytest.mark.usefixtures("fixed_points")
@pytest.mark.parametrize("form", ["maps", "runs", "COCO"])
def test_compact_targets(form, inputs, texts, generator):
    """Of different sizes, which are padded for the loss."""
    _, accelerated = both("no_auxiliary_loss", is_training=True)
    assert_compact_targets_serve(accelerated, form, [SIZE, (60, 140)], generator, **inputs, **texts)


def test_losses_are_weighted_and_added_up_at_once():
    """Values and gradients of the original, forward and backward in four operators and the loss's own gradient."""
    names = [f"loss_{kind}{output}" for output in ("", *(f"_{i}" for i in range(9))) for kind in ("mask", "dice")]
    leaves = [torch.rand(1).requires_grad_() for _ in names] + [torch.rand(()).requires_grad_()]
    found = []
    given = [*names, "loss_contrastive"]
    for model in both(is_training=True):
        model.criterion.forward = lambda **_: {k: x.clone() for k, x in zip(given, leaves, strict=True)}
        nothing = dict.fromkeys(inspect.signature(model.get_loss_dict).parameters.keys() - {"args", "kwargs"})
        losses = model.get_loss_dict(**nothing)
        with Operators() as seen:
            total = model.get_loss(model.get_loss_dict(**nothing))
            gradients = torch.autograd.grad(total.sum(), leaves)
        found.append((total.detach(), *losses.values(), *gradients))
    assert not {"aten::mul.Tensor", "aten::mul_.Tensor", "aten::add.Tensor"} & seen.names
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("fixed_points")
def test_names_of_losses(inputs, texts, generator):
    """The same names, the contrastive loss among them."""
    model, accelerated = both(is_training=True)
    given = {**inputs, **texts, **targets((3, 2), [SIZE] * 2, generator)}
    losses = []
    for x in (model, accelerated):
        x.get_loss = lambda found: losses.append(found) or sum(found.values())
        with torch.no_grad():
            x(**given)
    assert losses[0].keys() == losses[1].keys()
    assert "loss_contrastive" in losses[0]
    for name, value in losses[0].items():
        assert_same(value, losses[1][name], where=name)


@pytest.mark.usefixtures("fixed_points")
def test_bfloat16_with_labels(inputs, texts, generator):
    """The original raises; accelerated, the loss is near the one in float32, and gradients are finite."""
    model, accelerated = both(is_training=True)
    labels = targets((3, 2), [SIZE] * 2, generator)
    truth, _ = train(model, **inputs, **texts, **labels)
    low = {**inputs, **texts, **labels, "pixel_values": inputs["pixel_values"].bfloat16()}
    with pytest.raises(RuntimeError):
        train(copy.deepcopy(model).bfloat16(), **low)
    outputs, gradients = train(accelerated.bfloat16(), **low)
    assert outputs.masks_queries_logits.dtype == torch.bfloat16
    assert (outputs.loss - truth.loss).abs() < 0.1 * truth.loss
    assert all(g.isfinite().all() for g in gradients.values() if g is not None)


@pytest.mark.usefixtures("fixed_points")
def test_checkpointed_layers(inputs, texts, generator, monkeypatch):
    """OneFormer's layers have no checkpointing of their own; whoever wraps them gets the same gradients."""
    model, accelerated = both("no_auxiliary_loss", decoder_layers=4, is_training=True)
    given = {**inputs, **texts, **targets((3, 2), [SIZE] * 2, generator)}
    _, gradients = train(model, **given)
    forward = oneformer.DecoderLayer.forward

    def checkpointed(self, *args):
        return checkpoint(lambda *a: forward(self, *a), *args, use_reentrant=False)

    monkeypatch.setattr(oneformer.DecoderLayer, "forward", checkpointed)
    assert_same_gradients(gradients, train(accelerated, **given)[1])


TRACEABLE = pytest.mark.skipif(
    VERSION < (5, 18), reason="OneFormer before transformers 5.18 takes sizes from tensors: no graph"
)


@TRACEABLE
def test_compiled(inputs):
    _, accelerated = both("no_auxiliary_loss", use_auxiliary_loss=True, encoder_layers=1)
    seen = set()
    with torch.no_grad():
        expected = accelerated(**inputs)
        assert_same(expected, compile_whole(accelerated, seen)(**inputs))
    assert seen == OPERATORS


@TRACEABLE
def test_exported(inputs):
    _, accelerated = both("no_auxiliary_loss", use_auxiliary_loss=True, encoder_layers=1)
    program = torch.export.export(accelerated, tuple(inputs.values()))
    assert operators(program.graph) == OPERATORS
    with torch.no_grad():
        found = program.module()(*inputs.values())
        assert_same(accelerated(**inputs).masks_queries_logits, found.masks_queries_logits)


# ---------------------------------------------------------------- what takes the original's way
class Wrapped(torch.nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, *args, **kwargs):
        found = self.base(*args, **kwargs)
        return (found[0] * 1.5, *found[1:])


def test_wrapped_attention(inputs):
    """An adapter around the attention leaves layer and decoder alone; what is wrapped later warns."""
    model = make("pre_norm")
    layer = model.model.transformer_module.decoder.layers[1].cross_attn
    layer.multihead_attn = Wrapped(layer.multihead_attn)
    accelerated, report = m2f_kernels.accelerate(copy.deepcopy(model))
    assert {entry.cls for entry in report.skipped} - {"OneFormerPixelDecoder", "OneFormerPixelDecoderEncoderOnly"} == {
        "OneFormerTransformerDecoderCrossAttentionLayer",
        "OneFormerTransformerDecoderLayer",
        "OneFormerTransformerDecoder",
    }
    with torch.no_grad():
        assert_same(model(**inputs), accelerated(**inputs))
    model, accelerated = both("pre_norm")
    for x in (model, accelerated):
        layer = x.model.transformer_module.decoder.layers[1].cross_attn
        layer.multihead_attn = Wrapped(layer.multihead_attn)
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="runs as in transformers: its attention is"):
        assert_same(model(**inputs), accelerated(**inputs))


@pytest.mark.usefixtures("fixed_points")
def test_another_matcher(inputs, texts, generator):
    model, accelerated = both("no_auxiliary_loss", use_auxiliary_loss=True, is_training=True)

    class Fixed(torch.nn.Module):
        def forward(self, masks, *_):
            return [(torch.tensor([0, 1]), torch.tensor([1, 0]))] * 2

    losses = []
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        for x in (model, accelerated):
            x.criterion.matcher = Fixed()
            torch.manual_seed(1)
            losses.append(x(**inputs, **texts, **targets((2, 2), [SIZE] * 2, torch.Generator().manual_seed(3))).loss)
    assert_same(*losses)
    assert any("its matcher is" in str(x.message) for x in caught)
