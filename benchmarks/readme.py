"""Writes README's table of figures from a run's CSV: `python -m benchmarks.readme [RESULTS]`."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.cases import Row
from benchmarks.formats import mebibytes, number
from benchmarks.report import read_csv

ROOT = Path(__file__).parents[1]
DEFAULT = ROOT / "benchmarks" / "results" / "cpu-amd-epyc"
START, END = "<!-- figures: python -m benchmarks.readme -->", "<!-- end of figures -->"

#: Case, and what it is called in README.
CASES = {
    "encoder local fp32 forward": "forward, samples near the query",
    "encoder random fp32 forward": "forward, samples anywhere",
    "encoder local fp32 forward+backward": "forward + backward, near",
    "encoder random fp32 forward+backward": "forward + backward, anywhere",
}
OURS, PYTORCH, COMPILED = "m2f_kernels", "PyTorch grid_sample", "torch-ms-deform-attn"


def table(rows: list[Row]) -> str:
    """Markdown: time of each implementation and ratios, in both allocator settings."""
    by_key = {(r.case, r.implementation, r.setting): r for r in rows}
    lines = [
        "| ms, default allocator (heap retained) | m2f | PyTorch grid_sample | torch-ms-deform-attn |",
        "|---|---|---|---|",
    ]
    for case, name in CASES.items():
        cells = []
        for implementation in (OURS, PYTORCH, COMPILED):
            texts = []
            for setting in ("default", "heap retained"):
                time = by_key[case, implementation, setting].median_ms
                ours = by_key[case, OURS, setting].median_ms
                if time is None or ours is None:
                    texts.append("-")
                elif implementation == OURS:
                    texts.append(f"**{number(time)}**" if setting == "default" else number(time))
                else:
                    texts.append(f"{number(time)}, {number(time / ours)}x")
            cells.append(f"{texts[0]} ({texts[1]})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for case in ("encoder local fp32 forward", "encoder local fp32 forward+backward"):
        extra = [
            mebibytes(by_key[case, implementation, "default"].memory_extra_mib)
            for implementation in (OURS, PYTORCH, COMPILED)
        ]
        lines.append(f"| peak MiB above inputs and outputs, {case.rsplit(' ', 1)[-1]} | {' | '.join(extra)} |")
    return "\n".join(lines)


def update(readme: str, rows: list[Row]) -> str:
    """`readme` with its block of figures replaced."""
    before, rest = readme.split(START)
    return f"{before}{START}\n\n{table(rows)}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    results = Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT
    path = ROOT / "README.md"
    path.write_text(update(path.read_text(), read_csv(results / "ms_deform_attn.csv")))
