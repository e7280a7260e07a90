"""Reading a .pte back with ExecuTorch's own schemas: every weight of an XNNPACK linear as codes and
scales."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader
from executorch.exir._serialize._flatbuffer import _get_flatc_path
from executorch.exir._serialize._flatbuffer_program import _flatbuffer_to_program
from executorch.exir._serialize._program import PTEFile, _get_extended_header, _restore_segments
from executorch.exir.schema import DelegateCall, Int

from bluelm.errors import InputError
from bluelm.system.children import name_of, run
from bluelm.system.reading import read_bytes
from compress.checkpoint.quantized import QuantizedTensor
from export.artifacts.tables import read_tables

IDENTIFIER = b"ET12"  # of the flatbuffer
MOST_BYTES = 64 << 30
JSON_BYTES, FLATC_SECONDS, FLATC_KB = 50, 20, 1 << 20  # JSON of a byte (ours: 4), and what flatc may take
FLATC_BYTES = 100  # of memory, for a byte, above its own 64 MB
BLOCKWISE, CHANNELWISE = "xnn_datatype_qbint4", ("xnn_datatype_qcint8", "xnn_datatype_qcint4")


@dataclass(frozen=True)
class ProgramContents:
    """What a .pte holds: weights of linears in the order of the graph, names of methods, and of delegates."""

    linears: tuple[QuantizedTensor, ...]
    methods: tuple[str, ...]
    delegates: tuple[str, ...]
    file: PTEFile


def read(path: Path) -> ProgramContents:
    """Parse the file `path`."""
    file = read_program(path)
    plans = file.program.execution_plan
    forward = next(plan for plan in plans if plan.name == "forward")
    linears: list[QuantizedTensor] = []
    for delegate in forward.delegates:
        if delegate.id == "XnnpackBackend":
            blob = bytes(file.program.backend_delegate_data[delegate.processed.index].data)
            linears += _linears(blob, file)
    return ProgramContents(
        tuple(linears), tuple(plan.name for plan in plans), tuple(d.id for d in forward.delegates), file
    )


def read_program(path: Path, blocks: int | None = None) -> PTEFile:
    """The program of the file `path` as ExecuTorch's schema has it.

    Args:
        blocks: how many it holds of a model's at most; None where nobody knows.

    Raises:
        InputError: no .pte, or a damaged one.
    """
    content = read_bytes(path, MOST_BYTES, "the ExecuTorch program")
    if content[4:8] != IDENTIFIER:
        raise InputError("this is not an ExecuTorch program", where=path, fix="export it again")
    try:
        return _parse(content, blocks)
    except (AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError(f"the ExecuTorch program is damaged: {error!r}", where=path, fix="export it again") from None


def _parse(content: bytes, blocks: int | None) -> PTEFile:
    """`deserialize_pte_binary` within bounds: it copies segments, and constants in them, as often as they are named."""
    header = _get_extended_header(content)
    size = len(content) if header is None else header.program_size
    if size > len(content):
        raise ValueError(f"{size} bytes of tables in a file of {len(content)}")
    program = read_tables(lambda: _flatbuffer_to_program(content[:size]), size, blocks)
    base = 0 if header is None else header.segment_base_offset
    if base == 0:
        return PTEFile(program=program, mutable_data=None, named_data=None)
    if sum(segment.size for segment in program.segments) > len(content):
        raise ValueError("the segments are larger than the file")
    for parts in (program.constant_segment, *(program.mutable_data_segments or ())):
        if parts is not None and any(first > second for first, second in pairwise(parts.offsets)):
            raise ValueError("constants that lie in one another")
    return _restore_segments(program=program, segment_data=content[base:])


def constants(file: PTEFile) -> dict[str, list[Any]]:
    """What each method without instructions answers: whole numbers and truth values."""
    found: dict[str, list[Any]] = {}
    for plan in file.program.execution_plan:
        if not any(chain.instructions for chain in plan.chains):
            values: list[Any] = [plan.values[index].val for index in plan.outputs]
            found[plan.name] = [next(iter(vars(value).values()), None) for value in values]
    return found


def constant(file: PTEFile, method: str) -> list[int] | None:
    """The whole numbers that a method without inputs answers, as ExecuTorch's runners ask it; None if there is none."""
    plan = next((plan for plan in file.program.execution_plan if plan.name == method), None)
    if plan is None:
        return None
    values = [plan.values[index].val for index in plan.outputs]
    return [value.int_val for value in values if isinstance(value, Int)]


def all_delegated(path: Path) -> dict[str, tuple[str, ...]] | None:
    """By method, the delegates that it calls; None where a method also calls kernels of ExecuTorch's own."""
    plans = read_program(path).program.execution_plan
    steps = [step.instr_args for plan in plans for chain in plan.chains for step in chain.instructions]
    if not steps or not all(isinstance(step, DelegateCall) for step in steps):
        return None
    return {plan.name: tuple(delegate.id for delegate in plan.delegates) for plan in plans}


def embedding_codes(contents: ProgramContents, shape: tuple[int, int]) -> Iterator[np.ndarray]:
    """Constants of the program with as many bytes as int8 codes of `shape`, as such."""
    for buffer in contents.file.program.constant_buffer:
        if len(buffer.storage) == shape[0] * shape[1]:
            yield np.frombuffer(buffer.storage, np.int8).reshape(shape)


def _linears(blob: bytes, file: PTEFile) -> Iterator[QuantizedTensor]:
    graph = xnnpack_graph(blob)
    values = {_tensor(value)["id_out"]: value["xvalue_union"] for value in graph["xvalues"]}
    for node in graph["xnodes"]:
        if node["xnode_union_type"] == "XNNFullyConnected":
            weight = values[node["xnode_union"]["filter_id"]]
            if "quant_params" in weight:  # others are the mean of a norm and the turn of the rotary embedding
                yield quantized_weight(weight, graph, file)


def xnnpack_graph(blob: bytes) -> dict[str, Any]:
    """The graph of a delegate's blob, as the JSON that flatc makes of it by XNNPACK's schema.

    Raises:
        ValueError: it is none.
    """
    header = XNNHeader.from_bytes(blob[: XNNHeader.EXPECTED_LENGTH])
    start = header.flatbuffer_offset
    if start + header.flatbuffer_size > len(blob):
        raise ValueError("XNNPACK's graph ends behind the end of the delegate")
    with tempfile.TemporaryDirectory() as folder:
        schema, data = Path(folder) / "schema.fbs", Path(folder) / "graph.bin"
        schema.write_bytes(
            resources.files("executorch.backends.xnnpack.serialization").joinpath("schema.fbs").read_bytes()
        )
        data.write_bytes(blob[start : start + header.flatbuffer_size])
        _decompile(Path(folder), schema, data)
        return json.loads((Path(folder) / "graph.json").read_bytes())


def _decompile(folder: Path, schema: Path, data: Path) -> None:
    """flatc looks at nothing before it follows it: it crashes at what leads nowhere, and writes what leads to the same
    places again and again. It runs within limits of time, memory and what it writes."""
    size = data.stat().st_size
    blocks, memory = (JSON_BYTES * size + (1 << 20)) // 512, min(FLATC_KB, (FLATC_BYTES * size >> 10) + (64 << 10))
    limits = f"ulimit -c 0; ulimit -S -t {FLATC_SECONDS}; ulimit -f {blocks}; ulimit -v {memory} 2>/dev/null"
    options = ["--raw-binary", "--json", "--defaults-json", "--strict-json", "-o", str(folder)]
    command = ["sh", "-c", f'{limits}; exec "$@"', "flatc", _get_flatc_path(), *options, str(schema), "--", str(data)]
    ran = run(command, "flatc")
    if ran.returncode != 0:
        said = next(iter((ran.stderr or ran.stdout).strip().splitlines()), "")[:200]
        raise ValueError(f"flatc cannot read XNNPACK's graph ({name_of(ran.returncode)}) {said}".rstrip())


def _tensor(value: dict[str, Any]) -> dict[str, Any]:
    union = value["xvalue_union"]
    return union.get("tensor_value", union)


def quantized_weight(value: dict[str, Any], graph: dict[str, Any], file: PTEFile) -> QuantizedTensor:
    """A weight of an XNNPACK graph as codes and scales; scales that are no float16s stay float32.

    Raises:
        ValueError: a kind of number, or an axis, that this exporter never writes.
    """
    tensor, how = value["tensor_value"], value["quant_params"]
    rows, columns = tensor["dims"]
    data = np.frombuffer(constant_bytes(graph, file, tensor["constant_buffer_idx"]), np.uint8)
    scale_bytes = constant_bytes(graph, file, how["scale_buffer_idx"])
    if tensor["datatype"] not in (BLOCKWISE, *CHANNELWISE) or how["channel_dim"] != 0:
        raise ValueError(f"a weight of {tensor['datatype']} with scales along axis {how['channel_dim']}")
    if tensor["datatype"] == BLOCKWISE:
        scales = torch.frombuffer(bytearray(scale_bytes), dtype=torch.bfloat16).view(rows, -1).float()
        group = how["group_size"]
    else:
        scales = torch.frombuffer(bytearray(scale_bytes), dtype=torch.float32).view(rows, 1)
        group = -1
    bits = 8 if tensor["datatype"] == "xnn_datatype_qcint8" else 4
    if bits == 4:  # two a byte, the even column low, 8 in the middle
        codes = np.stack([data & 15, data >> 4], axis=-1).reshape(rows, columns)
    else:
        codes = data.reshape(rows, columns) ^ 128  # signed -> unsigned
    exact = scales.to(torch.float16)
    kept = exact if bool((exact.float() == scales).all()) else scales
    zeros = torch.full(kept.shape, 2 ** (bits - 1), dtype=torch.uint8)
    return QuantizedTensor(torch.from_numpy(codes.copy()), kept, zeros, bits, group)


def constant_bytes(graph: dict[str, Any], file: PTEFile, index: int) -> bytes:
    """A constant of an XNNPACK graph, which lies in the program's named data."""
    key = graph["constant_data"][index]["named_key"]
    assert file.named_data is not None
    return file.named_data.buffers[file.named_data.pte_data[key].buffer_index]
