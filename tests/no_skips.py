"""A pytest plugin: a skipped or expected-failing test that is not on the list fails the run."""

from __future__ import annotations

from pathlib import Path

import pytest

ALLOWED = Path(__file__).with_name("allowed_skips.txt")


def allowed() -> dict[str, str]:
    """nodeid -> reason, one a line as "nodeid  # reason"."""
    lines = [line for line in ALLOWED.read_text().splitlines() if line.strip() and not line.startswith("#")]
    return {nodeid.strip(): reason.strip() for nodeid, _, reason in (line.partition("#") for line in lines)}


class NoSkips:
    def __init__(self) -> None:
        self.offenders: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if (report.skipped or hasattr(report, "wasxfail")) and not allowed().get(report.nodeid):
            self.offenders.append(report.nodeid)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.offenders:
            print("\nskipped or expected to fail, and not on tests/allowed_skips.txt:", *self.offenders, sep="\n  ")
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(NoSkips(), "no-skips")
