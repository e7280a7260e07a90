"""Changes of a .pte for XNNPACK, one place at a time."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader
from executorch.exir._serialize._flatbuffer import _flatc_compile
from executorch.exir._serialize._program import PTEFile
from executorch.exir.schema import Bool, Int, KernelCall

from export.executorch.reader import xnnpack_graph

Change = Callable[[PTEFile], None]


HEADER = 64


def plan(file: PTEFile, name: str = "forward") -> Any:
    return next(plan for plan in file.program.execution_plan if plan.name == name)


def answer(name: str, value: int | bool) -> Change:
    """What a method without inputs says."""

    def change(file: PTEFile) -> None:
        method = plan(file, name)
        entry = method.values[method.outputs[0]]
        entry.val = Bool(bool_val=value) if isinstance(value, bool) else Int(int_val=value)

    return change


def argument(kernel: str, place: int, value: Any) -> Change:
    """A number that the last call of a kernel is given."""

    def change(file: PTEFile) -> None:
        method = plan(file)
        call = calls(method, kernel)[-1]
        method.values.append(replace(method.values[0], val=value))
        call.args[place] = len(method.values) - 1

    return change


def calls(method: Any, kernel: str) -> list[Any]:
    steps = [step.instr_args for chain in method.chains for step in chain.instructions]
    return [s for s in steps if isinstance(s, KernelCall) and method.operators[s.op_index].name.endswith(kernel)]


def crossed(kernel: str, a: int, b: int) -> Change:
    """Two arguments of the last call of a kernel in each other's place."""

    def change(file: PTEFile) -> None:
        given = calls(plan(file), kernel)[-1].args
        given[a], given[b] = given[b], given[a]

    return change


def number(fits: Callable[[np.ndarray], bool], edit: Callable[[np.ndarray], None], kind: Any = np.float32) -> Change:
    """A constant, among those of the program and of its delegates, that is known by its numbers."""

    def change(file: PTEFile) -> None:
        assert file.named_data is not None
        apart: list[Any] = file.named_data.buffers  # pyright: ignore[reportAssignmentType]
        for held in [*file.program.constant_buffer, *range(len(apart))]:
            data = bytes(apart[held] if isinstance(held, int) else held.storage)
            if len(data) % np.dtype(kind).itemsize:
                continue
            values = np.frombuffer(data, kind).copy()
            if fits(values):
                edit(values)
                if isinstance(held, int):
                    apart[held] = values.tobytes()
                else:
                    held.storage = values.tobytes()
                return
        raise AssertionError("there is no such constant")

    return change


def like(wanted: np.ndarray) -> Callable[[np.ndarray], bool]:
    return lambda values: values.size == wanted.size and np.array_equal(values, wanted.reshape(-1))


def at(index: int, edit: Callable[[Any], Any]) -> Callable[[np.ndarray], None]:
    def change(values: np.ndarray) -> None:
        values[index] = edit(values[index])

    return change


def inside(delegate: int, edit: Callable[[dict[str, Any]], None]) -> Change:
    """XNNPACK's graph in a delegate, written again."""

    def change(file: PTEFile) -> None:
        held = file.program.backend_delegate_data[plan(file).delegates[delegate].processed.index]
        graph = xnnpack_graph(bytes(held.data))
        edit(graph)
        with tempfile.TemporaryDirectory() as folder:
            schema = resources.files("executorch.backends.xnnpack.serialization").joinpath("schema.fbs").read_bytes()
            (Path(folder) / "schema.fbs").write_bytes(schema)
            (Path(folder) / "graph.json").write_text(json.dumps(graph))
            _flatc_compile(folder, f"{folder}/schema.fbs", f"{folder}/graph.json")
            made = next(path for path in Path(folder).iterdir() if path.suffix not in (".fbs", ".json")).read_bytes()
        size = -(-len(made) // 16) * 16
        header = XNNHeader(HEADER, len(made), HEADER + size, 0).to_bytes()
        held.data = header.ljust(HEADER, b"\0") + made.ljust(size, b"\0")

    return change


def nodes(graph: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [node for node in graph["xnodes"] if node["xnode_union_type"] == kind]


def product_for_sum(graph: dict[str, Any]) -> None:
    nodes(graph, "XNNAdd")[0]["xnode_union_type"] = "XNNMultiply"
