"""LiteRT, read back: the tables of the file, and every constant by its name.

Tables (operators, tensors, signatures) are held against those that are emitted anew without their numbers; the numbers
against the checkpoint and formulas alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
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
    from export.litert.reader import LitertFile

BITS: dict[str, KvBits] = {"float32": 32, "float16": 16, "int8": 8}
CACHED = re.compile(r"(?:past_)?(?P<kind>keys|values)\.(?P<layer>\d+)|layers\.(?P<of>\d+)\.(?P<name>keys|values)")
FROM_CALIBRATION = "scales of an int8 cache come from ranges of activations, which do not lie beside it"


def findings(artifact: Artifact, quantized: QuantizedCheckpoint) -> Iterator[items.Finding]:
    """Of the program and the embedding table beside it."""
    from export.litert.reader import LitertFile

    file = LitertFile(artifact.path("model"), quantized.config.num_layers)
    told = _told(artifact, quantized)
    for name, tensor, graph in file.constants():
        for item, fault in _judged(file, tensor, graph, name, artifact, quantized):
            told.setdefault(item, []).extend([fault] if fault and fault not in told.get(item, []) else [])
    for item, found in told.items():
        yield from items.checked(item, found)
    yield from table(artifact, quantized)
    yield from items.equal(items.MASK, artifact.mask_value, HIDDEN_SCORE)
    if artifact.cache == "int8" and artifact.paths("ranges"):
        yield from items.checked(items.ENCODINGS, _scale_faults(file, Ranges.load(artifact.path("ranges"))))
    elif artifact.cache == "int8":
        yield from items.untold(FROM_CALIBRATION, items.ENCODINGS)


def _told(artifact: Artifact, quantized: QuantizedCheckpoint) -> dict[str, list[str]]:
    """Faults of the tables, by item."""
    from export.litert import export as litert
    from export.litert.file import Outline
    from export.litert.reader import Layouts, LitertFile

    file = LitertFile(artifact.path("model"), quantized.config.num_layers)
    found: dict[str, list[str]] = {items.GRAPH: [], items.TELLS: [], items.CONTEXT: [], items.CACHE: []}
    type_of_cache = litert.CACHE_TYPES[BITS[artifact.cache]]
    for signature in file.model.signatureDefs:
        tensors = file.model.subgraphs[signature.subgraphIndex].tensors
        for one in signature.inputs:
            name, tensor = one.name.decode(), tensors[one.tensorIndex]
            if name == "mask" and tensor.shape[-1] != artifact.context:
                found[items.CONTEXT].append(f"{tensor.shape[-1]} instead of {artifact.context}")
            if name.startswith("past_") and tensor.type != type_of_cache:
                found[items.CACHE].append(f"{name} is of type {tensor.type} instead of {type_of_cache}")
    model, held = Outline("bluelm-export"), Layouts.of(quantized, file)
    try:
        list(litert.lower(model, held, artifact.context, artifact.chunk, BITS[artifact.cache], _encodings(file)))
    except ExportError as error:  # weights that we never write
        found[items.GRAPH].append(str(error))
        return found
    for path, fault in _differences(_bare(file.model), _bare(model.tables()), ""):
        found[items.TELLS if path.startswith(("signature", "description", "metadata")) else items.GRAPH].append(
            f"{path}: {fault}"
        )
    return {item: faults[:3] for item, faults in found.items()}


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
    file: LitertFile, tensor: Any, graph: Any, name: str, artifact: Artifact, quantized: QuantizedCheckpoint
) -> Iterator[tuple[str, str]]:
    """Items that a constant is, or belongs to, each with what is wrong or ""."""
    constants, weights = Constants(quantized, artifact.context), items.weight_names(quantized)
    if name in weights and name != EMBED:
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
