"""Writes README's tables of figures from committed CSVs: `python -m benchmarks.readme`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import tables
from benchmarks.cases import Row
from benchmarks.compare import read

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
#: Where README's figures come from: the first of these folders that has an operator's CSV.
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

    def text(self) -> str:
        for folder in self.folders:
            files = [RESULTS / folder / f"{op}.csv" for op in self.ops]
            if all(file.exists() for file in files):
                table = self.table([row for file in files for row in read(file)])
                drawn = [name for name in self.pictures if (RESULTS / folder / name).exists()]
                shown = [f"![{self.name}](benchmarks/results/{folder}/{name})" for name in drawn]
                return "\n\n".join([table, self.source(folder), *shown])
        return NOT_MEASURED

    def source(self, folder: str) -> str:
        links = ", ".join(f"[{op.replace('_', ' ')}](benchmarks/results/{folder}/{op}.md)" for op in self.ops)
        return f"Measured on {folder.split('/')[0]}; every case, aim, error, floor and fact of the run: {links}."


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


def update(readme: str) -> str:
    """`readme` with its blocks of figures replaced; a block whose marks it lacks is left out."""
    for block in BLOCKS:
        start, end = block.marks
        if start in readme:
            before, rest = readme.split(start)
            readme = f"{before}{start}\n\n{block.text()}\n\n{end}{rest.split(end)[1]}"
    return readme


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(update(path.read_text()))
