"""The tables of README and of the documentation, from the committed results.

`python -m benchmarks.readme` writes README's, as every run does that renews committed results. Those of docs/ are put
in where `[Table: NAME](...)` stands alone on a line when the site is built (docs/hooks.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks import arguments, models, tables
from benchmarks.cases import OURS, Row
from benchmarks.compare import read
from benchmarks.formats import markdown, number
from benchmarks.ops import end_to_end, point_loss
from benchmarks.report import RESULTS

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
_CPU, _GPU = "cpu-intel-xeon", "nvidia-h200"


class Block(NamedTuple):
    """A table of a page, and pictures below it."""

    ops: tuple[str, ...]
    table: Callable[[Sequence[Row]], str]
    pictures: tuple[str, ...] = ()
    device: str = _CPU

    def text(self, up: str) -> str:
        """Markdown; `up` leads from the page to the repository's root."""
        rows = [r for r in read(RESULTS / f"{self.device}.csv") if r.run == "default" and r.op in self.ops]
        folder = f"{up}benchmarks/results/{self.device}"
        links = ", ".join(f"[{op.replace('_', ' ')}]({folder}/{op}.md)" for op in self.ops)
        parts = [self.table(rows)] if rows else []
        shown = [f"![{picture}]({folder}/{picture}.png)" for picture in self.pictures]
        return "\n\n".join([*parts, f"Measured on {self.device}: {links}.", *shown])


_MODELS = (models.BEFORE, models.AFTER)
_OURS = (end_to_end.TRANSFORMERS, end_to_end.OURS)
_LOSS = (point_loss.TRANSFORMERS, OURS)
#: Device, operator and case of a run, and what is before and after; the row of the table.
HEADLINES = {
    (_CPU, "integrations", "Mask2Former Swin-T, 1024²", *_MODELS): "CPU, Mask2Former Swin-T 1024², `accelerate`",
    (_CPU, "integrations", "Deformable DETR ResNet-50, 800²", *_MODELS): "CPU, Deformable DETR 800², `accelerate`",
    (_CPU, "end_to_end", "R50 inference 1024²", *_OURS): "CPU, Mask2Former R50 1024², `m2f_model`",
    (_CPU, "end_to_end", "R50 training step 512²", *_OURS): "CPU, training step R50 512², `m2f_model`",
    (_CPU, "point_loss", "loss part 1024² T=30", *_LOSS): "CPU, matching and loss at 12544 points, 1024²",
    (_GPU, "end_to_end", "R50 inference 1024²", *_OURS): "GPU, Mask2Former R50 1024², `m2f_model`",
    (_GPU, "end_to_end", "R50 training step 1024² N=2", *_OURS): "GPU, training step R50 1024², batch 2, `m2f_model`",
    (_GPU, "point_loss", "loss part 1024² T=30", *_LOSS): "GPU, matching and loss at 12544 points, 1024²",
}


def headlines() -> list[tuple[str, Row, Row]]:
    """The rows of the headline table: its label, and what was measured before and after."""
    rows = {(device, r.op, r.case, r.implementation): r
            for device in (_CPU, _GPU) for r in read(RESULTS / f"{device}.csv")
            if r.run == "default" and r.setting in ("default", "cuda")}  # fmt: skip
    return [(label, rows[(*case, x)], rows[(*case, y)]) for (*case, x, y), label in HEADLINES.items()]


def headline() -> str:
    """The README's table of results: `transformers` before, this package after."""
    lines = []
    for label, old, new in headlines():
        lines.append([label])
        for x, y in ((old.median_ms, new.median_ms), (old.memory_extra_mib, new.memory_extra_mib)):
            lines[-1] += [number(x), number(y), f"**{number(x / y)}x**"]
    head = ["", "`transformers`, ms", "m2f, ms", "faster", "`transformers`, peak MiB", "m2f, peak MiB", "smaller"]
    return markdown(head, lines)


BLOCKS = {
    "the loss": Block(("point_loss",), tables.point_loss, ("point_loss_curve",)),
    "the whole model": Block(("end_to_end",), tables.end_to_end, ("end_to_end_stages",)),
    "other people's models": Block(("integrations",), tables.integrations),
    "other people's models in detail": Block(("integrations",), tables.integrations_in_detail),
    "deformable attention": Block(("ms_deform_attn",), tables.deformable_attention, ("ms_deform_attn",)),
    "masked attention": Block(("attention_mask", "masked_attention"), tables.masked_attention),
    "training": Block(("learning",), lambda rows: "", ("learning",)),
    "deformable attention on a GPU": Block(("ms_deform_attn",), tables.deformable_attention, (), _GPU),
    "the loss on a GPU": Block(("point_loss",), tables.point_loss, (), _GPU),
    "the whole model on a GPU": Block(("end_to_end",), tables.end_to_end, (), _GPU),
}
MARKER = re.compile(r"^\[Table: (.*)\]\(.*\)$", re.MULTILINE)
_HEADLINE = ("<!-- headline: python -m benchmarks.readme -->", "<!-- end of headline -->")


def fill(page: str, up: str) -> str:
    """A page of the documentation with its tables; `up` leads from it to the repository's root."""
    return MARKER.sub(lambda found: BLOCKS[found[1]].text(up), page)


def update(readme: str) -> str:
    """README with its table replaced."""
    before, rest = readme.split(_HEADLINE[0])
    return f"{before}{_HEADLINE[0]}\n\n{headline()}\n\n{_HEADLINE[1]}{rest.split(_HEADLINE[1])[1]}"


def main() -> None:
    README.write_text(update(README.read_text()))


if __name__ == "__main__":
    arguments(__doc__, {})
    main()
