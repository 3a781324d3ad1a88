"""Other classes for a trained model: what is kept, from which kinds of weights, and that it pays."""

import statistics
from pathlib import Path

import pytest
import torch

from m2f_model import Mask2Former, Mask2FormerConfig
from m2f_model.data import Shapes
from m2f_model.evaluate import evaluate
from m2f_model.labels import rows_of
from m2f_model.train import Recipe, Trainer
from m2f_model.weights import to_detectron2
from tests.model.command import m2f
from tests.model.generated import Beach, write_panoptic
from tests.model.test_train import small

MODEL = Path(__file__).parents[2] / "benchmarks" / "models" / "shapes"


@pytest.mark.parametrize(
    ("names", "known", "rows"),
    [
        (("a", "b"), ("b", "c", "a"), [2, 0]),
        (("Sky ", "tree"), ("tree-merged", "sky-other-merged"), [1, 0]),
        # The same name goes before the same words; what could be two is neither.
        (("sky-other", "sky"), ("sky", "sky-other-merged"), [1, 0]),
        (("sky",), ("sky-other-merged", "sky-stuff"), [None]),
        (("sky-other", "sky-stuff"), ("sky",), [None, None]),
        (("a", "a"), ("a",), [None, None]),
        (("windowpane, window",), ("door", "window"), [1]),
        (("traffic light",), ("light", "traffic"), [None]),
        (("SKY ",), ("sky", "sky-other-merged"), [0]),
        # In any script.
        (("犬", "STRASSE"), ("straße", "犬"), [1, 0]),
        (("犬",), ("猫",), [None]),
        (("Ёлка other",), ("ёлка",), [0]),
        (("-",), ("+",), [None]),
        ((), ("a",), []),
    ],
)
def test_rows_of_the_same_name(names, known, rows):
    assert rows_of(names, known) == rows


def test_relabel_keeps_rows_of_the_same_name():
    torch.manual_seed(0)
    model, old = (Mask2Former.from_pretrained(MODEL) for _ in range(2))
    pixels = torch.randn(1, 3, 64, 64)
    report = model.relabel(Beach.label_names, Beach.stuff_labels)
    assert (report.kept, report.new, report.gone) == (
        ("disc", "sky"),
        ("star", "water"),
        ("square", "triangle", "ground"),
    )
    assert (
        str(report) == "classes: 2 kept (disc, sky); 2 new (star, water); 3 no longer there (square, triangle, ground)"
    )
    ours, theirs = model(pixels), old(pixels)
    torch.testing.assert_close(ours.class_logits[..., [1, 3, 4]], theirs.class_logits[..., [0, 3, 5]])
    assert not torch.isclose(ours.class_logits[..., 0], theirs.class_logits[..., 1]).any()
    assert torch.equal(ours.masks.logits(), theirs.masks.logits())
    assert (model.config.num_labels, model.config.label_names) == (4, Beach.label_names)
    assert model.config.stuff_labels == Beach.stuff_labels
    target = {"labels": torch.tensor([3]), "masks": torch.ones(1, 64, 64)}
    assert all(loss.isfinite() for loss in model(pixels, [target]).losses.values())


def test_from_pretrained_with_labels(tmp_path):
    model = Mask2Former.from_pretrained(MODEL, labels=("sky", "bird"), stuff_labels=(0,))
    assert (model.config.label_names, model.config.stuff_labels) == (("sky", "bird"), (0,))
    old = Mask2Former.from_pretrained(MODEL).transformer_decoder.class_head
    assert torch.equal(model.transformer_decoder.class_head.weight[[0, 2]], old.weight[[3, 5]])
    assert torch.equal(model.transformer_decoder.class_head.bias[[0, 2]], old.bias[[3, 5]])
    model.save_pretrained(tmp_path)
    assert Mask2Former.from_pretrained(tmp_path).config.label_names == ("sky", "bird")
    for labels, stuff, message in [
        ((), None, r"labels: expected the names of classes; got \(\)"),
        ("sky", None, "labels: expected the names of classes; got 'sky'"),
        (("sky",), (1,), r"stuff_labels: expected labels in \[0, 1\)"),
        (None, (1,), "stuff_labels: expected none without labels"),
    ]:
        with pytest.raises(ValueError, match=message):
            Mask2Former.from_pretrained(MODEL, labels=labels, stuff_labels=stuff)


def test_classes_without_names():
    """As many are taken for the same, in order, and it says so; else only "no object" is known."""
    for count, in_order in ((5, True), (4, False)):
        model, old = Mask2Former(small()), small()
        assert old.label_names is None
        weight = model.transformer_decoder.class_head.weight.clone()
        report = model.relabel([f"class {i}" for i in range(count)])
        assert (report.in_order, len(report.kept)) == (in_order, 5 if in_order else 0)
        assert ("taken for these, in order" in str(report)) == in_order
        assert torch.equal(model.transformer_decoder.class_head.weight[-1], weight[-1])
        assert torch.equal(model.transformer_decoder.class_head.weight, weight) == in_order


@pytest.fixture(scope="module")
def beach(tmp_path_factory):
    return write_panoptic(Beach(length=3, size=64), tmp_path_factory.mktemp("beach"))


#: Of a run of one step.
ONE_STEP = ("--steps", 1, "--batch-size", 1, "--size", 64, "--workers", 0, "--device", "cpu")


@pytest.mark.parametrize("kind", ["Hugging Face", "detectron2", "checkpoint"])
def test_the_command(kind, tmp_path, beach, monkeypatch):
    """All kinds of weights start a run on other classes, which says in one line what it keeps."""
    torch.manual_seed(0)
    model = Mask2Former(small(label_names=Shapes.label_names))
    arguments = []
    if kind == "Hugging Face":
        weights = tmp_path / "start"
        model.save_pretrained(weights)
    elif kind == "detectron2":
        weights, arguments = tmp_path / "model.pth", ["--config", "r50-coco-panoptic"]
        torch.save({"model": to_detectron2(model.state_dict())}, weights)
        monkeypatch.setattr(Mask2FormerConfig, "preset", lambda name: model.config)
    else:
        run = Trainer(model, Shapes(length=1, size=64), Recipe.shapes(steps=2, batch_size=1), tmp_path / "start")
        run.run(stop=1)
        weights = run.checkpoint
    data = ["--data", "panoptic", "--annotations", beach[0], "--images", beach[1]]
    code, output = m2f("train", "-o", tmp_path / "run", *data, "--weights", weights, *arguments, *ONE_STEP)
    assert code == 0, output
    line = "classes: 2 kept (disc, sky); 2 new (star, water); 3 no longer there (square, triangle, ground)\n"
    assert line in output
    trained = Mask2Former.from_pretrained(tmp_path / "run")
    assert (trained.config.label_names, trained.config.stuff_labels) == (Beach.label_names, Beach.stuff_labels)
    head, old = trained.transformer_decoder.class_head.weight, model.transformer_decoder.class_head.weight
    assert (head[1] - old[0]).abs().max() < 1e-3  # a step of the optimiser apart
    assert (head[0] - old[1]).abs().max() > 1e-2


def test_checkpoints_of_runs_are_models(tmp_path):
    run = Trainer(Mask2Former(small()), Shapes(length=1, size=64), Recipe.shapes(steps=2, batch_size=1), tmp_path)
    run.run(stop=1)
    loaded = Mask2Former.from_checkpoint(run.checkpoint)
    assert loaded.config == run.model.config
    assert not loaded.training
    own = run.model.state_dict()
    assert all(torch.equal(v, own[k]) for k, v in loaded.state_dict().items())
    code, output = m2f("info", "--weights", run.checkpoint)
    assert (code, "stuff_labels               (3, 4)" in output) == (0, True)
    (tmp_path / "other.pth").write_bytes(b"x")
    code, output = m2f("info", "--weights", tmp_path / "other.pth")
    assert (code, output.count("\n")) == (2, 1)
    assert "other.pth: expected a checkpoint of `m2f train`" in output
    assert "a detectron2 checkpoint does not say what it is: give --config PRESET" in output
    state = torch.load(run.checkpoint)
    torch.save({**state, "config": {**state["config"], "backbone": None}}, run.checkpoint)
    with pytest.raises(ValueError, match="expected a run with a backbone of transformers"):
        Mask2Former.from_checkpoint(run.checkpoint)


def steps_to_quality(model, seed, out, quality=0.8, every=50, limit=2000):
    """Steps until the panoptic quality of 100 new images reaches `quality`."""
    recipe = Recipe.shapes(steps=limit, seed=seed, save_every=limit, milestones=(), evaluate_every=limit)
    run = Trainer(model, Beach(seed=seed), recipe, out, log=lambda _: None)
    validation = Beach(length=100, seed=1000 + seed)
    for step in range(every, limit + 1, every):
        run.run(stop=step)
        reached = evaluate(run.model, validation).pq
        print(f"seed {seed}, step {step}: PQ {reached:.3f}", flush=True)
        if reached >= quality:
            return step
    raise AssertionError(f"PQ {reached:.3f} after {limit} steps")


@pytest.mark.slow
def test_fine_tuning_pays(tmp_path):
    """From the model of the shapes at most half of the steps that a new model takes, median of three seeds."""
    steps = {"fine-tuned": [], "from scratch": []}
    for seed in range(3):
        for name in steps:
            torch.manual_seed(seed)
            if name == "fine-tuned":
                model = Mask2Former.from_pretrained(MODEL)
                assert model.relabel(Beach.label_names, Beach.stuff_labels).kept == ("disc", "sky")
            else:
                config = Mask2FormerConfig.tiny(4, label_names=Beach.label_names, stuff_labels=Beach.stuff_labels)
                model = Mask2Former(config)
            steps[name].append(steps_to_quality(model, seed, tmp_path / f"{name}-{seed}"))
    print("steps to PQ 0.8:", steps)
    assert statistics.median(steps["fine-tuned"]) <= statistics.median(steps["from scratch"]) / 2
