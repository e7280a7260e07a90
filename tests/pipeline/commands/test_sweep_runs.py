"""A sweep of real runs: shared work, going on where it stopped, a Ray cluster of two workers."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from bluelm.errors import UnavailableError
from pipeline.commands.sweep import Group, Variant, on_ray
from pipeline.report.sweep_results import VariantRow
from tests.support.checkpoints.shapes import tiny_checkpoint
from tests.support.limits import HANG_S

ROOT = Path(__file__).parents[3]


def sweep(out: Path, model: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from pipeline.cli import main; main()", "sweep", "--out", str(out)]
    small = [
        "--model",
        str(model),
        "--samples",
        "2",
        "--length",
        "16",
        "--eval-tokens",
        "512",
        "--runtime",
        "onnx-cpu",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "BLUELM_EXPORT_HISTORY": str(out / "history.sqlite")}
    return subprocess.run(
        [*command, *arguments, *small], capture_output=True, text=True, check=False, cwd=ROOT, env=environment
    )


def rows(out: Path) -> dict[str, dict[str, str]]:
    with (out / "sweep.csv").open(newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("sweep") / "tiny")


def test_runs_share_work_and_a_second_sweep_takes_what_is_finished(tmp_path, model):
    asked = ("--targets", "generic-arm64,apple", "--methods", "rtn", "--bits", "8", "--group-size", "32,7")
    done = sweep(tmp_path, model, *asked)
    found = rows(tmp_path)
    first, second = "rtn-w8-g32-generic-arm64", "rtn-w8-g32-apple"
    assert set(found) == {first, second, "rtn-w8-g7-generic-arm64", "rtn-w8-g7-apple"}
    assert done.returncode == 2  # a group of 7 is no recipe; the others are done all the same
    assert found["rtn-w8-g7-apple"]["exit_code"] == "2" and "--group-size" in found["rtn-w8-g7-apple"]["problem"]
    assert float(found[first]["mean_kl"]) < 0.01 and float(found[first]["size_bytes"]) > 1e5
    stages = json.loads((tmp_path / second / "report.json").read_text())["stages"]
    reused = {stage["name"]: stage["reused"] for stage in stages}
    assert reused["quantized"] and reused["onnx-cpu"] and not reused["judged"]
    reports = {name: (tmp_path / name / "report.json").stat().st_mtime_ns for name in (first, second)}
    sweep(tmp_path, model, *asked)
    assert {n: (tmp_path / n / "report.json").stat().st_mtime_ns for n in reports} == reports
    assert rows(tmp_path) == found
    (tmp_path / second / "sweep.json").unlink()  # as if it had been interrupted there
    sweep(tmp_path, model, *asked)
    again = {name: (tmp_path / name / "report.json").stat().st_mtime_ns for name in reports}
    assert again[first] == reports[first] and again[second] != reports[second]


PATIENT = {  # limits of Ray's that a busy machine reaches
    "RAY_gcs_server_port_wait_time_s": HANG_S,
    "RAY_agent_register_timeout_ms": 1000 * HANG_S,
    "RAY_worker_register_timeout_seconds": HANG_S,
    "RAY_health_check_timeout_ms": 1000 * HANG_S,
}


def children() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


ITS_OWN = pytest.mark.slow  # what Ray's own processes take is not measured


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A local Ray with room for two workers. Its parts give up on a busy machine: then it is started again."""
    with pytest.MonkeyPatch.context() as patch:
        for name, limit in PATIENT.items():
            patch.setenv(name, str(limit))
        from ray._private import services
        from ray.cluster_utils import Cluster

        others, get_node = children(), services.get_node

        def wait_for_node(*arguments: Any) -> Any:
            """Not for 30 s, as Ray does, but while its node lives."""
            while True:
                try:
                    return get_node(*arguments)
                except RuntimeError:  # it has not told of itself yet
                    if not any(process.name() == "raylet" for process in children() - others):
                        raise
                    time.sleep(0.5)

        patch.setattr(services, "get_node", wait_for_node)
        until = time.monotonic() + HANG_S
        head = {"num_cpus": 2, "object_store_memory": 80_000_000, "include_dashboard": False}
        while True:
            try:
                started = Cluster(initialize_head=True, head_node_args=head)
                break
            except Exception:
                if time.monotonic() > until:
                    raise
                for process in children() - others:
                    with suppress(psutil.NoSuchProcess):
                        process.kill()
        try:
            yield str(started.address)
        finally:
            started.shutdown()


def meet(work: Group) -> list[VariantRow]:
    """Wait until the other group is there too: both must be under way at the same time."""
    (variant,), folder, _ = work
    (Path(folder) / variant.name).touch()
    deadline = time.monotonic() + HANG_S
    while len(list(Path(folder).iterdir())) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return [VariantRow(variant.name, variant.method, variant.bits, variant.group_size, variant.target, os.getpid())]


@ITS_OWN
def test_two_ray_workers_work_at_the_same_time(tmp_path, cluster):
    variants = [Variant("rtn", bits, "32", "generic-arm64") for bits in ("4", "8")]
    with on_ray(cluster) as run_all:
        found = run_all(meet, [([v], str(tmp_path), []) for v in variants])
    assert [group[0].name for group in found] == [v.name for v in variants]
    workers = {group[0].exit_code for group in found}
    assert len(workers) == 2 and os.getpid() not in workers


def dies(work: Group) -> list[VariantRow]:
    os.kill(os.getpid(), signal.SIGKILL)
    return []


@ITS_OWN
def test_a_ray_worker_that_is_killed_is_said(tmp_path, cluster):
    with on_ray(cluster) as run_all, pytest.raises(UnavailableError, match="a worker of Ray was lost") as caught:
        run_all(dies, [([], str(tmp_path), [])])
    assert "finished runs are kept" in (caught.value.fix or "")


def test_a_sweep_on_ray(tmp_path, model, cluster):
    done = sweep(tmp_path, model, "--targets", "generic-arm64", "--methods", "rtn", "--bits", "4,8", "--ray", cluster)
    found = rows(tmp_path)
    assert len(found) == 2 and all(row["exit_code"] in ("0", "3") for row in found.values()), done.stderr
    assert float(found["rtn-w8-g32-generic-arm64"]["mean_kl"]) < float(found["rtn-w4-g32-generic-arm64"]["mean_kl"])


def test_no_ray_cluster_there(tmp_path, model):
    done = sweep(tmp_path, model, "--targets", "generic-arm64", "--ray", "127.0.0.1:1")
    assert done.returncode == 5 and "no Ray cluster" in done.stderr
