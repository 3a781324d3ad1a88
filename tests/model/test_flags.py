"""Every option of the command is used by some test, and those that no other test uses do what their help says."""

import argparse
from pathlib import Path

import pytest
import torch
from PIL import Image

from m2f_model import Mask2Former, cli
from m2f_model.data import Shapes
from tests.model.command import m2f
from tests.model.generated import Beach, write_panoptic
from tests.model.test_train import small

MODEL = Path(__file__).parents[2] / "benchmarks" / "models" / "shapes"


def test_every_option_is_used_by_a_test():
    """A quick look: as a string in the tests of the model, not counting the lists of names below `--help`."""
    text = "\n".join(path.read_text() for path in Path(__file__).parent.glob("*.py"))
    (commands,) = (a for a in cli.parser()._actions if isinstance(a, argparse._SubParsersAction))
    assert {"train", "segment", "evaluate", "export", "bench", "info"} <= set(commands.choices)
    unused = [
        (name, action.option_strings)
        for name, parser in commands.choices.items()
        for action in parser._actions
        if action.option_strings and "--help" not in action.option_strings
        if not any(f'"{option}"' in text for option in action.option_strings)
    ]
    assert not unused


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Arguments of m2f train for a step on one image."""
    folder = tmp_path_factory.mktemp("start")
    annotations, images = write_panoptic(Beach(length=1, size=64), folder / "data")
    torch.manual_seed(0)
    Mask2Former(small(label_names=Shapes.label_names)).save_pretrained(folder / "model")
    data = ("--data", "panoptic", "--annotations", annotations, "--images", images, "--weights", folder / "model")
    return (*data, "--steps", 1, "--batch-size", 1, "--size", 64, "--workers", 0, "--device", "cpu")


def recipe_of(start, out, *options):
    code, output = m2f("train", "-o", out, *start, *options)
    assert code == 0, output
    return torch.load(out / "checkpoint.pth"), output


def test_options_of_training(start, tmp_path):
    plain, output = recipe_of(start, tmp_path / "plain", "--seed", 3)
    assert "warning" not in output
    changed, output = recipe_of(
        start, tmp_path / "changed", "--lr", 0.003, "--seed", 4, "--activation-checkpointing", "--parallel", "fsdp"
    )
    assert {k: changed["recipe"][k] for k in ("lr", "seed", "activation_checkpointing", "parallel")} == {
        "lr": 0.003,
        "seed": 4,
        "activation_checkpointing": True,
        "parallel": "fsdp",
    }
    assert plain["recipe"]["seed"] == 3
    name = "transformer_decoder.mask_head.0.weight"
    before = Mask2Former.from_pretrained(start[7]).state_dict()[name]
    moved = [(state["model"][name] - before).abs().max().item() for state in (plain, changed)]
    assert moved[1] > 10 * moved[0] > 0  # AdamW's first step is the learning rate, whatever the gradient


def test_graphs_where_there_is_no_gpu(start, tmp_path):
    """It says so, once, and goes on as ever."""
    state, output = recipe_of(start, tmp_path / "run", "--cuda-graphs")
    assert state["recipe"]["cuda_graphs"]
    assert output.count("warning: ") == 1
    Image.fromarray(Shapes(seed=1)[0]["image"].permute(1, 2, 0).numpy()).save(tmp_path / "photo.png")
    arguments = ("segment", tmp_path / "photo.png", "--weights", MODEL, "--device", "cpu", "--task", "semantic")
    for name, options in (("plain", ()), ("graphs", ("--cuda-graphs",))):
        code, output = m2f(*arguments, "-o", tmp_path / name, *options)
        assert (code, output.count("warning: ")) == (0, len(options))
    results = [(tmp_path / name / "photo.semantic.png").read_bytes() for name in ("plain", "graphs")]
    assert results[0] == results[1]


@pytest.mark.slow
def test_a_training_step_of_the_benchmark():
    arguments = ("bench", "--backbone", "tiny", "--size", 64, "--rounds", 1, "--device", "cpu")
    code, output = m2f(*arguments, "--training", "--activation-checkpointing")
    assert code == 0, output
    assert "tiny 64² training step, batch 1, cpu" in output
