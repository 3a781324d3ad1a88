"""Pytest plugin: a run that was cut off goes on where it ended.

`pytest -p benchmarks.tools.resume --resume-from FILE` leaves out the tests that FILE names as passed or skipped, and
adds each test's outcome to FILE as it ends: one line, outcome and name. With pytest-xdist the controller writes. Where
nothing is left to run, the exit status is 0.
"""

from __future__ import annotations

from pathlib import Path

import pytest

FINISHED = ("passed", "skipped")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--resume-from", type=Path, help="file of the outcomes so far; those that passed are left out")


def outcomes(path: Path) -> dict[str, str]:
    """The last outcome of each test in the file, by name; empty without the file."""
    if not path.exists():
        return {}
    lines = [line.split(" ", 1) for line in path.read_text().splitlines() if " " in line]
    return {name: outcome for outcome, name in lines}


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    path = config.getoption("resume_from")
    if path is None:
        return
    done = {name for name, outcome in outcomes(path).items() if outcome in FINISHED}
    left_out = [item for item in items if item.nodeid in done]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item.nodeid not in done]


class _Writer:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.known = bool(outcomes(path))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # A test passes when its call does; it fails in any phase.
        if report.when == "call" or not report.passed:
            with self.path.open("a") as file:
                file.write(f"{report.outcome} {report.nodeid}\n")

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self.known:
            session.exitstatus = pytest.ExitCode.OK


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("resume_from")
    if path is not None and not hasattr(config, "workerinput"):
        path.parent.mkdir(parents=True, exist_ok=True)
        config.pluginmanager.register(_Writer(path), "resume-writer")
