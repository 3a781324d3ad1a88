"""EoMT and EoMT-DINOv3 of `transformers` before and after: outputs, masks of blocks, loss, gradients, and no mask of
all pairs of tokens. VidEoMT: its loss."""

import copy
import inspect
import pickle
import warnings

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import m2f_kernels
from m2f_kernels.integrations.transformers import eomt, patch, unpatch
from tests.integrations.families import modeling, photograph
from tests.integrations.published import (
    assert_compact_targets_serve,
    assert_same,
    assert_same_gradients,
    targets,
    train,
)
from tests.integrations.test_copies import Losses
from tests.model import peers

SIZE, QUERIES, LABELS, BLOCKS = 64, 7, 5, 3
COMMON = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": SIZE,
    "patch_size": 8,
    "num_blocks": BLOCKS,
    "num_queries": QUERIES,
    "num_register_tokens": 2,
    "num_upscale_blocks": 1,
    "num_labels": LABELS,
    "train_num_points": 200,
    "layerscale_value": 1.0,
}
CONFIGS = {
    "Eomt": {"mlp_ratio": 2},
    "EomtDinov3": {"intermediate_size": 64},
}
pytestmark = pytest.mark.skipif(
    not hasattr(transformers, "EomtDinov3ForUniversalSegmentation"), reason="this transformers has no EoMT-DINOv3"
)
models = pytest.mark.parametrize("name", CONFIGS)
MODULES = (("Eomt", "eomt"), ("EomtDinov3", "eomt_dinov3"), ("Videomt", "videomt"))
TOKENS = QUERIES + 3 + (SIZE // 8) ** 2


def make(name, probabilities=None, **changes):
    torch.manual_seed(3)
    config = getattr(transformers, f"{name}Config")(**{**COMMON, **CONFIGS.get(name, {}), **changes})
    model = getattr(transformers, f"{name}ForUniversalSegmentation")(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=(parameter.dim() / 2 / parameter[0].numel()) ** 0.5)
    # As if trained: masks that differ between queries, and prefix and position embeddings that count.
    if probabilities is not None:
        model.attn_mask_probs.copy_(torch.tensor(probabilities))
    return model


def both(name, **changes):
    model = make(name, **changes)
    accelerated, report = m2f_kernels.accelerate(copy.deepcopy(model))
    assert not report.skipped
    return model, accelerated


@pytest.fixture(scope="module")
def pixels():
    image = photograph((SIZE, SIZE))
    return torch.stack([image, image.flip(-1)])


@pytest.fixture
def fixed_points(monkeypatch):
    """All draw the same points: the original and the operators have other generators."""
    for name, family in MODULES:
        peers.fix_points(monkeypatch.setattr, modeling(family), f"{name}Loss")


class Pairs(TorchDispatchMode):
    """Counts the tensors with as many elements as there are pairs of tokens, in any image."""

    def __init__(self, pairs):
        super().__init__()
        self.pairs, self.count = pairs, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.count += sum(isinstance(x, torch.Tensor) and x.numel() >= self.pairs for x in tree_leaves(result))
        return result


# ---------------------------------------------------------------- outputs
@models
@pytest.mark.parametrize("probabilities", [[1.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.5, 1.0]], ids=str)
def test_outputs(name, probabilities, pixels):
    """With masks in every block, with that of the first in all (as published), without, and with some queries freed."""
    model, accelerated = both(name, probabilities=probabilities)
    results = []
    for one in (model, accelerated):
        torch.manual_seed(1)
        with torch.no_grad():
            results.append(one(pixels, output_hidden_states=True))
    assert type(results[0]) is type(results[1])
    assert_same(*results)
    assert len(results[0].hidden_states) == 5


@models
def test_masks_are_seen(name, pixels, monkeypatch):
    """This test's comparisons can fail: the operator is called once a block, and its masks reach the outputs."""
    model, accelerated = both(name)
    operator, calls = eomt.predict_attention_mask, []

    def wrong(*args):
        calls.append(1)
        found = operator(*args)
        return found._replace(bits=~found.bits)

    with torch.no_grad():
        before = model(pixels)
        monkeypatch.setattr(eomt, "predict_attention_mask", wrong)
        after = accelerated(pixels)
    assert len(calls) == BLOCKS
    with pytest.raises(AssertionError):
        assert_same(before, after, 1e-2)


@models
@pytest.mark.parametrize("embedding", [0.0, None])
def test_logits_of_zero(name, embedding, pixels):
    """Blocked, as published: of all masks, and of those of some queries and patches. Then all other tokens are seen."""
    model, accelerated = both(name)
    outputs = []
    for one in (model, accelerated):
        with torch.no_grad():
            if embedding is not None:
                one.mask_head.fc3.weight.zero_()
                one.mask_head.fc3.bias.zero_()
            else:  # features of whole patches are 0
                norm = one.upscale_block.block[-1].layernorm2d
                norm.register_forward_hook(lambda _, __, out: out * (torch.arange(out.shape[-1]) >= 8))
            outputs.append(one(pixels))
    assert_same(*outputs)


@models
def test_contract(name, pixels):
    """A tuple where it is asked for, hidden states and attentions where they are, patch offsets handed through."""
    model, accelerated = both(name, attn_implementation="eager")
    for flags in (
        {"return_dict": False},
        {"output_hidden_states": True, "return_dict": False},
        {"output_attentions": True},
        {"patch_offsets": [torch.tensor([0, 0, 4])]},
    ):
        with torch.no_grad():
            assert_same(model(pixels, **flags), accelerated(pixels, **flags))
    with torch.no_grad():
        assert accelerated(pixels, output_attentions=True).attentions[0].shape == (
            2,
            4,
            TOKENS - QUERIES,
            TOKENS - QUERIES,
        )


# ---------------------------------------------------------------- training
@models
@pytest.mark.parametrize("probabilities", [[1.0, 1.0, 1.0], [0.9, 0.3, 0.0]], ids=str)
def test_loss_and_gradients(name, probabilities, pixels, fixed_points, generator):
    model, accelerated = both(name, probabilities=probabilities)
    inputs = {"pixel_values": pixels, **targets([3, 2], [(SIZE, SIZE)] * 2, generator, LABELS)}
    before, gradients = train(model, **inputs)
    after, gradients_after = train(accelerated, **inputs)
    assert_same(before, after)
    assert_same_gradients(gradients, gradients_after)
    assert any("layers.3.attention.q_proj" in n and g.any() for n, g in gradients.items())


@models
@pytest.mark.parametrize(("form", "known"), [("maps", True), ("maps", False), ("runs", True), ("COCO", False)])
def test_compact_targets(name, form, known, pixels, fixed_points, generator):
    """Of different sizes, which are padded for the loss; also where the original's criterion serves."""
    _, accelerated = both(name)
    if not known:
        m2f_kernels.restore(accelerated.criterion)
    assert_compact_targets_serve(accelerated, form, [(SIZE, SIZE), (40, 50)], generator, pixel_values=pixels)


@models
def test_no_tensor_of_all_pairs(name, pixels, generator):
    """In a training step nothing of tokens x tokens is made, by any operator outside the fused ones."""
    model, accelerated = both(name, image_size=192, num_queries=3, train_num_points=50)
    tokens = 3 + 3 + 24**2
    inputs = {"pixel_values": torch.randn(1, 3, 192, 192), **targets([2], [(48, 48)], generator, LABELS)}
    counts = []
    for one in (model, accelerated):
        with Pairs(tokens**2) as seen:
            train(one, **inputs)
        counts.append(seen.count)
    assert counts[0] > 0
    assert counts[1] == 0


@models
def test_no_tensor_of_all_pairs_at_1280(name, generator):
    """A training step of 1280 x 1280 pixels: 6400 patches, of which all pairs would be 160 MiB for each head."""
    tokens = 3 + 3 + (1280 // 16) ** 2
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "num_blocks": 1, "patch_size": 16}
    model = make(name, **sizes, num_queries=3, train_num_points=50, image_size=1280)
    accelerated = m2f_kernels.accelerate(model).model.train()
    inputs = {"pixel_values": torch.randn(1, 3, 1280, 1280), **targets([2], [(40, 40)], generator, LABELS)}
    with Pairs(tokens**2) as seen:
        accelerated(**inputs).loss.backward()
    assert not seen.count
    assert all(p.grad is not None for p in accelerated.layers.parameters() if p.requires_grad)


class _Halved:
    """A mixin for a matcher: calls the published one for other masks."""

    def forward(self, masks, *rest):
        return super().forward(0.5 * masks, *rest)


class _OwnMatcher:
    def forward(self, masks, classes, mask_labels, class_labels):
        return [(torch.arange(len(x)), torch.arange(len(x)).flip(0)) for x in class_labels]


class _OwnClasses:
    """A mixin for a loss: one part of its own."""

    def loss_labels(self, logits, class_labels, indices):
        return {"loss_cross_entropy": logits.square().mean()}


class _OwnMasks:
    def loss_masks(self, masks, mask_labels, indices, num_masks):
        return {name: 3 * x for name, x in super().loss_masks(masks, mask_labels, indices, num_masks).items()}


class _Doubled:
    def forward(self, *args, **kwargs):
        return {name: 2 * loss for name, loss in super().forward(*args, **kwargs).items()}


class _OwnPoints:
    def sample_points_using_uncertainty(self, logits, *_):
        line = torch.linspace(0.05, 0.95, 30)
        return torch.stack([line, line.flip(0)], -1).expand(logits.shape[0], -1, -1)


CHANGES = [
    ("HungarianMatcher", _Halved),
    ("HungarianMatcher", _OwnMatcher),
    ("Loss", _OwnClasses),
    ("Loss", _OwnMasks),
    ("Loss", _Doubled),
    ("Loss", _OwnPoints),
]


def derived(name, part, change):
    """A class as a user writes it, derived from what the name in transformers holds now."""
    return type(f"Own{part}", (change, getattr(modeling(dict(MODULES)[name]), f"{name}{part}")), {})


def with_part(model, name, part, change):
    """The model with a loss or a matcher of the user's own."""
    cls = derived(name, part, change)
    if part == "Loss":
        model.criterion = cls(model.config, model.weight_dict)
    else:
        matcher = model.criterion.matcher
        costs = {x: getattr(matcher, x) for x in ("cost_class", "cost_mask", "cost_dice", "num_points")}
        model.criterion.matcher = cls(**costs)
    return model


@models
@pytest.mark.parametrize(("part", "change"), CHANGES, ids=lambda x: getattr(x, "__name__", x))
@pytest.mark.filterwarnings("ignore:.*its matcher is:RuntimeWarning")
def test_losses_and_matchers_of_ones_own(name, part, change, pixels, fixed_points, generator):
    """Derived from the published ones, or from patched ones: what they override runs, all else is fused."""
    inputs = {"pixel_values": pixels, **targets([3, 2], [(SIZE, SIZE)] * 2, generator, LABELS)}
    plain = with_part(make(name), name, part, change)
    before, gradients = train(plain, **inputs)
    published = train(make(name), **inputs)[0].loss
    assert before.loss.item() != pytest.approx(published.item(), rel=1e-4)
    accelerated, report = m2f_kernels.accelerate(copy.deepcopy(plain))
    patch(dict(MODULES)[name])
    try:
        patched = with_part(make(name), name, part, change)
    finally:
        unpatch()
    for model in (accelerated, patched):
        with Losses() as seen:
            after, found = train(model, **inputs)
        assert_same(before, after)
        assert_same_gradients(gradients, found)
        assert seen.lost == (change is not _OwnPoints)
        assert seen.matched == (change is not _OwnMatcher)
    assert len(report.skipped) == (change in (_OwnMatcher, _OwnPoints))


@models
def test_dropout_runs_as_in_transformers(name, pixels):
    model, accelerated = both(name, attention_dropout=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for one in (model, accelerated):
            one.train()
        results = []
        for one in (model, accelerated):
            torch.manual_seed(0)
            results.append(one(pixels))
    assert_same(*results, 0)
    assert [w for w in caught if "dropped out" in str(w.message)]


@models
def test_hooks_see_what_they_saw(name, pixels, generator):
    """The weights of an attention, its mask, and one call of the criterion per output with logits."""
    seen = []
    inputs = {"pixel_values": pixels, **targets([3, 2], [(SIZE, SIZE)] * 2, generator, LABELS)}
    for one in both(name, attn_implementation="eager"):
        shapes = []

        def look(module, args, kwargs, output, shapes=shapes):
            shapes.append([x.shape for x in tree_leaves((args, kwargs, output)) if isinstance(x, torch.Tensor)])

        handles = [m.register_forward_hook(look, with_kwargs=True) for m in (one.layers[-1].attention, one.criterion)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            train(one, **inputs)
        for handle in handles:
            handle.remove()
        seen.append(shapes)
    assert len(seen[0]) == 1 + BLOCKS + 1
    assert seen[0] == seen[1]


@models
def test_collected_once_is_fused_afterwards(name):
    """Hooks that transformers leaves behind do not send later calls the slow way."""
    _, accelerated = both(name, image_size=192, num_queries=3)
    pixels = torch.randn(1, 3, 192, 192)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        accelerated(pixels, output_hidden_states=True)
        with Pairs((3 + 3 + 24**2) ** 2) as seen:
            accelerated(pixels)
    assert not seen.count


@models
def test_gradient_checkpointing_of_layers(name, pixels):
    """A block that is computed again for its gradients gives the same ones."""
    _, accelerated = both(name)
    results = []
    for checkpointed in (False, True):
        model = copy.deepcopy(accelerated)
        for layer in model.layers:
            layer.gradient_checkpointing = checkpointed
            layer._gradient_checkpointing_func = torch.utils.checkpoint.checkpoint
        model.train()
        torch.manual_seed(0)
        model(pixels).masks_queries_logits.square().mean().backward()
        results.append({n: p.grad for n, p in model.named_parameters()})
    assert_same_gradients(*results, 1e-6)


@models
def test_bfloat16(name, pixels):
    """Not further from float32 than the original is."""
    model, accelerated = both(name)
    with torch.no_grad():
        truth = model(pixels).masks_queries_logits
        errors = [
            (one.bfloat16()(pixels.bfloat16()).masks_queries_logits.float() - truth).norm() / truth.norm()
            for one in (model, accelerated)
        ]
    assert errors[1] <= 1.5 * errors[0] + 0.01


@models
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_torchscript_exporter_to_onnx(name, pixels, tmp_path):
    pytest.importorskip("onnx", reason="onnx is not installed: pip install onnx")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install onnxruntime")
    _, accelerated = both(name)

    class Tensors(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = accelerated

        def forward(self, pixel_values):
            output = self.model(pixel_values)
            return output.masks_queries_logits, output.class_queries_logits

    path = str(tmp_path / "m.onnx")
    with torch.no_grad():
        expected = Tensors()(pixels)
        torch.onnx.export(Tensors().eval(), (pixels,), path, dynamo=False, opset_version=20, input_names=["pixels"])
    for x, y in zip(runtime.InferenceSession(path).run(None, {"pixels": pixels.numpy()}), expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(x), y, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- and back
@models
def test_copies_pickles_and_takes_back(name, pixels):
    model, accelerated = both(name)
    with torch.no_grad():
        expected = accelerated(pixels).masks_queries_logits
        for other in (copy.deepcopy(accelerated), pickle.loads(pickle.dumps(accelerated))):
            assert torch.equal(other(pixels).masks_queries_logits, expected)
        assert list(accelerated.state_dict()) == list(model.state_dict())
        restored = m2f_kernels.restore(accelerated)
        assert torch.equal(restored(pixels).masks_queries_logits, model(pixels).masks_queries_logits)


@models
def test_signature(name):
    """That of `forward` is as published: programs read which arguments and options a model takes."""
    model, accelerated = both(name)
    assert inspect.signature(accelerated.forward) == inspect.signature(model.forward)
    assert accelerated.forward.__doc__ == model.forward.__doc__


@models
def test_a_model_derived_from_a_patched_one(name, pixels):
    """A method of its own that the fused code would not call."""

    def predict(self, logits):
        classes, masks = published_predict(self, logits)
        return classes, -masks

    family = dict(MODULES)[name]
    published = getattr(modeling(family), f"{name}ForUniversalSegmentation")
    published_predict = published.predict
    expected = type("Own", (published,), {"predict": predict})(make(name).config).eval()
    patch(family)
    try:
        own = type("Own", (getattr(modeling(family), published.__name__),), {"predict": predict})(expected.config)
    finally:
        unpatch()
    own.eval().load_state_dict(expected.state_dict())
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="overrides predict"):
        assert_same(expected(pixels), own(pixels))


def test_patched_classes(pixels):
    original = make("Eomt")
    try:
        patch("eomt")
        patched = transformers.models.eomt.modeling_eomt.EomtForUniversalSegmentation(original.config).eval()
    finally:
        unpatch()
    patched.load_state_dict(original.state_dict())
    assert isinstance(patched, eomt.ForUniversalSegmentation)
    with torch.no_grad():
        assert_same(original(pixels), patched(pixels))


def test_videomt(pixels):
    """Its forward has no masks and no loss: only its loss, called by itself, changes."""
    model, accelerated = both("Videomt", mlp_ratio=2)
    video = pixels[:, None].expand(-1, 2, -1, -1, -1)
    with torch.no_grad():
        assert_same(model(video), accelerated(video))
    assert type(accelerated.criterion).__name__ == "VideomtLoss"
    assert isinstance(accelerated.criterion, eomt.VideomtCriterion)


def test_videomt_loss(fixed_points, generator):
    model, accelerated = both("Videomt", mlp_ratio=2)
    masks = torch.randn(2, QUERIES, 16, 16, generator=generator)
    classes = torch.randn(2, QUERIES, LABELS + 1, generator=generator)
    labels = targets([3, 2], [(SIZE, SIZE)] * 2, generator, LABELS)
    assert_same(model.criterion(masks, classes, **labels), accelerated.criterion(masks, classes, **labels))


@models
def test_an_attention_that_no_kernel_serves(name, pixels, monkeypatch):
    """Elsewhere than the model, as on a second device without kernels: it runs the published code, under the mask of
    all pairs."""
    _, accelerated = both(name, probabilities=[0.5, 1.0, 1.0])

    def output():
        torch.manual_seed(11)
        return accelerated(pixel_values=pixels).masks_queries_logits

    expected, calls = output(), []
    monkeypatch.setattr(eomt, "masked_attention", lambda *args, **kwargs: calls.append(1))
    monkeypatch.setattr(eomt.dispatch, "serves", lambda op, tensor: tensor is next(accelerated.parameters()))
    monkeypatch.setattr(eomt, "kernels_serve", lambda *args: True)
    torch.testing.assert_close(output(), expected, rtol=1e-4, atol=1e-4)
    assert not calls
