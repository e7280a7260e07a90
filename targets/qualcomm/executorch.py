"""Snapdragons through ExecuTorch: a .pte whose methods are the compiled HTP graphs of an onnx-npu artifact.

    onnx-npu -> Qualcomm's compiler, one binary a graph -> a method a graph, nothing but a call of the QNN delegate

So codes, scales and 16-bit activations are those of qnn-context; ExecuTorch's own lowering has no operator for weights
in groups. A method's weights are its own: the simulator, which judges what ships, loads no binary with shared ones.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter, ValidationError

from bluelm.errors import InputError, TargetError
from bluelm.system.files import atomic_folder, write_text
from bluelm.system.progress import Progress, Silent
from bluelm.system.reading import read_bytes
from export.artifacts.artifact import SIMULATOR, Artifact, list_files
from export.artifacts.mobile import MODEL
from export.onnx.decoder import GRAPHS
from export.onnx.reader import read_model
from targets.host.cached_runtime import CachedRuntime, Feeds, Step, chain
from targets.host.child import Child, next_core
from targets.qualcomm.backend import HtpBackend, chip_of
from targets.qualcomm.border import binary_of
from targets.qualcomm.compile import (
    GIVEN,
    Made,
    binary_contents,
    carry,
    compile_graphs,
    compiled_from,
    given,
    graphs_of,
)
from targets.qualcomm.executorch_messages import Describe, LoadProgram, Method, Pack
from targets.qualcomm.executorch_messages import Step as Run
from targets.qualcomm.messages import BinaryContents
from targets.socs import Soc
from targets.tools import require_for

WORKER = "targets.qualcomm.executorch_worker"
METHODS = "methods.json"
PACK_LIMIT_S, STEP_LIMIT_S = 3600.0, 900.0


@dataclass
class ExecutorchQnnBackend(HtpBackend):
    """Checks and lowers as for qnn-context; what is compiled goes into one program."""

    def compile(self, artifact: Artifact, target: str, soc: Soc, folder: Path, progress: Progress | None) -> Artifact:
        log = folder.with_name(f"{folder.name}.compile.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        graphs = graphs_of(artifact)
        with (
            atomic_folder(folder) as temporary,
            (progress or Silent()).task("compile for ExecuTorch", len(graphs) + 1) as task,
        ):
            compiled = temporary / "graphs"
            compiled.mkdir()
            made = compile_graphs(artifact, chip_of(soc), compiled, log, task)
            task.advance(note=MODEL)
            methods = _pack(graphs, compiled, (temporary / MODEL).resolve(), soc.id)
            compiler = binary_contents([_binary(compiled / graphs[0].name)])[0].compiler
            (temporary / SIMULATOR).mkdir()
            dumps = [dump.rename(temporary.resolve() / SIMULATOR / dump.name) for dump in made.dumps]
            shutil.rmtree(compiled)
            made = replace(made, dumps=dumps)
            _complete(artifact, temporary, methods, target, soc.id, made, compiler)
        return Artifact.open(folder)


class ExecutorchQnnRuntime(CachedRuntime):
    """The program on the simulator, in a child process; nothing falls back to the CPU."""

    def __init__(self, artifact: Artifact, child: Child, methods: Mapping[str, list[Method]]) -> None:
        self._child = child
        steps = [chain([self._step(method) for method in methods[graph]]) for graph in GRAPHS]
        super().__init__(f"{artifact.format} on the HTP simulator", artifact, *steps)
        every = tuple(method for graph in GRAPHS for method in methods[graph])
        child.call(LoadProgram(str(artifact.path("model").resolve()), every), STEP_LIMIT_S)

    def close(self) -> None:
        self._child.close()
        self._child.log.unlink(missing_ok=True)

    def _step(self, method: Method) -> Step:

        def run(feeds: Feeds) -> Mapping[str, np.ndarray]:
            if unknown := [name for name in method.inputs if name not in feeds]:
                raise InputError(f"the method {method.name} wants {unknown[0]!r}, which no step has")
            own = {name: feeds[name] for name in method.inputs}
            return self._child.call(Run(method.name, own), STEP_LIMIT_S)

        return run


def open_executorch_qnn(artifact: Artifact) -> ExecutorchQnnRuntime:
    """Load the program on the simulator.

    Raises:
        UnavailableError: ExecuTorch or onnxruntime-qnn is not installed.
        InputError: the program is damaged.
    """
    methods = read_methods(artifact.path("methods"))
    child = start(next_core())
    try:
        return ExecutorchQnnRuntime(artifact, child, methods)
    except BaseException:
        child.close()
        raise


def read_methods(path: Path) -> dict[str, list[Method]]:
    """Methods of prefill and of decode, one a part of the model, in order of execution.

    Raises:
        InputError: the file does not tell them.
    """
    try:
        methods = TypeAdapter(dict[str, list[Method]]).validate_json(read_bytes(path))
    except ValidationError as error:
        raise InputError(f"the methods of the program cannot be read: {error}", where=path) from None
    if set(methods) != set(GRAPHS):
        raise InputError(f"methods of {' and '.join(GRAPHS)} are wanted, found {sorted(methods)}", where=path)
    return methods


def describe_program(path: Path) -> dict[str, BinaryContents]:
    """What the compiled graphs of a program say of themselves, by method.

    Raises:
        InputError: the program, or what is compiled in it, cannot be read.
        UnavailableError: ExecuTorch or onnxruntime-qnn is not installed.
    """
    child = start()
    try:
        return child.call(Describe(str(path.resolve())), STEP_LIMIT_S)
    finally:
        child.close()
        child.log.unlink(missing_ok=True)


def _binary(wrapper: Path) -> Path:
    """The binary that an EPContext wrapper names."""
    found = binary_of(wrapper)
    assert found is not None, wrapper
    return found


def _pack(graphs: list[Path], compiled: Path, path: Path, chip: str) -> list[Method]:
    """Write the program of all graphs; a method for each.

    Raises:
        TargetError: a compiled graph has other inputs or outputs than the one that it was made of.
    """
    child = start()
    try:
        packed = Pack(tuple(str(_binary(compiled / graph.name).resolve()) for graph in graphs), str(path), chip)
        methods: tuple[Method, ...] = child.call(packed, PACK_LIMIT_S)
    finally:
        child.close()
    for graph, method in zip(graphs, methods, strict=True):
        source = read_model(graph).graph
        wanted = [{value.name for value in values} for values in (source.input, source.output)]
        if [set(method.inputs), set(method.outputs)] != wanted:
            raise TargetError(f"the compiled graph has another border than {graph.name}", where=child.log)
    child.log.unlink(missing_ok=True)
    return list(methods)


def _complete(
    artifact: Artifact, folder: Path, methods: list[Method], target: str, soc: str, made: Made, compiler: str
) -> None:
    """Write which methods there are, bring the host's files along, write artifact.json."""
    order = {graph: methods[index :: len(GRAPHS)] for index, graph in enumerate(GRAPHS)}
    told = {graph: [asdict(method) for method in found] for graph, found in order.items()}
    write_text(folder / METHODS, json.dumps(told, indent=1) + "\n")
    program = list_files(folder, {MODEL: "model", METHODS: "methods"})
    dumps = {f"{SIMULATOR}/{path.name}": GIVEN for path in made.dumps}
    files = (*program, *list_files(folder, carry(artifact, folder) | dumps))
    record = given(artifact, compiler, {"shipped": made.settings}, program)
    about = {"format": "executorch-qnn", "target": target, "soc": soc, "nodes": made.nodes, "given": record}
    packages = ("executorch", "onnxruntime", "onnxruntime-qnn")
    compiled_from(artifact, files, packages, **about).save(folder)


def start(core: int | None = None) -> Child:
    """A child process with Qualcomm's libraries where ExecuTorch looks for an SDK.

    Args:
        core: see `Child`.

    Raises:
        UnavailableError: a package is not installed.
    """
    require_for("executorch-qnn")
    found = importlib.util.find_spec("onnxruntime_qnn")
    assert found is not None and found.origin is not None
    libraries = Path(found.origin).parent
    sdk = Path(tempfile.gettempdir()) / f"bluelm-qnn-{version('onnxruntime-qnn')}"
    link = sdk / "lib" / "x86_64-linux-clang"
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.exists():
        link.unlink(missing_ok=True)
        link.symlink_to(libraries)
    paths = f"{libraries}:{libraries.with_name('onnxruntime_qnn.libs')}"
    log = Path(tempfile.mkstemp(prefix="bluelm-executorch-qnn-", suffix=".log")[1])
    return Child(WORKER, log, environment={"QNN_SDK_ROOT": str(sdk), "LD_LIBRARY_PATH": paths}, core=core)
