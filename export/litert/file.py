"""Writing .tflite files directly: the flatbuffer first, the weights streamed behind it.

Schema: tensorflow/compiler/mlir/lite/schema/schema.fbs, as the ai-edge-litert wheel carries it. A
`Buffer` either holds its bytes or points at them by `offset` and `size` from the start of the file;
weights do the latter, so a file larger than memory can be written, and the flatbuffer itself stays small.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated

from bluelm.system.files import atomic_file
from compress.checkpoint.quantized import QuantizedTensor

schema: Any = schema_py_generated  # generated classes, whose annotations are wrong
IDENTIFIER = b"TFL3"
VERSION = 3  # of the schema
ALIGNMENT = 64
Type = schema.TensorType
TYPES = {
    np.dtype(np.float32): Type.FLOAT32,
    np.dtype(np.float16): Type.FLOAT16,
    np.dtype(np.int32): Type.INT32,
    np.dtype(np.int8): Type.INT8,
}


class LitertModel:
    """A model under construction: subgraphs that share weight buffers, and one signature for each
    subgraph."""

    def __init__(self, description: str) -> None:
        self._model = schema.ModelT()
        self._model.version, self._model.description = VERSION, description
        self._model.buffers = [schema.BufferT()]  # buffer 0 is the empty one
        self._model.operatorCodes, self._model.subgraphs, self._model.signatureDefs = [], [], []
        self._weights = tempfile.TemporaryFile()  # noqa: SIM115  (closed by `save`)
        self._buffers: dict[str, int] = {}
        self._codes: dict[tuple[int, int], int] = {}

    def buffer(self, name: str, array: np.ndarray | None = None) -> int:
        """Index of the weight buffer `name`; the first call brings its bytes, later ones share them."""
        if name not in self._buffers:
            assert array is not None, name
            start = -(-self._weights.tell() // ALIGNMENT) * ALIGNMENT
            self._weights.seek(start)
            self._weights.write(np.ascontiguousarray(array).data)
            entry = schema.BufferT()
            entry.offset, entry.size = (
                ALIGNMENT + start,
                array.nbytes,
            )  # moved behind the flatbuffer by `save`
            self._model.buffers.append(entry)
            self._buffers[name] = len(self._model.buffers) - 1
        return self._buffers[name]

    def holds(self, name: str) -> bool:
        """True when the weight buffer `name` is written already."""
        return name in self._buffers

    def operator_code(self, operator: int, version: int) -> int:
        """Index of an operator in the model's table."""
        key = (operator, version)
        if key not in self._codes:
            code = schema.OperatorCodeT()
            code.builtinCode, code.deprecatedBuiltinCode, code.version = operator, min(operator, 127), version
            self._model.operatorCodes.append(code)
            self._codes[key] = len(self._model.operatorCodes) - 1
        return self._codes[key]

    def subgraph(self, name: str) -> Subgraph:
        """A new, empty subgraph."""
        graph = Subgraph(self, name)
        self._model.subgraphs.append(graph.table)
        return graph

    def signature(self, name: str, graph: Subgraph, inputs: dict[str, int], outputs: dict[str, int]) -> None:
        """Declare `graph` an entry point with named inputs and outputs."""
        graph.table.inputs, graph.table.outputs = list(inputs.values()), list(outputs.values())
        entry = schema.SignatureDefT()
        entry.signatureKey, entry.subgraphIndex = name, self._model.subgraphs.index(graph.table)
        entry.inputs, entry.outputs = _named(inputs), _named(outputs)
        self._model.signatureDefs.append(entry)

    def save(self, path: Path) -> None:
        """Write the file, all or nothing. The model cannot be used afterwards."""
        head = self._pack()
        shift = -(-len(head) // ALIGNMENT) * ALIGNMENT - ALIGNMENT
        for entry in self._model.buffers[1:]:
            entry.offset += shift
        moved = self._pack()
        assert len(moved) == len(head)  # offsets are fixed-width, so nothing else moved
        with atomic_file(path) as temporary, self._weights, temporary.open("wb") as file:
            file.write(moved)
            file.seek(shift + ALIGNMENT)
            self._weights.seek(0)
            shutil.copyfileobj(self._weights, file, 2**22)

    def _pack(self) -> bytes:
        builder = flatbuffers.Builder(2**16)
        builder.Finish(self._model.Pack(builder), file_identifier=IDENTIFIER)
        return bytes(builder.Output())


class Outline(LitertModel):
    """The tables of a model without a byte of its constants."""

    def buffer(self, name: str, array: np.ndarray | None = None) -> int:
        if name not in self._buffers:
            self._model.buffers.append(schema.BufferT())
            self._buffers[name] = len(self._model.buffers) - 1
        return self._buffers[name]

    def holds(self, name: str) -> bool:
        return True

    def tables(self) -> Any:
        """`ModelT` as it is read from a file."""
        self._weights.close()
        return schema.ModelT.InitFromObj(schema.Model.GetRootAs(self._pack()))


class Subgraph:
    """One graph: tensors by index, operators in order."""

    def __init__(self, model: LitertModel, name: str) -> None:
        self.model = model
        self.table = schema.SubGraphT()
        self.table.name, self.table.tensors, self.table.operators = name, [], []
        self._constants: dict[str, int] = {}

    def tensor(
        self,
        name: str,
        shape: Sequence[int],
        dtype: int = Type.FLOAT32,
        buffer: int = 0,
        quantization: Any = None,
    ) -> int:
        """Index of a new tensor; `buffer` 0 for one that is computed or given at run time."""
        tensor = schema.TensorT()
        tensor.name, tensor.shape, tensor.type, tensor.buffer = name, list(shape), dtype, buffer
        tensor.quantization, tensor.hasRank = quantization, True
        self.table.tensors.append(tensor)
        return len(self.table.tensors) - 1

    def constant(self, name: str, array: np.ndarray) -> int:
        """A constant of float or integer type, stored once a model and once a graph."""
        if name not in self._constants:
            array = np.ascontiguousarray(array)
            self._constants[name] = self.tensor(name, array.shape, TYPES[array.dtype], self.model.buffer(name, array))
        return self._constants[name]

    def weight(self, name: str, read: Any) -> int:
        """A quantized weight [out, in]; `read() -> QuantizedTensor` is called only when its bytes are
        needed."""
        if name not in self._constants:
            weight: QuantizedTensor = read()
            codes = f"{name}.codes"
            data = None if self.model.holds(codes) else pack(weight)
            dtype = Type.INT4 if weight.bits == 4 else Type.INT8
            buffer = self.model.buffer(codes, data)
            self._constants[name] = self.tensor(name, weight.shape, dtype, buffer, self._scales(name, weight))
        return self._constants[name]

    def operator(
        self,
        operator: int,
        inputs: Sequence[int],
        outputs: Sequence[int],
        options: Any = None,
        version: int = 1,
    ) -> None:
        """Append an operator; `options` is the schema's table of its options."""
        entry = schema.OperatorT()
        entry.opcodeIndex = self.model.operator_code(operator, version)
        entry.inputs, entry.outputs = list(inputs), list(outputs)
        if options is not None:
            kind = type(options).__name__.removesuffix("T")
            entry.builtinOptionsType, entry.builtinOptions = getattr(schema.BuiltinOptions, kind), options
        self.table.operators.append(entry)

    def _scales(self, name: str, weight: QuantizedTensor) -> Any:
        """One float32 scale a row, or float16 scales of blocks along `in` in a tensor of their own."""
        quantization = schema.QuantizationParametersT()
        quantization.quantizedDimension = 0
        if weight.groups == 1:
            quantization.scale = weight.scales[:, 0].float().numpy()
            quantization.zeroPoint = np.zeros(weight.shape[0], np.int64)
            return quantization
        blocks = schema.BlockwiseQuantizationT()
        blocks.scales = self.constant(f"{name}.scales", weight.scales.numpy())
        blocks.zeroPoints, blocks.blockSize = -1, weight.columns_per_group
        quantization.detailsType = schema.QuantizationDetails.BlockwiseQuantization
        quantization.details = blocks
        return quantization


def pack(weight: QuantizedTensor) -> np.ndarray:
    """uint8: signed codes row by row; 4-bit ones two a byte, the even column in the low half."""
    signed = weight.signed_codes().numpy()
    if weight.bits == 8:
        return signed.view(np.uint8)
    low, high = signed[:, 0::2] & 15, signed[:, 1::2] & 15
    return (low | high << 4).view(np.uint8)


def _named(tensors: dict[str, int]) -> list[Any]:
    entries = []
    for name, index in tensors.items():
        entry = schema.TensorMapT()
        entry.name, entry.tensorIndex = name, index
        entries.append(entry)
    return entries
