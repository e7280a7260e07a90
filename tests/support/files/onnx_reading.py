"""Reads codes and scales out of ONNX files by onnx's protobuf and plain arithmetic: nothing of `export`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper

WIDTHS: dict[str, type[np.generic]] = {
    "FLOAT": np.float32,
    "FLOAT16": np.float16,
    "INT8": np.int8,
    "UINT8": np.uint8,
}


@dataclass(frozen=True)
class Weight:
    """codes [out, in], zeros [out, groups], unsigned as in the checkpoint; scales float64 [out, groups]."""

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray


def read_initializer(folder: Path, tensor: TensorProto) -> np.ndarray:
    """The values of an initializer, inline or external; int4 as int8."""
    if tensor.data_location == TensorProto.EXTERNAL:
        where = {entry.key: entry.value for entry in tensor.external_data}
        with (folder / where["location"]).open("rb") as file:
            file.seek(int(where["offset"]))
            raw = file.read(int(where["length"]))
    else:
        raw = tensor.raw_data
    count = int(np.prod(tensor.dims, dtype=np.int64))
    if tensor.data_type != TensorProto.INT4:
        return np.frombuffer(raw, WIDTHS[TensorProto.DataType.Name(tensor.data_type)]).reshape(tensor.dims)
    nibbles: list[int] = []
    for byte in raw:
        nibbles += [byte % 16, byte // 16]
    signed = [n - 16 if n > 7 else n for n in nibbles[:count]]
    return np.array(signed, np.int8).reshape(tensor.dims)


def npu_weights(path: Path) -> dict[str, Weight]:
    """By name: what each DequantizeLinear of an integer initializer makes."""
    model = onnx.load(path, load_external_data=False)
    tensors = {t.name: t for t in model.graph.initializer}
    consumers = {name: node for node in model.graph.node if node.op_type == "MatMul" for name in node.input}
    found: dict[str, Weight] = {}
    for node in model.graph.node:
        first = tensors.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if first is None or first.data_type not in (TensorProto.INT4, TensorProto.INT8):
            continue
        assert node.output[0] in consumers, "a weight that no MatMul uses"
        assert len(node.input) == 2, "symmetric weights have no zero points"
        codes = read_initializer(path.parent, first).astype(np.int64).T  # [out, in]
        scales = read_initializer(path.parent, tensors[node.input[1]]).astype(np.float64)
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if scales.ndim == 1:
            assert attributes["axis"] == 1
            scales = scales[:, None]
        else:
            assert attributes["axis"] == 0
            scales = scales.T  # [out, groups]
            assert codes.shape[1] == scales.shape[1] * attributes["block_size"]
        middle = 8 if first.data_type == TensorProto.INT4 else 128
        found[node.output[0]] = Weight(codes + middle, scales, np.full(scales.shape, middle))
    return found


def cpu_weights(path: Path) -> dict[str, Weight]:
    """By name: the weights of each MatMulNBits, one column of scales a block."""
    model = onnx.load(path, load_external_data=False)
    tensors = {t.name: t for t in model.graph.initializer}
    casts = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type == "Cast"}
    return {
        node.input[1].removesuffix(".codes"): _nbits(path.parent, node, tensors, casts)
        for node in model.graph.node
        if node.op_type == "MatMulNBits"
    }


def _nbits(folder: Path, node: NodeProto, tensors: dict[str, TensorProto], casts: dict[str, str]) -> Weight:
    about = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    rows, columns, bits, size = (about[key] for key in ("N", "K", "bits", "block_size"))
    blocks = -(-columns // size)
    packed = read_initializer(folder, tensors[node.input[1]])
    assert packed.shape == (rows, blocks, size * bits // 8)
    codes = _unpack(packed.reshape(rows, -1), bits)[:, :columns]
    scales = read_initializer(folder, tensors[casts[node.input[2]]]).astype(np.float64).reshape(rows, blocks)
    zeros = np.full(scales.shape, 2 ** (bits - 1))
    if len(node.input) > 3:
        packed = read_initializer(folder, tensors[node.input[3]]).reshape(rows, -1)
        zeros = _unpack(packed, bits)[:, :blocks]
    return Weight(codes, scales, zeros)


def _unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """[rows, bytes] to [rows, codes]."""
    if bits == 8:
        return packed.astype(np.int64)
    out = np.empty((packed.shape[0], 2 * packed.shape[1]), np.int64)
    out[:, 0::2], out[:, 1::2] = packed % 16, packed // 16
    return out


def structure(path: Path) -> str:
    """The layout of a graph as text: inputs, initializers, nodes, outputs."""
    model = onnx.load(path, load_external_data=False)
    lines = [f"opset {o.domain or 'onnx'} {o.version}" for o in model.opset_import]
    for title, values in (("input", model.graph.input), ("output", model.graph.output)):
        lines += [f"{title} {v.name} {_type(v.type.tensor_type)}" for v in values]
    for tensor in sorted(model.graph.initializer, key=lambda t: t.name):
        place = "external" if tensor.data_location == TensorProto.EXTERNAL else "inline"
        kind = TensorProto.DataType.Name(tensor.data_type).lower()
        lines.append(f"{place} {_anonymous(tensor.name)} {kind} {list(tensor.dims)}")
    for node in model.graph.node:
        inputs = [_anonymous(name) for name in node.input]
        values = [f"{a.name}={_short(helper.get_attribute_value(a))}" for a in node.attribute]
        lines.append(f"{node.op_type}({', '.join([*inputs, *values])}) -> {', '.join(node.output)}")
    return "\n".join(dict.fromkeys(lines)) + "\n"


def _anonymous(name: str) -> str:
    """Names of encodings carry their values, which depend on the machine's arithmetic."""
    return re.sub(r"^(scale|zero\.uint16)\.\w+$", r"\1.<value>", name)


def _type(tensor: onnx.TypeProto.Tensor) -> str:
    kind = TensorProto.DataType.Name(tensor.elem_type).lower()
    return f"{kind} {[d.dim_value for d in tensor.shape.dim]}"


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
