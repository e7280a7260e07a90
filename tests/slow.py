"""Which tests are slow: the full suite measures, `tests/slow.txt` remembers, `make quick` leaves them out.

Seconds are of the processor, of the test's process and of the children that it waited for: a busy machine changes them
little. Of a test with many cases the longest counts, or a quarter of all together. A fixture's seconds are its own, so
that leaving out the test that came first does not make the next one pay: who asks for a slow fixture is slow. A test
that is not in the list yet counts as quick; the full suite says at its end what is missing, and `make slow` writes
the list anew. No test fails for its time.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

import pytest

LIST = Path(__file__).with_name("slow.txt")
LIMIT = 0.6  # seconds: from here on a test is slow
MANY = 4  # times LIMIT is what all cases of a test may take together
STAYS = 0.3  # and down to here it stays in the list, so that it does not come and go
HEAD = "# Slow tests and fixtures, in seconds of the processor (tests/slow.py); `make slow` writes this.\n"
KIND = "processor seconds"  # of a property that a report carries to the process that sums up


def listed() -> set[str]:
    """Names of slow tests, without their parameters, and of slow fixtures, each behind where it is defined."""
    lines = LIST.read_text(encoding="utf-8").splitlines() if LIST.is_file() else []
    return {line for line in lines if line and not line.startswith("#")}


def plain(nodeid: str) -> str:
    """A test's name without its parameters."""
    return nodeid.partition("[")[0]


def weighed(cases: Iterable[float]) -> float:
    """Seconds of a test: its longest case, or, of many short ones, a quarter of all together."""
    took = list(cases)
    return max(max(took), sum(took) / MANY)


def of_fixture(base: str, name: str) -> str:
    return f"{base or '.'}::{name} (fixture)"


def renewed(before: Iterable[str], seconds: dict[str, float]) -> list[str]:
    """The list after a run that took these seconds: what did not run stays as it was."""
    known = set(before)
    stays = {name for name in known if seconds.get(name, LIMIT) >= STAYS}
    return sorted(stays | {name for name, took in seconds.items() if took >= LIMIT})


def _now() -> float:
    return sum(os.times()[:4])


class Clock:
    """Measures tests and fixtures; in the process that sums up, gathers what reports carry."""

    def __init__(self, write: bool) -> None:
        self.write = write
        self.cases: dict[str, list[float]] = {}
        self._running: pytest.Item | None = None

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        self._running = item
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, Any, Any]:
        return (yield from self._measured(plain(item.nodeid)))

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[Any]) -> Generator[None, Any, Any]:
        return (yield from self._measured(of_fixture(fixturedef.baseid, fixturedef.argname)))

    def _measured(self, name: str) -> Generator[None, Any, Any]:
        began = _now()
        try:
            return (yield)
        finally:
            if self._running is not None:
                self._running.user_properties.append((KIND, (name, round(_now() - began, 2))))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for kind, value in report.user_properties:
            if kind == KIND:
                name, took = value  # pyright: ignore[reportGeneralTypeIssues]
                self.cases.setdefault(name, []).append(took)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        before, seconds = listed(), {name: weighed(cases) for name, cases in self.cases.items()}
        after = renewed(before, seconds)
        if self.write:
            LIST.write_text(HEAD + "".join(f"{name}\n" for name in after), encoding="utf-8")
            terminalreporter.write_line(f"{LIST.name}: {len(after)} slow tests and fixtures")
        elif new := sorted(set(after) - before):
            terminalreporter.write_line(f"Slow, and not in {LIST.name} yet (`make slow` adds them):")
            for name in new:
                terminalreporter.write_line(f"  {seconds[name]:.1f} s {name}")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-slow", action="store_true", help="write tests/slow.txt anew")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Clock(bool(config.getoption("--write-slow")) and not hasattr(config, "workerinput")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is slow."""
    slow = listed()
    for item in items:
        bases = [node.nodeid for node in item.listchain()]
        names = (of_fixture(base, name) for name in getattr(item, "fixturenames", ()) for base in bases)
        if plain(item.nodeid) in slow or not slow.isdisjoint(names):
            item.add_marker("slow")
