"""Tables in Markdown and on the terminal, the CSV, the required figures and the comparison of two runs."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import memory
from benchmarks.cases import Benchmark, Figure, Row, Scale
from benchmarks.formats import mebibytes, number

#: A time is a regression if it grew by more than this share and by more than both interquartile ranges together.
REGRESSION_SHARE = 0.10
METHOD = """\
- Times: median (interquartile range) in ms of interleaved runs, A B C A B C ..., after one warm-up round.
- Speed-up: this row's median over the median of the case's first implementation.
- Error: relative L2 against the reference in fp64, worst output and worst gradient; of attention masks, the share of
  bits that differ from it. A row above the tolerance has no time.
- Floor: max(bytes moved / measured bandwidth, rows gathered / measured gather rate, operations of matrix products /
  measured rate of `torch.mm` in the same dtype), and the share of it reached. Deformable attention: local cases count
  gathered rows at the L1 rate, random ones at the L2 rate; backward counts as a second gather and a read-modify-write
  of every row. Masked attention: operations of attended pairs only, 2 products forward and 4 backward.
- Page faults: minor faults per call (CPU); they are what the allocator setting changes."""


@dataclass(frozen=True)
class Run:
    """Everything one run of the suite measured."""

    scale: Scale
    facts: dict[str, str]
    floors: dict[str, dict[str, float]]
    rows: list[Row]


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def _settings(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(row.setting for row in rows))


def _time_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    header = ["case", "implementation", "ms (IQR)", "speed-up", "error", "error grad", "MiB written", "faults",
              "floor ms", "share"]  # fmt: skip
    lines = []
    for row in rows:
        time = row.status if row.median_ms is None else f"{number(row.median_ms)} ({number(row.iqr_ms)})"
        speedup = "" if row.subject_speedup is None else f"{number(row.subject_speedup)}x"
        faults = "-" if row.page_faults is None else f"{row.page_faults:.0f}"
        share = "-" if row.floor_share is None else f"{row.floor_share:.0%}"
        floor = "-" if row.floor_ms is None else f"{number(row.floor_ms)} ({row.floor_kind})"
        lines.append(
            [row.case, row.implementation, time, speedup, _error(row.error_output), _error(row.error_gradients),
             number(row.written_mib), faults, floor, share]
        )  # fmt: skip
    return header, lines


def _memory_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    header = ["case", "implementation", "extra MiB", "total MiB"]
    lines = []
    for row in rows:
        if row.memory_extra_mib is not None:
            lines.append(
                [row.case, row.implementation, mebibytes(row.memory_extra_mib), mebibytes(row.memory_total_mib)]
            )
    return header, lines


def _scaling_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Cases that were also run with fewer threads: how much the others help."""
    header = ["case", "implementation", "setting", "threads", "ms", "threads", "ms", "scaling"]
    measured = {row.key: row for row in rows if row.median_ms is not None}
    lines = []
    for row in measured.values():
        whole = measured.get((row.op, row.case.rsplit(f" {row.threads} thread", 1)[0], row.implementation, row.setting))
        if whole is not None and whole is not row and row.median_ms and whole.median_ms:
            few, all_ = [str(row.threads), number(row.median_ms)], [str(whole.threads), number(whole.median_ms)]
            scaling = f"{number(row.median_ms / whole.median_ms)}x"
            lines.append([whole.case, row.implementation, row.setting, *few, *all_, scaling])
    return header, lines


def _floor_table(floors: dict[str, dict[str, float]]) -> tuple[list[str], list[list[str]]]:
    """Rates in GB/s, those of matrix products in GFLOP/s."""
    names = list(next(iter(floors.values())))
    return ["threads", *(f"{name} {'GFLOP/s' if name.endswith('matmul') else 'GB/s'}" for name in names)], [
        [threads, *(number(rates[name] / 1e9) for name in names)] for threads, rates in floors.items()
    ]


def _side(
    rows: Sequence[Row], side: tuple[str, tuple[str, ...], str], setting: str, of_fastest: bool = False
) -> float | None:
    """One side of a figure: of the rows measured the least value, or the value of the fastest."""
    case, implementations, field = side
    values = [
        (row.median_ms if of_fastest and row.median_ms is not None else value, value)
        for row in rows
        if row.case == case and row.implementation in implementations and row.setting == setting
        if (value := getattr(row, field)) is not None
    ]
    return min(values)[1] if values else None


def evaluate(figure: Figure, rows: Sequence[Row], setting: str) -> tuple[float, bool] | None:
    """The ratio, and whether it is only a lower bound (memory below what can be resolved); None if not measured."""
    above = _side(rows, figure.numerator, setting, figure.of_fastest)
    below = _side(rows, figure.denominator, setting, figure.of_fastest)
    if above is None or below is None:
        return None
    if figure.denominator[2].startswith("memory") and below < memory.RESOLUTION_MIB:
        return above / memory.RESOLUTION_MIB, True
    return (above / below, False) if below else None


def figure_table(benchmark: Benchmark, run: Run) -> tuple[list[str], list[list[str]]]:
    """Required figures: target, measured, met or MISSED, for every allocator setting."""
    header = ["required figure", "setting", "target", "measured", ""]
    lines = []
    for figure in benchmark.figures(run.scale):
        for setting in _settings(run.rows):
            is_memory = figure.numerator[2].startswith("memory")
            if is_memory and setting not in figure.target:
                continue
            target = figure.target.get(setting)
            found = evaluate(figure, run.rows, setting)
            if found is None:
                measured, verdict = "-", "not measured"
            else:
                measured = f"{'> ' if found[1] else ''}{number(found[0])}x"
                verdict = "no target" if target is None else "met" if found[0] >= target else "MISSED"
                if run.scale.quick and target is not None:
                    verdict = "quick shapes: not judged"
            lines.append([figure.label, setting, "-" if target is None else f"≥ {number(target)}x", measured, verdict])
    return header, lines


def _markdown(header: list[str], lines: list[list[str]]) -> str:
    out = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(out + ["| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines])


def _rich(title: str, header: list[str], lines: list[list[str]]) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    grouped = header[0] == "case"  # a line of its own for each case leaves more room for the numbers
    for i, name in enumerate(header[1:] if grouped else header):
        table.add_column("" if grouped and i == 0 else name, justify="left" if i == 0 else "right", no_wrap=i > 0)
    last = None
    for line in lines:
        style = "red" if "MISSED" in line else "green" if "met" in line else None
        if grouped:
            if line[0] != last:
                table.add_row(f"[bold]{line[0]}")
            last, line = line[0], line[1:]
            style = "cyan" if line[0] == "m2f_kernels" else None
            line[0] = "  " + line[0]
        table.add_row(*line, style=style)
    return table


def _sections(benchmark: Benchmark, run: Run) -> list[tuple[str, list[str], list[list[str]]]]:
    rows = [row for row in run.rows if row.op == benchmark.op]
    own = Run(run.scale, run.facts, run.floors, rows)
    sections = [("Required figures", *figure_table(benchmark, own))]
    for setting in _settings(rows):
        sections.append((f"Time, allocator: {setting}", *_time_table([row for row in rows if row.setting == setting])))
    note = "allocator: default" if run.scale.device == "cpu" else "caching allocator"
    sections.append((f"Peak memory, {note}", *_memory_table(rows)))
    sections.append(("Threads", *_scaling_table(rows)))
    sections.append(("Measured rates behind the floors", *_floor_table(run.floors)))
    return [section for section in sections if section[2]]


def show(console: Console, benchmark: Benchmark, run: Run) -> None:
    """Print an operator's tables."""
    console.rule(f"[bold]{benchmark.title}")
    for title, header, lines in _sections(benchmark, run):
        console.print(_rich(title, header, lines))


def markdown(benchmark: Benchmark, run: Run, picture: bool, others: Sequence[str] = ()) -> str:
    """An operator's tables as Markdown, without the facts."""
    parts = [f"# {benchmark.title}", benchmark.description]
    if run.scale.quick:
        parts.append("**Quick run: small shapes and few rounds. Required figures are not judged.**")
    if picture:
        parts.append(f"![{benchmark.title}]({benchmark.op}.png)")
    parts += [f"![{benchmark.title}]({name})" for name in others]
    for title, header, lines in _sections(benchmark, run):
        parts += [f"## {title}", _markdown(header, lines)]
    return "\n\n".join(parts) + "\n"


def facts_markdown(run: Run) -> str:
    return "## Measured with\n\n" + _markdown(["", ""], [[name, fact] for name, fact in run.facts.items()]) + "\n"


def method_markdown() -> str:
    cpu, cuda = (memory.__doc__ or "").split("\n\n")[1:3]
    lines = ["## Method", "", METHOD, f"- Peak memory. {' '.join(cpu.split())}", f"  {' '.join(cuda.split())}", ""]
    return "\n".join(lines)


def write(directory: Path, benchmarks: Sequence[Benchmark], run: Run) -> None:
    """CSV, Markdown and picture of each operator, and report.md with all of them."""
    from benchmarks import plot

    directory.mkdir(parents=True, exist_ok=True)
    chapters = []
    for benchmark in benchmarks:
        rows = [row for row in run.rows if row.op == benchmark.op]
        write_csv(directory / f"{benchmark.op}.csv", rows)
        picture = plot.draw(directory / f"{benchmark.op}.png", benchmark, rows, run.facts)
        chapter = markdown(benchmark, run, picture, benchmark.pictures(directory, rows))
        (directory / f"{benchmark.op}.md").write_text(chapter + "\n" + facts_markdown(run) + "\n" + method_markdown())
        chapters.append(chapter)
    (directory / "report.md").write_text("\n".join([*chapters, facts_markdown(run), method_markdown()]))


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, Row.columns())
        writer.writeheader()
        for row in rows:
            values: dict[str, Any] = asdict(row)
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in values.items()})


def read_csv(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return [Row.from_strings(record) for record in csv.DictReader(file)]


def regressions(old: Sequence[Row], new: Sequence[Row]) -> list[str]:
    """This package's rows that became slower beyond noise, need more memory, or no longer work; one line each."""
    before = {row.key: row for row in old}
    found = []
    for row in new:
        was = before.get(row.key)
        if was is None or not row.ours or was.median_ms is None:
            continue
        name = f"{row.case}, {row.implementation}, {row.setting}"
        if row.median_ms is None:
            found.append(f"{name}: was {number(was.median_ms)} ms, now {row.status}")
            continue
        grown = row.median_ms - was.median_ms
        if grown > REGRESSION_SHARE * was.median_ms and grown > (row.iqr_ms or 0) + (was.iqr_ms or 0):
            found.append(f"{name}: {number(was.median_ms)} -> {number(row.median_ms)} ms")
        if row.memory_extra_mib is not None and was.memory_extra_mib is not None:
            more = row.memory_extra_mib - was.memory_extra_mib
            if more > max(REGRESSION_SHARE * was.memory_extra_mib, 2 * memory.RESOLUTION_MIB):
                found.append(f"{name}: {number(was.memory_extra_mib)} -> {number(row.memory_extra_mib)} MiB extra")
    return found
