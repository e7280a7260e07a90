"""Mutation testing: small faults put into a module one at a time; the quick tests of that module should see each.

    python -m benchmarks.mutants eval.budget.budget [MODULE ...] [--sample 60] [--seed 1]

Tests are collected and run once, each with the lines that it runs. Then for every mutant a forked child swaps the code
of one function (or the value of one constant) in the modules as they are loaded, and runs the tests that run its line
until one fails. mutmut copies the whole project, imports it again for each run and leaves constants of modules alone,
among them limits that decide; a fork costs milliseconds.

`results/mutants.json` keeps the survivors; those that `mutants/equivalent.yaml` lists change nothing that could be seen
from outside, each for the reason given there.
"""

from __future__ import annotations

import argparse
import importlib
import os
import random
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import hypothesis
import pytest
import yaml
from _pytest.runner import runtestprotocol

from benchmarks import pages
from benchmarks.mutants.mutations import Mutant, mutants_of, put_into

ROOT = Path(__file__).resolve().parents[2]
EQUIVALENT = Path(__file__).with_name("equivalent.yaml")
MOST_BYTES = 4 << 30  # of a mutant that takes more and more
WAITS = 20  # a busy machine gives a process so small a share
SLOW_S = 4.0  # CPU seconds; slower tests are left out
READS = ".readback"  # in the names of modules that make nothing: artifacts that the tests keep are as good as new ones

TESTS: dict[str, list[str]] = yaml.safe_load(Path(__file__).with_name("tests.yaml").read_text(encoding="utf-8"))


def file_of(name: str) -> str:
    """Where the tests are that `mutants/tests.yaml` calls so: export/gguf/bpe is tests/export/gguf/test_bpe.py."""
    folder, _, last = name.rpartition("/")
    return f"tests/{folder}/test_{last}.py"


class Campaign:
    """A pytest plugin: runs the tests once with their lines, then every mutant in a child."""

    def __init__(self, name: str, sample: int, seed: int, only: str | None) -> None:
        self.name, self.sample, self.seed, self.only = name, sample, seed, only
        self.result: dict[str, Any] | None = None

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection(self) -> None:
        """Behind conftest's profile: the same examples each time, and no shrinking of what failed."""
        phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
        hypothesis.settings.register_profile(
            "mutants", hypothesis.settings(), derandomize=True, database=None, phases=phases
        )
        hypothesis.settings.load_profile("mutants")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        module = importlib.import_module(self.name)
        file = str(module.__file__)
        seen = {item: _lines_of(item, file) for item in session.items}
        failed = [item.nodeid for item, (passed, _, _) in seen.items() if not passed]
        if failed or not seen:
            raise pytest.UsageError(f"these fail without any mutant: {failed or 'nothing collected'}")
        quick = sorted((item for item in seen if seen[item][2] < SLOW_S), key=lambda item: seen[item][2])
        every = mutants_of(Path(file).read_text(encoding="utf-8"))
        if self.only:
            every = [mutant for mutant in every if self.only in mutant.key]
        known = equivalent(self.name)
        left = [mutant for mutant in every if mutant.key not in known]
        chosen = sorted(
            random.Random(self.seed).sample(left, min(self.sample, len(left))), key=lambda mutant: mutant.lines
        )
        killed, unreached, survivors = 0, 0, list[dict[str, str]]()
        for mutant in chosen:
            lines = set(range(mutant.lines[0], mutant.lines[1] + 1))
            constant = mutant.place in vars(module) and not callable(vars(module)[mutant.place])
            tests = [item for item in quick if constant or seen[item][1] & lines]
            limit = int(5 * sum(seen[item][2] for item in tests)) + 10
            outcome = _in_child(lambda m=mutant, t=tests: _first_failure(module, m, t), limit)
            killed += outcome == "killed"
            unreached += outcome == "unreached"
            if outcome == "survived":
                why = "no test runs it" if not tests else f"{len(tests)} tests pass"
                survivors.append({"line": str(mutant.lines[0]), "mutant": mutant.key, "why": why})
                print(f"  {self.name}:{mutant.lines[0]} {mutant.key} ({why})", flush=True)
        tried = len(chosen) - unreached
        print(f"{self.name}: {killed} of {tried} killed ({len(every)} mutants, {len(quick)} tests)", flush=True)
        self.result = {
            "module": self.name, "mutants": len(every), "tried": tried, "killed": killed, "seed": self.seed,
            "equivalent": len(every) - len(left), "survivors": survivors,
            "tests": len(quick), "slow": [item.nodeid for item in seen if item not in quick],
        }  # fmt: skip
        return True


def _lines_of(item: pytest.Item, file: str) -> tuple[bool, set[int], float]:
    """Whether a test passes, which lines of a file it runs, and in how many CPU seconds."""
    lines: set[int] = set()

    def inside(frame: FrameType, event: str, _: object) -> Any:
        lines.add(frame.f_lineno)
        return inside

    def calls(frame: FrameType, event: str, _: object) -> Any:
        return inside if frame.f_code.co_filename == file else None

    started = time.process_time()
    threading.settrace(calls)
    sys.settrace(calls)
    try:
        reports = runtestprotocol(item, log=False, nextitem=None)
    finally:
        sys.settrace(None)
        threading.settrace(None)  # pyright: ignore[reportArgumentType]
    return all(report.passed or report.skipped for report in reports), lines, time.process_time() - started


def _first_failure(module: ModuleType, mutant: Mutant, tests: list[pytest.Item]) -> int:
    """0 survived, 1 killed, 2 unreached."""
    if not put_into(module, mutant):
        return 2
    if READS not in module.__name__:
        _forget()
    for item in tests:
        if any(report.failed for report in runtestprotocol(item, log=False, nextitem=None)):
            return 1
    return 0


def _forget() -> None:
    """What tests made once with the sound module and kept is made again."""
    for name, other in list(sys.modules.items()):
        if name.partition(".")[0] == "tests":
            for held in vars(other).values():
                clear = getattr(held, "cache_clear", None)
                if callable(clear):
                    clear()


def _in_child(run: Callable[[], int], limit_s: int) -> str:
    """The outcome of a mutant; what breaks the process or takes `limit_s` of CPU, or `MOST_BYTES`, is killed too.

    So is what waits for ever, which takes no CPU: the child gets an alarm after `WAITS` times as long by the clock.
    """
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(WAITS * limit_s)
            resource.setrlimit(resource.RLIMIT_CPU, (limit_s, limit_s))
            resource.setrlimit(resource.RLIMIT_DATA, (MOST_BYTES, MOST_BYTES))
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, 1)
            os.dup2(nothing, 2)
            code = run()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return {0: "survived", 2: "unreached"}.get(os.waitstatus_to_exitcode(status), "killed")


def equivalent(name: str) -> dict[str, str]:
    """Mutants of a module that change nothing, and why."""
    listed = yaml.safe_load(EQUIVALENT.read_text(encoding="utf-8")) if EQUIVALENT.is_file() else {}
    return {row["mutant"]: row["why"] for row in listed.get(name, [])}


def keep(found: dict[str, Any]) -> None:
    """Into the results, in place of what they held of that module."""
    made = pages.stamp()
    before = pages.results("mutants")["modules"] if pages.results_file("mutants").is_file() else []
    others = [row for row in before if row["module"] != found["module"]]
    rows = sorted([*others, {**found, "day": made["day"], "commit": made["commit"]}], key=lambda row: row["module"])
    known = [(name, *one) for name in TESTS for one in equivalent(name).items()]
    left = [{"module": name, "mutant": mutant, "why": why} for name, mutant, why in known]
    pages.save("mutants", {"made": made, "modules": rows, "equivalent": left})


def main() -> None:
    parser = argparse.ArgumentParser(description="Put small faults into modules and see whether their tests fail.")
    parser.add_argument("modules", nargs="+", choices=sorted(TESTS), metavar="MODULE")
    parser.add_argument("--sample", type=int, default=60, help="mutants a module, at most")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", help="mutants whose text holds this; results are not saved")
    given = parser.parse_args()
    os.chdir(ROOT)
    for name in given.modules:
        campaign = Campaign(name, given.sample, given.seed, given.only)
        files = [file_of(test) for test in TESTS[name]]
        code = pytest.main(["-q", "--durations=0", "--no-header", "-p", "no:cacheprovider", *files], [campaign])
        if campaign.result is None:
            sys.exit(int(code) or 1)
        if not given.only:
            keep(campaign.result)


if __name__ == "__main__":
    main()
