"""Checks of graphs that Qualcomm compiled: their metadata, their inputs, what they compute."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol, cast

import numpy as np

from bluelm.errors import InputError
from compress.checkpoint.store import QuantizedCheckpoint
from eval.accuracy import twin_blocks
from eval.accuracy.twin_blocks import again, unlike
from eval.measurement import Measurement
from export.artifacts.artifact import Artifact, find_source, source_of
from export.lowering.ranges import Ranges
from export.onnx.decoder import GRAPHS
from targets.host.cached_runtime import Feeds
from targets.qualcomm.backend import chip_of
from targets.qualcomm.border import binary_of, border_faults, onnx_border, wrapper_faults
from targets.qualcomm.compile import GIVEN, binary_contents, graphs_of
from targets.qualcomm.given import faults as given_faults
from targets.qualcomm.messages import SHARING, BinaryContents, GraphBorder
from targets.runtime import Place, open_runtime
from targets.socs import find_soc

MISMATCHES, EXCESS = "compiled_mismatches", "twin_block_excess"
LIMIT = 6.0
"""Of `twin_blocks.Apart.ratio`. Sound graphs lie below it (4.0 at most, SmolLM2-135M's:
benchmarks/npu/htp_trials.md); with the codes of any column drawn anew those of a small model lie above it
(tests/eval/files/test_compiled.py)."""


class Graphs(Protocol):
    """What runs a step of an artifact's graphs on inputs made here: `CachedRuntime`."""

    def run(self, feeds: Feeds) -> Mapping[str, np.ndarray]: ...


def mismatches(artifact: Artifact, subject: str) -> Measurement:
    """Names, graphs, tensors, encodings, compiler and chip: what the finished files tell by the vendor's own API, and
    what the compiler was given by its dump, against the ONNX graphs."""
    try:
        found = list(_faults(artifact, find_source(artifact)))
    except InputError as error:
        found = [error.problem]
    note = "; ".join(found[:3]) + (f"; and {len(found) - 3} more" if len(found) > 3 else "")
    return Measurement(MISMATCHES, len(found), "places", "measured", note=note, subject=subject)


class TwinCheck:
    """Every block and the head of prefill and decode on the simulator, each against its twin, and decode against
    prefill."""

    def __init__(self, artifact: Artifact, quantized: QuantizedCheckpoint, on: Place) -> None:
        """Run the artifact on the probes; it is closed again before the build that shows blocks is opened.

        Raises:
            InputError: the ONNX artifact that it was compiled from is not beside it, or is another's.
        """
        self._artifact, self._quantized = artifact, quantized
        self._ranges = Ranges.load(source_of(artifact).path("ranges"))
        self._ranges.check(quantized)
        self._probes = twin_blocks.probes(artifact, self._ranges)
        with open_runtime(artifact.folder, on) as runtime:
            self._own = self._run(cast(Graphs, runtime))
            self._decode_unlike = self._as_prefill(cast(Graphs, runtime), self._own)

    def figure(self, shown: Graphs, subject: str) -> Measurement:
        """How far they are apart, by `LIMIT`; above 1 also where graphs that should answer alike do not.

        Two compilations of the same weights give the same bits in every model tried, and so do decode and prefill in
        all but some tiny ones. Where they do not, single weights of one may be wrong by less than the noise, so that a
        twin cannot tell: the figure is 1 and the share of values that differ. Decode that differs from prefill in the
        build that shows blocks as well, which is compiled anew from graphs whose weights were read back, is the
        compiler's way with these shapes: then the same bits as that build's are what holds the artifact.

        Args:
            shown: a build of the same ONNX graphs with block outputs, which speaks for the artifact.
        """
        outputs = self._run(shown)
        runs = {graph: list(zip(feeds, outputs[graph], strict=True)) for graph, feeds in self._probes.items()}
        context = self._artifact.context
        found = twin_blocks.apart(self._quantized, self._ranges, context, runs)
        shown_unlike = unlike(pair for graph in runs for pair in zip(self._own[graph], outputs[graph], strict=True))
        if shown_unlike:
            found += twin_blocks.whole(self._quantized, self._ranges, context, runs, self._own)
        worst = max(found, key=lambda apart: apart.ratio)
        note = (
            f"{worst.value} of {worst.graph} is farthest from its twin, {worst.ratio:.2g} times what float16 products "
            f"explain ({LIMIT:g} is the limit); the graphs that show their blocks answer {_alike(shown_unlike)} the "
            f"artifact's own, decode answers {_alike(self._decode_unlike)} prefill"
        )
        expected = self._decode_unlike and self._as_prefill(shown, outputs)
        if expected:
            note += ", as it does in those graphs"
        differing = max(shown_unlike, 0.0 if expected else self._decode_unlike)
        value = max(worst.ratio / LIMIT, 1 + differing if differing else 0.0)
        return Measurement(EXCESS, value, "", "emulated", n=len(found), note=note, subject=subject)

    def _run(self, runtime: Graphs) -> dict[str, list[Mapping[str, np.ndarray]]]:
        return {graph: [runtime.run(feeds) for feeds in inputs] for graph, inputs in self._probes.items()}

    def _as_prefill(self, runtime: Graphs, outputs: Mapping[str, list[Mapping[str, np.ndarray]]]) -> float:
        """The share of values that decode computes otherwise than prefill did."""
        chunks = zip(self._probes["prefill"], outputs["prefill"], strict=True)
        steps = [step for feeds, outputs in chunks for step in again(self._artifact, feeds, outputs)]
        return unlike((wanted, runtime.run(feeds)) for feeds, wanted in steps)


def _alike(differing: float) -> str:
    return f"otherwise ({differing:.2g} of the values) than" if differing else "with the same bits as"


def _faults(artifact: Artifact, source: Artifact | None) -> Iterator[str]:
    """Without a source the files are held against one another alone."""
    if artifact.given is None:
        yield "artifact.json does not tell what was compiled"
        return
    if source is not None:
        for role in (GIVEN, f"{GIVEN}-shipped") if not artifact.record.runs_as_shipped else (GIVEN,):
            for dump, graph in zip(artifact.paths(role), graphs_of(source), strict=True):
                yield from (f"given for {graph.name}: {fault}" for fault in given_faults(dump, graph))
    soc_model = chip_of(find_soc(artifact.soc or "")).soc_model
    yield from option_faults(artifact.given.settings, soc_model)
    forms = _programs(artifact, source) if artifact.record.delegate else _wrappers(artifact, source)
    for name, contents, faults in forms:
        yield from (f"{name}: {fault}" for fault in faults)
        if contents.compiler != artifact.given.compiler:
            yield f"{name} is by {contents.compiler}, and artifact.json says {artifact.given.compiler}"
        if contents.soc_model != soc_model:
            yield f"{name} is for chip {contents.soc_model} instead of {soc_model}"


def option_faults(settings: Mapping[str, Mapping[str, str]], soc_model: int) -> Iterator[str]:
    """Options of the form that ships and of the one that ran: the same, but for the sharing of weights."""
    ships = settings.get("shipped", {})
    for form, told in settings.items():
        extra = SHARING if form == "shipped" and len(settings) > 1 else {}
        wanted = {key: value for key, value in ships.items() if key not in SHARING} | extra
        apart = sorted(key for key in told.keys() | wanted.keys() if told.get(key) != wanted.get(key))
        yield from (f"the {form} form was compiled with {key} {told.get(key, 'unset')}" for key in apart)
    if ships.get("soc_model") != str(soc_model):
        yield f"what ships was compiled for chip {ships.get('soc_model', 'unknown')} instead of {soc_model}"


def _wrappers(artifact: Artifact, source: Artifact | None) -> Iterator[tuple[str, BinaryContents, list[str]]]:
    """Each wrapper of both forms: its name, its binary's contents, its faults."""
    known: dict[Path, BinaryContents] = {}
    for form in ("", "simulator-"):
        for graph in GRAPHS:
            wrappers = artifact.paths(f"{form}{graph}")
            for wrapper, wanted in zip(wrappers, _borders(source, graph, len(wrappers)), strict=True):
                binary = binary_of(wrapper)
                if binary not in artifact.paths(f"{form}context"):
                    raise InputError(
                        f"{wrapper.name} names {binary and binary.name}, which is not a file of the artifact"
                    )
                if binary not in known:
                    (known[binary],) = binary_contents([binary])
                name = str(wrapper.relative_to(artifact.folder))
                yield name, known[binary], list(wrapper_faults(wrapper, known[binary], wanted))


def _programs(artifact: Artifact, source: Artifact | None) -> Iterator[tuple[str, BinaryContents, list[str]]]:
    """Each method of an ExecuTorch program."""
    from targets.qualcomm.executorch import describe_program, read_methods

    told = describe_program(artifact.path("model"))
    methods = read_methods(artifact.path("methods"))
    for graph in GRAPHS:
        for method, wanted in zip(methods[graph], _borders(source, graph, len(methods[graph])), strict=True):
            if method.name not in told:
                raise InputError(f"the program has no method {method.name}", where=artifact.path("model"))
            contents = told[method.name]
            faults = [fault for compiled in contents.graphs for fault in border_faults(compiled, wanted)]
            if [compiled.name for compiled in contents.graphs] != [method.name]:
                faults.append(f"it holds {', '.join(compiled.name for compiled in contents.graphs)}")
            yield f"{graph} of the program", contents, faults


def _borders(source: Artifact | None, graph: str, parts: int) -> Sequence[GraphBorder | None]:
    """Those of a graph's parts in the ONNX artifact; None where there is none."""
    return [None] * parts if source is None else [onnx_border(path) for path in source.paths(graph)]
