"""A Snapdragon artifact on Qualcomm's x86 simulator of the NPU, in a child process."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from export.artifacts.artifact import Artifact
from export.onnx.decoder import GRAPHS
from targets.host.cached_runtime import CachedRuntime, Feeds, Step, chain
from targets.host.child import Child, next_core
from targets.host.sliding import kept_by_host
from targets.qualcomm.backend import chip_of
from targets.qualcomm.messages import Chip, GraphRan, GraphsLoaded, LoadGraphs, RunGraph
from targets.socs import DEFAULT_SNAPDRAGON, find_soc

WORKER = "targets.qualcomm.worker"
LOAD_LIMIT_S = 600.0
STEP_LIMIT_S = 900.0


class QnnRuntime(CachedRuntime):
    """Keeps one child with both graphs of every part loaded; a step takes seconds, whatever its number of rows."""

    def __init__(
        self,
        artifact: Artifact,
        child: Child,
        paths: Mapping[str, Sequence[Path]],
        chip: Chip,
        adapted: Callable[[Step], Step],
    ) -> None:
        self._child = child
        steps = [adapted(chain([self._load(path, chip) for path in paths[graph]])) for graph in GRAPHS]
        super().__init__(f"{artifact.format} on the HTP simulator", artifact, *steps)

    def close(self) -> None:
        self._child.close()
        if not self._child.failed:
            self._child.log.unlink(missing_ok=True)

    def _load(self, path: Path, chip: Chip) -> Step:
        """Load one graph in the child."""
        name = path.stem
        loaded: GraphsLoaded = self._child.call(LoadGraphs(name, str(path.resolve()), chip), LOAD_LIMIT_S)

        def run(feeds: Feeds) -> Mapping[str, np.ndarray]:
            own = {given: feeds[given] for given in loaded.inputs}
            ran: GraphRan = self._child.call(RunGraph(name, own), STEP_LIMIT_S)
            return ran.outputs

        return run


def open_sliding(artifact: Artifact) -> QnnRuntime:
    """`open_htp` for graphs whose cache slides inside them."""
    return open_htp(artifact, kept_by_host)


def open_htp(artifact: Artifact, adapted: Callable[[Step], Step] = lambda step: step) -> QnnRuntime:
    """Load the graphs on the simulator; an onnx-npu artifact is compiled in memory first.

    Args:
        adapted: makes a graph's step one of a host that keeps the cache.

    Raises:
        UnavailableError: onnxruntime-qnn is not installed.
        TargetError: a graph is refused.
    """
    soc = find_soc(artifact.soc or DEFAULT_SNAPDRAGON)
    prefix = "" if artifact.record.runs_as_shipped else "simulator-"
    paths = {name: artifact.paths(f"{prefix}{name}") for name in GRAPHS}
    with tempfile.NamedTemporaryFile(prefix="bluelm-htp-", suffix=".log", delete=False) as log:
        # the simulator's threads hand over to each other: on several cores they take longer than on one
        child = Child(WORKER, Path(log.name), core=next_core())
    try:
        return QnnRuntime(artifact, child, paths, chip_of(soc), adapted)
    except BaseException:
        child.close()
        raise
