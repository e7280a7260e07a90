"""Hostile .pte files of ExecuTorch, and the folder in those of Core ML, each made of a valid one."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any

import flatbuffers

from tests.hostile.tables import FLAT, MANY, Change, apart, poked, vector
from tests.hostile.texts import DEEP, DIGITS, SHOUT

# --- .pte ------------------------------------------------------------------------------------------------------------


def _program(change: Callable[[Any], None]) -> Change:
    """The program of a file changed; segments stay as they lie behind it."""

    def do(valid: bytes) -> bytes:
        from executorch.exir._serialize import _flatbuffer_program as tables
        from executorch.exir._serialize import _program as files

        header: Any = files._get_extended_header(valid)
        program = tables._flatbuffer_to_program(valid[: header.program_size])
        change(program)
        made: Any = tables._program_to_flatbuffer(program)
        base = -(-(len(made.data) + files._ExtendedHeader.EXPECTED_LENGTH) // 4096) * 4096
        said = files._ExtendedHeader(base, base, header.segment_data_size)
        whole = bytes(files._insert_flatbuffer_header(bytes(made.data), "ET..", said.to_bytes()))
        return whole.ljust(base, b"\0") + valid[header.segment_base_offset :]

    return do


def _plans(change: Callable[[Any], None]) -> Change:
    def do(program: Any) -> None:
        for plan in program.execution_plan:
            change(plan)

    return _program(do)


def _delegates(change: Callable[[bytes], bytes]) -> Change:
    """What each delegate is given, as ExecuTorch writes it."""

    def do(valid: bytes) -> bytes:
        from executorch.exir._serialize._program import deserialize_pte_binary, serialize_pte_binary

        file = deserialize_pte_binary(valid)
        for held in file.program.backend_delegate_data:
            held.data = change(bytes(held.data))
        return bytes(serialize_pte_binary(file, extract_delegate_segments=True))

    return do


def _segments(offset: int | None, size: int | None, times: int = 1) -> Change:
    """Segments that lie elsewhere, or each of them many times."""

    def change(program: Any) -> None:
        for segment in program.segments:
            segment.offset, segment.size = (segment.offset if offset is None else offset), size or segment.size
        program.segments *= times

    return _program(change)


def _header(field: int, number: int) -> Change:
    """Another number in the extended header behind the root's place and the identifier."""
    return poked(8 + field, "<Q", number)


def _calls(name: str, value: Any) -> Change:
    def change(plan: Any) -> None:
        for chain in plan.chains:
            for step in chain.instructions:
                if hasattr(step.instr_args, name):
                    setattr(step.instr_args, name, value)

    return _plans(change)


def _tensor_values(name: str, value: Any) -> Change:
    def change(plan: Any) -> None:
        for held in plan.values:
            if hasattr(held.val, name):
                setattr(held.val, name, value)

    return _plans(change)


def _processed(plan: Any) -> None:
    for delegate in plan.delegates:
        delegate.processed.index = 2**32 - 1


def _shouting(plan: Any) -> None:
    plan.name = SHOUT


def _bomb(valid: bytes) -> bytes:
    """An XNNPACK graph of many values that are one, each with many sizes that are one."""
    builder = flatbuffers.Builder(1 << 20)
    builder.StartVector(4, MANY, 4)
    for _ in range(MANY):
        builder.PrependUint32(1)
    sizes = builder.EndVector()
    builder.StartObject(9)  # XNNTensorValue
    builder.PrependUOffsetTRelativeSlot(2, sizes, 0)
    tensor = builder.EndObject()
    builder.StartObject(2)  # XValue
    builder.PrependUint8Slot(0, 1, 0)
    builder.PrependUOffsetTRelativeSlot(1, tensor, 0)
    value = builder.EndObject()
    values = vector(builder, [value] * MANY)
    builder.StartObject(8)  # XNNGraph
    builder.PrependUOffsetTRelativeSlot(2, values, 0)
    builder.Finish(builder.EndObject(), file_identifier=b"XN01")
    made = bytes(builder.Output())
    return b"\0" * 4 + b"XH00" + struct.pack("<HIIIQ", 30, 64, len(made), 64 + len(made), 0).ljust(56, b"\0") + made


def _plans_that_are_one(valid: bytes) -> bytes:
    """Many methods that are one, of many values that are one."""
    builder = flatbuffers.Builder(1 << 20)
    builder.StartObject(2)
    value = builder.EndObject()
    values = vector(builder, [value] * MANY)
    builder.StartObject(8)  # ExecutionPlan
    builder.PrependUOffsetTRelativeSlot(2, values, 0)
    plan = builder.EndObject()
    plans = vector(builder, [plan] * MANY)
    builder.StartObject(8)  # Program
    builder.PrependUOffsetTRelativeSlot(1, plans, 0)
    builder.Finish(builder.EndObject(), file_identifier=b"ET12")
    return bytes(builder.Output())


PTE: dict[str, Change] = {
    **FLAT,
    "tables of 2^63 bytes": _header(8, 2**63),
    "tables of no bytes": _header(8, 0),
    "segments that begin at 2^63": _header(16, 2**63),
    "segments that begin in the tables": _header(16, 64),
    "segments behind the end": _segments(2**62, None),
    "segments of 2^62 bytes": _segments(None, 2**62),
    "segments over one another": _segments(0, None),
    "segments that are all of it, 200 times": _segments(0, 20_000, 200),
    "a million values of nothing": apart(b"ET12", 1, 2),
    "methods that are one": _plans_that_are_one,
    "methods that shout": _plans(_shouting),
    "methods without values": _plans(lambda plan: plan.values.clear()),
    "methods without steps": _plans(lambda plan: plan.chains.clear()),
    "methods without outputs": _plans(lambda plan: plan.outputs.clear()),
    "outputs that are not there": _plans(lambda plan: plan.outputs.__setitem__(slice(None), [2**31 - 1])),
    "negative outputs": _plans(lambda plan: plan.outputs.__setitem__(slice(None), [-1])),
    "inputs that are not there": _plans(lambda plan: plan.inputs.__setitem__(slice(None), [2**31 - 1])),
    "no operators": _plans(lambda plan: plan.operators.clear()),
    "no delegates": _plans(lambda plan: plan.delegates.clear()),
    "delegates of no data": _plans(_processed),
    "arguments that are not there": _calls("args", [2**31 - 1] * 9),
    "negative arguments": _calls("args", [-1] * 9),
    "no arguments": _calls("args", []),
    "operators that are not there": _calls("op_index", 2**31 - 1),
    "delegates that are not there": _calls("delegate_index", 2**31 - 1),
    "sizes of 2^31 - 1": _tensor_values("sizes", [2**31 - 1] * 4),
    "negative sizes": _tensor_values("sizes", [-4] * 2),
    "constants that are not there": _tensor_values("data_buffer_idx", 2**32 - 1),
    "no methods": _program(lambda program: program.execution_plan.clear()),
    "delegates of nothing": _delegates(lambda data: b""),
    "delegates cut in half": _delegates(lambda data: data[: len(data) // 2]),
    "delegates of ones": _delegates(lambda data: b"\xff" * len(data)),
    "delegates of ones behind their header": _delegates(lambda data: data[:64] + b"\xff" * 4096),
    "delegates whose tables are behind the end": _delegates(lambda data: data[:14] + b"\xff" * 8 + data[22:]),
    "delegates of a root behind the end": _delegates(lambda data: data[:64] + b"\xff" * 4 + data[68:]),
    "delegates of values that are one": _delegates(_bomb),
}


# --- the folder in a .pte of Core ML ----------------------------------------------------------------------------------


def _contents(change: Callable[[list[Any]], object]) -> Change:
    """Another table of contents behind the same bytes."""

    def do(valid: bytes) -> bytes:
        turned = valid[::-1].decode("utf-8", "replace")
        table, end = json.JSONDecoder().raw_decode(turned)
        made = change(table["nodes"])
        text = made if isinstance(made, str) else json.dumps(table)
        return valid[: len(valid) - len(turned[:end].encode())] + text.encode("utf-8", "surrogatepass")[::-1]

    return do


def _file_called(name: str) -> Change:
    """One of the files under another name."""

    def change(nodes: list[Any]) -> None:
        nodes[0]["name"], parent = name, next(node for node in nodes if 0 in node["children"].values())
        parent["children"] = {name if child == 0 else key: child for key, child in parent["children"].items()}

    return _contents(change)


def _root_called(name: str) -> Change:
    return _contents(lambda nodes: nodes[-1].update(name=name))


def _region(**numbers: Any) -> Change:
    return _contents(lambda nodes: nodes[0]["dataRegion"].update(numbers))


def _leading_to(index: Any) -> Change:
    """Every folder's children are one node."""

    def change(nodes: list[Any]) -> None:
        for node in nodes:
            node["children"] = dict.fromkeys(node["children"], index)

    return _contents(change)


def _circle(nodes: list[Any]) -> None:
    nodes[0].update(kind=1, children={nodes[-1]["name"]: len(nodes) - 1})


def _chain(nodes: list[Any]) -> None:
    for index in range(5000):
        child = {nodes[-1]["name"]: len(nodes) - 1}
        nodes.append({"kind": 1, "name": f"f{index}", "children": child, "dataRegion": {"offset": 0, "size": 0}})


FLATTENED: dict[str, Change] = {
    "a file of another place": _file_called("../../../owned"),
    "a file of an absolute place": _file_called("/tmp/owned"),
    "a file of a name with a zero byte": _file_called("a\x00b"),
    "a file without a name": _file_called(""),
    "a file that is the folder above": _file_called(".."),
    "a file that shouts": _file_called(SHOUT),
    "a file that is half a letter": _file_called("\ud800"),
    "a file of a name of 100,000 letters": _file_called("x" * 100_000),
    "a folder of another place": _root_called("../../../../owned"),
    "a folder of an absolute place": _root_called("/tmp/owned"),
    "a folder that is this one": _root_called("."),
    "bytes behind the end": _region(offset=2**40),
    "2^62 bytes": _region(size=2**62),
    "bytes before the start": _region(offset=-5),
    "fewer bytes than none": _region(size=-1),
    "bytes that are text": _region(size="5"),
    "bytes that are halves": _region(offset=0.5),
    "folders in themselves": _leading_to(-1),
    "folders in a circle": _contents(
        lambda nodes: nodes[0].update(kind=1, children={nodes[-1]["name"]: len(nodes) - 1})
    ),
    "children that are not there": _leading_to(10**6),
    "children that are text": _leading_to("x"),
    "a kind that is none": _contents(lambda nodes: [node.update(kind=7) for node in nodes] and None),
    "5000 folders in one another": _contents(_chain),
    "no nodes": _contents(lambda nodes: nodes.clear()),
    "depth": _contents(lambda nodes: '{"nodes":' + "[" * DEEP),
    "5000 digits": _contents(lambda nodes: f'{{"nodes": {DIGITS}}}'),
    "no table": lambda valid: valid[:100],
}
