"""ONNX artifacts on this machine's CPU, by onnxruntime."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnxruntime

from bluelm.errors import InputError
from export.artifacts.artifact import Artifact
from export.onnx.decoder import GRAPHS
from targets.arm64.ort_errors import ORT_ERRORS
from targets.host.cached_runtime import CachedRuntime, Feeds, Step, chain
from targets.host.sliding import kept_by_host


def open_cpu(artifact: Artifact) -> CachedRuntime:
    """Both graphs of every part in onnxruntime's CPU provider.

    Raises:
        InputError: a graph is damaged.
    """
    return _opened(artifact, lambda step: step)


def open_sliding(artifact: Artifact) -> CachedRuntime:
    """The same of graphs whose cache slides inside them.

    Raises:
        InputError: a graph is damaged.
    """
    return _opened(artifact, kept_by_host)


def _opened(artifact: Artifact, adapted: Callable[[Step], Step]) -> CachedRuntime:
    name = f"{artifact.format} in onnxruntime {onnxruntime.__version__}"
    steps = [adapted(chain([session_step(path) for path in artifact.paths(graph)])) for graph in GRAPHS]
    return CachedRuntime(name, artifact, *steps)


def session_step(path: Path) -> Callable[[Feeds], Mapping[str, np.ndarray]]:
    """A session of a graph on the CPU, as a function from inputs to outputs by name."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # idle threads must not spin: prefill, decode and the judge's own work share the cores
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except ORT_ERRORS as error:
        raise InputError(f"onnxruntime cannot load the graph: {error}", where=path) from None
    return run_step(session)


def run_step(session: onnxruntime.InferenceSession) -> Callable[[Feeds], Mapping[str, np.ndarray]]:
    """One run of a session by names."""
    names = [output.name for output in session.get_outputs()]
    inputs = [given.name for given in session.get_inputs()]

    def step(feeds: Feeds) -> Mapping[str, np.ndarray]:
        found = session.run(names, {name: feeds[name] for name in inputs})
        return {name: np.asarray(array) for name, array in zip(names, found, strict=True)}

    return step
