"""Training by two processes is training by one with the batch of both."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from m2f_model import Mask2Former, Mask2FormerConfig
from m2f_model.data import Batches, Shapes
from m2f_model.train import Process, Recipe, Trainer

BATCH = 4
ROOT = Path(__file__).parents[2]


class SameTargets(Shapes):
    """Two targets in every image. The class loss is a mean over each process' queries, weighted by what they match, as
    published: the mean of two such means is the mean over both only where both have as many targets."""

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return {**sample, "labels": sample["labels"][:2], "masks": sample["masks"][:2]}


def one_point_set():
    """Random points and importance sampling draw in another order for another batch: here all masks have one set."""
    import m2f_kernels
    from m2f_kernels.nn import hungarian_matcher, point_mask_criterion

    points = torch.rand(64, 2, generator=torch.Generator().manual_seed(7))

    class Random:
        def __getattr__(self, name):
            return getattr(torch, name)

        @staticmethod
        def rand(*shape, **_):
            return points[: shape[-2]].expand(*shape)

    def fixed(masks, targets, pairs, count, *_):
        rows = sum(len(queries) for queries, _ in pairs)
        return m2f_kernels.point_mask_loss(masks, targets, points[:count].expand(rows, -1, -1), matches=pairs)

    hungarian_matcher.torch = Random()
    point_mask_criterion.uncertain_point_mask_loss = fixed


def train(out):
    """Two steps; losses, clipped gradients, their norms and the final weights of this process."""
    torch.set_num_threads(1)
    one_point_set()
    with Process.joined("cpu") as process:
        torch.manual_seed(0)
        # Batch norm that is not frozen would see another batch.
        sizes = {"encoder_layers": 1, "decoder_layers": 2, "num_queries": 8, "num_points": 64}
        model = Mask2Former(Mask2FormerConfig.tiny(5, frozen_batch_norm=True, **sizes))
        data = SameTargets(length=12, size=64)
        recipe = Recipe.shapes(steps=2, batch_size=BATCH // process.world_size)
        trainer = Trainer(model, data, recipe, out, process=process, log=lambda _: None)
        batches = Batches(data, recipe.batch_size, rank=process.rank, world_size=process.world_size)
        steps = []
        for step in range(2):
            losses, norm = trainer.update(*batches[step])
            gradients = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
            steps.append({"losses": losses, "norm": norm, "gradients": gradients})
        trainer.save()
        result = {"steps": steps, "weights": model.state_dict(), "world_size": process.world_size}
        torch.save(result, out / f"result{process.rank}.pt")


def run(out, world_size):
    out.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = f"from pathlib import Path; from tests.model.test_two_processes import train; train(Path({str(out)!r}))"
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    processes = []
    for rank in range(world_size):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), **together}
        environment = {**clean, **(ranks if world_size > 1 else {})}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", code],
                cwd=ROOT,
                env=environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
    try:
        for process in processes:
            output, _ = process.communicate(timeout=120)
            assert process.returncode == 0, output
    finally:
        for process in processes:
            process.kill()
    return [torch.load(out / f"result{rank}.pt") for rank in range(world_size)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("processes")
    return run(out / "one", 1)[0], run(out / "two", 2), out / "two"


def test_loss_and_gradients(results):
    one, two, _ = results
    assert [r["world_size"] for r in two] == [2, 2]
    assert any(p.ne(q).any() for p, q in zip(*(r["steps"][0]["losses"].values() for r in two), strict=True))
    # Of the first step. After it AdamW, which divides by the size of gradients, has made rounding as large as they are.
    alone, ranks = one["steps"][0], [r["steps"][0] for r in two]
    for name, loss in alone["losses"].items():
        mean = (ranks[0]["losses"][name] + ranks[1]["losses"][name]) / 2
        torch.testing.assert_close(mean, loss, rtol=1e-4, atol=0, msg=lambda m, name=name: f"{name}: {m}")
    scale = max(g.norm() for g in alone["gradients"].values())
    for rank in ranks:
        torch.testing.assert_close(rank["norm"], alone["norm"], rtol=1e-3, atol=0)
        assert rank["gradients"].keys() == alone["gradients"].keys()
        for name, expected in alone["gradients"].items():
            error = (rank["gradients"][name] - expected).norm() / max(expected.norm(), 1e-4 * scale)
            assert error < 1e-3, f"{name}: {error:.2g}"


def test_weights_stay_the_same_in_both(results):
    _, (first, second), _ = results
    assert all(torch.equal(x, second["weights"][name]) for name, x in first["weights"].items())


def test_one_checkpoint_with_the_random_state_of_each(results):
    _, _, out = results
    state = torch.load(out / "checkpoint.pth", weights_only=True)
    assert state["step"] == 2
    assert not torch.equal(state["random"][0]["cpu"], state["random"][1]["cpu"])
