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


class Resume:
    """The outcomes so far of the tests in a file, by name; `writes` those of this run to it."""

    def __init__(self, path: Path, writes: bool) -> None:
        self.path, self.writes = path, writes
        lines = path.read_text().splitlines() if path.exists() else []
        self.outcomes = {name: outcome for outcome, _, name in (line.partition(" ") for line in lines)}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        left_out = {item for item in items if self.outcomes.get(item.nodeid) in FINISHED}
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # A test passes when its call does; it fails in any phase.
        if self.writes and (report.when == "call" or not report.passed):
            with self.path.open("a") as file:
                file.write(f"{report.outcome} {report.nodeid}\n")

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if self.writes and self.outcomes and exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
            session.exitstatus = pytest.ExitCode.OK


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("resume_from")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        config.pluginmanager.register(Resume(path, writes=not hasattr(config, "workerinput")), "resume")
