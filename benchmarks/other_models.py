"""Models of `transformers` before and after `m2f_kernels.accelerate`: their targets, and the rows of older files.

`python -m benchmarks.integrations` measures them.
"""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.cases import Benchmark, Figure, Row, Scale
from benchmarks.integrations_models import MODELS

OP = "integrations"
BEFORE, AFTER = "before", "after"
#: The part of a call that deformable attention takes, among the stages of a row before.
ATTENTION = "deformable attention"
#: Columns by which an older version's CSV, one line for each model and setting, is recognised.
COLUMNS = {"model", "setting", "aim", "before_ms", "after_ms"}
#: Least times by which peak memory shrinks, by the beginning of the model's name.
MEMORY_AIMS = {"Mask2Former Swin-T, 1024²": 2.0}


def rows(records: Iterable[dict[str, str]]) -> list[Row]:
    """Two rows for each line of an older CSV."""
    found = []
    for record in records:
        numbers = {name: text for name, text in record.items() if name not in ("model", "setting")}
        known = {name: float(text) for name, text in numbers.items() if text not in ("", "nan")}
        for name in (BEFORE, AFTER):
            row = new_row(record["model"], name, record["setting"])
            row.median_ms, row.iqr_ms = known.get(f"{name}_ms"), known.get(f"{name}_iqr_ms")
            row.rounds, row.memory_extra_mib = int(known["rounds"]), known.get(f"{name}_mib")
            if row.median_ms is None:
                row.status = "not measured"
            elif name == BEFORE and "share" in known:
                row.stages = f"{ATTENTION}={known['share'] * row.median_ms:.6g}"
            elif name == AFTER and known.get("largest"):
                row.error_output = known["difference"] / known["largest"]
            found.append(row)
    return found


def new_row(model: str, name: str, setting: str) -> Row:
    """A row without figures."""
    direction = "forward+backward" if "training" in model else "forward"
    return Row(OP, model, name, setting, direction, "", "float32", 0, ours=name == AFTER, headline=True)


def figures(scale: Scale) -> list[Figure]:
    """Each model's targets; they are for the first allocator setting."""
    found = []
    setting = "cuda" if scale.device == "cuda" else "default"
    for model in MODELS:
        time, memory = (
            [(model.name, (side,), f) for side in (BEFORE, AFTER)] for f in ("median_ms", "memory_extra_mib")
        )
        found.append(Figure(f"{model.name}: faster than before", *time, {setting: model.aim}))
        aim = next((least for start, least in MEMORY_AIMS.items() if model.name.startswith(start)), None)
        found.append(Figure(f"{model.name}: less peak memory above weights", *memory, {setting: aim}))
    return found


BENCHMARK = Benchmark(
    op=OP,
    title="Models of `transformers` before and after `accelerate`",
    description=(
        "Batch 1, float32, eager, the same random weights, before and after in turns in one process per model and "
        "allocator setting. Peak memory is above the weights and what was there before the call, outputs included, of "
        "one call each in another process. Stage: what the forward of the deformable attention modules takes of a call "
        "before; where nothing else is replaced, a ratio cannot exceed 1 / (1 - its share). Error: largest difference "
        "of predictions relative to the largest, with the original's choice of queries where a detector chooses; of "
        "the loss for a training step, whose points are drawn anew."
    ),
    figures=figures,
)
