"""Two processes on gloo compute what one process computes."""

import dataclasses
import os
import signal

import pytest
import torch

import m2f_kernels.graphs
from m2f_model import Mask2Former, Mask2FormerConfig
from m2f_model.data import Shapes
from m2f_model.parallel import PARALLEL, whole
from m2f_model.train import Process, Recipe, Trainer
from tests.model.peers import fix_points, photograph
from tests.ranks import in_processes
from tests.recorded import Device

#: Ways to train on two processes.
WAYS = (*PARALLEL, "ddp, graphs")
LABELS = [torch.tensor([0, 3, 4]), torch.tensor([2, 1, 0])]
RECIPE = Recipe.shapes(steps=4, batch_size=2, save_every=2, evaluate_every=4, evaluate_count=2)


def model_of(seed):
    torch.manual_seed(seed)
    # Statistics of a batch of two are not those of two batches of one: batch norm is frozen.
    return Mask2Former(Mask2FormerConfig.tiny(5, frozen_batch_norm=True, num_points=256))


def batch():
    """Two photographs with three targets each: the class loss is a mean over the images of a process."""
    pixels = torch.cat([photograph("astronaut", 64, 96), photograph("coffee", 64, 96)])
    targets = []
    for image, labels in zip(pixels.mean(1), LABELS, strict=True):
        masks = torch.stack([(image > low) & (image < low + 1) for low in (-1.5, -0.5, 0.2)])
        targets.append({"labels": labels, "masks": masks})
    return pixels, targets


def gradients_of(trainer, pixels, targets):
    """Losses and unclipped gradients of a step, and the parameters after it."""
    found = {}

    def keep(parameters, *_):
        found.update({k: whole(p.grad).clone() for k, p in trainer.model.named_parameters() if p.grad is not None})
        return torch.tensor(0.0)

    torch.nn.utils.clip_grad_norm_, before = keep, torch.nn.utils.clip_grad_norm_
    try:
        losses, _ = trainer.update(pixels, targets)
    finally:
        torch.nn.utils.clip_grad_norm_ = before
    return losses, found, state_of(trainer)


def state_of(trainer):
    return {k: whole(v).clone() for k, v in trainer.model.state_dict().items()}


def quiet(_):
    pass


def one_step(rank, directory, parallel):
    fix_points(setattr)
    m2f_kernels.graphs.CudaDevice = Device  # stands for CUDA
    with Process.joined("cpu") as process:
        # Another seed in the other process: the model of the first one is what counts.
        trainer = Trainer(model_of(rank), Shapes(8), recipe_of(parallel), directory / "run", process=process, log=quiet)
        pixels, targets = batch()
        part = slice(rank, rank + 1)
        torch.save(gradients_of(trainer, pixels[part], targets[part]), directory / f"step{rank}.pt")
        if trainer.graphs is not None:  # captured once, and replayed
            trainer.update(pixels[part], targets[part])
            assert (trainer.graphs.captures, trainer.graphs.reason) == (1, None)
        if not trainer.sharded:  # DistributedDataParallel copies what its module returns, and may write buffers
            buffers = list(trainer.model.buffers())
            versions = [x._version for x in buffers]
            assert trainer.parallel(pixels[part], targets[part]).shape == (len(trainer._losses.names),)
            assert [x._version for x in buffers] == versions


def whole_and_parts(rank, directory, parallel):
    """Four steps at once, and two and two with new processes' state between."""
    with Process.joined("cpu") as process:
        states = []
        for name, stops in (("whole", [4]), ("parts", [2, 4])):
            for stop in stops:
                torch.manual_seed(100 * rank)
                data, recipe = Shapes(8, size=64), recipe_of(parallel)
                trainer = Trainer(
                    model_of(0), data, recipe, directory / name, process=process, validation=data, log=quiet
                )
                trainer.run(stop)
            states.append(state_of(trainer))
        torch.save(states, directory / f"states{rank}.pt")


def recipe_of(parallel):
    kind, _, graphs = parallel.partition(", ")
    return dataclasses.replace(RECIPE, parallel=kind, cuda_graphs=bool(graphs))


def interrupted(rank, directory, parallel):
    """The second process alone is told to stop, in its third step."""
    with Process.joined("cpu") as process:
        trainer = Trainer(model_of(0), Shapes(8), recipe_of(parallel), directory / "run", process=process, log=quiet)
        update = trainer.update

        def told(*batch):
            if rank == 1 and trainer.step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return update(*batch)

        trainer.update = told
        try:
            trainer.run()
        except SystemExit as error:
            (directory / f"ended{rank}").write_text(f"{trainer.step} {error.code}")


@pytest.mark.parametrize("parallel", WAYS)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_loss_and_gradients_are_those_of_one_process(tmp_path, monkeypatch, parallel):
    in_processes(one_step, tmp_path, parallel)
    parts = [torch.load(tmp_path / f"step{rank}.pt") for rank in range(2)]
    fix_points(monkeypatch.setattr)
    alone = Trainer(model_of(0), Shapes(8), RECIPE, tmp_path / "alone", log=quiet)
    losses, gradients, _ = gradients_of(alone, *batch())
    for key, value in losses.items():
        torch.testing.assert_close(sum(part[0][key] for part in parts) / 2, value, rtol=1e-5, atol=1e-6)
    assert len(gradients) > 100
    scale = max(g.norm() for g in gradients.values())
    for _, found, _ in parts:
        assert found.keys() == gradients.keys()
        for key, gradient in gradients.items():
            error = (found[key] - gradient).norm() / max(gradient.norm(), 1e-6 * scale)
            assert error < 1e-4, f"{key}: {error:.2g}"
    assert all(torch.equal(v, parts[1][2][k]) for k, v in parts[0][2].items())


@pytest.mark.parametrize("parallel", PARALLEL)
def test_two_processes_go_on_exactly(tmp_path, parallel):
    in_processes(whole_and_parts, tmp_path, parallel)
    (whole_state, resumed), (other, _) = (torch.load(tmp_path / f"states{rank}.pt") for rank in range(2))
    assert [k for k in whole_state if not torch.equal(whole_state[k], resumed[k])] == []
    assert [k for k in whole_state if not torch.equal(whole_state[k], other[k])] == []
    saved = Mask2Former.from_pretrained(tmp_path / "whole").state_dict()
    assert [k for k in whole_state if not torch.equal(whole_state[k], saved[k])] == []
    with pytest.raises(ValueError, match="processes: 2 there, 1 here"):
        Trainer(model_of(0), Shapes(8), recipe_of(parallel), tmp_path / "whole", log=quiet)


def test_processes_stop_together(tmp_path):
    in_processes(interrupted, tmp_path, "ddp")
    assert [(tmp_path / f"ended{rank}").read_text() for rank in range(2)] == ["3 143"] * 2
    assert torch.load(tmp_path / "run" / "checkpoint.pth", weights_only=True)["step"] == 3
