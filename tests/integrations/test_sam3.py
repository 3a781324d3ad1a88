"""The box decoder of SAM-3 in `transformers` before and after: outputs, gradients, no bias of all pairs."""

import copy
import warnings
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
import transformers

import m2f_kernels
from m2f_kernels.integrations.transformers import sam3
from tests.integrations.published import assert_same, assert_same_gradients
from tests.watching import Largest


def importable(name: str) -> bool:
    """False where transformers lacks the class, or needs a package for it that is not there (5.0: torchvision)."""
    try:
        return hasattr(transformers, name)
    except ModuleNotFoundError:
        return False


pytestmark = pytest.mark.skipif(not importable("Sam3Model"), reason="this transformers imports no SAM-3 here")
SIDES, QUERIES, HEADS, WIDTH = (9, 13), 10, 4, 32
NAMES = ("intermediate_hidden_states", "reference_boxes", "presence_logits")


@pytest.fixture(params=["sam3", "sam3_lite_text"])
def family(request):
    if not importable("Sam3LiteTextModel") and request.param == "sam3_lite_text":
        pytest.skip("this transformers has no SAM-3 of that family")
    return request.param


def make(family="sam3", implementation="sdpa", **changes):
    torch.manual_seed(3)
    module = import_module(f"transformers.models.{family}.modeling_{family}")
    prefix = "Sam3LiteText" if family == "sam3_lite_text" else "Sam3"
    config = getattr(module, f"{prefix}DETRDecoderConfig")(
        hidden_size=WIDTH, num_layers=3, num_queries=QUERIES, num_attention_heads=HEADS, intermediate_size=64,
        dropout=0.0, **changes,
    )  # fmt: skip
    config._attn_implementation = implementation
    decoder = getattr(module, f"{prefix}DetrDecoder")(config).eval()
    with torch.no_grad():  # boxes and biases that matter
        for parameter in decoder.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return decoder


def both(*args, **changes):
    decoder = make(*args, **changes)
    return decoder, m2f_kernels.accelerate(copy.deepcopy(decoder)).model


def inputs(n=2, sides=SIDES, dtype=torch.float32):
    g = torch.Generator().manual_seed(5)
    image, positions = (torch.randn(n, sides[0] * sides[1], WIDTH, generator=g).to(dtype) for _ in range(2))
    text = torch.randn(n, 6, WIDTH, generator=g).to(dtype)
    return {
        "vision_features": image,
        "text_features": text,
        "vision_pos_encoding": positions,
        "text_mask": torch.tensor([[True] * 6, [True] * 4 + [False] * 2])[:n],
        "spatial_shapes": torch.tensor([sides]),
    }


def train(decoder, given):
    given = {name: x.clone().requires_grad_(x.is_floating_point()) for name, x in given.items()}
    out = decoder(**given)
    sum(getattr(out, name).square().mean() for name in NAMES).backward()
    gradients = {name: p.grad for name, p in decoder.named_parameters()}
    return out, gradients, {name: x.grad for name, x in given.items() if x.requires_grad}


def test_outputs_and_gradients(family):
    """Of every parameter, those that make the bias of boxes among them, and of the image."""
    decoder, accelerated = both(family)
    before, gradients, of_inputs = train(decoder, inputs())
    after, found, found_inputs = train(accelerated, inputs())
    for name in NAMES:
        assert_same(getattr(before, name), getattr(after, name))
    assert gradients["box_rpb_embed_x.layer1.weight"].any()
    assert gradients["box_rpb_embed_y.layer1.weight"].any()
    assert_same_gradients(gradients, found)
    assert_same_gradients(of_inputs, found_inputs)


def test_no_tensor_of_all_pairs():
    decoder, accelerated = both()
    given = inputs(n=1, sides=(40, 50))
    pairs = HEADS * (QUERIES + 1) * 2000
    for model, fits in ((decoder, False), (accelerated, True)):
        with Largest() as largest:
            train(model, given)
        assert (largest.elements < pairs) == fits


def test_both_modules_are_replaced_and_given_back():
    decoder = make()
    report = m2f_kernels.accelerate(decoder)
    replaced = str(report)
    assert "the bias of boxes in two parts" in replaced
    assert isinstance(decoder, sam3.Decoder)
    assert isinstance(decoder.layers[0].vision_cross_attn, sam3.Attention)
    m2f_kernels.restore(decoder)
    assert not isinstance(decoder, sam3.Decoder)
    assert not isinstance(decoder.layers[0].vision_cross_attn, sam3.Attention)


def dense(accelerated):
    """True if the decoder makes the bias of all pairs."""
    boxes, shape = torch.rand(1, QUERIES, 4), tuple(torch.tensor(SIDES))
    return isinstance(accelerated._get_rpb_matrix(boxes, shape), torch.Tensor)


def test_weights_that_are_seen_are_made():
    """With eager attention, and where a hook looks, the published code runs."""
    _, accelerated = both()
    assert not dense(accelerated)
    _, eager = both(implementation="eager")
    assert dense(eager)
    assert_same(eager(**inputs(), output_attentions=True).attentions, make(implementation="eager")(
        **inputs(), output_attentions=True).attentions)  # fmt: skip
    handle = accelerated.layers[1].vision_cross_attn.register_forward_hook(lambda *_: None)
    assert dense(accelerated)
    handle.remove()
    assert not dense(accelerated)


def test_where_no_kernel_serves(monkeypatch):
    decoder, accelerated = both()
    monkeypatch.setattr(sam3, "kernels_serve", lambda ops, tensor: False)
    assert dense(accelerated)
    for name in NAMES:
        assert torch.equal(getattr(decoder(**inputs()), name), getattr(accelerated(**inputs()), name))


def test_other_uses_of_the_bias_get_the_sum():
    _, accelerated = both()
    boxes, shape = torch.rand(2, QUERIES, 4), tuple(torch.tensor(SIDES))
    bias, expected = accelerated._get_rpb_matrix(boxes, shape), make()._get_rpb_matrix(boxes, shape)
    torch.testing.assert_close(bias.dense(), expected)
    torch.testing.assert_close(torch.exp(bias), expected.exp())
    torch.testing.assert_close(bias.permute(1, 0, 2, 3), expected.permute(1, 0, 2, 3))
    assert bias.shape == expected.shape
    padded = F.pad(bias, (0, 0, 1, 0))
    assert isinstance(padded, sam3.BoxBias)
    torch.testing.assert_close(padded.dense(), F.pad(expected, (0, 0, 1, 0)))
    torch.testing.assert_close(F.pad(bias, (0, 0, 1, 0), value=2.0), F.pad(expected, (0, 0, 1, 0), value=2.0))
    torch.testing.assert_close(F.pad(bias, (1, 0)), F.pad(expected, (1, 0)))


def test_compiled_and_under_autocast():
    """A compiled decoder makes the bias as published."""
    decoder, accelerated = both()
    given = inputs()
    expected = decoder(**given)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(accelerated, backend="eager")(**given)
    for name in NAMES:
        assert_same(getattr(expected, name), getattr(compiled, name))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        theirs, ours = decoder(**given), accelerated(**given)
    for name in NAMES:
        exact = getattr(expected, name)
        error = (getattr(ours, name).float() - exact).norm()
        assert error <= 2 * (getattr(theirs, name).float() - exact).norm() + 1e-3 * exact.norm(), name


def test_without_a_bias():
    """Several levels: the published decoder makes none."""
    decoder, accelerated = both()
    given = inputs() | {"spatial_shapes": torch.tensor([[9, 9], [6, 6]])}
    for name in NAMES:
        assert_same(getattr(decoder(**given), name), getattr(accelerated(**given), name))
