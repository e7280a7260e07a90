"""Core ML packages, read back: the program of each, and every constant by its name, in both functions.

The program is held against the one that is written anew without its numbers, the numbers against the checkpoint and
formulas alone.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bluelm.block import block_of
from bluelm.config import ModelConfig
from bluelm.errors import ExportError
from compress.checkpoint.store import EMBED, HEAD, QuantizedCheckpoint
from export.artifacts.artifact import Artifact
from export.artifacts.debug import DEBUG_NOTE
from export.lowering.parts import Part
from export.onnx.readback_constants import HIDDEN_SCORE, Constants
from export.onnx.reader import HeldWeight
from export.readback import items
from export.readback.held import faults
from export.readback.numbers import array_fault

if TYPE_CHECKING:
    from export.coreml.package import Package

TABLE = "embed"  # the token table's name in a program
TYPES = {"float16": np.dtype(np.float16), "float32": np.dtype(np.float32)}


def findings(artifact: Artifact, quantized: QuantizedCheckpoint) -> Iterator[items.Finding]:
    """Of all packages of the artifact."""
    from export.coreml.export import packages
    from export.coreml.package import Package

    found: dict[str, list[str]] = {item: [] for item in (items.GRAPH, items.TELLS, items.CONTEXT, items.CACHE)}
    parts: list[Part] = []
    for path in packages(artifact):
        package = Package.open(path, quantized.config.num_layers)
        for item, fault in _package(package, artifact, quantized, parts):
            found.setdefault(item, []).extend([fault] if fault and fault not in found.get(item, []) else [])
    layers = [layer for part in parts for layer in part.layers]
    if layers != list(range(quantized.config.num_layers)):
        found[items.GRAPH].append(f"the packages hold the blocks {layers}")
    for item, told in found.items():
        yield from items.checked(item, told[:3])
    yield from items.equal(items.MASK, artifact.mask_value, HIDDEN_SCORE)


def _package(
    package: Package, artifact: Artifact, quantized: QuantizedCheckpoint, parts: list[Part]
) -> Iterator[tuple[str, str]]:
    """Items that one package holds, each with what is wrong or ""; adds the package's part to `parts`."""
    from export.coreml.program import DECODE, PREFILL

    told = package.spec.description.metadata.userDefined
    yield items.TELLS, "" if told["quantized"] == quantized.digest() else "it is of another quantized checkpoint"
    wide = told["activations"] if told["activations"] in TYPES else "float16"
    yield items.TELLS, "" if f"{wide} activations" in artifact.notes else f"the program computes in {wide}"
    functions = {name: dict(package.constants(name)) for name in (PREFILL, DECODE) if name in package.functions}
    yield items.GRAPH, "" if len(functions) == 2 else f"the functions are {', '.join(package.functions)}"
    weights = {name: _weight_values(values) for name, values in _weights(functions, quantized)}
    parts.append(_part(weights, quantized))
    yield from _states(package, artifact)
    yield from _program_faults(package, artifact, quantized, parts[-1], weights, wide)
    numbers = Numbers(package, quantized, artifact.context, TYPES[wide])
    for constants in functions.values():
        for name, values in constants.items():
            yield from numbers.judged(name, values)


def _states(package: Package, artifact: Artifact) -> Iterator[tuple[str, str]]:
    """Slots and type of the cache in every function."""
    from export.coreml.package import value_type

    for function in package.functions.values():
        for named in function.inputs:
            kind, shape = value_type(named.type), value_type(named.type).shape or ()
            if kind.state and len(shape) == 4:
                slots = shape[3 if named.name.endswith("keys") else 2]
                yield items.CONTEXT, "" if slots == artifact.context else f"{slots} slots instead of {artifact.context}"
                there = {"fp16": "float16", "fp32": "float32"}.get(kind.dtype, kind.dtype)
                yield items.CACHE, "" if there == artifact.cache else f"{there} instead of {artifact.cache}"


def _weights(functions: Mapping[str, Mapping[str, Any]], quantized: QuantizedCheckpoint) -> Iterator[tuple[str, Any]]:
    """Weights of the first function by their names in the program, with the records of their parts."""
    for constants in list(functions.values())[:1]:
        for name in [*items.weight_names(quantized), TABLE]:
            key = _key(name)
            if key in constants and "data" in constants[key]:
                yield name, constants[key]
            elif {f"{key}_codes", f"{key}_scales"} <= constants.keys():
                yield name, {"data": constants[f"{key}_codes"]["val"], "scale": constants[f"{key}_scales"]["val"]}


def _weight_values(values: Mapping[str, Any]) -> Any:
    """`Layout` of a weight as the program declares it."""
    from export.coreml.ops import WeightForm
    from export.coreml.package import value_type

    data, scale = value_type(values["data"].type), value_type(values["scale"].type)
    rows, columns = (size or 0 for size in (data.shape or (0, 0))[:2])
    groups = (scale.shape or (0, 1))[1] or 1
    return WeightForm((rows, columns), groups, data.bits, "offset" not in values)


def _part(weights: Mapping[str, Any], quantized: QuantizedCheckpoint) -> Part:
    """Which blocks a package holds, and whether embedding and head."""
    layers = [layer for layer in range(quantized.config.num_layers) if _first(quantized.config, layer) in weights]
    first, last = (layers[0], layers[-1] + 1) if layers else (quantized.config.num_layers,) * 2
    return Part(TABLE in weights, first, last, HEAD in weights)


def _first(config: ModelConfig, layer: int) -> str:
    return f"model.layers.{layer}.{next(iter(block_of(config).linears))}"


def _program_faults(
    package: Package, artifact: Artifact, quantized: QuantizedCheckpoint, part: Part, layouts: Mapping[str, Any],
    wide: str,
) -> Iterator[tuple[str, str]]:  # fmt: skip
    """Where the program is not the one that is written for this part; constants apart."""
    from export.coreml.ops import Constants
    from export.coreml.package import Package as Opened
    from export.coreml.program import ProgramSizes, build
    from export.coreml.save import outline

    weights = Constants(quantized, "float32" if wide == "float32" else "float16", layouts=dict(layouts))
    shape = ProgramSizes(artifact.context, artifact.chunk, DEBUG_NOTE in artifact.notes)
    metadata = {"quantized": quantized.digest(), "activations": wide}
    with tempfile.TemporaryDirectory(prefix="bluelm-outline-") as scratch:
        try:
            wanted = outline(build(weights, part, shape), weights.providers, metadata, Path(scratch))
        except ExportError as error:  # weights that we never write
            yield items.GRAPH, str(error)
            return
        again = Opened(package.path, wanted, Path(scratch))
        for function in package.functions.keys() & again.functions.keys():
            first, second = (dict(one.constants(function)) for one in (package, again))
            for name in first.keys() & second.keys():
                yield from _small(name, (package, first[name]), (again, second[name]))
        mine, theirs = _bare(package.spec), _bare(wanted)
    if mine == theirs:
        return
    if mine.description != theirs.description:
        yield (
            items.TELLS if mine.description.metadata != theirs.description.metadata else items.GRAPH,
            "description is another",
        )
    for name, function in theirs.mlProgram.functions.items():
        yield items.GRAPH, _first_other(name, mine.mlProgram.functions[name], function)
    yield items.GRAPH, "" if mine.mlProgram.functions == theirs.mlProgram.functions else "the program is another"


def _first_other(name: str, mine: Any, theirs: Any) -> str:
    """The first operation of a function that is another."""
    if mine == theirs:
        return ""
    if mine.inputs != theirs.inputs or mine.opset != theirs.opset:
        return f"{name}: its inputs are others"
    block = f"{theirs.opset}"
    mine, theirs = (list(one.block_specializations[block].operations) for one in (mine, theirs))
    for index, (a, b) in enumerate(zip(mine, theirs, strict=False)):
        if a != b:
            return f"{name}, operation {index}: {_shown(a)} instead of {_shown(b)}"
    return f"{name}: {len(mine)} operations instead of {len(theirs)}"


def _shown(op: Any) -> str:
    inputs = ", ".join(a.name for argument in op.inputs.values() for a in argument.arguments if a.name)
    return f"{op.type} {op.outputs[0].name} of {inputs or 'constants'}"


def _all(spec: Any) -> Iterator[Any]:
    """Operations of all functions."""
    for function in spec.mlProgram.functions.values():
        yield from function.block_specializations[function.opset].operations


def _small(name: str, mine: tuple[Package, Any], theirs: tuple[Package, Any]) -> Iterator[tuple[str, str]]:
    """A constant that both programs hold in their files, though it is no number of the model: indices of slots."""
    values = [constants.get("val") for _, constants in (mine, theirs)]
    if any(value is None or value.WhichOneof("value") != "blobFileValue" for value in values):
        return
    if values[1].blobFileValue.offset:  # what is left out of the outline lies at 0
        fault = array_fault(mine[0].value(values[0]), theirs[0].value(values[1]))
        yield items.GRAPH, f"{name}: {fault}" if fault else ""


def _bare(spec: Any) -> Any:
    """Without places in weight files, epsilons and the scales of attention, which are judged by themselves."""
    bare = type(spec)()
    bare.CopyFrom(spec)
    for op in _all(bare):
        values = [op.attributes["val"]] if op.type == "const" else []
        values += [argument.value for one in op.inputs.values() for argument in one.arguments]
        for value in values:
            if value.WhichOneof("value") == "blobFileValue":
                value.blobFileValue.offset = 0
        if op.type == "const" and Numbers.judges(op.outputs[0].name):
            op.attributes["val"].ClearField("immediateValue")
    return bare


class Numbers:
    """Constants of a program by name, held against the checkpoint."""

    EPSILON = re.compile(r"(?:layers_(\d+)_(\w+_norm)|final_norm)_layer_norm_epsilon_0")
    SCALE = re.compile(r"layers_(\d+)_q_scaled_y_0")

    def __init__(self, package: Package, quantized: QuantizedCheckpoint, context: int, dtype: np.dtype[Any]) -> None:
        self._package, self._quantized, self._dtype = package, quantized, dtype
        self._tables = {_key(name): table for name, table in Constants(quantized, context).tables.items()}
        self._weights = {_key(TABLE if name == EMBED else name): name for name in items.weight_names(quantized)}
        self._records: dict[str, dict[str, Any]] = {}

    @classmethod
    def judges(cls, name: str) -> bool:
        """Whether a constant inside the program is a number of the model."""
        return bool(cls.EPSILON.fullmatch(name) or cls.SCALE.fullmatch(name))

    def judged(self, name: str, values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """Items that the constant is, each with what is wrong or ""; the same record is read once."""
        if self._records.get(name) == values:
            return
        self._records[name] = dict(values)
        base = name.removesuffix("_doubled")
        if name in self._weights:
            yield self._weights[name], self._weight(self._weights[name], values)
        elif name.removesuffix("_scales") in self._weights and f"{name.removesuffix('_scales')}_codes" in self._records:
            base = name.removesuffix("_scales")
            parts = {"data": self._records[f"{base}_codes"]["val"], "scale": values["val"]}
            yield self._weights[base], self._weight(self._weights[base], parts)
        elif base in self._tables and "_q_scaled" not in name:
            table = self._tables[base]
            wanted = table.values().astype(self._dtype)
            wanted = np.tile(wanted, 2) if name.endswith("_doubled") else wanted  # of [x, -x]
            yield table.item, self._same(values, wanted)
        elif match := self.EPSILON.fullmatch(name):
            norms = {norm.makes: norm.weight for norm in block_of(self._quantized.config).norms.values()}
            norm = f"model.layers.{match[1]}.{norms[match[2]]}" if match[1] else "model.norm"
            yield items.eps(norm), self._same(values, np.array(self._quantized.config.rms_norm_eps, self._dtype))
        elif match := self.SCALE.fullmatch(name):
            factor = np.array(self._quantized.config.head_dim**-0.5, self._dtype)
            yield items.attention_scale(int(match[1])), self._same(values, factor)

    def _same(self, values: Mapping[str, Any], wanted: np.ndarray) -> str:
        try:
            return array_fault(self._package.value(values["val"]), wanted)
        except ExportError as error:
            return str(error)

    def _weight(self, name: str, values: Mapping[str, Any]) -> str:
        """Codes are signed where there are no zero points."""
        from export.coreml.package import value_type

        try:
            codes, scales = (self._package.value(values[part]) for part in ("data", "scale"))
            zeros = self._package.value(values["offset"]) if "offset" in values else None
        except (ExportError, KeyError) as error:
            return str(error)
        bits = value_type(values["data"].type).bits
        if codes.dtype == np.int8 and zeros is None:
            codes = (codes.view(np.uint8) ^ 128) if bits == 8 else (codes + np.int8(8)).view(np.uint8)
        if codes.dtype != np.uint8:
            return f"codes of {codes.dtype}"
        tensor = self._quantized.embed() if name == EMBED else self._quantized.linear(name)
        return ", ".join(faults(tensor, HeldWeight(codes, scales, zeros, bits)))


def _key(name: str) -> str:
    """A name as MIL allows it."""
    return re.sub(r"\W", "_", name)
