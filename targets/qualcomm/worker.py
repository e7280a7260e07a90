"""The child process that holds Qualcomm's compiler and simulator, by onnxruntime-qnn.

Nothing runs on the CPU instead: every session forbids onnxruntime's fall back, without which a backend that
failed to load gives a CPU session with perfect results.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime

from bluelm.errors import TargetError, UnavailableError
from targets.arm64.ort_errors import ORT_ERRORS
from targets.host.child import serve
from targets.qualcomm import system as qnn_system
from targets.qualcomm.messages import (
    SHARING,
    BinaryContents,
    Chip,
    Compile,
    Compiled,
    Describe,
    GraphRan,
    GraphsLoaded,
    LoadGraphs,
    Message,
    RunGraph,
)
from targets.tools import require

PROVIDER = "QNNExecutionProvider"

_sessions: dict[str, onnxruntime.InferenceSession] = {}


def handle(message: Message) -> Compiled | GraphsLoaded | GraphRan | BinaryContents:
    """Do what a message asks."""
    if isinstance(message, Compile):
        return _compile(message)
    if isinstance(message, Describe):
        return qnn_system.contents(Path(message.path).read_bytes(), message.path)
    if isinstance(message, LoadGraphs):
        session = _session(message.source, message.chip, {}, severity=3)
        _sessions[message.name] = session
        return GraphsLoaded(tuple(i.name for i in session.get_inputs()), tuple(o.name for o in session.get_outputs()))
    return _run(message)


def _compile(message: Compile) -> Compiled:
    settings = {"ep.context_enable": "1", "ep.context_embed_mode": "0"}
    provider = {"htp_graph_finalization_optimization_mode": "3"}  # takes longest, gives the best graph
    if message.share:
        provider |= {key: value for key, value in SHARING.items() if not key.startswith("ep.")}
        settings |= {key: value for key, value in SHARING.items() if key.startswith("ep.")}
    told = _chosen(message.chip) | provider | settings
    settings |= {"ep.context_file_path": message.target, "session.record_ep_graph_assignment_info": "1"}
    if message.share and message.last:
        settings["ep.stop_share_ep_contexts"] = "1"
    with tempfile.TemporaryDirectory(prefix="bluelm-dump-") as folder:
        if message.dump is not None:
            provider |= {"dump_json_qnn_graph": "1", "json_qnn_graph_dir": folder}
        session = _session(message.source, message.chip, settings, message.severity, provider)
        if message.dump is not None:
            _keep_dump(Path(folder), Path(message.dump), message.source)
    kinds: Counter[str] = Counter()
    for part in session.get_provider_graph_assignment_info():
        if part.ep_name == PROVIDER:
            kinds.update(node.op_type for node in part.get_nodes())
    return Compiled(dict(sorted(kinds.items())), told)


def _keep_dump(folder: Path, target: Path, source: str) -> None:
    """The one graph that was dumped; beside it there is a list of its tensors' sizes.

    Raises:
        TargetError: the compiler was given several graphs, or none.
    """
    found = [path for path in folder.glob("*.json") if not path.stem.endswith("_tensor_log")]
    if len(found) != 1:
        raise TargetError(f"the compiler was given {len(found)} graphs instead of one", where=source)
    target.write_bytes(found[0].read_bytes())


def _run(message: RunGraph) -> GraphRan:
    session = _sessions[message.name]
    names = [output.name for output in session.get_outputs()]
    try:
        found = session.run(names, message.inputs)
    except ORT_ERRORS as error:
        raise TargetError(f"the NPU failed to run the graph: {error}", where=message.name) from None
    return GraphRan({name: np.asarray(array) for name, array in zip(names, found, strict=True)})


def _session(
    source: str, chip: Chip, settings: dict[str, str], severity: int, provider: dict[str, str] | None = None
) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = severity
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    for key, value in settings.items():
        options.add_session_config_entry(key, value)
    options.add_provider_for_devices(_devices(), _chosen(chip) | (provider or {}))
    try:
        return onnxruntime.InferenceSession(source, options)
    except ORT_ERRORS as error:
        raise TargetError(f"the NPU refused the graph: {error}", where=source) from None


def _chosen(chip: Chip) -> dict[str, str]:
    return {"backend_type": "htp", "soc_model": str(chip.soc_model), "htp_arch": str(chip.hexagon_arch)}


@cache
def _devices() -> list[onnxruntime.OrtEpDevice]:
    """Register Qualcomm's provider with onnxruntime and return its devices.

    Raises:
        UnavailableError: onnxruntime-qnn is not installed, or does not load here.
    """
    fix = "pip install 'bluelm-export[qualcomm]' (Linux x86_64)"
    try:
        import onnxruntime_qnn
    except ImportError as error:
        raise UnavailableError(f"onnxruntime-qnn is not installed: {error}", fix=fix) from None
    require("libatomic.so.1")  # without it the provider registers, and then takes no node
    try:
        onnxruntime.register_execution_provider_library(PROVIDER, onnxruntime_qnn.get_library_path())
    except ORT_ERRORS as error:
        raise UnavailableError(f"onnxruntime-qnn does not load: {error}", fix=fix) from None
    devices = [device for device in onnxruntime.get_ep_devices() if device.ep_name == PROVIDER]
    if not devices:
        raise UnavailableError("onnxruntime-qnn offers no device here", fix=fix)
    return devices


if __name__ == "__main__":
    serve(handle, sys.argv)
