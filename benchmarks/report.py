"""Keeps the results of runs, one CSV and one JSON for each device, and writes pages and pictures of them.

A run of some operators renews their rows and facts and keeps the others'. `python -m benchmarks.report CSV...` writes a
device's pages into the folder of its name beside the CSV; `make docs` writes those of the committed results.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

import benchmarks
from benchmarks import RESULTS, arguments, measure, readme
from benchmarks.cases import REST, Benchmark, Figure, Row, Scale, read_csv, write_csv
from benchmarks.compare import read
from benchmarks.formats import error, markdown, mebibytes, number
from benchmarks.readme import Rows

METHOD = """\
- Times: median (interquartile range) in ms of interleaved runs, A B C A B C ..., each warmed up by the call whose
  result was checked. At least three rounds (`--full`: five); a call of more than ten seconds (of the loss: five) is
  timed once (twice), and the table says so.
- Ratio: this row's median over the median of the case's first implementation.
- Error: relative L2 against the reference in fp64, worst output and worst gradient; of attention masks, the share of
  bits that differ from it; of whole models, the largest difference of the last prediction from the other model's,
  relative to the largest value. A row above the tolerance has no time.
- Floor: max(bytes moved / measured bandwidth, rows gathered / measured gather rate, operations of matrix products /
  measured rate of `torch.mm` in the same dtype), and the share of it reached. Deformable attention: local cases count
  gathered rows at the L1 rate, random ones at the L2 rate; backward counts as a second gather and a read-modify-write
  of every row. Masked attention: operations of attended pairs only, 2 products forward and 4 backward.
- Page faults: minor faults per call (CPU); they are what the allocator setting changes."""
RESOURCES = """\
What kernels take, by {compiler}, compiled and not run: `make resources`. Registers and stack are per thread, in
registers and bytes, shared memory in bytes per block (CUDA: to which the launch adds dynamic shared memory); spills are
instructions that access local memory, of CUDA bytes. A stack without spills holds the arguments of an error's message.
Occupancy is the share of a multiprocessor's warps that fit by registers and shared memory. Instructions are counted as
they stand in the code: a loop counts once. A wave is what the part holds at once. *Least*: the launch's tensors moved
once over the data sheet's bandwidth, or the operations of its matrix products (half precision, where counted) over the
data sheet's rate."""
#: Load average before a run above which the machine is not idle enough for times to be trusted.
BUSY = 0.5
#: Title, heads of the columns, lines.
Section = tuple[str, list[str], list[list[str]]]


@dataclass(frozen=True)
class Run:
    """Everything one run of the suite measured; `curves` are a training's, one value for each step."""

    scale: Scale
    facts: dict[str, str]
    floors: dict[str, dict[str, float]]
    rows: list[Row]
    curves: dict[str, list[float]] = field(default_factory=dict)


# ---------------------------------------------------------------- figures with targets

FIGURES = ["required figure", "setting", "target", "measured", ""]
MET, MISSED, NO_TARGET, NOT_MEASURED = "met", "**MISSED**", "no target", "not measured"


def _value(figure: Figure, names: Sequence[str], rows: Sequence[Row], setting: str) -> float | None:
    """Of the rows measured the least value, or the value of the fastest."""
    values = [
        (row.median_ms if figure.of_fastest and row.median_ms is not None else value, value)
        for row in rows
        if row.case == figure.case and row.implementation in names and row.setting == setting
        if (value := getattr(row, figure.field)) is not None and row.status == "ok"
    ]
    return min(values)[1] if values else None


def evaluate(figure: Figure, rows: Sequence[Row], setting: str) -> tuple[float, bool] | None:
    """The figure, and whether it is only a lower bound (memory below what can be resolved); None if not measured."""
    above = _value(figure, figure.above, rows, setting)
    if figure.below is None or above is None:
        return None if above is None else (above, False)
    below = _value(figure, (figure.below,), rows, setting)
    if below is not None and figure.field.startswith("memory") and below < measure.RESOLUTION_MIB:
        return above / measure.RESOLUTION_MIB, True
    return (above / below, False) if below else None


def judged(benchmark: Benchmark, scale: Scale, rows: Sequence[Row]) -> list[list[str]]:
    """A line for each figure and allocator setting, as `FIGURES` names them; figures of cases that a run of this scale
    leaves out are not among them. A quick run and an occasional measurement have none."""
    if scale.quick or (rows and rows[0].run not in ("default", "full")):
        return []
    left_out = set() if scale.full else {case.name for case in benchmark.cases(scale) if case.full}
    settings, found = Rows(rows).settings, []
    for figure in benchmark.figures.get(scale.device, ()):
        targets = dict(zip(settings, figure.target, strict=False))
        for setting in () if figure.case in left_out else settings:
            result = evaluate(figure, rows, setting)
            of_one = figure.at_most or figure.field.startswith("memory")
            if setting in targets or not (result is None or of_one):
                found.append([figure.label, setting, *_verdict(figure, targets.get(setting), result)])
    return found


def _verdict(figure: Figure, target: float | None, result: tuple[float, bool] | None) -> list[str]:
    """Target, measured value and verdict."""

    def text(value: float) -> str:
        return error(value) if figure.field.startswith("error") else number(value) + ("x" if figure.below else "")

    aim = "-" if target is None else f"{'≤' if figure.at_most else '≥'} {text(target)}"
    if result is None:
        return [aim, "-", NOT_MEASURED]
    measured = f"{'> ' if result[1] else ''}{text(result[0])}"
    if target is None:
        return [aim, measured, NO_TARGET]
    return [aim, measured, MET if (result[0] <= target if figure.at_most else result[0] >= target) else MISSED]


def summary(found: Sequence[Sequence[str]]) -> str:
    """One line with the numbers of targets met and missed."""
    verdicts = [line[-1] for line in found if line[-1] != NO_TARGET]
    counts = [f"{verdicts.count(x)} {x.strip('*')}" for x in (MET, MISSED, NOT_MEASURED) if x in verdicts]
    return f"{len(verdicts)} targets: {', '.join(counts)}." if verdicts else "No targets here."


# ---------------------------------------------------------------- tables of an operator


def _time(row: Row) -> str:
    if row.median_ms is None:
        return row.status
    return f"{number(row.median_ms)} ({'one call' if row.rounds == 1 else number(row.iqr_ms)})"


Columns = list[tuple[str, Callable[[Row], str]]]
_WHO: Columns = [("case", lambda row: row.case), ("implementation", lambda row: row.implementation)]
_ERRORS: Columns = [
    ("error", lambda row: error(row.error_output)), ("error grad", lambda row: error(row.error_gradients)),
]  # fmt: skip
_FLOOR: Columns = [
    ("floor ms", lambda row: "-" if row.floor_ms is None else f"{number(row.floor_ms)} ({row.floor_kind})"),
    ("share", lambda row: "-" if row.floor_share is None else f"{row.floor_share:.0%}"),
]
_MEMORY: Columns = [
    ("extra MiB", lambda row: mebibytes(row.memory_extra_mib)),
    ("total MiB", lambda row: mebibytes(row.memory_total_mib)),
]
_WRITTEN: Columns = [
    ("MiB written", lambda row: number(row.written_mib)),
    ("faults", lambda row: "-" if row.page_faults is None else f"{row.page_faults:.0f}"),
]


def _times(benchmark: Benchmark) -> Columns:
    """Time and ratio, and images per second where cases say how many they have."""
    # Of every scale: rows may be of any.
    scales = [Scale(device, not full, full) for device in ("cpu", "cuda") for full in (False, True)]
    images = {case.name: case.images for scale in scales for case in benchmark.cases(scale) if case.images}

    def rate(row: Row) -> str:
        return number(images[row.case] * 1e3 / row.median_ms) if row.median_ms and row.case in images else ""

    def ratio(row: Row) -> str:
        return "" if row.subject_speedup is None else f"{number(row.subject_speedup)}x"

    return [("ms (IQR)", _time), *([("images/s", rate)] if images else []), ("ratio", ratio)]


def _table(
    title: str, columns: Columns, rows: Sequence[Row], which: Callable[[Row], bool] = lambda row: True
) -> Section:
    return title, [name for name, _ in columns], [[text(row) for _, text in columns] for row in rows if which(row)]


def _stage_table(rows: Sequence[Row]) -> Section:
    shown = [row for row in rows if row.stages and row.median_ms is not None]
    names = dict.fromkeys(name for row in shown for name in row.stage_ms)
    stages = [(name, lambda row, name=name: number(row.stage_ms.get(name))) for name in names]
    whole = [(REST, lambda row: number(row.rest_ms)), ("total", lambda row: number(row.median_ms))]
    return _table("Stages, ms", [*_WHO, ("setting", lambda row: row.setting), *stages, *whole], shown)


def _floor_table(floors: dict[str, dict[str, float]]) -> tuple[list[str], list[list[str]]]:
    """Rates in GB/s, those of matrix products in GFLOP/s."""
    names = list(next(iter(floors.values()), {}))
    return ["threads", *(f"{name} {'GFLOP/s' if name.endswith('matmul') else 'GB/s'}" for name in names)], [
        [threads, *(number(rates[name] / 1e9) for name in names)] for threads, rates in floors.items()
    ]


def _peers_table(benchmark: Benchmark, rows: Sequence[Row]) -> Section:
    """The headline cases: every peer, its time and ratio in each setting, error, peak memory, share of the floor."""
    shown = [row for row in rows if row.headline]
    found = Rows(shown)

    def under(setting: str, name: str, text: Callable[[Row], str]) -> tuple[str, Callable[[Row], str]]:
        named = f"ms, {setting}" if text is _time else name
        return (
            named,
            lambda row: text(here) if (here := found.by_key.get((row.case, row.implementation, setting))) else "-",
        )

    times = [under(setting, *column) for setting in found.settings for column in _times(benchmark)]
    columns = [*_WHO, *times, *_ERRORS, ("peak MiB", _MEMORY[0][1]), ("share of floor", _FLOOR[1][1])]
    return _table("Headline cases", columns, shown, lambda row: row.setting == found.settings[0])


def _sections(benchmark: Benchmark, run: Run) -> list[Section]:
    rows = run.rows
    time = [*_WHO, *_times(benchmark), *_ERRORS, *_WRITTEN, *_FLOOR]
    note = "allocator: default" if run.scale.device == "cpu" else "caching allocator"
    sections = [
        ("Required figures", FIGURES, judged(benchmark, run.scale, rows)),
        *(
            _table(f"Time, allocator: {setting}", time, rows, lambda row, setting=setting: row.setting == setting)
            for setting in Rows(rows).settings
        ),
        _table(f"Peak memory, {note}", _WHO + _MEMORY, rows, lambda row: row.memory_extra_mib is not None),
        _stage_table(rows),
        _table("Kernel launches", [*_WHO, ("kernels launched", lambda row: str(row.kernels))], rows,
               lambda row: row.kernels is not None),
        ("Measured rates behind the floors", *_floor_table(run.floors)),
    ]  # fmt: skip
    return [section for section in sections if section[2]]


def chapter(benchmark: Benchmark, run: Run, pictures: Sequence[str]) -> str:
    """An operator's page."""
    parts = [f"# {benchmark.title}", benchmark.description]
    if run.scale.quick:
        parts.append("**Quick run: small shapes and few rounds. Required figures are not judged.**")
    parts += [f"![{benchmark.title}]({name})" for name in pictures]
    for title, header, lines in _sections(benchmark, run):
        parts += [f"## {title}", markdown(header, lines)]
    return "\n\n".join([*parts, "## Measured with", _facts(run.facts), method()])


def _facts(facts: dict[str, str]) -> str:
    return markdown(["", ""], [[name, fact] for name, fact in facts.items()])


def method() -> str:
    cpu, cuda = (measure.memory.__doc__ or "").split("\n\n")[1:3]
    return "\n".join(
        ["## Method", "", METHOD, f"- Peak memory. {' '.join(cpu.split())}", f"  {' '.join(cuda.split())}", ""]
    )


# ---------------------------------------------------------------- the terminal


def show(console: Console, benchmark: Benchmark, run: Run, everything: bool) -> None:
    """Print an operator's figures and its headline cases, or all of its readme."""
    console.rule(f"[bold]{benchmark.title}")
    sections = _sections(benchmark, run)
    if not everything:
        peers = _peers_table(benchmark, run.rows)
        sections = [peers, *(s for s in sections if s[0] in ("Required figures", "Stages, ms"))]
    for title, header, lines in sections:
        if lines:
            console.print(Markdown(f"### {title}\n\n{markdown(header, lines)}"))


# ---------------------------------------------------------------- files


def save(table: Path, run: Run) -> None:
    """Renew what a device's CSV, and the JSON beside it, say of the operators of a run."""
    names = {(row.run, row.op): None for row in run.rows}
    known = [row for row in (read(table) if table.exists() else []) if (row.run, row.op) not in names]
    rows = sorted([*known, *run.rows], key=lambda row: (row.run, row.op))
    about = table.with_suffix(".json")
    facts = json.loads(about.read_text()) if about.exists() else {}
    stated = {name: value for name, value in asdict(run).items() if name != "rows" and value}
    for name, op in names:
        facts.setdefault(name, {})[op] = stated
    table.parent.mkdir(parents=True, exist_ok=True)
    write_csv(table, map(asdict, rows))
    text = json.dumps(facts, indent=1)
    about.write_text(re.sub(r"(?<=[\d\[],)\s+(?=[\d.]+[,\s])", " ", text) + "\n")
    if table.parent == RESULTS:
        readme.main()


def load(table: Path) -> dict[str, dict[str, Run]]:
    """By the name of the run and by operator, in the registry's order, what a device's files hold."""
    about = json.loads(table.with_suffix(".json").read_text())
    rows = read(table)
    order = [*benchmarks.REGISTRY, *benchmarks.OTHERS]
    found: dict[str, dict[str, Run]] = {}
    for name, of in about.items():
        for op in sorted(of, key=lambda op: (order.index(op) if op in order else len(order), op)):
            mine = [row for row in rows if (row.run, row.op) == (name, op)]
            given = {"floors": {}} | of[op]
            found.setdefault(name, {})[op] = Run(**given | {"scale": Scale(**given["scale"]), "rows": mine})
    return found


def pages(table: Path, directory: Path) -> None:
    """Write the pages and pictures of a device: those of the usual run, and others in folders of their names."""
    from benchmarks import plot  # which needs matplotlib

    for name, runs in load(table).items():
        folder = directory if name == "default" else directory / name
        folder.mkdir(parents=True, exist_ok=True)
        for op, run in runs.items():
            benchmark = benchmarks.load(op)
            drawn = plot.draw(folder, benchmark, run.rows, run.facts) + benchmark.pictures(folder, run.rows)
            drawn += plot.draw_learning(folder, run.curves) if run.curves else []
            (folder / f"{op}.md").write_text(chapter(benchmark, run, drawn))
        (folder / "report.md").write_text(text(folder, runs))


def committed(directory: Path) -> None:
    """Write the pages of all committed results: a folder for each device, and a page for each compiler's report."""
    for table in sorted(RESULTS.glob("*.csv")):
        if table.with_suffix(".json").exists():
            pages(table, directory / table.stem)
            continue
        lines = read_csv(table)
        title, compiler = table.stem.replace("_", " "), lines[0].pop("compiler")
        cells = [[line[name] for name in lines[0]] for line in lines]
        parts = [
            f"# {title[0].upper()}{title[1:]}",
            RESOURCES.format(compiler=compiler),
            markdown(list(lines[0]), cells),
        ]
        (directory / f"{table.stem}.md").write_text("\n\n".join(parts) + "\n")


# ---------------------------------------------------------------- the report

#: The first page: title, operator, table and pictures of each section, and a note.
FIRST_PAGE = (
    (
        "The loss of a training step: full masks, K = 12544 points, and this package",
        "point_loss", readme.point_loss, ("point_loss_curve.png",),
        "*Full masks*: predictions upsampled to the ground truth, every pixel supervised; *points as published*: the "
        "code of `transformers`. The published 18 GB -> 6 GB per image is a whole training step on a GPU; this is the "
        "loss part alone.",
    ),
    (
        "A whole Mask2Former, `transformers`' and this package's",
        "end_to_end", readme.end_to_end, ("end_to_end_stages.png", "end_to_end_sizes.png"),
        "The same random weights and input; peak memory above weights and, in training, gradients.",
    ),
    ("Models of `transformers` before and after `accelerate`", "integrations", readme.integrations, (), ""),
)  # fmt: skip


def text(directory: Path, runs: dict[str, Run]) -> str:
    """The report of all operators of a run, whose pages and pictures lie in a folder."""
    parts = [f"# Benchmark results: {' and '.join(sorted({run.facts['device'] for run in runs.values()}))}"]
    # By operator: its name, and the columns of `FIGURES`.
    found = [[op, *x] for op, run in runs.items() for x in judged(benchmarks.load(op), run.scale, run.rows)]
    missed = [f"- {line[1]} ({line[2]}): {line[4]}, target {line[3]}" for line in found if line[-1] == MISSED]
    # The blank line between them is for Markdown.
    parts += [*_warnings(runs), f"{summary(found)} [All of them](#targets).", "\n".join(missed)]
    for title, op, table, pictures, note in FIRST_PAGE:
        parts.append(f"## {title}")
        if op not in runs:
            parts.append(f"*Not measured in this folder: {op}.*")
            continue
        parts += [table(runs[op].rows), f"Every case: [{op}.md]({op}.md). {note}"]
        parts += [f"![{title}]({name})" for name in pictures if (directory / name).exists()]
    parts.append("## Every operator and every peer")
    for op, run in runs.items():
        _, header, lines = _peers_table(benchmarks.load(op), run.rows)
        picture = f"![{op}]({op}.png)" if (directory / f"{op}.png").exists() else ""
        parts += [f"### [{benchmarks.load(op).title}]({op}.md)", markdown(header, lines) if lines else "", picture]
    targets = [line for line in found if line[-1] != NO_TARGET]
    parts += ["## Targets", summary(found), markdown(["operator", *FIGURES], targets)]
    for facts in _conditions(runs):
        ops = ", ".join(op for op, run in runs.items() if run.facts == facts)
        parts += [f"## Measured with: {ops}", _facts(facts)]
    return "\n\n".join(part for part in [*parts, method()] if part)


def _warnings(runs: dict[str, Run]) -> list[str]:
    quick = ", ".join(op for op, run in runs.items() if run.scale.quick)
    busy = ", ".join(op for op, run in runs.items() if float(run.facts.get("load average before", 0)) > BUSY)
    found = {
        f"**Quick run of {quick}: small shapes and few rounds. Targets are not judged.**": quick,
        f"**The machine was not idle before the run of {busy}: read these times with care.**": busy,
        "The operators come from several runs; the facts of each are at the end.": len(_conditions(runs)) > 1,
    }
    return [warning for warning, holds in found.items() if holds]


def _conditions(runs: dict[str, Run]) -> list[dict[str, str]]:
    """The conditions under which operators were measured, each once."""
    return list({json.dumps(run.facts): run.facts for run in runs.values()}.values())


def main() -> None:
    """Write the pages of results into the folder of their name."""
    about = {"nargs": "+", "type": Path, "metavar": "CSV", "help": "results of a device, with their JSON"}
    for table in arguments(main.__doc__, {"tables": about}).tables:
        pages(table, table.with_suffix(""))


if __name__ == "__main__":
    main()
