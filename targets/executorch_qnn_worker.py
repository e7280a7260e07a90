"""The child process of ExecuTorch's Qualcomm backend: lowers to a .pte for HTP, and runs it on the simulator.

Its libraries are those of onnxruntime-qnn, found by environment variables that are read when the process begins.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from bluelm.errors import InputError, TargetError
from compress.store import QuantizedCheckpoint
from export.executorch_static import METHODS, StaticDecoder, example
from targets.child import serve
from targets.executorch_qnn_messages import Load, Lower, Lowered, Step

_loaded: dict[str, Any] = {}


def handle(message: Lower | Load | Step) -> object:
    """Do what a message asks."""
    if isinstance(message, Lower):
        return _lower(message)
    if isinstance(message, Load):
        return _load(message)
    border: Load = _loaded["border"]
    given = [torch.from_numpy(message.feeds[name]) for name in border.inputs]
    found = _loaded[message.method].execute(given)
    return {name: tensor.float().numpy().copy() for name, tensor in zip(border.outputs, found, strict=True)}


def _lower(message: Lower) -> Lowered:
    from executorch.backends.qualcomm.serialization.qc_schema import QcomChipset
    from executorch.backends.qualcomm.utils import utils as qnn
    from executorch.exir import ExecutorchBackendConfig

    quantized = QuantizedCheckpoint.open(Path(message.source))
    chip = getattr(QcomChipset, message.chip, None)
    if chip is None:
        raise TargetError(f"ExecuTorch's Qualcomm backend does not know {message.chip}")
    module = StaticDecoder(quantized, message.context, codes=False, debug=message.debug).eval()
    options = qnn.generate_htp_compiler_spec(use_fp16=True)
    spec = qnn.generate_qnn_executorch_compiler_spec(soc_model=chip, backend_options=options)
    widths = dict(zip(METHODS, (message.chunk, 1), strict=True))
    inputs: dict[str, Any] = {name: example(quantized.config, width, message.context) for name, width in widths.items()}
    with torch.no_grad():
        edge = qnn.to_edge_transform_and_lower_to_qnn(
            dict.fromkeys(METHODS, module),
            inputs,
            dict.fromkeys(METHODS, spec),
        )
    left = {
        name: sorted(
            str(node.target)
            for node in edge.exported_program(name).graph.nodes
            if node.op == "call_function" and not str(node.target).endswith(("delegate", "getitem>"))
        )
        for name in METHODS
    }
    with Path(message.path).open("wb") as file:
        edge.to_executorch(ExecutorchBackendConfig(extract_delegate_segments=True)).write_to_file(file)
    return Lowered(left)


def _load(message: Load) -> None:
    from executorch.runtime import Runtime

    try:
        program = Runtime.get().load_program(message.path)
        _loaded.update({name: program.load_method(name) for name in METHODS})
    except RuntimeError as error:
        raise InputError(f"ExecuTorch cannot load the program: {error}", where=message.path) from None
    _loaded.update(program=program, border=message)


if __name__ == "__main__":
    serve(handle, sys.argv)
