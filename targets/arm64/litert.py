"""LiteRT artifacts on this machine's CPU: XNNPACK's kernels, by ai-edge-litert's interpreter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path

import numpy as np

from bluelm.errors import InputError
from export.artifacts.artifact import Artifact
from targets.host.cached_runtime import CachedRuntime, Feeds, Step


def open_litert(artifact: Artifact) -> CachedRuntime:
    """Both signatures in one interpreter.

    Raises:
        InputError: the file is damaged.
    """
    name = f"litert in ai-edge-litert {version('ai-edge-litert')}"
    return CachedRuntime(name, artifact, *signature_steps(artifact.path("model")))


def signature_steps(path: Path, threads: int = 2, names: tuple[str, str] = ("prefill", "decode")) -> tuple[Step, Step]:
    """Two signatures of a file, as functions from inputs to outputs by name."""
    from ai_edge_litert.interpreter import Interpreter

    try:
        interpreter = Interpreter(model_path=str(path), num_threads=threads)
        interpreter.allocate_tensors()
        runners = [interpreter.get_signature_runner(name) for name in names]
    except (RuntimeError, ValueError) as error:
        raise InputError(f"LiteRT cannot load the model: {error}", where=path) from None

    def step(runner: Callable[..., Mapping[str, np.ndarray]]) -> Step:
        def run(feeds: Feeds) -> Mapping[str, np.ndarray]:
            return runner(**feeds)

        return run

    return step(runners[0]), step(runners[1])
