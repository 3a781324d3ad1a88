"""mmcv's attention module and mmdet's pixel decoder, before and after `m2f_kernels.integrations.mmcv.patch()`.

`python -m benchmarks.integrations_ecosystems` prints the table of docs/integrations/mmcv.md; CPU, float32. Needs mmcv,
and mmdet for its rows; mmcv's compiled extension, which has no CPU kernel, may be missing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import memory, timing
from m2f_kernels.integrations import mmcv as integration


def provide_extension() -> None:
    """mmcv imports its extension for every operator; where it was not built, a module without functions that work."""

    class NotCompiled(ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return None

    if importlib.util.find_spec("mmcv._ext") is None:
        sys.modules["mmcv._ext"] = NotCompiled("mmcv._ext")


def attention(side: int) -> tuple[nn.Module, Callable[[nn.Module], list[Tensor]]]:
    """One encoder layer's attention of a `side`² image: strides 32, 16 and 8, every position a query."""
    from mmcv.ops import MultiScaleDeformableAttention

    sizes = [(side // s, side // s) for s in (32, 16, 8)]
    length = sum(h * w for h, w in sizes)
    module = MultiScaleDeformableAttention(256, 8, 3, 4, dropout=0.0, batch_first=True)
    query, points = torch.randn(1, length, 256), torch.rand(1, length, 3, 2)
    shapes = torch.tensor(sizes)
    starts = torch.cat([shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]])

    def run(module: nn.Module) -> list[Tensor]:
        return [module(query, reference_points=points, spatial_shapes=shapes, level_start_index=starts)]

    return module, run


def pixel_decoder(side: int) -> tuple[nn.Module, Callable[[nn.Module], list[Tensor]]]:
    """MSDeformAttnPixelDecoder as mmdet's Mask2Former with a ResNet-50 configures it."""
    from mmdet.models.layers import MSDeformAttnPixelDecoder
    from mmengine.config import ConfigDict

    attention_config = {"embed_dims": 256, "num_heads": 8, "num_levels": 3, "num_points": 4, "batch_first": True}
    ffn = {"embed_dims": 256, "feedforward_channels": 1024}
    decoder = MSDeformAttnPixelDecoder(
        in_channels=[256, 512, 1024, 2048],
        strides=[4, 8, 16, 32],
        feat_channels=256,
        out_channels=256,
        num_outs=3,
        norm_cfg=ConfigDict(type="GN", num_groups=32),
        act_cfg=ConfigDict(type="ReLU"),
        encoder=ConfigDict(num_layers=6, layer_cfg={"self_attn_cfg": attention_config, "ffn_cfg": ffn}),
        positional_encoding=ConfigDict(num_feats=128, normalize=True),
    )
    decoder.init_weights()
    channels = zip((256, 512, 1024, 2048), (4, 8, 16, 32), strict=True)
    features = [torch.randn(1, c, side // s, side // s) for c, s in channels]

    def run(module: nn.Module) -> list[Tensor]:
        mask_features, levels = module(features)
        return [mask_features, *levels]

    return decoder, run


def runs() -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """By name of a row: the same call before and after. What patch() does to the class is done in front of each;
    patch() itself searches all modules, which is not to be timed."""
    from mmcv.ops import MultiScaleDeformableAttention

    original = MultiScaleDeformableAttention.forward
    cases = {"attention, 1024²": (attention, 1024), "attention, 512²": (attention, 512)}
    if importlib.util.find_spec("mmdet") is not None:
        cases["pixel decoder, 512²"] = (pixel_decoder, 512)
    found = {}
    for name, (build, side) in cases.items():
        torch.manual_seed(0)
        module, run = build(side)
        module.eval()

        def forward(use: Any, module: nn.Module = module, run: Any = run) -> list[Tensor]:
            MultiScaleDeformableAttention.forward = use
            with torch.no_grad():
                return run(module)

        def step(use: Any, module: nn.Module = module, run: Any = run) -> list[Tensor]:
            MultiScaleDeformableAttention.forward = use
            module.zero_grad()
            outputs = run(module)
            sum(x.mean() for x in outputs).backward()
            return [x.detach() for x in outputs]

        for direction, function in (("forward", forward), ("forward + backward", step)):
            pair = (partial(function, original), partial(function, integration._attention_forward))
            found[f"{name}, {direction}"] = pair
    return found


def peaks() -> dict[str, list[float]]:
    """Peak MiB above what is there before the call, in a process of its own as benchmarks.memory wants it."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.integrations_ecosystems", "--memory"]
    done = subprocess.run(command, env={**os.environ, **memory.ENVIRONMENT}, check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", type=float, default=10.0, help="seconds of interleaved timing per row")
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if importlib.util.find_spec("mmcv") is None:
        raise SystemExit("mmcv is not installed: there is nothing to compare with")
    provide_extension()
    if arguments.memory:
        table = runs()
        for run in (run for pair in table.values() for run in pair):  # threads and code
            run()
        print(json.dumps({name: [memory.peak_mib(run, "cpu")[0] for run in pair] for name, pair in table.items()}))
        return
    measured = peaks()
    print(
        "| CPU, float32, batch 1 | ms before | ms after | ratio | peak MiB before | peak MiB after | max difference |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, pair in runs().items():
        difference = max(float((a - b).abs().max()) for a, b in zip(pair[0](), pair[1](), strict=True))
        before, after = (t.median_ms for t in timing.interleaved(pair, "cpu", arguments.budget, 5))
        memories = " | ".join(f"{mib:.0f}" for mib in measured[name])
        print(
            f"| {name} | {before:.0f} | **{after:.0f}** | {before / after:.2f}x | {memories} | {difference:.1g} |",
            flush=True,
        )
    print(f"\n{torch.get_num_threads()} threads, torch {torch.__version__}")


if __name__ == "__main__":
    main()
