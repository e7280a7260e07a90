"""onnx-cpu and onnx-npu, read back: prefill and decode, each of one part or several, and the table beside them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, cast

import numpy as np
from onnx import NodeProto, TensorProto, helper

from bluelm.errors import ExportError, InputError
from compress.checkpoint.store import QuantizedCheckpoint
from export.artifacts.artifact import Artifact
from export.artifacts.mobile import CACHES, KvBits
from export.lowering.parts import Part
from export.lowering.ranges import Ranges
from export.onnx import cpu as onnx_cpu
from export.onnx import npu as onnx_npu
from export.onnx.decoder import (
    GRAPHS,
    HOST_KEPT,
    IR_VERSION,
    OPSETS,
    WEIGHTS,
    Border,
    emitted,
    part_file,
)
from export.onnx.graph import NoFile
from export.onnx.readback_constants import HIDDEN_SCORE, Code, Constants, Encodings, codes
from export.onnx.readback_structure import structure_faults
from export.onnx.reader import OnnxFile, kind
from export.readback import held, items

ONE = {"ones.codes": np.uint8(128), "ones.scale": np.float32(1 / 128), "ones.zero": np.uint8(0)}
"""A gamma of ones, exactly."""
ONES_OF_A_HEAD = re.compile(r"ones\.\d+\.codes")
"""The same of a head's width."""
TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "int16": TensorProto.INT16,
    "int8": TensorProto.INT8,
}


Slots = Callable[[list[int], int, int], dict[str, list[int]]]
"""(shape, tokens, context) -> the shape that it has to be, by what a tensor of the cache is called."""


def findings(artifact: Artifact, quantized: QuantizedCheckpoint) -> Iterator[items.Finding]:
    """What is right and wrong in it."""
    yield from graph_findings(artifact, quantized, HOST_KEPT, _kept_by_host)
    yield from items.right(items.TELLS)  # the graphs tell none but what the graph's comparison holds


def graph_findings(
    artifact: Artifact, quantized: QuantizedCheckpoint, border: Border, slots: Slots
) -> Iterator[items.Finding]:
    """All but what files tell a runner.

    Args:
        border: of the cache, as the graphs are emitted again. slots: of it.
    """
    files = {role: [OnnxFile(path) for path in artifact.paths(role)] for role in GRAPHS}
    integer = bool(artifact.record.encodings)
    constants = Constants(quantized, artifact.context)
    encodings = None
    if artifact.paths("ranges"):
        cache_bits = 8 if artifact.cache == "int8" else 16
        encodings = Encodings(Ranges.load(artifact.path("ranges")), constants, cache_bits)
    yield from _weights(files, quantized)
    yield from held.table(artifact, quantized)
    yield from _numbers(files, constants, integer)
    yield from _epsilons(files, constants)
    yield from _border(artifact, files, slots)
    yield from _encodings(artifact, quantized, files, encodings)
    if integer and encodings is not None:
        yield from items.equal(items.MASK, artifact.mask_value, encodings.mask_value)
    elif not integer:
        yield from items.equal(items.MASK, artifact.mask_value, HIDDEN_SCORE)
    yield from _graph(artifact, quantized, files, None if encodings is None else encodings.ranges, border)


Files = dict[str, list[OnnxFile]]


def _weights(files: Files, quantized: QuantizedCheckpoint) -> Iterator[items.Finding]:
    """Codes, scales and zero points of both graphs; numbers that they share are read once."""
    for name in items.linear_names(quantized):
        held_by = [[file for file in files[role] if name in file] for role in GRAPHS]
        if any(len(found) != 1 for found in held_by):
            yield items.Finding(name, "wrong", "is not in each graph once")
            continue
        wanted, (prefill, decode) = quantized.ordered(name).weight, (found[0] for found in held_by)
        shared = prefill.place(name) == decode.place(name)
        yield from items.checked(name, _weight_faults((prefill,) if shared else (prefill, decode), name, wanted))


def _weight_faults(files: Iterable[OnnxFile], name: str, wanted: held.QuantizedTensor) -> Iterator[str]:
    for file in files:
        try:
            yield from held.faults(wanted, file.weight(name))
        except InputError as error:
            yield str(error)


def _numbers(files: Files, constants: Constants, integer: bool) -> Iterator[items.Finding]:
    """Every constant that is no code or scale of a weight; one that nothing explains is wrong."""
    tables = {f"{name}.codes" if integer else name: table.item for name, table in constants.tables.items()}
    for role in GRAPHS:
        missing = set(tables)
        for file in files[role]:
            parts = {name for node in file.weights.values() for name in _stored(file, node)}
            for name in file.tensors.keys() - parts:
                missing.discard(name)
                yield from _number(file, name, constants, integer)
        yield from (items.Finding(tables[name], "wrong", f"{name} is not in {role}") for name in sorted(missing))
    yield from items.right(*dict.fromkeys(tables.values()))


def _number(file: OnnxFile, name: str, constants: Constants, integer: bool) -> Iterator[items.Finding]:
    """Wrong, if it is."""
    item, wanted = items.GRAPH, None
    table = constants.tables.get(name.removesuffix(".codes") if integer else name)
    if table is not None:
        item = table.item
        wanted = codes(table.values()) if integer else table.values()
    elif integer and (plain := ONES_OF_A_HEAD.sub("ones.codes", name)) in ONE:
        wanted = np.full(file.tensors[name].dims, ONE[plain]) if plain == "ones.codes" else np.array(ONE[plain])
    elif (order := constants.order(name)) is not None:
        item, wanted = name.removesuffix(".order"), order
    else:
        wanted = constants.said(name)
    where = f"{name} of {file.path.name}"
    if wanted is None:
        yield items.Finding(item, "wrong", f"{where} belongs to nothing of the model")
        return
    try:
        found = file.array(name)
    except InputError as error:
        yield items.Finding(item, "wrong", str(error))
        return
    if found.dtype != wanted.dtype or found.shape != wanted.shape:
        told = f"{found.dtype} {list(found.shape)} instead of {wanted.dtype} {list(wanted.shape)}"
        yield items.Finding(item, "wrong", f"{where} is {told}")
    elif found.tobytes() != wanted.tobytes():
        places = np.argwhere(found != wanted)
        at = f"first at {places[0].tolist()}" if places.size else "in the sign of a zero"
        yield items.Finding(item, "wrong", f"{where} has {len(places)} other numbers, {at}")


def _stored(file: OnnxFile, node: NodeProto) -> Iterator[str]:
    """Constants that a quantized weight consists of, as `OnnxFile.weight` reads them."""
    casts = {cast.output[0]: cast.input[0] for cast in file.graph.node if cast.op_type == "Cast"}
    names = node.input[1:] if node.op_type == "MatMulNBits" else node.input
    yield from (casts.get(name, name) for name in names)


def _epsilons(files: Files, constants: Constants) -> Iterator[items.Finding]:
    """Of every norm in both graphs, as float32, which attributes are."""
    wanted = np.float32(constants.quantized.config.rms_norm_eps)
    for place, norm in constants.norms.items():
        faults: list[str] = []
        for role in GRAPHS:
            nodes = [
                node
                for file in files[role]
                for node in file.graph.node
                if node.op_type == "RMSNormalization" and node.name in (place, f"{place}.unit.exact")
            ]
            found = [attributes(node).get("epsilon", "nothing") for node in nodes]
            if found != [wanted]:
                faults.append(f"{', '.join(map(told, found)) or 'none'} in {role} instead of {told(wanted)}")
        yield from items.checked(items.eps(norm), faults)


def attributes(node: NodeProto) -> dict[str, object]:
    """A node's attributes by name."""
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def told(value: object) -> str:
    """A float in six digits."""
    return f"{value:g}" if isinstance(value, float | np.floating) else str(value)


def _kept_by_host(shape: list[int], tokens: int, context: int) -> dict[str, list[int]]:
    slots = context - tokens
    return {"past_keys": [*shape[:3], slots], "past_values": [*shape[:2], slots, *shape[3:]]}


def _border(artifact: Artifact, files: Files, slots: Slots) -> Iterator[items.Finding]:
    """Sizes and types of inputs and outputs: positions, mask, caches."""
    context, sizes, kinds = artifact.context, [], []
    for role, tokens in zip(GRAPHS, (artifact.chunk, 1), strict=True):
        for file in files[role]:
            for value in (*file.graph.input, *file.graph.output):
                shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
                stem, name = value.name.split(".")[0], f"{value.name} of {file.path.name}"
                wanted = {
                    "positions": [tokens],
                    "mask": [1, 1, tokens, context],
                    **slots(shape, tokens, context),
                }.get(stem, shape)
                if shape != wanted:
                    sizes.append(f"{name} is {shape} instead of {wanted}")
                if stem.endswith(("keys", "values")) and value.type.tensor_type.elem_type != TYPES[artifact.cache]:
                    kinds.append(f"{name} is {kind(value.type.tensor_type.elem_type)} instead of {artifact.cache}")
    yield from items.checked(items.CONTEXT, sizes)
    yield from items.checked(items.CACHE, kinds)


def _encodings(
    artifact: Artifact, quantized: QuantizedCheckpoint, files: Files, encodings: Encodings | None
) -> Iterator[items.Finding]:
    """Of every QuantizeLinear and DequantizeLinear of an activation, against the ranges beside the graphs."""
    if encodings is None:
        if artifact.record.encodings or artifact.cache == "int8":
            yield from items.untold("the ranges that they were made of do not lie beside the graphs", items.ENCODINGS)
        return
    faults: list[str] = []
    if encodings.ranges.weights != quantized.digest():
        faults.append("ranges.json is of another quantized checkpoint")
    for file in (file for role in GRAPHS for file in files[role]):
        for node in file.graph.node:
            if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or node.name in file.weights:
                continue
            if node.name.endswith(".ones"):
                continue
            faults += _code_faults(file, node, encodings.of(node.name))
    yield from items.checked(items.ENCODINGS, faults)


def _code_faults(file: OnnxFile, node: NodeProto, wanted: Code | None) -> Iterator[str]:
    where = f"{node.name} of {file.path.name}"
    if wanted is None:
        yield f"{where} has no range"
        return
    try:
        scale, zero = (file.array(name) for name in node.input[1:3])
    except (InputError, KeyError, ValueError):
        yield f"{where} has no constant scale and zero point"
        return
    if scale.tobytes() != wanted.scale.tobytes() or scale.dtype != np.float32:
        yield f"the scale of {where} is {scale} instead of {wanted.scale}"
    if zero.dtype != wanted.zero.dtype or zero.tobytes() != wanted.zero.tobytes():
        yield f"the zero point of {where} is {zero.dtype} {zero} instead of {wanted.zero.dtype} {wanted.zero}"


def _graph(
    artifact: Artifact, quantized: QuantizedCheckpoint, files: Files, ranges: Ranges | None, border: Border
) -> Iterator[items.Finding]:
    """Both graphs against what is emitted for this model, part by part."""
    parts = [_part(file) for file in files["prefill"]]
    ends = [0, *(part.last for part in parts)]
    whole = [part.first for part in parts] == ends[:-1] and ends[-1] == quantized.config.num_layers
    if not whole or len(files["decode"]) != len(parts):
        yield items.Finding(items.GRAPH, "wrong", "the parts do not make up the model's blocks, one after another")
        return
    if ranges is None and (artifact.record.encodings or artifact.cache == "int8"):
        yield from items.untold("they cannot be emitted again without the ranges", items.GRAPH)
        return
    try:
        if artifact.record.encodings:
            assert ranges is not None
            cache_bits = 8 if artifact.cache == "int8" else 16
            backend = onnx_npu.backend(quantized, ranges.model_copy(update={"cache_bits": cache_bits}))
        else:
            bits = cast(KvBits, next(width for width, name in CACHES.items() if name == artifact.cache))
            backend = onnx_cpu.backend(quantized, accuracy_level(files["prefill"]), bits, ranges)
        faults: list[str] = []
        for index, part in enumerate(parts):
            weights = NoFile(artifact.folder / part_file(WEIGHTS, index, len(parts)))
            sizes = artifact.context, artifact.chunk, artifact.mask_value
            graphs = emitted(weights, quantized.config, part, *sizes, backend, border)
            for role, graph in zip(GRAPHS, graphs, strict=True):
                faults += structure_faults(files[role][index], graph.model(OPSETS, IR_VERSION))
    except (ExportError, StopIteration) as error:
        faults = [f"they cannot be emitted again: {error}"]
    yield from items.checked(items.GRAPH, faults)


def accuracy_level(files: Sequence[OnnxFile]) -> Literal[0, 4]:
    """How MatMulNBits computes, which is a choice and no part of the model; the same in all nodes (GRAPH)."""
    found = {attributes(node).get("accuracy_level") for file in files for node in file.weights.values()}
    return 4 if found == {4} else 0


def _part(file: OnnxFile) -> Part:
    """Which blocks a part's graph gives keys of."""
    names = [value.name for value in file.graph.output]
    numbers = [name.removeprefix("keys.") for name in names]
    layers = [int(number) for number in numbers if number.isdecimal() and len(number) < 10]
    first_input = next((value.name for value in file.graph.input), "")
    embeds, heads = first_input == "hidden", "logits" in names
    if not layers:  # a head alone, behind the stream of the last block
        number = first_input.split(".")[1:2]
        first = int(number[0]) + 1 if number and number[0].isdecimal() and len(number[0]) < 10 else 0
        return Part(embeds, first, first, heads)
    return Part(embeds, min(layers), max(layers) + 1, heads)
