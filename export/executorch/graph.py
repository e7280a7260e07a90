"""The method `forward` of an XNNPACK .pte as one graph: XNNPACK's own graphs, and ExecuTorch's kernels between them.

A value is the node that computes it; caches are what was last written into them. Nothing is computed here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
from executorch.exir._serialize._program import PTEFile
from executorch.exir.schema import Bool, DelegateCall, Double, Int, KernelCall, Null, Tensor, TensorList

from bluelm.errors import InputError
from compress.checkpoint.quantized import QuantizedTensor
from export.executorch.reader import constant_bytes, quantized_weight, xnnpack_graph

NONE = 2**32 - 1  # XNNPACK's id of no value
SCALARS = {0: np.uint8, 1: np.int8, 3: np.int32, 4: np.int64, 5: np.float16, 6: np.float32}  # ExecuTorch's ScalarType
WRITES = "llama::update_cache"


@dataclass(frozen=True, eq=False)
class Node:
    """An operation on values: nodes, or plain numbers.

    Attributes:
        op: a kernel, a node of XNNPACK (`XNNMultiply`), or "input", "cache", "constant", "weight".
        extra: what else it says of itself.
        array, weight: of a constant, and of a quantized one.
    """

    op: str
    inputs: tuple[Any, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    array: Callable[[], np.ndarray] | None = None
    weight: Callable[[], QuantizedTensor] | None = None


def forward(file: PTEFile) -> tuple[Any, ...]:
    """The outputs of `forward`.

    Raises:
        InputError: it has none, or one that is not put together as ExecuTorch does it.
    """
    try:
        plan = next(plan for plan in file.program.execution_plan if plan.name == "forward")
        return _Reading(file, plan).outputs()
    except (StopIteration, LookupError, TypeError, ValueError, AttributeError, AssertionError) as error:
        raise InputError(f"the program cannot be followed: {error!r}", fix="export it again") from None


class _Reading:
    """One pass over the method's instructions."""

    def __init__(self, file: PTEFile, plan: Any) -> None:
        self._file, self._plan = file, plan
        self._made: dict[int, Any] = {index: Node("input", (place,)) for place, index in enumerate(plan.inputs)}

    def outputs(self) -> tuple[Any, ...]:
        for step in (step for chain in self._plan.chains for step in chain.instructions):
            call: Any = step.instr_args
            if isinstance(call, KernelCall):
                self._kernel(self._plan.operators[call.op_index], call.args)
            elif isinstance(call, DelegateCall):
                self._delegate(self._plan.delegates[call.delegate_index], call.args)
            else:
                raise ValueError(f"an instruction {type(call).__name__}")
        return tuple(self._value(index) for index in self._plan.outputs)

    def _value(self, index: int) -> Any:
        if index in self._made:
            return self._made[index]
        value: Any = self._plan.values[index].val
        if isinstance(value, Null):
            return None
        if isinstance(value, Int | Double | Bool):
            return next(iter(vars(value).values()))
        if not isinstance(value, Tensor):
            return Node("list", tuple(self._value(item) for item in value.items))
        told = {"type": int(value.scalar_type), "sizes": list(value.sizes)}
        if value.data_buffer_idx and value.allocation_info is None:
            node = Node("constant", (), told, array=lambda: self._array(value))
        else:
            node = Node("cache", (), told)
        self._made[index] = node
        return node

    def _array(self, tensor: Any) -> np.ndarray:
        data = self._file.program.constant_buffer[tensor.data_buffer_idx].storage
        return np.frombuffer(bytes(data), SCALARS[int(tensor.scalar_type)]).reshape(tensor.sizes)

    def _kernel(self, operator: Any, arguments: list[int]) -> None:
        """Outputs come last, once more as what the kernel gives back."""
        name, last = f"{operator.name}.{operator.overload}".rstrip("."), arguments[-1]
        value = self._plan.values[last].val
        results = list(value.items) if isinstance(value, TensorList) else [last]
        given = arguments[:-1]
        while given and given[-1] in results:
            given.pop()
        inputs = tuple(self._value(index) for index in given)
        for place, result in enumerate(results):
            self._made[result] = Node(name, inputs, {"result": place})
        if operator.name == WRITES:
            self._made[given[1]] = self._made[last]

    def _delegate(self, delegate: Any, arguments: list[int]) -> None:
        if delegate.id != "XnnpackBackend":
            raise ValueError(f"a delegate {delegate.id}")
        graph = xnnpack_graph(bytes(self._file.program.backend_delegate_data[delegate.processed.index].data))
        local: dict[int, Any] = {NONE: None}
        results: dict[int, int] = {}
        kinds: dict[int, str] = {}
        for value in (entry["xvalue_union"] for entry in graph["xvalues"]):
            tensor = value.get("tensor_value", value)
            kinds[tensor["id_out"]] = tensor["datatype"]
            if tensor["constant_buffer_idx"]:
                local[tensor["id_out"]] = self._constant(value, tensor, graph)
            elif tensor["flags"] == 1:
                local[tensor["id_out"]] = self._value(arguments[tensor["external_id"]])
            elif tensor["flags"] == 2:
                results[tensor["id_out"]] = arguments[tensor["external_id"]]
        for entry in graph["xnodes"]:
            told = dict(entry["xnode_union"])
            made = told.pop("output_id")
            inputs = tuple(local[told.pop(name)] for name in [name for name in told if name.endswith("_id")])
            told |= {"to": kinds[made]} if entry["xnode_union_type"] == "XNNConvert" else {}
            told |= {"range": entry["output_min_max"]} if entry.get("output_min_max") else {}
            local[made] = Node(entry["xnode_union_type"], inputs, told)
        self._made |= {result: local[made] for made, result in results.items()}

    def _constant(self, value: dict[str, Any], tensor: dict[str, Any], graph: dict[str, Any]) -> Node:
        if "quant_params" in value:
            return Node("weight", (), value["quant_params"], weight=lambda: quantized_weight(value, graph, self._file))

        def read() -> np.ndarray:
            data = constant_bytes(graph, self._file, tensor["constant_buffer_idx"])
            kind = {"xnn_datatype_fp32": np.float32, "xnn_datatype_fp16": np.float16}[tensor["datatype"]]
            return np.frombuffer(data, kind).reshape(tensor["dims"])

        return Node("constant", (), {"sizes": tensor["dims"]}, array=read)
