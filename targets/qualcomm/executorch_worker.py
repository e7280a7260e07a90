"""The child process of ExecuTorch's Qualcomm backend: packs compiled graphs into a .pte, runs it on the simulator.

Its libraries are those of onnxruntime-qnn, found by environment variables that are read when the process begins.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from bluelm.errors import InputError, TargetError
from targets.host.child import serve
from targets.qualcomm.executorch_messages import Describe, LoadProgram, Method, Pack, Step
from targets.qualcomm.messages import BinaryContents

OUTPUT = "output_"  # what ExecuTorch puts before the names of a graph's outputs
_loaded: dict[str, tuple[Method, Any]] = {}


def handle(message: Pack | LoadProgram | Step | Describe) -> object:
    """Do what a message asks."""
    if isinstance(message, Pack):
        return _pack(message)
    if isinstance(message, Describe):
        return _describe(message)
    if isinstance(message, LoadProgram):
        return _load(message)
    border, method = _loaded[message.method]
    try:
        found = method.execute([torch.from_numpy(_bits(message.feeds[name])) for name in border.inputs])
    except RuntimeError as error:
        raise InputError(
            f"ExecuTorch cannot run the program: {error}", where=border.name, fix="export it again"
        ) from None
    return {name: _codes(tensor.numpy()) for name, tensor in zip(border.outputs, found, strict=True)}


def _bits(array: np.ndarray) -> np.ndarray:
    """int16 as the float16 of the same bits, which is how the program's border has them: ExecuTorch's Java classes know
    no int16, and the delegate only carries them."""
    return array.view(np.float16) if array.dtype == np.int16 else array


def _codes(array: np.ndarray) -> np.ndarray:
    """The int16 whose bits a float16 of the border has."""
    return (array.view(np.int16) if array.dtype == np.float16 else array).copy()


def _pack(message: Pack) -> tuple[Method, ...]:
    from executorch.backends.qualcomm.builders.qnn_constants import OpContextLoader
    from executorch.backends.qualcomm.partition.qnn_partitioner import QnnPartitioner
    from executorch.backends.qualcomm.utils import utils as qnn
    from executorch.exir import ExecutorchBackendConfig, to_edge

    options = _options(message.chip)
    library = torch.library.Library(OpContextLoader.namespace, "FRAGMENT")
    methods: list[Method] = []
    programs: dict[str, ExportedProgram] = {}
    binaries: dict[str, bytes] = {}
    for binary in message.binaries:
        wrapped, method, given, made = _graph(Path(binary), options)
        if method.name in programs:
            raise TargetError(f"two graphs have the name {method.name}", where=binary)
        module = _Loader(_define(library, f"context_{len(methods)}", made))
        programs[method.name] = torch.export.export(module, given, strict=True)
        binaries[method.name] = wrapped
        methods.append(method)
    edge = to_edge(programs)
    for name, wrapped in binaries.items():
        for node in edge.exported_program(name).graph.nodes:
            if node.op == "call_function" and OpContextLoader.namespace in str(node.target):
                node.meta[OpContextLoader.meta_ctx_bin] = wrapped
    edge = edge.to_backend({name: QnnPartitioner(options) for name in programs})
    settings = ExecutorchBackendConfig(
        extract_delegate_segments=True, segment_alignment=qnn.get_qnn_context_binary_alignment()
    )
    with Path(message.path).open("wb") as file:
        edge.to_executorch(settings).write_to_file(file)
    return tuple(methods)


def _options(chip: str) -> Any:
    """ExecuTorch's options for graphs that are compiled already."""
    from executorch.backends.qualcomm.serialization.qc_schema import QcomChipset
    from executorch.backends.qualcomm.utils import utils as qnn

    known = getattr(QcomChipset, chip, None)
    if known is None:
        raise TargetError(f"ExecuTorch's Qualcomm backend does not know {chip}", fix="use --runtime qnn-context")
    htp = qnn.generate_htp_compiler_spec(use_fp16=False)
    return qnn.generate_qnn_executorch_compiler_spec(soc_model=known, backend_options=htp, is_from_context_binary=True)


def _graph(binary: Path, options: Any) -> tuple[bytes, Method, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """A binary as ExecuTorch holds it, and the border of its one graph: names, and zeros of the shapes and types."""
    from executorch.backends.qualcomm.python import PyQnnManagerAdaptor
    from executorch.backends.qualcomm.utils import utils as qnn

    encoded = qnn.generate_qnn_executorch_option(options)
    wrapped = bytes(PyQnnManagerAdaptor.QnnManager(encoded).MakeBinaryInfo(binary.read_bytes()))
    manager: Any = PyQnnManagerAdaptor.QnnManager(encoded, wrapped)
    if manager.Init().value != 0:
        raise TargetError("ExecuTorch cannot load the compiled graph", where=binary)
    (name,) = manager.GetGraphNames()
    manager.AllocateTensor(name)
    types: dict[Any, torch.dtype] = {}
    for known in (qnn.QNN_QUANT_TYPE_MAP, qnn.QNN_TENSOR_TYPE_MAP):
        for dtype, qnn_type in known.items():
            types.setdefault(qnn_type, dtype)

    def border(tensors: Iterable[Any]) -> dict[str, Tensor]:
        zeros = {t.GetName(): torch.zeros(tuple(t.GetDims()), dtype=types[t.GetDataType()]) for t in tensors}
        return {key.removeprefix(OUTPUT): torch.from_numpy(_bits(value.numpy())) for key, value in zeros.items()}

    given, made = border(manager.GetGraphInputs(name)), border(manager.GetGraphOutputs(name))
    manager.Destroy()
    return wrapped, Method(name, tuple(given), tuple(made)), tuple(given.values()), tuple(made.values())


def _define(library: torch.library.Library, name: str, outputs: tuple[Tensor, ...]) -> Any:
    """An operator that stands for a compiled graph; ExecuTorch's delegate takes it with the graph itself."""
    library.define(f"{name}(Tensor[] inputs) -> Any")
    library.impl(
        name,
        lambda inputs: tuple(torch.empty_like(output, device="meta") for output in outputs),
        "CompositeExplicitAutograd",
    )
    return getattr(getattr(torch.ops, library.ns), name).default


class _Loader(nn.Module):
    """Calls the operator of a compiled graph."""

    def __init__(self, operator: Any) -> None:
        super().__init__()
        self._operator = operator

    def forward(self, *inputs: Tensor) -> Any:
        return self._operator(inputs)


def _describe(message: Describe) -> dict[str, BinaryContents]:
    """Each method's binary lies in the program in ExecuTorch's own frame, which it also takes off."""
    from executorch.backends.qualcomm.python import PyQnnManagerAdaptor

    from export.executorch.reader import read_program
    from targets.qualcomm import system as qnn_system

    program = read_program(Path(message.path)).program
    found: dict[str, BinaryContents] = {}
    for plan in program.execution_plan:
        if len(plan.delegates) != 1:
            raise InputError(f"the method {plan.name} calls {len(plan.delegates)} delegates", where=message.path)
        framed = bytes(program.backend_delegate_data[plan.delegates[0].processed.index].data)
        binary = bytes(PyQnnManagerAdaptor.StripProtocol(framed))
        found[plan.name] = qnn_system.contents(binary, message.path)
    return found


def _load(message: LoadProgram) -> None:
    from executorch.runtime import Runtime

    try:
        program = Runtime.get().load_program(message.path)
        _loaded.update({method.name: (method, program.load_method(method.name)) for method in message.methods})
    except (KeyError, RuntimeError) as error:  # a method that is not there; a file that is none
        raise InputError(f"ExecuTorch cannot load the program: {error}", where=message.path) from None


if __name__ == "__main__":
    serve(handle, sys.argv)
