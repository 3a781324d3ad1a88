"""Writes the tables of README and docs/results.md from committed CSVs: `python -m benchmarks.readme`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import bench_end_to_end, other_models, peers_points, tables
from benchmarks.cases import Row
from benchmarks.compare import read
from benchmarks.formats import markdown, number

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
#: Pages with tables, and the relative path from each to the repository's root.
PAGES = {ROOT / "README.md": "", ROOT / "docs" / "results.md": "../"}
#: Folders of the CPU's figures: the first that has an operator's CSV is used.
FOLDERS = ("cpu-intel-xeon", "cpu-intel-xeon/full", "cpu-amd-epyc/full")
GPU = ("nvidia-h200",)
NOT_MEASURED = "*Not measured yet.*"


@dataclass(frozen=True)
class Block:
    """A part of README between two comments, written from CSVs."""

    name: str
    ops: tuple[str, ...]
    table: Callable[[Sequence[Row]], str]
    pictures: tuple[str, ...] = ()
    folders: tuple[str, ...] = FOLDERS

    @property
    def marks(self) -> tuple[str, str]:
        return f"<!-- {self.name}: python -m benchmarks.readme -->", f"<!-- end of {self.name} -->"

    def text(self, root: str) -> str:
        for folder in self.folders:
            files = [RESULTS / folder / f"{op}.csv" for op in self.ops]
            if all(file.exists() for file in files):
                table = self.table([row for file in files for row in read(file)])
                drawn = [name for name in self.pictures if (RESULTS / folder / name).exists()]
                shown = [f"![{self.name}]({root}benchmarks/results/{folder}/{name})" for name in drawn]
                return "\n\n".join([table, self.source(folder, root), *shown])
        return NOT_MEASURED

    def source(self, folder: str, root: str) -> str:
        links = ", ".join(f"[{op.replace('_', ' ')}]({root}benchmarks/results/{folder}/{op}.md)" for op in self.ops)
        return f"Measured on {folder.split('/')[0]}: {links}."


@dataclass(frozen=True)
class Headline:
    """A row of the headline table: one case of a run, before and after."""

    folder: str
    op: str
    case: str
    before: str
    after: str
    label: str

    def row(self, implementation: str) -> Row:
        return next(
            row
            for row in read(RESULTS / self.folder / f"{self.op}.csv")
            if (row.case, row.implementation) == (self.case, implementation) and row.setting in ("default", "cuda")
        )


_CPU, _GPU = "cpu-intel-xeon", "nvidia-h200"
_MODELS = (other_models.BEFORE, other_models.AFTER)
_OURS = (bench_end_to_end.TRANSFORMERS, bench_end_to_end.OURS)
_LOSS = (peers_points.TRANSFORMERS, tables.OURS)
HEADLINES = (
    Headline(
        _CPU, "integrations", "Mask2Former Swin-T, 1024²", *_MODELS, "CPU, Mask2Former Swin-T 1024², `accelerate`"
    ),
    Headline(
        _CPU, "integrations", "Deformable DETR ResNet-50, 800²", *_MODELS, "CPU, Deformable DETR 800², `accelerate`"
    ),
    Headline(_CPU, "end_to_end", "R50 inference 1024²", *_OURS, "CPU, Mask2Former R50 1024², `m2f_model`"),
    Headline(_CPU, "end_to_end", "R50 training step 512²", *_OURS, "CPU, training step R50 512², `m2f_model`"),
    Headline(_CPU, "point_loss", "loss part 1024² T=30", *_LOSS, "CPU, matching and loss at 12544 points, 1024²"),
    Headline(_GPU, "end_to_end", "R50 inference 1024²", *_OURS, "GPU, Mask2Former R50 1024², `m2f_model`"),
    Headline(
        _GPU, "end_to_end", "R50 training step 1024² N=2", *_OURS, "GPU, training step R50 1024², batch 2, `m2f_model`"
    ),
    Headline(_GPU, "point_loss", "loss part 1024² T=30", *_LOSS, "GPU, matching and loss at 12544 points, 1024²"),
)


def headline() -> str:
    """The README's table of results: `transformers` before, this package after."""
    lines = []
    for one in HEADLINES:
        before, after = one.row(one.before), one.row(one.after)
        cells = [
            (number(old), number(new), f"**{number(old / new)}x**")
            for old, new in ((before.median_ms, after.median_ms), (before.memory_extra_mib, after.memory_extra_mib))
            if old is not None and new is not None
        ]
        lines.append([one.label, *cells[0], *cells[1]])
    head = ["", "`transformers`, ms", "m2f, ms", "faster", "`transformers`, peak MiB", "m2f, peak MiB", "smaller"]
    return markdown(head, lines)


BLOCKS = (
    Block("figures of the loss", ("point_loss",), tables.point_loss, ("point_loss_curve.png",)),
    Block("figures of the whole model", ("end_to_end",), tables.end_to_end, ("end_to_end_stages.png",)),
    Block("figures of other people's models", ("integrations",), tables.integrations),
    Block("figures", ("ms_deform_attn",), tables.deformable_attention, ("ms_deform_attn.png",)),
    Block("figures of masked attention", ("attention_mask", "masked_attention"), tables.masked_attention),
    Block("figures of deformable attention on a GPU", ("ms_deform_attn",), tables.deformable_attention, (), GPU),
    Block("figures of the loss on a GPU", ("point_loss",), tables.point_loss, (), GPU),
    Block("figures of the whole model on a GPU", ("end_to_end",), tables.end_to_end, (), GPU),
)


_HEADLINE = ("<!-- headline: python -m benchmarks.readme -->", "<!-- end of headline -->")


def update(text: str, root: str = "") -> str:
    """A page with its tables replaced; those whose marks it lacks are left out.

    Args:
        root: what the page's links to the repository's root begin with.
    """
    blocks = [(_HEADLINE, headline), *((block.marks, lambda b=block: b.text(root)) for block in BLOCKS)]
    for (start, end), made in blocks:
        if start in text:
            before, rest = text.split(start)
            text = f"{before}{start}\n\n{made()}\n\n{end}{rest.split(end)[1]}"
    return text


if __name__ == "__main__":
    for page, root in PAGES.items():
        page.write_text(update(page.read_text(), root))
