"""Training: the recipe, runs that go on exactly, checkpoints that survive."""

import dataclasses
import multiprocessing
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from m2f_model import Mask2Former, Mask2FormerConfig
from m2f_model import train as training
from m2f_model.data import Batches, Shapes
from m2f_model.train import Recipe, Trainer, build_optimizer, of_data
from tests.model.command import m2f
from tests.recorded import Device
from tests.watching import Largest

DATA = Shapes(length=12, size=64)
#: Four steps with everything on that could make a difference: milestones, jitter, evaluation.
RECIPE = Recipe.shapes(
    steps=4, batch_size=2, size=64, log_every=1, save_every=2, evaluate_every=3, evaluate_count=2, milestones=(0.6,)
)


def small(**changes):
    sizes = {"encoder_layers": 1, "decoder_layers": 2, "num_queries": 8, "num_points": 64}
    return Mask2FormerConfig.tiny(5, **{"stuff_labels": DATA.stuff_labels, **sizes, **changes})


def trainer(out, recipe=RECIPE, lines=None, **changes):
    torch.manual_seed(0)
    log = (lambda _: None) if lines is None else lines.append
    return Trainer(Mask2Former(small(**changes)), DATA, recipe, out, validation=DATA, log=log)


def same(a, b):
    assert a.keys() == b.keys()
    different = [k for k in a if not torch.equal(a[k], b[k])]
    assert not different


def test_a_stopped_run_goes_on_exactly(tmp_path):
    whole, lines = trainer(tmp_path / "whole"), []
    whole.run()
    trainer(tmp_path / "parts").run(stop=2)
    torch.manual_seed(99)
    second = trainer(tmp_path / "parts", lines=lines)
    assert second.step == 2
    assert "going on from step 2" in lines[0]
    second.run()
    assert second.step == whole.step == 4
    same(whole.model.state_dict(), second.model.state_dict())
    rates = [[group["lr"] for group in run.optimizer.param_groups] for run in (whole, second)]
    assert rates[0] == rates[1] == pytest.approx([RECIPE.lr / 10] * len(rates[0]))  # the first milestone is behind
    for a, b in zip(
        whole.optimizer.state_dict()["state"].values(), second.optimizer.state_dict()["state"].values(), strict=True
    ):
        same(a, b)
    saved = Mask2Former.from_pretrained(tmp_path / "parts")
    same(saved.state_dict(), whole.model.state_dict())
    assert saved.config.stuff_labels == DATA.stuff_labels


def test_masks_are_never_dense(tmp_path, monkeypatch):
    """Between files and loss at most one mask is; the step has the bits of dense ones."""
    recipe = dataclasses.replace(RECIPE, scales=(0.9, 1.2), batch_size=1)
    # The data set's own samples are dense.
    samples = [DATA[i] for i in range(len(DATA))]
    made = Shapes(length=len(DATA), size=64)
    monkeypatch.setattr(Shapes, "__getitem__", lambda _, i: samples[i])
    results = []
    for dense in (False, True):
        torch.manual_seed(0)
        run = Trainer(Mask2Former(small()), DATA, recipe, tmp_path / str(dense), log=lambda _: None)
        batches = Batches(made, 1, seed=recipe.seed, size=recipe.size, scales=recipe.scales)
        with Largest(torch.bool, torch.uint8) as seen:
            pixels, targets = batches[3]
            if dense:
                targets = [{**target, "masks": target["masks"].masks()} for target in targets]
            assert len(targets[0]["labels"]) > 3
            torch.manual_seed(1)
            losses, norm = run.update(pixels, targets)
        results.append((losses, norm, seen.elements))
    (losses, norm, largest), (expected, expected_norm, largest_dense) = results
    same(losses, expected)
    assert torch.equal(norm, expected_norm)
    assert largest <= 3 * 64 * 64 < largest_dense  # the image has three bytes to a pixel


def test_a_trained_model_has_what_its_data_have(tmp_path):
    """Names, stuff and image size, whatever the configuration that training began with."""
    trainer(tmp_path, stuff_labels=None, image_size=(800, 1333)).run()
    config = Mask2Former.from_pretrained(tmp_path).config
    assert (config.label_names, config.stuff_labels) == (DATA.label_names, DATA.stuff_labels)
    assert config.image_size == (50, 83)  # 800 and 1333 for jitter to 1024, here to 64
    assert of_data(config, DATA, Recipe()).image_size == (800, 1333)
    assert of_data(config, DATA, dataclasses.replace(RECIPE, size=None)).image_size == (64, 128)
    published = Mask2FormerConfig.preset("r50-cityscapes-semantic", num_labels=5, keep_aspect_ratio=False)
    changed = of_data(published, DATA, RECIPE)
    assert (changed.semantic_only, changed.keep_aspect_ratio, changed.frozen_batch_norm) == (False, True, False)


def test_weights_of_other_classes_are_an_error(tmp_path):
    """As many classes are not the same classes; other words for the same are."""
    for names, i, ours, theirs in [
        (("square", "disc", *DATA.label_names[2:]), 0, "disc", "square"),
        ((*DATA.label_names[:3], "bird", "plane"), 3, "sky", "bird"),
    ]:
        with pytest.raises(ValueError, match=f"label {i} is '{ours}' here and '{theirs}' there"):
            trainer(tmp_path, label_names=names)
    names = ("Disc", "red square", "triangle", "sky-other-merged", "ground")
    assert trainer(tmp_path, label_names=names).model.config.label_names == DATA.label_names


def test_every_step_changes_every_parameter(tmp_path):
    run = trainer(tmp_path)
    before = {k: p.detach().clone() for k, p in run.model.named_parameters()}
    run.run(stop=2)
    assert [k for k, p in run.model.named_parameters() if torch.equal(p, before[k])] == []


def test_the_seed_makes_the_run(tmp_path):
    runs = []
    for name, recipe in (("a", RECIPE), ("b", RECIPE), ("c", dataclasses.replace(RECIPE, seed=1))):
        runs.append(trainer(tmp_path / name, recipe))
        runs[-1].run(stop=1)
    weights = [r.model.transformer_decoder.class_head.weight for r in runs]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.filterwarnings("error:.*lr_scheduler")
@pytest.mark.parametrize("autocast", ["bf16", "fp16"])
def test_autocast(autocast, tmp_path):
    run = trainer(tmp_path, dataclasses.replace(RECIPE, autocast=autocast))
    run.run(stop=3)
    assert run.model.backbone.body.embedder.embedder.convolution.weight.dtype == torch.float32
    assert all(p.isfinite().all() for p in run.model.parameters())


def test_activation_checkpointing_changes_nothing_but_memory(tmp_path):
    pixels, targets = torch.rand(1, 3, 64, 64), [{"labels": DATA[0]["labels"], "masks": DATA[0]["masks"]}]
    gradients = []
    for on in (False, True):
        model = trainer(tmp_path / str(on)).model
        model.set_activation_checkpointing(on)
        saved = []
        torch.manual_seed(5)
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=saved: s.append(x.numel()) or x, lambda x: x):
            loss = sum(model(pixels, targets).losses.values())
        loss.backward()
        gradients.append(({k: p.grad for k, p in model.named_parameters() if p.grad is not None}, sum(saved)))
    same(gradients[0][0], gradients[1][0])
    assert gradients[1][1] < 0.8 * gradients[0][1]


@pytest.mark.parametrize("autocast", ["none", "fp16", pytest.param("bf16", marks=pytest.mark.slow)])
def test_graphs_change_nothing(autocast, tmp_path, monkeypatch):
    """Captured once, on a device that stands for CUDA, and replayed; a run without graphs goes on from there."""
    monkeypatch.setattr("m2f_kernels.graphs.CudaDevice", Device)
    recipe = dataclasses.replace(RECIPE, autocast=autocast)
    eager, lines = trainer(tmp_path / "eager", recipe), []
    # A graph cannot read what autocast keeps: a weight that is used twice is cast twice.
    torch.set_autocast_cache_enabled(False)
    try:
        eager.run(stop=3)
    finally:
        torch.set_autocast_cache_enabled(True)
    captured = trainer(tmp_path / "captured", dataclasses.replace(recipe, cuda_graphs=True))
    captured.run(stop=3)
    assert captured.graphs.captures == 1
    assert captured.graphs.reason is None
    same(eager.model.state_dict(), captured.model.state_dict())
    trainer(tmp_path / "captured", recipe, lines)
    assert "going on from step 3" in lines[0]


def test_graphs_are_refused(tmp_path):
    with pytest.raises(ValueError, match="cuda_graphs: expected False with activation_checkpointing"):
        dataclasses.replace(RECIPE, cuda_graphs=True, activation_checkpointing=True)
    with pytest.raises(ValueError, match="cuda_graphs: expected False with parallel='fsdp'"):
        dataclasses.replace(RECIPE, cuda_graphs=True, parallel="fsdp")
    run = trainer(tmp_path, dataclasses.replace(RECIPE, cuda_graphs=True))
    with pytest.warns(UserWarning, match="Mask2Former runs without a graph: a tensor is on 'cpu'"):
        run.run(stop=1)


def test_the_optimizer_is_fused_on_a_gpu(monkeypatch):
    given = []
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, **options: given.append(options))
    for device in ("cuda", "cpu"):
        model = torch.nn.Module()
        monkeypatch.setattr(
            model,
            "named_parameters",
            lambda d=device: [("x", SimpleNamespace(requires_grad=True, device=torch.device(d)))],
        )
        build_optimizer(model, RECIPE)
    assert given == [{"fused": True}, {"fused": None}]


def test_optimizer_groups():
    config = Mask2FormerConfig.preset("swin-tiny-coco-panoptic")
    with torch.device("meta"):
        model = Mask2Former(config)
    optimizer = build_optimizer(model, Recipe())
    names = {id(p): k for k, p in model.named_parameters()}
    groups = {(g["lr"], g["weight_decay"]): {names[id(p)] for p in g["params"]} for g in optimizer.param_groups}
    assert groups.keys() == {(1e-4, 0.05), (1e-4, 0.0), (1e-5, 0.05), (1e-5, 0.0)}
    assert set().union(*groups.values()) == set(names.values())
    still = groups[1e-4, 0.0] | groups[1e-5, 0.0]
    modules = dict(model.named_modules())
    for name in names.values():
        module = modules[name.rpartition(".")[0]]
        norm_or_embedding = isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.Embedding))
        assert (name in still) == (norm_or_embedding or name.endswith("relative_position_bias_table")), name
    assert {"pixel_decoder.level_embed"} == {n for n in names.values() if n.endswith("level_embed")} - still


def test_published_recipe():
    recipe = Recipe()
    assert (recipe.lr, recipe.weight_decay, recipe.backbone_lr, recipe.clip) == (1e-4, 0.05, 0.1, 0.01)
    # Published for COCO: 368750 steps, tenths after 327778 and 355092.
    rates = [recipe.learning_rate(s) for s in (0, 327700, 327900, 355000, 355200)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01])


def test_another_recipe_does_not_go_on(tmp_path):
    trainer(tmp_path).run(stop=2)
    with pytest.raises(
        ValueError, match=r"checkpoint\.pth: expected a checkpoint of this recipe; lr: 0\.0005 there, 1 here"
    ):
        trainer(tmp_path, dataclasses.replace(RECIPE, lr=1))
    with pytest.raises(ValueError, match="expected the weights of this model"):
        trainer(tmp_path, num_queries=9)
    assert trainer(tmp_path, dataclasses.replace(RECIPE, log_every=7)).step == 2


def test_a_full_disk_leaves_the_former_checkpoint(tmp_path, monkeypatch):
    run = trainer(tmp_path)
    run.run(stop=2)
    before = run.checkpoint.read_bytes()

    def full(state, file):
        file.write(b"a part")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match="No space left"):
            run.save()
    assert run.checkpoint.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "checkpoint.pth", "tensorboard"]
    assert trainer(tmp_path).step == 2


def test_a_diverged_run_stops_and_leaves_the_former_checkpoint(tmp_path):
    run = trainer(tmp_path)
    run.run(stop=2)
    before = run.checkpoint.read_bytes()
    with torch.no_grad():
        run.model.transformer_decoder.class_head.bias.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match=r"step 3: expected finite losses; not finite: .*loss_cross_entropy"):
        run.run()
    assert run.checkpoint.read_bytes() == before


def disturb(run, step, value, parameter="transformer_decoder.class_head.weight"):
    """The gradient of one parameter is `value` at one step; losses before it are as ever."""
    hit = lambda g: g * value if run.step + 1 == step else g  # noqa: E731
    run.model.get_parameter(parameter).register_hook(hit)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("step", [3, 4])
@pytest.mark.parametrize(
    "parameter",
    [
        "transformer_decoder.class_head.weight",
        "pixel_decoder.level_embed",
        "backbone.body.embedder.embedder.convolution.weight",
    ],
)
def test_gradients_that_are_not_finite_reach_no_checkpoint(parameter, step, value, tmp_path):
    """At a step that saves (the last, 4) and at one that does not: it is named, and the former checkpoint stays."""
    run = trainer(tmp_path, dataclasses.replace(RECIPE, log_every=100, evaluate_every=100))
    run.run(stop=2)
    before = run.checkpoint.read_bytes()
    disturb(run, step, value, parameter)
    with pytest.raises(FloatingPointError, match=rf"^step {step}: expected finite losses and gradients"):
        run.run()
    assert run.checkpoint.read_bytes() == before
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize("what", ["parameter", "statistic", "moment"])
def test_weights_that_are_not_finite_reach_no_checkpoint(what, tmp_path):
    """They need not show in any loss yet."""
    run = trainer(tmp_path)
    run.run(stop=2)
    before = run.checkpoint.read_bytes()
    parameter = run.model.transformer_decoder.class_head.weight
    if what == "moment":
        run.optimizer.state[parameter]["exp_avg_sq"][0, 0] = float("inf")
    elif what == "parameter":
        parameter.data[0, 0] = float("nan")
    else:
        next(b for k, b in run.model.named_buffers() if k.endswith("running_var"))[0] = float("inf")
    with pytest.raises(
        FloatingPointError, match=r"^step 2: expected finite weights; not finite: .*; nothing is written"
    ):
        run.save()
    assert run.checkpoint.read_bytes() == before


def test_float16_skips_and_counts(tmp_path):
    """Neither the weights nor the statistics of batch norm take part in a step whose gradients overflow; said once."""
    lines = []
    run = trainer(tmp_path, dataclasses.replace(RECIPE, autocast="fp16"), lines)
    run.scaler = torch.amp.GradScaler("cpu", init_scale=16.0)  # the first of the default's overflow by themselves
    run.run(stop=1)
    before = {k: v.clone() for k, v in run.model.state_dict().items() if v.is_floating_point()}
    assert any(k.endswith("running_mean") for k in before)
    disturb(run, 2, float("inf"))
    run.run(stop=2)
    same({k: v for k, v in run.model.state_dict().items() if k in before}, before)
    run.run()
    assert run.step == 4
    assert not torch.equal(
        run.model.transformer_decoder.class_head.weight, before["transformer_decoder.class_head.weight"]
    )
    assert [line for line in lines if "skipped" in line] == [
        "step 2: 1 steps skipped so far, whose gradients were not finite in float16; the loss is scaled down "
        "(TensorBoard's train/skipped_steps counts on)"
    ]
    state = torch.load(run.checkpoint, weights_only=True)
    assert state["skipped"] == 1
    assert all(v.isfinite().all() for v in state["model"].values())


def test_float16_that_has_diverged(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_SKIPPED_IN_A_ROW", 3)
    run = trainer(tmp_path, dataclasses.replace(RECIPE, autocast="fp16"))
    run.model.transformer_decoder.class_head.weight.register_hook(lambda g: g * float("inf"))
    with pytest.raises(
        FloatingPointError, match=r"^step 3: expected finite gradients; those of the last 3 steps were not"
    ):
        run.run()
    assert torch.load(run.checkpoint, weights_only=True)["step"] == 2


# ---------------------------------------------------------------- what happens to runs


class Broken(Shapes):
    def __getitem__(self, index):
        raise OSError("no such image")


def test_a_validation_that_fails_loses_nothing(tmp_path):
    run = Trainer(Mask2Former(small()), DATA, RECIPE, tmp_path, validation=Broken(12, 64), log=lambda _: None)
    with pytest.raises(OSError, match="no such image"):
        run.run()
    assert torch.load(run.checkpoint, weights_only=True)["step"] == 3


def test_data_are_checked_at_the_start(tmp_path):
    """Those of training by the trainer itself; those of validation when it is asked, as `m2f train` does."""

    class Checked(Shapes):
        def check(self, progress):
            raise ValueError(f"image {next(iter(progress([5])))} is missing")

    broken = Checked(length=12, size=64)
    with pytest.raises(ValueError, match="image 5 is missing"):
        Trainer(Mask2Former(small()), broken, RECIPE, tmp_path)
    run = Trainer(Mask2Former(small()), DATA, RECIPE, tmp_path, validation=broken)
    with pytest.raises(ValueError, match="image 5 is missing"):
        run.check_validation()


class Interrupting(Shapes):
    """Validation data whose second sample is slow enough for a signal."""

    number: int
    taken = 0

    def __getitem__(self, index):
        self.taken += 1
        os.kill(os.getpid(), self.number)
        return super().__getitem__(index)


@pytest.mark.parametrize(("number", "ends"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
@pytest.mark.parametrize("when", ["step", "validation"])
def test_an_interrupted_run_goes_on_exactly(when, number, ends, tmp_path):
    """In a step that saves nothing, and in a validation, which is given up. Handlers are as before."""
    former = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    recipe = dataclasses.replace(RECIPE, save_every=100, evaluate_every=100 if when == "step" else 1)
    whole = trainer(tmp_path / "whole", recipe)
    whole.run()
    run, lines = trainer(tmp_path / "parts", recipe), []

    def log(line):
        lines.append(line)
        if when == "step" and "step 1/" in line:
            os.kill(os.getpid(), number)

    run.log = log
    if when == "validation":
        run.validation = Interrupting(12, 64)
        run.validation.number = number
    with pytest.raises(ends) as ended:
        run.run()
    assert ended.type is not SystemExit or ended.value.code == 143
    assert lines[-1] == (
        f"stopped by {number.name} after step 1 of 4, which is written to {run.checkpoint}: "
        "the same command goes on from there"
    )
    if when == "validation":
        assert run.validation.taken <= 2
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == former
    second = trainer(tmp_path / "parts", recipe)
    assert second.step == 1
    second.run()
    same(whole.model.state_dict(), second.model.state_dict())


def test_a_signal_to_the_whole_group(tmp_path, capfd):
    """Processes that prepare data do not die of it, and print nothing."""
    run, sent = trainer(tmp_path, dataclasses.replace(RECIPE, workers=2)), []

    def log(line):
        if not sent:
            children = multiprocessing.active_children()
            sent.extend(children)
            for child in children:
                os.kill(child.pid, signal.SIGINT)
                os.kill(child.pid, signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)

    run.log = log
    with pytest.raises(KeyboardInterrupt):
        run.run()
    assert len(sent) == 2
    for child in sent:
        child.join(10)
        assert child.exitcode == 0
    assert capfd.readouterr().err == "stopping after this step; Ctrl-C again: at once\n"
    assert torch.load(run.checkpoint, weights_only=True)["step"] == 1


def test_what_a_killed_run_leaves_is_gone_after_the_next_start(tmp_path):
    trainer(tmp_path).run(stop=2)
    (tmp_path / ".checkpoint.pth.01234567").write_bytes(b"half")
    (tmp_path / ".model.abcdefgh").mkdir()
    (tmp_path / ".model.abcdefgh" / "model.safetensors").write_bytes(b"half")
    trainer(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "checkpoint.pth", "tensorboard"]


@pytest.mark.parametrize("content", ["empty", "text", "half", "tensors"])
def test_a_damaged_checkpoint(content, tmp_path):
    run = trainer(tmp_path)
    run.run(stop=2)
    if content == "tensors":
        torch.save({"model": {}}, run.checkpoint)
    else:
        whole = run.checkpoint.read_bytes()
        run.checkpoint.write_bytes({"empty": b"", "text": b"hello\n", "half": whole[: len(whole) // 2]}[content])
    with pytest.raises(
        ValueError, match=r"checkpoint\.pth: expected a checkpoint of `m2f train`; it is damaged or "
    ) as e:
        trainer(tmp_path)
    assert "\n" not in str(e.value)


def test_a_finished_run(tmp_path):
    """It is said in one line, and nothing is written; where the model was not written yet, it is."""
    trainer(tmp_path).run()
    files = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    mode = 0o666 & ~os.umask(os.umask(0o022))
    assert {(tmp_path / n).stat().st_mode & 0o777 for n in ("checkpoint.pth", "model.safetensors", "config.json")} == {
        mode
    }
    lines = []
    trainer(tmp_path, lines=lines).run()
    assert len(lines) == 1
    assert "checkpoint.pth: this run is at its end, step 4 of 4; the model is in" in lines[0]
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()} == files
    (tmp_path / "config.json").unlink()
    trainer(tmp_path).run()
    Mask2Former.from_pretrained(tmp_path)


def test_other_data_do_not_go_on(tmp_path):
    trainer(tmp_path).run(stop=2)
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"expected a checkpoint of a run on these data; samples: 12 there, 13 here"):
        Trainer(Mask2Former(small()), Shapes(length=13, size=64), RECIPE, tmp_path)
    with pytest.raises(ValueError, match=r"on these data; content: .* there, .* here"):
        Trainer(Mask2Former(small()), Shapes(length=12, size=64, seed=1), RECIPE, tmp_path)
    # Validation data may change.
    Trainer(Mask2Former(small()), DATA, RECIPE, tmp_path, validation=Shapes(length=3, size=32), log=lambda _: None)


class Reordered(Shapes):
    """The shapes under other numbers."""

    label_names = ("sky", "ground", "square", "disc", "triangle")
    stuff_labels = (0, 1)

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return {**sample, "labels": torch.tensor([3, 2, 4, 0, 1])[sample["labels"]]}


def test_validation_categories_are_compared_by_name(tmp_path):
    def with_(validation):
        return Trainer(Mask2Former(small()), DATA, RECIPE, tmp_path, validation=validation, log=lambda _: None)

    found = with_(Reordered(12, 64)).validation
    assert (found.label_names, found.stuff_labels, len(found)) == (DATA.label_names, DATA.stuff_labels, 12)
    assert all(torch.equal(found[i]["labels"], DATA[i]["labels"]) for i in range(12))
    for names, stuff, message in (
        (("disc",), (), "square, triangle, sky, ground missing"),
        ((*DATA.label_names[:4], "grass"), (3, 4), "ground missing; grass unknown"),
        ((*DATA.label_names, "grass"), (3, 4), "grass unknown"),
        (DATA.label_names, (3,), "expected the stuff of the training data; ground stuff in only one"),
    ):
        other = Shapes(12, 64)
        other.label_names, other.stuff_labels = names, stuff
        with pytest.raises(ValueError, match=f"validation: .*{message}"):
            with_(other)


def test_no_data(tmp_path):
    class Nothing(Shapes):
        def __len__(self):
            return 0

    with pytest.raises(ValueError, match="data: expected at least one sample"):
        Trainer(Mask2Former(small()), Nothing(), RECIPE, tmp_path)


def test_labels_of_another_data_set(tmp_path):
    with pytest.raises(ValueError, match=r"data: expected 4 labels, the model's; got \('disc'"):
        Trainer(Mask2Former(Mask2FormerConfig.tiny(4)), DATA, RECIPE, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps: expected at least 1; got 0"),
        ({"lr": 0}, "lr: expected a positive number; got 0"),
        ({"clip": -1}, "clip: expected a positive number"),
        ({"autocast": "fp8"}, "autocast: expected one of 'none', 'bf16', 'fp16'; got 'fp8'"),
        ({"size": 100}, "size: expected a multiple of 32; got 100"),
        ({"scales": (2, 1)}, "scales: expected 0 < smallest <= largest"),
    ],
)
def test_bad_recipes(changes, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**changes)


def test_batches_without_targets(tmp_path):
    run = trainer(tmp_path)
    nothing = {"labels": torch.zeros(0, dtype=torch.int64), "masks": torch.zeros(0, 64, 64, dtype=torch.bool)}
    losses, norm = run.update(torch.rand(2, 3, 64, 64), [nothing, nothing])
    assert all(v.isfinite() for v in losses.values())
    assert norm.isfinite()


# ---------------------------------------------------------------- the command


def test_command(tmp_path):
    arguments = ["train", "--data", "shapes", "-o", str(tmp_path / "out"), "--steps", "1", "--batch-size", "2"]
    result = m2f(*arguments)
    assert result.exit_code == 0, result.output
    assert "step 1/1  loss" in result.output
    assert "PQ" in result.output
    model = Mask2Former.from_pretrained(tmp_path / "out")
    assert model.config.label_names == ("disc", "square", "triangle", "sky", "ground")
    assert (tmp_path / "out" / "model.safetensors").stat().st_size < 10e6
    assert list((tmp_path / "out" / "tensorboard").iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "videos"], "semantic, ade20k or cityscapes; got 'videos'"),
        (["--data", "instance"], "--annotations, --images: expected both for instance data"),
        (["--data", "shapes", "--autocast", "fp8"], "autocast: expected one of"),
        (["--data", "shapes", "--backbone", "r50"], "backbone: expected none with"),
        (["--data", "instance", "--backbone", "r18"], "backbone: expected one of r50,"),
        (["--data", "shapes", "--annotations", "a.json"], "--annotations, --images: expected none with --data shapes"),
        (["--data", "shapes", "--backend", "fast"], "backend: expected one of auto, "),
        (["--data", "shapes", "--device", "gpu"], "expected auto, cpu, cuda or cuda:N"),
        (["--data", "shapes", "--device", "cuda:99"], "cuda:99: "),
    ],
)
def test_bad_commands(arguments, message, tmp_path):
    result = m2f("train", "-o", tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
