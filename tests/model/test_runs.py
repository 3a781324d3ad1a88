"""Runs that people can live with: what they say, keep and allow."""

import dataclasses
import json
import re

import pytest
import torch

from m2f_model import Mask2Former, Mask2FormerConfig
from m2f_model import train as training
from m2f_model.coco import CocoInstances, CocoPanoptic
from m2f_model.data import Shapes, summary
from m2f_model.evaluate import Quality
from m2f_model.semantic import SemanticMaps
from m2f_model.train import Trainer
from tests.model.command import m2f
from tests.model.generated import Beach, write_instances, write_panoptic, write_semantic
from tests.model.test_train import DATA, RECIPE, same, small, trainer

SHORT = dataclasses.replace(RECIPE, milestones=())


def qualities(monkeypatch, *values):
    """Let validations give these."""
    left = iter(values)
    monkeypatch.setattr(training, "evaluate", lambda *_: Quality(next(left), 0.0, 0.0))


def test_the_best_model_is_kept(tmp_path, monkeypatch):
    """That of the best validation, also where the run was stopped in between."""
    recipe, lines = dataclasses.replace(SHORT, steps=5, evaluate_every=1, save_every=5), []
    qualities(monkeypatch, 0.2, 0.5, 0.4, 0.5, 0.3)
    run = trainer(tmp_path, recipe, lines)
    run.run(stop=2)
    assert run.best == (0.5, 2)
    weights = {k: v.clone() for k, v in run.model.state_dict().items()}
    second = trainer(tmp_path, recipe, lines)
    assert second.best == (0.5, 2)
    second.run()
    assert second.best == (0.5, 2)
    same(Mask2Former.from_pretrained(tmp_path / "best").state_dict(), weights)
    assert json.loads((tmp_path / "best" / "validation.json").read_text()) == {"pq": 0.5, "step": 2}
    said = [line for line in lines if "best PQ so far" in line]
    assert [line.split("  ")[0] for line in said] == ["step 1", "step 2"]
    assert not torch.equal(
        second.model.transformer_decoder.class_head.weight, weights["transformer_decoder.class_head.weight"]
    )


def test_the_best_model_of_another_run_does_not_count(tmp_path, monkeypatch):
    """Of a run that was moved away, or of steps after the checkpoint; a damaged file neither."""
    recipe = dataclasses.replace(SHORT, evaluate_every=1, save_every=4)
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "validation.json").write_text('{"pq": 0.9, "step": 1}')
    qualities(monkeypatch, 0.2, 0.3)
    run = trainer(tmp_path, recipe)
    assert run.best is None
    run.run(stop=1)
    assert run.best == (0.2, 1)
    for text, best in (
        ('{"pq": 0.9, "step": 2}', None),
        ("{", None),
        ("[]", None),
        ('{"pq": 0.9, "step": 1}', (0.9, 1)),
    ):
        (tmp_path / "best" / "validation.json").write_text(text)
        assert trainer(tmp_path, recipe).best == best


def test_more_steps_go_on_exactly(tmp_path):
    """Without milestones a run that is extended, finished or not, is the longer run."""
    whole = trainer(tmp_path / "whole", SHORT)
    whole.run()
    trainer(tmp_path / "parts", dataclasses.replace(SHORT, steps=2)).run()
    lines = []
    second = trainer(tmp_path / "parts", SHORT, lines)
    assert lines[0].startswith("steps: 2 there, 4 here; after step 2 the learning rate is that of the new number")
    second.run()
    same(whole.model.state_dict(), second.model.state_dict())
    same(Mask2Former.from_pretrained(tmp_path / "parts").state_dict(), whole.model.state_dict())
    with pytest.raises(ValueError, match=r"steps: expected at least 4, which .*checkpoint\.pth has; got 3"):
        trainer(tmp_path / "parts", dataclasses.replace(SHORT, steps=3))


def test_checkpoints_of_former_versions(tmp_path):
    """Fields that they do not have were as by default."""
    run = trainer(tmp_path, SHORT)
    run.run(stop=1)
    state = torch.load(run.checkpoint)
    for name in ("crop", "colours", "schedule"):
        del state["recipe"][name]
    del state["config"]
    torch.save(state, run.checkpoint)
    assert trainer(tmp_path, SHORT).step == 1
    with pytest.raises(ValueError, match=r"checkpoint\.pth: expected a checkpoint of `m2f train`.*config missing"):
        Mask2Former.from_checkpoint(run.checkpoint)


def test_the_log_says_what_is_left(tmp_path, monkeypatch):
    lines, seconds = [], iter(range(100, 10**6, 1000))
    monkeypatch.setattr(training.time, "monotonic", lambda: next(seconds))
    run = trainer(tmp_path, dataclasses.replace(SHORT, steps=100), lines)
    run.run(stop=1)
    assert re.fullmatch(r"step 1/100  loss [\d.]+  lr 0\.0005  1000\.000 s/step  1 day, 3:30:00 left", lines[0]), lines[
        0
    ]


def test_other_loggers_get_what_tensorboard_gets(tmp_path, monkeypatch):
    written, given = [], []
    monkeypatch.setattr(training.SummaryWriter, "add_scalar", lambda self, *values: written.append(values))
    torch.manual_seed(0)
    run = Trainer(
        Mask2Former(small()),
        DATA,
        SHORT,
        tmp_path,
        validation=DATA,
        log=lambda _: None,
        callback=lambda step, values: given.extend((k, v, step) for k, v in values.items()),
    )
    run.run(stop=3)
    assert given == written
    names = {name for name, _, _ in given}
    assert {"train/loss", "train/lr", "train/gradient_norm", "validation/pq"} <= names
    assert {step for name, _, step in given if name.startswith("validation/")} == {3}
    assert all(isinstance(value, float) for _, value, _ in given)


def test_the_summary_of_data(tmp_path):
    assert summary(Shapes(length=7)) == ["7 images; 5 classes, 3 of things and 2 of stuff"]
    beach = Beach(length=3, size=64)
    panoptic = CocoPanoptic(*write_panoptic(beach, tmp_path / "p"))
    counts = [sum((beach[i]["labels"] == label).sum().item() for i in range(3)) for label in range(4)]
    first, second = summary(panoptic)
    assert first == "3 images; 4 classes, 2 of things and 2 of stuff"
    assert second.startswith(f"{sum(counts)} targets: ")
    assert all(f"{name} {count}" in second for name, count in zip(Beach.label_names, counts, strict=True))
    instances = CocoInstances(*write_instances(beach, tmp_path / "i"))
    assert instances.class_counts == counts[:2]
    maps, images = write_semantic(beach, tmp_path / "s")
    semantic = SemanticMaps.from_directories(images, maps, (*Beach.label_names, "bird", "fish"))
    assert len(summary(semantic)) == 1  # nothing is counted yet
    semantic.check()
    _, second, third = summary(semantic)
    assert second.startswith(f"{3 * 64 * 64} pixels: ")
    assert third == "no pixels of bird, fish"

    class Many:
        label_names, stuff_labels, class_counts = tuple(map(str, range(20))), (), list(range(20))

        def __len__(self):
            return 1

    assert summary(Many())[1:] == [
        "190 targets: 19 19, 18 18, 17 17, 16 16, 15 15, 14 14, ..., 6 6, 5 5, 4 4, 3 3, 2 2, 1 1",
        "no targets of 0",
    ]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A panoptic data set, and a model to start from, as arguments of m2f train."""
    folder = tmp_path_factory.mktemp("start")
    annotations, images = write_panoptic(Beach(length=5, size=64), folder / "data")
    torch.manual_seed(0)
    model = Mask2Former(small(label_names=("disc", "star", "sky", "water", "fish"), stuff_labels=(2, 3)))
    model.save_pretrained(folder / "model")
    data = ("--data", "panoptic", "--annotations", annotations, "--images", images, "--weights", folder / "model")
    return (
        *data,
        "--batch-size",
        2,
        "--size",
        64,
        "--workers",
        0,
        "--device",
        "cpu",
        "--validation-annotations",
        annotations,
    )


def test_a_dry_run(start, tmp_path):
    """A step's time and memory, and nothing on disk."""
    code, output = m2f("train", "-o", tmp_path / "run", *start, "--dry-run")
    assert code == 0, output
    line = output.splitlines()[-1]
    found = re.fullmatch(
        r"one batch: 2 x 3 x 64 x 64 pixels, (\d+) targets, loss ([\d.]+), [\d.]+ s for a step, "
        r"peak memory (\d+) MiB of the process",
        line,
    )
    assert found, line
    assert int(found[1]) > 0
    assert float(found[2]) > 0
    assert 100 < int(found[3]) < 100_000
    assert not list(tmp_path.iterdir())


def test_what_a_run_says_and_writes(start, tmp_path):
    """Epochs, intervals, the data at the start, the best model; an unfinished run is exported."""
    arguments = ("train", "-o", tmp_path / "run", *start, "--epochs", 1.1, "--log-every", 2, "--save-every", 1)
    code, output = m2f(*arguments, "--evaluate-every", 2)
    assert code == 0, output
    assert "data: 5 images; 4 classes, 2 of things and 2 of stuff\n" in output
    assert re.search(r"data: \d+ targets: .*star", output)
    assert "steps: 3 of 2 images, 1.2 times the data\n" in output
    assert "validation: 5 images, every 2 steps\n" in output
    assert re.search(r"step 2/3  loss .* s/step  0:00:\d\d left\n", output)
    assert len(re.findall(r"step \d/3  loss", output)) == 2  # the second and the last
    assert "best PQ so far" in output
    assert (tmp_path / "run" / "best" / "config.json").is_file()
    recipe = torch.load(tmp_path / "run" / "checkpoint.pth")["recipe"]
    assert (recipe["steps"], recipe["save_every"], recipe["log_every"], recipe["evaluate_every"]) == (3, 1, 2, 2)
    code, output = m2f(*arguments[:-6], "--steps", 4)
    assert (code, "steps: 3 there, 4 here" in output, "going on from step 3" in output) == (0, True, True)

    (tmp_path / "run" / "config.json").unlink()
    for checkpoint, out in (
        (tmp_path / "run" / "checkpoint.pth", "a"),
        (tmp_path / "run", "b"),
        (tmp_path / "run" / "best", "c"),
    ):
        code, output = m2f("export", checkpoint, "-o", tmp_path / out)
        assert (code, "a model of 4 classes is in" in output) == (0, True)
    saved = [Mask2Former.from_pretrained(tmp_path / out) for out in "abc"]
    same(saved[0].state_dict(), saved[1].state_dict())
    same(saved[2].state_dict(), Mask2Former.from_pretrained(tmp_path / "run" / "best").state_dict())
    assert saved[0].config.label_names == Beach.label_names
    assert isinstance(saved[0].config, Mask2FormerConfig)
    code, output = m2f("segment", start[5], "--weights", tmp_path / "a", "-o", tmp_path / "segmented")
    assert code == 0, output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--epochs", "0"], "--epochs: expected a positive number, and no --steps; got 0.0, --steps None"),
        (["train", "--epochs", "nan"], "--epochs: expected a positive number, and no --steps; got nan"),
        (["train", "--epochs", "inf"], "--epochs: expected a positive number, and no --steps; got inf"),
        (
            ["train", "--epochs", "1", "--steps", "2"],
            "--epochs: expected a positive number, and no --steps; got 1.0, --steps 2",
        ),
        (["train", "--save-every", "0"], "save_every: expected at least 1; got 0"),
        (["train", "--evaluate-every", "-1"], "evaluate_every: expected at least 1; got -1"),
        (["train", "--log-every", "x"], "argument --log-every: invalid int value: 'x'"),
        (["export", "gone.pth"], "--weights: no file gone.pth"),
        (["export", "gone"], "gone: no such directory"),
        (["export", "."], "expected a directory in Hugging Face's format"),
        (["export"], "the following arguments are required: CHECKPOINT"),
    ],
)
def test_mistakes(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = ["--data", "shapes"] if arguments[0] == "train" else []
    code, output = m2f(*arguments, "-o", "out", *data)
    assert (code, output.count("\n")) == (2, 1)
    assert output.startswith("error: ")
    assert message in output
    assert not (tmp_path / "out").exists()
