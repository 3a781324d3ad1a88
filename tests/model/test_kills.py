"""A run that is ended at random moments, again and again: nothing is lost beyond the last save interval, and nothing is
left over. Minutes."""

import multiprocessing
import os
import random
import signal
import time
from collections import Counter

import pytest
import torch

from m2f_model import Mask2Former, Mask2FormerConfig
from m2f_model.data import Shapes
from m2f_model.train import Recipe, Trainer

MOMENTS = 40
DATA = Shapes(length=32, size=64)
RECIPE = Recipe.shapes(
    steps=150, batch_size=2, size=64, workers=1, log_every=50, save_every=4, evaluate_every=10, evaluate_count=6
)


def live(out, diary):
    """One life of the run, which writes down what it is about to do and what it has done."""
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)

    def note(line):
        with diary.open("a") as file:
            file.write(f"{line}\n")

    note("starting")
    torch.manual_seed(0)
    sizes = {"encoder_layers": 1, "decoder_layers": 2, "num_queries": 8, "num_points": 64}
    config = Mask2FormerConfig.tiny(5, stuff_labels=DATA.stuff_labels, label_names=DATA.label_names, **sizes)
    run = Trainer(Mask2Former(config), DATA, RECIPE, out, validation=Shapes(6, 64, seed=1), log=lambda _: None)
    left = [p.name for p in out.iterdir() if p.name.startswith(".")]
    note(f"started {run.step} {' '.join(left)}")
    update, save, evaluate = run.update, run.save, run._evaluate

    def noted(name, function):
        def call(*args):
            note(name)
            found = function(*args)
            note(f"done {run.step}" if name == "step" else f"after {name}")
            return found

        return call

    run.update, run.save, run._evaluate = noted("step", update), noted("save", save), noted("validation", evaluate)
    run.run()


def start(*args):
    process = multiprocessing.get_context("fork").Process(target=live, args=args)
    process.start()
    return process


def weights(out):
    return Mask2Former.from_pretrained(out).state_dict()


@pytest.mark.slow
def test_random_moments(tmp_path):
    """SIGKILL, SIGINT and SIGTERM in turn. What a run has finished in the end is what one has that nobody ended."""
    (tmp_path / "whole").mkdir()
    began = time.monotonic()
    whole = start(tmp_path / "whole", tmp_path / "diary")
    whole.join()
    assert whole.exitcode == 0
    length = time.monotonic() - began
    expected = weights(tmp_path / "whole")
    chosen, hit, finished, lost = random.Random(0), Counter(), 0, []
    for moment in range(MOMENTS):
        out = tmp_path / f"run{finished}"
        out.mkdir(exist_ok=True)
        diary = tmp_path / f"diary{moment}"
        number = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)[moment % 3]
        life = start(out, diary)
        # The time until the first step is as long as some steps: most moments lie behind it.
        life.join(chosen.uniform(0, 0.2 * length))
        if life.is_alive():
            os.kill(life.pid, number)
        life.join(60)
        assert not life.is_alive()
        lines = diary.read_text().splitlines() if diary.exists() else []
        assert not [x for x in lines if x.startswith("started") and len(x.split()) > 2], lines
        steps = [int(x.split()[1]) for x in lines if x.startswith("done")]
        during = lines[-1].split()[0] if lines else "starting"
        during = {"done": "step", "after": "step", "started": "starting"}.get(during, during)
        # What a signal finds is finished; only a kill leaves the diary where it was.
        hit[("" if life.exitcode else "too late for ") + number.name] += 1
        hit[f"kill while {during}"] += number == signal.SIGKILL and life.exitcode != 0
        checkpoint = out / "checkpoint.pth"
        if steps:
            written = torch.load(checkpoint, weights_only=True)["step"] if checkpoint.exists() else 0
            lost.append(steps[-1] - written)
            assert lost[-1] <= (RECIPE.save_every if number == signal.SIGKILL else 0), (number, lines[-5:])
        if (out / "config.json").exists():
            found = weights(out)
            assert all(torch.equal(found[k], v) for k, v in expected.items())
            finished += 1
    out = tmp_path / f"run{finished}"
    out.mkdir(exist_ok=True)
    last = start(out, tmp_path / "diary")
    last.join()
    found = weights(out)
    assert all(torch.equal(found[k], v) for k, v in expected.items())
    assert not [p.name for p in out.iterdir() if p.name.startswith(".")]
    print(f"{MOMENTS} moments, {finished + 1} runs, at most {max(lost)} steps of {RECIPE.save_every} lost; {dict(hit)}")
    assert len(lost) > MOMENTS / 4
    assert all(hit[name] for name in ("SIGKILL", "SIGINT", "SIGTERM"))
