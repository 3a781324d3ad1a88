"""Training on the shapes for a while: memory and Python's objects stay where they were. Minutes."""

import gc
import os
from pathlib import Path

import pytest
import torch

from m2f_model import Mask2Former, Mask2FormerConfig
from m2f_model.data import Shapes
from m2f_model.train import Recipe, Trainer

PAGE = os.sysconf("SC_PAGE_SIZE")


def resident():
    """Bytes of memory that this process holds, and its Python objects."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE, len(gc.get_objects())


@pytest.mark.slow
def test_memory_stays_flat(tmp_path):
    """After 100 steps, in which caches and the allocator's heap have grown, 500 more add less than 8 MiB: 16 KiB a
    step, the size of one image's masks. All sizes of targets occur in the first part."""
    torch.manual_seed(0)
    data = Shapes(length=64, size=64)
    recipe = Recipe.shapes(steps=600, batch_size=4, save_every=10**6, evaluate_every=10**6, log_every=100)
    config = Mask2FormerConfig.tiny(5, stuff_labels=data.stuff_labels, num_points=256)
    measured = []

    def log(line):
        measured.append(resident())
        print(line, f"{measured[-1][0] / 2**20:.1f} MiB, {measured[-1][1]} objects")

    Trainer(Mask2Former(config), data, recipe, tmp_path, log=log).run()
    assert len(measured) == 6
    memory, objects = zip(*measured, strict=True)
    assert memory[-1] - memory[0] < 8 * 2**20
    assert objects[-1] - objects[0] < 500
