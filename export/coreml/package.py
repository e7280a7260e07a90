"""Reading a saved Core ML package: the MIL program, its types and its weight file.

The program is read through coremltools' protobuf classes. The weight file is MILBlob storage: a 64-byte
header (count, version 2), then 64-byte records (sentinel, type, size, offset, padding bits), each followed by
its bytes; integers below 8 bits are packed little-endian, first element in the lowest bits.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bluelm.errors import InputError
from bluelm.system.reading import read_json
from bluelm.trust.paths import check_name
from export.artifacts.protobufs import MOST_MESSAGES, read_message
from export.coreml.importing import import_coremltools

SENTINEL = 0xDEADBEEF
MOST_CONSTANT = 1 << 36  # bytes
MESSAGES, MESSAGES_OF_A_BLOCK = 40_000, 12_000  # at most; Llama's are 3,300 and 5,900
RECORD = struct.Struct("<IIQQQ")
BLOB_TYPES = {
    1: "fp16", 2: "fp32", 3: "uint8", 4: "int8", 6: "int16", 7: "uint16", 8: "int4", 9: "uint1",
    10: "uint2", 11: "uint4", 12: "uint3", 13: "uint6", 14: "int32", 15: "uint32",
}  # fmt: skip
PROTO_TYPES = {
    "BOOL": "bool", "STRING": "string", "FLOAT16": "fp16", "FLOAT32": "fp32", "FLOAT64": "fp64",
    "INT4": "int4", "INT8": "int8", "INT16": "int16", "INT32": "int32", "INT64": "int64",
    "UINT1": "uint1", "UINT2": "uint2", "UINT3": "uint3", "UINT4": "uint4", "UINT6": "uint6",
    "UINT8": "uint8", "UINT16": "uint16", "UINT32": "uint32", "UINT64": "uint64",
}  # fmt: skip
NUMPY_TYPES: dict[str, type[np.generic]] = {
    "bool": np.bool_, "string": np.str_, "fp16": np.float16, "fp32": np.float32, "fp64": np.float64,
    "int8": np.int8, "int16": np.int16, "int32": np.int32, "int64": np.int64, "uint8": np.uint8,
    "uint16": np.uint16, "uint32": np.uint32, "uint64": np.uint64, "int4": np.int8, "uint1": np.uint8,
    "uint2": np.uint8, "uint3": np.uint8, "uint4": np.uint8, "uint6": np.uint8,
}  # fmt: skip
SUB_BYTE_BITS = {"int4": 4, "uint1": 1, "uint2": 2, "uint3": 3, "uint4": 4, "uint6": 6}


@dataclass(frozen=True)
class ValueType:
    """Element type and shape of a MIL value; None for a dimension known only when it runs.

    `shape` is None for anything that is not a tensor. `state` marks a state that wraps a tensor.
    """

    dtype: str
    shape: tuple[int | None, ...] | None
    state: bool = False

    @property
    def bits(self) -> int:
        """Bits an element."""
        return SUB_BYTE_BITS.get(self.dtype) or np.dtype(NUMPY_TYPES[self.dtype]).itemsize * 8

    @property
    def nbytes(self) -> int:
        """Packed bytes of a tensor of known shape."""
        elements = math.prod(d or 0 for d in self.shape or ())
        return (elements * self.bits + 7) // 8


def unpack_bits(raw: np.ndarray, dtype: str, count: int) -> np.ndarray:
    """Elements of `dtype` from packed bytes: uint8 [bytes] -> int8 or uint8 [count]."""
    bits = SUB_BYTE_BITS[dtype]
    if bits == 4:
        both = np.stack([raw & 15, raw >> 4], axis=-1).reshape(-1)[:count]
    else:
        flat = np.unpackbits(raw, bitorder="little")[: count * bits].reshape(count, bits)
        both = (flat << np.arange(bits, dtype=np.uint8)).sum(axis=-1, dtype=np.uint8)
    if dtype == "int4":
        return ((both ^ 8).astype(np.int8) - np.int8(8)).astype(np.int8)
    return both


class Package:
    """A saved .mlpackage: its specification, and values read from its weight file when asked for.

    Attributes:
        path: the .mlpackage folder.
        spec: the `Model` protobuf message.
        root: the folder that `@model_path` in the program stands for.
    """

    def __init__(self, path: Path, spec: Any, root: Path) -> None:
        self.path, self.spec, self.root = path, spec, root
        self._files: dict[Path, np.ndarray] = {}

    @classmethod
    def open(cls, path: Path, blocks: int | None = None) -> Package:
        """Read a package's manifest and specification.

        Args:
            blocks: how many it may hold of a model's, which bounds what is read; None where nobody knows.

        Raises:
            InputError: not a package, a part is missing, or it holds no ML program.
            UnavailableError: coremltools is not installed.
        """
        manifest = path / "Manifest.json"
        if not manifest.is_file():
            raise InputError("this is not a Core ML package: no Manifest.json", where=path)
        try:
            content = read_json(manifest)
            entry = content["itemInfoEntries"][content["rootModelIdentifier"]]["path"]
        except (LookupError, TypeError) as error:
            raise InputError(f"the manifest cannot be read: {error!r}", where=manifest) from error
        check_name(str(entry), manifest)
        model = path / "Data" / str(entry)
        if not model.is_file():
            raise InputError("the manifest names a specification that is not there", where=model)
        import_coremltools()
        from coremltools.proto import Model_pb2

        most = MOST_MESSAGES if blocks is None else min(MOST_MESSAGES, MESSAGES + MESSAGES_OF_A_BLOCK * blocks)
        spec: Any = read_message(model, Model_pb2.Model(), "a specification", most)  # type: ignore[reportAttributeAccessIssue]
        if spec.WhichOneof("Type") != "mlProgram":
            raise InputError(
                f"the package holds a {spec.WhichOneof('Type')}, not an ML program",
                where=model,
                fix="convert with minimum_deployment_target iOS15 or newer",
            )
        return cls(path, spec, model.parent)

    @property
    def functions(self) -> dict[str, Any]:
        """The program's functions (protobuf messages) by name."""
        return dict(self.spec.mlProgram.functions)

    @property
    def default_function(self) -> str:
        """The function that a caller gets who names none."""
        return self.spec.description.defaultFunctionName or "main"

    def operations(self, function: str) -> list[Any]:
        """Operations of a function's block, in order of execution."""
        found = self.functions.get(function)
        if found is None:
            raise InputError(f"no function {function!r}; the package has {sorted(self.functions)}", where=self.path)
        return list(found.block_specializations[found.opset].operations)

    def value(self, value: Any) -> np.ndarray:
        """A constant of the program as an array; sub-byte integers come as int8 or uint8, one a byte.

        Raises:
            InputError: a kind of value, or a weight record, that is not as it should be.
        """
        kind = value_type(value.type)
        if kind.nbytes > MOST_CONSTANT:
            raise InputError(f"a constant of {kind.nbytes} bytes", where=self.path)
        if value.WhichOneof("value") == "blobFileValue":
            return self._blob(value.blobFileValue, kind)
        tensor = value.immediateValue
        if tensor.WhichOneof("value") != "tensor" or kind.shape is None:
            raise InputError(f"a constant of kind {tensor.WhichOneof('value')} is not known", where=self.path)
        try:
            return _immediate(tensor.tensor, kind)
        except (ValueError, TypeError) as error:
            raise InputError(f"a constant is not what its type says: {error}", where=self.path) from None

    def _blob(self, reference: Any, kind: ValueType) -> np.ndarray:
        name = reference.fileName.removeprefix("@model_path/")
        check_name(name, self.path)
        path = self.root / name
        if path not in self._files:
            if not path.is_file() or path.stat().st_size == 0:
                raise InputError("the program names a weight file that is not there, or empty", where=path)
            self._files[path] = np.memmap(path, np.uint8, "r")
        return read_blob(self._files[path], reference.offset, kind, path)

    def constants(self, function: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Names of constant results and their protobuf values by parameter ("val" for a plain const)."""
        for op in self.operations(function):
            if op.type == "const":
                yield op.outputs[0].name, {"val": op.attributes["val"]}
            elif op.type.startswith("constexpr_"):
                values = {k: v for k, v in op.attributes.items() if k != "name"}
                values.update({k: a.arguments[0].value for k, a in op.inputs.items()})
                yield op.outputs[0].name, values


def value_type(proto: Any) -> ValueType:
    """The protobuf `ValueType` message as ours."""
    kind = proto.WhichOneof("type")
    if kind == "stateType":
        inner = value_type(proto.stateType.wrappedType)
        return ValueType(inner.dtype, inner.shape, state=True)
    if kind != "tensorType":
        return ValueType(kind or "none", None)
    from coremltools.proto import MIL_pb2

    tensor = proto.tensorType
    name = MIL_pb2.DataType.Name(tensor.dataType)  # type: ignore[reportAttributeAccessIssue]
    if name not in PROTO_TYPES:
        raise InputError(f"the element type {name} is not known")
    shape = tuple(d.constant.size if d.HasField("constant") else None for d in tensor.dimensions)
    return ValueType(PROTO_TYPES[name], shape)


def read_blob(data: np.ndarray, offset: int, kind: ValueType, where: Path) -> np.ndarray:
    """One tensor of the weight file `data` (uint8, memory-mapped), whose record starts at `offset`.

    Raises:
        InputError: no record there, or one of another type or size than the program declares.
    """
    if offset + 64 > len(data):
        raise InputError(f"weight record at {offset} lies behind the end of the file", where=where)
    sentinel, code, size, start, _padding = RECORD.unpack(data[offset : offset + RECORD.size].tobytes())
    if sentinel != SENTINEL:
        raise InputError(f"no weight record at offset {offset}: the file is damaged", where=where)
    found = BLOB_TYPES.get(code, f"type {code}")
    if found != kind.dtype:
        raise InputError(f"weights at {offset} are {found}, the program says {kind.dtype}", where=where)
    if size != kind.nbytes or start + size > len(data):
        raise InputError(f"weights at {offset} have {size} bytes, {kind.nbytes} are declared", where=where)
    shape = tuple(d or 0 for d in kind.shape or ())
    raw = data[start : start + size]
    if kind.dtype in SUB_BYTE_BITS:
        return unpack_bits(np.asarray(raw), kind.dtype, int(np.prod(shape))).reshape(shape)
    return raw.view(NUMPY_TYPES[kind.dtype]).reshape(shape)


def _immediate(tensor: Any, kind: ValueType) -> np.ndarray:
    """A constant written inside the program: `TensorValue` message -> array of the declared type."""
    shape = tuple(d or 0 for d in kind.shape or ())
    field = tensor.WhichOneof("value")
    values = getattr(tensor, field).values
    if field != "bytes":
        return np.array(list(values), dtype=NUMPY_TYPES[kind.dtype]).reshape(shape)
    raw = np.frombuffer(values, np.uint8)
    if kind.dtype in SUB_BYTE_BITS:
        return unpack_bits(raw, kind.dtype, int(np.prod(shape))).reshape(shape)
    return raw.view(NUMPY_TYPES[kind.dtype]).reshape(shape)
