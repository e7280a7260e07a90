"""Inputs of an artifact's graphs, for runners without tokens: recorded in use, or constant."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from bluelm.errors import InputError
from bluelm.system.files import atomic_folder
from export.artifacts.artifact import Artifact
from export.onnx.reader import read_model
from targets.arm64.genai import GenaiRuntime
from targets.arm64.onnx import session_step
from targets.host.cached_runtime import CachedRuntime, Feeds, Step

TOKEN = 5  # any: speed does not depend on it
PROMPT = 128  # tokens of prefill where a graph takes any number


def host(name: str, artifact: Artifact, prefill: Step, decode: Step) -> CachedRuntime | GenaiRuntime:
    """The host's side of an artifact of onnxruntime's or LiteRT's formats over steps that run its graphs."""
    kind = CachedRuntime if artifact.record.host_cache else GenaiRuntime
    return kind(name, artifact, prefill, decode)


def prompt_tokens(artifact: Artifact) -> int:
    """Tokens of the prefill that is timed: a chunk, but less where one chunk may fill the context."""
    if not artifact.record.host_cache:
        return min(artifact.chunk, PROMPT, max(1, artifact.context // 2))
    return artifact.chunk


def graph_paths(artifact: Artifact, graph: str) -> list[Path]:
    """Files of a graph, "prefill" or "decode", one a part of the model; some formats have one for both."""
    return artifact.paths(graph) or artifact.paths("model")


def graph_path(artifact: Artifact, graph: str) -> Path:
    """The file of a graph of an artifact in one part."""
    (path,) = graph_paths(artifact, graph)
    return path


def still(path: Path) -> Feeds:
    """Zeros for every input of a graph of fixed shapes, whose speed does not depend on them: a compiled one, that
    nothing here can run to record others."""
    feeds: dict[str, np.ndarray] = {}
    for value in read_model(path).graph.input:
        about = value.type.tensor_type
        shape = [dimension.dim_value for dimension in about.shape.dim]
        feeds[value.name] = np.zeros(shape, helper.tensor_dtype_to_np_dtype(about.elem_type))
    return feeds


def record(artifact: Artifact, depth: int = 0) -> tuple[dict[str, Feeds], dict[str, np.ndarray]]:
    """Inputs of one whole chunk of prefill and of one decode step behind it, run by onnxruntime here.

    Args:
        depth: tokens in the cache before the decode step, 0: as many as prefill takes. Less than the context.

    Returns:
        feeds and logits by graph ("prefill", "decode").
    """
    prompt = prompt_tokens(artifact)
    depth = depth or prompt
    if not prompt <= depth < artifact.context:
        raise InputError(
            f"a depth of {depth} tokens lies outside the artifact",
            where=artifact.folder,
            fix=f"choose {prompt} to {artifact.context - 1}",
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
    runtime.prefill([TOKEN] * prompt)
    first = feeds["prefill"], logits["prefill"]
    if depth > prompt:
        runtime.prefill([TOKEN] * (depth - prompt))
    runtime.decode(TOKEN)
    return (
        {"prefill": first[0], "decode": feeds["decode"]},
        {"prefill": first[1], "decode": logits["decode"]},
    )


def binaries(graph: onnx.GraphProto) -> set[str]:
    """Files with compiled code that the nodes of a graph name."""
    attributes = (attribute for node in graph.node for attribute in node.attribute)
    return {attribute.s.decode() for attribute in attributes if attribute.name == "ep_cache_context"}


def perf_test_folder(artifact: Artifact, source: Path, feeds: Feeds, folder: Path) -> Path:
    """A folder as onnxruntime_perf_test reads it: the graph `source`, what it names, test_data_set_0/input_N.pb."""
    with atomic_folder(folder) as temporary:
        graph = read_model(source).graph
        names = {source.name, *binaries(graph), *(f.path for f in artifact.files if f.role == "weights")}
        for name in sorted(names):
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            (temporary / name).symlink_to((artifact.folder / name).resolve())
        inputs = temporary / "test_data_set_0"
        inputs.mkdir()
        for index, value in enumerate(graph.input):
            tensor = numpy_helper.from_array(feeds[value.name], value.name)
            (inputs / f"input_{index}.pb").write_bytes(tensor.SerializeToString())
    return folder
