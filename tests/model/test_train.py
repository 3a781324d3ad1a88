"""Training: the recipe, runs that go on exactly, checkpoints that survive."""

import dataclasses

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from m2f_model import Mask2Former, Mask2FormerConfig
from m2f_model.cli import app
from m2f_model.data import Shapes
from m2f_model.train import Recipe, Trainer, build_optimizer

DATA = Shapes(length=12, size=64)
#: Four steps with everything on that could make a difference: milestones, jitter, evaluation.
RECIPE = Recipe.shapes(
    steps=4, batch_size=2, size=64, log_every=1, save_every=2, evaluate_every=3, evaluate_count=2, milestones=(0.6,)
)


def small(**changes):
    sizes = {"encoder_layers": 1, "decoder_layers": 2, "num_queries": 8, "num_points": 64}
    return Mask2FormerConfig.tiny(5, stuff_labels=DATA.stuff_labels, **{**sizes, **changes})


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
        other = name.endswith("relative_position_bias_table") or name == "pixel_decoder.level_embed"
        assert (name in still) == (norm_or_embedding or other), name


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
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.pth", "tensorboard"]
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
    result = CliRunner().invoke(app, arguments)
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
        (["--data", "videos"], "data: expected shapes, instance or panoptic; got 'videos'"),
        (["--data", "instance"], "annotations, images: expected both for instance data"),
        (["--data", "shapes", "--autocast", "fp8"], "autocast: expected one of"),
        (["--data", "shapes", "--backbone", "r50"], "backbone: expected none with"),
        (["--data", "instance", "--backbone", "r18"], "backbone: expected one of r50,"),
        (["--data", "shapes", "--annotations", "a.json"], "annotations, images: expected none with shapes"),
        (["--data", "shapes", "--backend", "fast"], "backend: expected one of auto, reference"),
        (["--data", "shapes", "--device", "gpu"], "expected cpu, cuda or cuda:N"),
        (["--data", "shapes", "--device", "cuda:99"], "cuda:99: "),
    ],
)
def test_bad_commands(arguments, message, tmp_path):
    result = CliRunner().invoke(app, ["train", "-o", str(tmp_path / "out"), *arguments])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
