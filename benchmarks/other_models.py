"""Models of `transformers` before and after `m2f_kernels.accelerate`.

`python -m benchmarks.integrations` measures them and writes a CSV of its own, one line per model and allocator setting.
This module converts it to the rows and figures of all other benchmarks, which the report, the comparison of runs and
README use.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.cases import Figure, Row

OP = "integrations"
BEFORE, AFTER = "before", "after"
#: Columns by which that command's CSV is recognised.
COLUMNS = {"model", "setting", "aim", "before_ms", "after_ms"}
#: Least times by which peak memory shrinks, by the beginning of the model's name.
MEMORY_AIMS = {"Mask2Former Swin-T, 1024²": 2.0}


def rows(records: Iterable[dict[str, str]]) -> list[Row]:
    """Two rows for each line of the CSV."""
    found = []
    for record in records:
        direction = "forward+backward" if "training" in record["model"] else "forward"
        for name in (BEFORE, AFTER):
            row = Row(OP, record["model"], name, record["setting"], direction, "", "float32", 0)
            row.ours, row.headline = name == AFTER, True
            row.median_ms, row.iqr_ms = _number(record, f"{name}_ms"), _number(record, f"{name}_iqr_ms")
            row.memory_extra_mib = _number(record, f"{name}_mib")
            difference, largest = _number(record, "difference"), _number(record, "largest")
            if name == AFTER and difference is not None and largest:
                row.error_output = difference / largest
            if row.median_ms is None:
                row.status = "not measured"
            found.append(row)
    return found


def _number(record: dict[str, str], name: str) -> float | None:
    text = record.get(name, "")
    return None if text in ("", "nan") else float(text)


def figures(records: Sequence[dict[str, str]]) -> list[Figure]:
    """Each model's targets, which the CSV states; they are for the first allocator setting."""
    found = []
    for record in records:
        name, setting = record["model"], record["setting"]
        if setting != records[0]["setting"]:
            continue
        time, memory = ([(name, (side,), f) for side in (BEFORE, AFTER)] for f in ("median_ms", "memory_extra_mib"))
        found.append(Figure(f"{name}: faster than before", *time, {setting: float(record["aim"])}))
        aim = next((least for start, least in MEMORY_AIMS.items() if name.startswith(start)), None)
        found.append(Figure(f"{name}: less peak memory above weights", *memory, {setting: aim}))
    return found
