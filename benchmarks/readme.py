"""Writes README's tables of figures from committed CSVs: `python -m benchmarks.readme`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import peers_attention, peers_points
from benchmarks.cases import Row
from benchmarks.formats import mebibytes, number
from benchmarks.report import read_csv

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
OURS = "m2f_kernels"
SETTINGS = ("default", "heap retained")
NOT_MEASURED = "*Not measured yet.*"


def _measured(rows: Sequence[Row]) -> dict[tuple[str, str, str], Row]:
    return {(r.case, r.implementation, r.setting): r for r in rows}


def times(rows: Sequence[Row], cases: dict[str, str], columns: dict[str, str]) -> list[str]:
    """Lines of Markdown: each case's time in both allocator settings, with the peers' ratios to ours.

    Args:
        cases: case and what it is called.
        columns: implementation and what it is called, ours first.
    """
    by_key = _measured(rows)
    lines = [
        "| ms, default allocator (heap retained) | " + " | ".join(columns.values()) + " |",
        "|" + "---|" * (1 + len(columns)),
    ]
    for case, name in cases.items():
        cells = []
        for implementation in columns:
            texts = []
            for setting in SETTINGS:
                time = by_key[case, implementation, setting].median_ms
                ours = by_key[case, OURS, setting].median_ms
                if time is None or ours is None:
                    texts.append("-")
                elif implementation == OURS:
                    texts.append(f"**{number(time)}**" if setting == SETTINGS[0] else number(time))
                else:
                    texts.append(f"{number(time)}, {number(time / ours)}x")
            cells.append(f"{texts[0]} ({texts[1]})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def amounts(
    rows: Sequence[Row],
    case: str,
    columns: dict[str, str],
    name: str,
    text: Callable[[Row], str] = lambda row: mebibytes(row.memory_extra_mib),
) -> str:
    """A line of Markdown: an amount of memory of each implementation."""
    by_key = _measured(rows)
    return f"| {name} | {' | '.join(text(by_key[case, one, SETTINGS[0]]) for one in columns)} |"


# ---------------------------------------------------------------- tables


def point_loss(rows: Sequence[Row]) -> str:
    columns = {
        OURS: "m2f",
        peers_points.TRANSFORMERS: "K = 12544 points as published",
        peers_points.STRIDE_4: "full masks at stride 4",
        peers_points.FULL: "full masks",
    }
    shown = [(size, targets) for size in (1024, 512) for targets in (10, 30, 100)]
    cases = {f"loss part {size}² T={targets}": f"time, {size}², {targets} targets" for size, targets in shown}
    lines = times(rows, cases, columns)
    for case, name in cases.items():
        if "1024²" in case or case == "loss part 512² T=10":
            lines.append(amounts(rows, case, columns, name.replace("time", "peak MiB", 1)))
    return "\n".join(lines)


def deformable_attention(rows: Sequence[Row]) -> str:
    columns = {
        OURS: "m2f",
        "PyTorch grid_sample": "PyTorch grid_sample",
        "torch-ms-deform-attn": "torch-ms-deform-attn",
    }
    cases = {
        "encoder local fp32 forward": "forward, samples near the query",
        "encoder random fp32 forward": "forward, samples anywhere",
        "encoder local fp32 forward+backward": "forward + backward, near",
        "encoder random fp32 forward+backward": "forward + backward, anywhere",
    }
    lines = times(rows, cases, columns)
    for case in ("encoder local fp32 forward", "encoder local fp32 forward+backward"):
        name = f"peak MiB above inputs and outputs, {case.rsplit(' ', 1)[-1]}"
        lines.append(amounts(rows, case, columns, name))
    return "\n".join(lines)


def masked_attention(rows: Sequence[Row]) -> str:
    """Two tables: the nine layers' attention masks, and attention with them."""
    names = (peers_attention.TRANSFORMERS, peers_attention.TRANSFORMERS_DROPPED, peers_attention.STRIDED)
    columns = {OURS: "m2f"} | {name: name for name in names}
    large = "9 layers 1024² fp32"
    lines = times(rows, {large: "masks of 9 layers, 1024²", "9 layers 512² fp32": "masks of 9 layers, 512²"}, columns)
    lines.append(amounts(rows, large, columns, "peak MiB above inputs, 1024²"))
    written = amounts(rows, large, columns, "MiB written, 1024²", lambda row: number(row.written_mib))
    lines += [written, ""]

    names = (peers_attention.SDPA, peers_attention.SDPA_ADDITIVE, peers_attention.MULTIHEAD)
    columns = {OURS: "m2f"} | {name: name for name in names}
    where = "S=16384 Q=100"
    cases = {
        f"{where} open 1.0 fp32 forward": "forward, every key attended",
        f"{where} blobs 0.3 fp32 forward": "forward, regions of 0.3 of the image",
        f"{where} blobs 0.05 fp32 forward": "forward, regions of 0.05",
        f"{where} random 0.05 fp32 forward": "forward, random keys, 0.05",
        f"{where} blobs 0.3 fp32 forward+backward": "forward + backward, regions of 0.3",
    }
    lines += times(rows, cases, columns)
    for case in (f"{where} blobs 0.3 fp32 forward", f"{where} blobs 0.3 fp32 forward+backward"):
        name = f"peak MiB above inputs and outputs, {case.rsplit(' ', 1)[-1]}"
        lines.append(amounts(rows, case, columns, name))
    return "\n".join(lines)


# ---------------------------------------------------------------- README


@dataclass(frozen=True)
class Block:
    """A part of README between two comments, written from CSVs."""

    name: str
    results: Path
    files: tuple[str, ...]
    table: Callable[[Sequence[Row]], str]

    @property
    def marks(self) -> tuple[str, str]:
        return f"<!-- {self.name}: python -m benchmarks.readme -->", f"<!-- end of {self.name} -->"

    def text(self) -> str:
        paths = [self.results / file for file in self.files]
        if not all(path.exists() for path in paths):
            return NOT_MEASURED
        return self.table([row for path in paths for row in read_csv(path)])


COMMITTED = RESULTS / "cpu-intel-xeon"
BLOCKS = (
    Block("figures of the loss", COMMITTED, ("point_loss.csv",), point_loss),
    Block("figures", RESULTS / "cpu-amd-epyc", ("ms_deform_attn.csv",), deformable_attention),
    Block(
        "figures of masked attention",
        COMMITTED,
        ("attention_mask.csv", "masked_attention.csv"),
        masked_attention,
    ),
)


def update(readme: str) -> str:
    """`readme` with its blocks of figures replaced."""
    for block in BLOCKS:
        start, end = block.marks
        before, rest = readme.split(start)
        readme = f"{before}{start}\n\n{block.text()}\n\n{end}{rest.split(end)[1]}"
    return readme


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(update(path.read_text()))
