"""What every test needs: nothing is written into the user's own folders, and Debian packages of its marks are here."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from tests import packages

pytest_plugins = ["tests.slow"]

# Runs append to the history; those of tests to one of their own, in child processes too.
_folder = tempfile.TemporaryDirectory(prefix="bluelm-export-tests-")
os.environ["BLUELM_EXPORT_HISTORY"] = str(Path(_folder.name) / "history.sqlite")
os.environ.pop("MLFLOW_TRACKING_URI", None)

# Property tests: a busy machine may take any time for an example, and for drawing one.
hypothesis.settings.register_profile(
    "tests", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow], derandomize=packages.in_ci()
)
hypothesis.settings.load_profile("tests")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before any fixture is made."""
    for mark in item.iter_markers("requires"):
        packages.need(*mark.args)
    if sys.platform != "linux" and item.get_closest_marker("linux"):
        pytest.skip("needs Linux")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
    """Behind all else, above pytest's closing line: packages that tests lacked, and what installs them."""
    yield
    reports = [report for kind in ("skipped", "failed", "error") for report in terminalreporter.stats.get(kind, [])]
    lacking = packages.missing()
    if lacking and any(packages.LACKS in str(report.longrepr) for report in reports):
        outcome = "failed" if packages.in_ci() else "were skipped"
        terminalreporter.write_line(f"Tests {outcome} for want of {', '.join(lacking)}. What installs them:")
        terminalreporter.write_line(f"  {packages.command(lacking)}")
