"""Inputs of an artifact's graphs as they are in use: recorded once, for runners that know no tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from bluelm.errors import InputError
from bluelm.files import atomic_folder
from export.artifact import Artifact
from targets.cached_runtime import CachedRuntime, Feeds, Step
from targets.genai_runtime import GenaiRuntime
from targets.onnx_runtime import session_step

TOKEN = 5  # any: speed does not depend on it


def host(name: str, artifact: Artifact, prefill: Step, decode: Step) -> CachedRuntime | GenaiRuntime:
    """The host's side of an artifact of onnxruntime's or LiteRT's formats over steps that run its graphs."""
    kind = GenaiRuntime if artifact.format == "onnx-genai" else CachedRuntime
    return kind(name, artifact, prefill, decode)


def graph_path(artifact: Artifact, graph: str) -> Path:
    """File of a graph, "prefill" or "decode"; an onnx-genai artifact has one for both."""
    return artifact.path("model" if artifact.format == "onnx-genai" else graph)


def record(artifact: Artifact, depth: int = 0) -> tuple[dict[str, Feeds], dict[str, np.ndarray]]:
    """Inputs of one whole chunk of prefill and of one decode step behind it, run by onnxruntime here.

    Args:
        depth: tokens in the cache before the decode step, 0: one chunk. Less than the context.

    Returns:
        feeds and logits by graph ("prefill", "decode").
    """
    depth = depth or artifact.chunk
    if not artifact.chunk <= depth < artifact.context:
        raise InputError(
            f"a depth of {depth} tokens lies outside the artifact",
            where=artifact.folder,
            fix=f"choose {artifact.chunk} to {artifact.context - 1}",
        )
    feeds: dict[str, Feeds] = {}
    logits: dict[str, np.ndarray] = {}

    def recording(graph: str) -> Step:
        step = session_step(graph_path(artifact, graph))

        def run(inputs: Feeds) -> Mapping[str, np.ndarray]:
            outputs = step(inputs)
            feeds[graph] = {name: array.copy() for name, array in inputs.items()}
            logits[graph] = outputs["logits"]
            return outputs

        return run

    runtime = host("recording", artifact, recording("prefill"), recording("decode"))
    runtime.prefill([TOKEN] * artifact.chunk)
    first = feeds["prefill"], logits["prefill"]
    if depth > artifact.chunk:
        runtime.prefill([TOKEN] * (depth - artifact.chunk))
    runtime.decode(TOKEN)
    return (
        {"prefill": first[0], "decode": feeds["decode"]},
        {"prefill": first[1], "decode": logits["decode"]},
    )


def perf_test_folder(artifact: Artifact, graph: str, feeds: Feeds, folder: Path) -> Path:
    """A folder as onnxruntime_perf_test reads it: the graph, its weights, test_data_set_0/input_N.pb."""
    with atomic_folder(folder) as temporary:
        source = graph_path(artifact, graph)
        names = {source.name, *(f.path for f in artifact.files if f.role == "weights")}
        for name in sorted(names):
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            (temporary / name).symlink_to((artifact.folder / name).resolve())
        inputs = temporary / "test_data_set_0"
        inputs.mkdir()
        order = [value.name for value in onnx.load(source, load_external_data=False).graph.input]
        for index, name in enumerate(order):
            tensor = numpy_helper.from_array(feeds[name], name)
            (inputs / f"input_{index}.pb").write_bytes(tensor.SerializeToString())
    return folder
