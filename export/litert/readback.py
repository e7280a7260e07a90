"""LiteRT, read back: the tables of the file, and every constant by its name.

Tables (operators, tensors, signatures) are held against those that are emitted anew without their numbers; the numbers
against the checkpoint and formulas alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from bluelm.errors import ExportError
from compress.checkpoint.store import EMBED, QuantizedCheckpoint
from export.artifacts.artifact import Artifact
from export.artifacts.mobile import KvBits
from export.lowering.encoding import Encoding
from export.lowering.ranges import Ranges
from export.onnx.readback_constants import HEADROOM_8_BITS, HIDDEN_SCORE, Constants, around
from export.readback import items
from export.readback.held import faults, stored, table
from export.readback.numbers import array_fault

if TYPE_CHECKING:
    from export.litert.file import LitertModel
    from export.litert.reader import LitertFile

BITS: dict[str, KvBits] = {"float32": 32, "float16": 16, "int8": 8}
CACHED = re.compile(r"(?:past_)?(?P<kind>keys|values)\.(?P<layer>\d+)|layers\.(?P<of>\d+)\.(?P<name>keys|values)")
Lower = Callable[["LitertModel", QuantizedCheckpoint], Iterator[str]]
"""Puts the graphs of a checkpoint into a model."""
FROM_CALIBRATION = "scales of an int8 cache come from ranges of activations, which do not lie beside it"


def findings(artifact: Artifact, quantized: QuantizedCheckpoint) -> Iterator[items.Finding]:
    """Of the program and the embedding table beside it."""
    from export.litert import export as litert
    from export.litert.reader import LitertFile

    file = LitertFile(artifact.path("model"), quantized.config.num_layers)
    bits = BITS[artifact.cache]

    def lower(model: LitertModel, held: QuantizedCheckpoint) -> Iterator[str]:
        return litert.lower(model, held, artifact.context, artifact.chunk, bits, _encodings(file))

    told = graph_faults(LitertFile(file.path, quantized.config.num_layers), quantized, lower)
    told |= {items.CONTEXT: [], items.CACHE: []}
    for name, tensor in graph_inputs(file):
        if name == "mask" and tensor.shape[-1] != artifact.context:
            told[items.CONTEXT].append(f"{tensor.shape[-1]} instead of {artifact.context}")
        if name.startswith("past_") and tensor.type != litert.CACHE_TYPES[bits]:
            told[items.CACHE].append(f"{name} is of type {tensor.type} instead of {litert.CACHE_TYPES[bits]}")
    yield from found_in(told, constant_faults(file, artifact.context, quantized, {EMBED}))
    yield from table(artifact, quantized)
    yield from items.equal(items.MASK, artifact.mask_value, HIDDEN_SCORE)
    if artifact.cache == "int8" and artifact.paths("ranges"):
        yield from items.checked(items.ENCODINGS, _scale_faults(file, Ranges.load(artifact.path("ranges"))))
    elif artifact.cache == "int8":
        yield from items.untold(FROM_CALIBRATION, items.ENCODINGS)


def found_in(told: dict[str, list[str]], more: Iterable[tuple[str, str]]) -> Iterator[items.Finding]:
    """Findings of faults by item, and of items each with what is wrong or ""."""
    for item, fault in more:
        told.setdefault(item, []).extend([fault] if fault and fault not in told.get(item, []) else [])
    for item, faults_of_it in told.items():
        yield from items.checked(item, faults_of_it[:3] if item in (items.GRAPH, items.TELLS) else faults_of_it)


def graph_faults(file: LitertFile, quantized: QuantizedCheckpoint, lower: Lower) -> dict[str, list[str]]:
    """Differences of the tables from those that `lower` emits anew without numbers, as operations and metadata.

    Args:
        file: read for this alone: its tables are taken apart.
    """
    from export.litert.file import Outline
    from export.litert.reader import Layouts

    found: dict[str, list[str]] = {items.GRAPH: [], items.TELLS: []}
    model = Outline("bluelm-export")
    try:
        list(lower(model, Layouts.of(quantized, file)))
    except ExportError as error:  # weights that we never write
        found[items.GRAPH].append(str(error))
        return found
    for path, fault in _differences(_bare(file.model), _bare(model.tables()), ""):
        found[items.TELLS if path.startswith(("signature", "description", "metadata")) else items.GRAPH].append(
            f"{path}: {fault}"
        )
    return found


def constant_faults(
    file: LitertFile, context: int, quantized: QuantizedCheckpoint, elsewhere: Collection[str] = ()
) -> Iterator[tuple[str, str]]:
    """Items that constants are, or belong to, each with what is wrong or ""; `elsewhere`: weights that are no part."""
    constants, weights = Constants(quantized, context), {*items.weight_names(quantized)} - {*elsewhere}
    for name, tensor, graph in file.constants():
        yield from _judged(file, tensor, graph, name, constants, weights, quantized)


def graph_inputs(file: LitertFile) -> Iterator[tuple[str, Any]]:
    """Name and tensor of every input of every signature."""
    for signature in file.model.signatureDefs:
        for one in signature.inputs:
            yield one.name.decode(), file.model.subgraphs[signature.subgraphIndex].tensors[one.tensorIndex]


def _scale_faults(file: LitertFile, ranges: Ranges) -> Iterator[str]:
    """Scales of the int8 cache that are not those of the ranges beside it."""
    for tensor in (tensor for graph in file.model.subgraphs for tensor in graph.tensors):
        match, how = CACHED.match(tensor.name.decode()), tensor.quantization
        if match is None or how is None or how.scale is None:
            continue
        low, high = ranges.values[f"layers.{match['layer'] or match['of']}.{match['kind'] or match['name']}"]
        wanted = around(low * HEADROOM_8_BITS, high * HEADROOM_8_BITS, np.int8)
        if [np.float32(scale) for scale in how.scale] != [wanted.scale] or np.any(how.zeroPoint):
            yield f"{match[0]} has the scale {float(how.scale[0]):.9g} instead of {wanted.scale:.9g}"


def _encodings(file: LitertFile) -> Any:
    """The file's own scales of its int8 cache; whether they are the right ones is not known."""
    scales: dict[str, float] = {}
    for tensor in file.model.subgraphs[0].tensors:
        kind, _, layer = tensor.name.decode().partition(".")
        if kind in ("keys", "values") and tensor.quantization is not None and tensor.quantization.scale is not None:
            scales[f"layers.{layer}.{kind}"] = float(tensor.quantization.scale[0])
    return lambda name: Encoding(scales.get(name, 1.0), 0, "int8")


def _bare(model: Any) -> Any:
    """Without what differs between files of the same tables: where buffers lie, and the scales of weights' rows."""
    model.buffers = len(model.buffers)
    for graph in model.subgraphs:
        for tensor in graph.tensors:
            if tensor.buffer and tensor.quantization is not None:
                tensor.quantization.scale = tensor.quantization.zeroPoint = None
            tensor.buffer = bool(tensor.buffer)
    return model


def _differences(found: Any, wanted: Any, path: str) -> Iterator[tuple[str, str]]:
    """Places of two trees of the schema's objects where they differ."""
    if hasattr(wanted, "__dict__") and type(found) is type(wanted):
        for name in vars(wanted):
            yield from _differences(getattr(found, name), getattr(wanted, name), f"{path}.{name}" if path else name)
    elif isinstance(wanted, list) and isinstance(found, list):
        if len(found) != len(wanted):
            yield path, f"{len(found)} instead of {len(wanted)}"
        for index, (mine, theirs) in enumerate(zip(found, wanted, strict=False)):
            yield from _differences(mine, theirs, f"{path}[{index}]")
    elif not np.array_equal(np.asarray(found), np.asarray(wanted)):
        yield path, f"{_short(found)} instead of {_short(wanted)}"


def _short(value: Any) -> str:
    return str(value.tolist() if isinstance(value, np.ndarray) else value)[:60]


def _judged(
    file: LitertFile,
    tensor: Any,
    graph: Any,
    name: str,
    constants: Constants,
    weights: Collection[str],
    quantized: QuantizedCheckpoint,
) -> Iterator[tuple[str, str]]:
    """Items that a constant is, or belongs to, each with what is wrong or ""."""
    if name in weights:
        try:
            found = faults(quantized.linear(name), stored(file.weight(tensor, graph)))
        except ExportError as error:
            found = [str(error)]
        yield name, ", ".join(found)
        return
    array = file.array(tensor)
    if name in constants.tables:
        named = constants.tables[name]
        values = named.values()
        yield named.item, array_fault(array, np.atleast_1d(values))
    elif name == "epsilon":
        fault = array_fault(array, np.array([quantized.config.rms_norm_eps], np.float32))
        yield from ((items.eps(norm), fault) for norm in items.norm_names(quantized))
    elif name.startswith("integers."):
        wanted = np.array([int(number) for number in name.removeprefix("integers.").split("x")], np.int32)
        yield items.GRAPH, _about(name, array_fault(array, wanted))
    elif name == "axis.last":
        yield items.GRAPH, _about(name, array_fault(array, np.array([2], np.int32)))
    elif not (name.endswith(".scales") and name.removesuffix(".scales") in weights):  # read with their codes
        yield items.GRAPH, f"the constant {name} is none of this model's"


def _about(name: str, fault: str) -> str:
    return f"{name}: {fault}" if fault else ""
