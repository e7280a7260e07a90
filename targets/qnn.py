"""Compiles an onnx-npu artifact for a Snapdragon's NPU (HTP) into offline context binaries.

Both graphs of a part go into one binary that holds the weights once: that is what ships. Qualcomm's x86 simulator
cannot load a binary with shared weights ("feature not supported"), so the same graphs are compiled a second
time, each into a binary of its own, and those are what the simulator runs and the judge judges.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import onnx

from bluelm.errors import TargetError
from bluelm.files import atomic_folder
from bluelm.progress import Progress, Silent, Task
from export.artifact import Artifact, ArtifactFile, NodeCount, list_files
from export.onnx_decoder import GRAPHS
from export.package import bits_per_weight
from targets.child import Child
from targets.qnn_messages import Chip, Compile, Compiled

WORKER = "targets.qnn_worker"
COMPILE_LIMIT_S = 3600.0
NOTE = (
    "The shipped context binary holds both graphs and the weights once. The x86 simulator cannot load such a "
    "binary, so the simulator's files hold the same graphs compiled one by one."
)
CARRIED = ("embedding", "tokenizer", "config")


def compile_contexts(
    artifact: Artifact,
    chip: Chip,
    target: str,
    soc: str,
    folder: Path,
    progress: Progress | None = None,
    limit_s: float = COMPILE_LIMIT_S,
) -> Artifact:
    """Compile both graphs of every part; a new artifact in `folder`. The compiler's log stays beside it,
    `<folder>.compile.log`.

    Raises:
        TargetError: the NPU refused nodes (they are named, with the compiler's reasons), the compiler crashed
            or took longer than `limit_s` seconds a graph.
        UnavailableError: onnxruntime-qnn is not installed.
    """
    log = folder.with_name(f"{folder.name}.compile.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        atomic_folder(folder) as temporary,
        (progress or Silent()).task("compile", 2 * len(graphs_of(artifact))) as task,
    ):
        (temporary / "simulator").mkdir()
        compile_graphs(artifact, chip, temporary / "simulator", log, task, limit_s=limit_s)
        nodes = compile_graphs(artifact, chip, temporary, log, task, share=True, limit_s=limit_s)
        _describe(artifact, temporary, target, soc, nodes)
    return Artifact.open(folder)


def graphs_of(artifact: Artifact) -> list[Path]:
    """Both graphs of every part, part by part."""
    return [path for part in zip(*(artifact.paths(name) for name in GRAPHS), strict=True) for path in part]


def compile_graphs(
    artifact: Artifact,
    chip: Chip,
    folder: Path,
    log: Path,
    task: Task,
    *,
    share: bool = False,
    limit_s: float = COMPILE_LIMIT_S,
) -> dict[str, NodeCount]:
    """Compile every graph into an EPContext wrapper of its name in `folder`, and a binary beside it.

    Args:
        share: the two graphs of a part go into one binary, which holds the weights once.

    Returns:
        what the NPU took, by graph.
    """
    nodes: dict[str, NodeCount] = {}
    for part in zip(*(artifact.paths(name) for name in GRAPHS), strict=True):
        child = Child(WORKER, log)
        try:
            for graph in part:
                task.advance(note=graph.stem + (", weights shared" if share else ""))
                source, made = str(graph.resolve()), str((folder / graph.name).resolve())
                nodes[graph.stem] = _compile(
                    child, Compile(source, made, chip, share=share, last=graph == part[-1]), limit_s
                )
        finally:
            child.close()
    return nodes


def _compile(child: Child, message: Compile, limit_s: float) -> NodeCount:
    """One graph; checks that the NPU took all of it."""
    try:
        compiled: Compiled = child.call(message, limit_s)
    except TargetError as error:
        raise _explain(error, message, child.log, limit_s) from None
    wrapper = onnx.load(message.target, load_external_data=False)
    rest = [node.name for node in wrapper.graph.node if node.op_type != "EPContext"]
    graph = onnx.load(message.source, load_external_data=False)
    wanted = [node.op_type for node in graph.graph.node]
    missing = {kind for kind in wanted if compiled.kinds.get(kind, 0) < wanted.count(kind)}
    if rest or missing:
        raise TargetError(
            f"the NPU left nodes to the CPU: {', '.join(rest) or ', '.join(sorted(missing))}",
            where=message.source,
            fix=f"see {child.log}",
        )
    return NodeCount(on_npu=len(wanted), in_graph=len(wanted), kinds=_count(wanted))


def _count(kinds: list[str]) -> dict[str, int]:
    return {kind: kinds.count(kind) for kind in sorted(set(kinds))}


def _explain(error: TargetError, message: Compile, log: Path, limit_s: float) -> TargetError:
    """The same failure with the refused nodes named, from a second try with a verbose log."""
    refused = refused_nodes(log.read_text(encoding="utf-8", errors="replace"))
    if not refused:
        return error
    Path(message.target).unlink(missing_ok=True)  # the failed try may have written the part that was taken
    child = Child(WORKER, log)
    try:
        again = Compile(message.source, message.target, message.chip, severity=0)
        child.call(again, limit_s)
    except TargetError:
        pass
    finally:
        child.close()
    reasons = refusal_reasons(log.read_text(encoding="utf-8", errors="replace"))
    named = "\n".join(f"  {name} ({kind}): {reasons.get(name, 'see the log')}" for name, kind in refused)
    return TargetError(
        f"the NPU refused {len(refused)} nodes of {Path(message.source).name}:\n{named}",
        where=log,
        fix="this is a fault of the exporter unless the graph was changed; the CPU artifact runs the model",
    )


def refused_nodes(log: str) -> list[tuple[str, str]]:
    """(name, operation) of the nodes that onnxruntime-qnn says it does not support, in order."""
    found: dict[tuple[str, str], None] = {}
    for line in re.findall(r"Unsupported nodes in QNN EP: (.*)", log):
        found |= dict.fromkeys(re.findall(r"\{ name: (.+?), type: (\w+) \}", line))
    return list(found)


def refusal_reasons(log: str) -> dict[str, str]:
    """Node name to reason, from a verbose log."""
    reasons: dict[str, str] = {}
    pattern = r"Validation FAILED for \d+ nodes.*?\n((?:\tOperator type: .*\n)+)\tREASON : (.*)"
    for nodes, reason in re.findall(pattern, log):
        for name in re.findall(r"Node name: (.*?) Node index", nodes):
            reasons.setdefault(name, reason.strip())
    for name, kind, code in re.findall(
        r"backendValidateOpConfig\(\) failed for node `(.*?)` of type `(.*?)` with error code (\d+)", log
    ):
        reasons[name] = f"QNN's {kind} does not take it (error {code})"
    return reasons


def _describe(artifact: Artifact, temporary: Path, target: str, soc: str, nodes: dict[str, NodeCount]) -> None:
    """Check what the compiler wrote, bring the host's files along, write artifact.json."""
    roles: dict[str, str] = {}
    graphs = {file.path: file.role for file in artifact.files if file.role in GRAPHS}
    for wrappers in zip(*(artifact.paths(name) for name in GRAPHS), strict=True):
        names = [wrapper.name for wrapper in wrappers]
        roles |= {name: graphs[name] for name in names} | {_shared_binary(temporary, names): "context"}
    roles |= carry(artifact, temporary)
    roles |= {f"simulator/{name}": f"simulator-{role}" for name, role in graphs.items()}  # in order of execution
    binaries = sorted(path.name for path in (temporary / "simulator").iterdir() if path.name not in graphs)
    roles |= {f"simulator/{name}": "simulator-context" for name in binaries}
    files = list_files(temporary, roles)
    about = {"format": "qnn-context", "target": target, "soc": soc, "nodes": nodes, "notes": (*artifact.notes, NOTE)}
    compiled_from(artifact, files, ("onnxruntime", "onnxruntime-qnn"), **about).save(temporary)


def carry(artifact: Artifact, folder: Path) -> dict[str, str]:
    """Copy what the host needs beside the graphs into `folder`; its roles by path."""
    carried = {file.path: file.role for file in artifact.files if file.role in CARRIED}
    for path in carried:
        shutil.copyfile(artifact.folder / path, folder / path)
    return carried


def compiled_from(
    artifact: Artifact, files: tuple[ArtifactFile, ...], packages: Sequence[str], **about: object
) -> Artifact:
    """The description of what `packages` made of the artifact: its own, with other files and what else is new."""
    producers = artifact.producers | {name: version(name) for name in packages}
    weights = bits_per_weight(files, artifact.parameters)
    return artifact.model_copy(update={"files": files, "producers": producers, "bits_per_weight": weights, **about})


def _shared_binary(folder: Path, wrappers: Sequence[str]) -> str:
    """The one binary that both wrappers of a part name.

    Raises:
        TargetError: they name different ones, or it lacks a graph.
    """
    binaries: set[str] = set()
    partitions: list[bytes] = []
    for name in wrappers:
        wrapper = onnx.load(folder / name, load_external_data=False)
        attributes = {a.name: a.s for a in wrapper.graph.node[0].attribute}
        binaries.add(attributes["ep_cache_context"].decode())
        partitions.append(attributes["partition_name"])
    if len(binaries) != 1:
        raise TargetError("the compiler did not put both graphs into one binary", where=sorted(binaries))
    (binary,) = binaries
    content = (folder / binary).read_bytes()
    if not all(partition in content for partition in partitions):
        raise TargetError("the shared binary does not hold both graphs", where=folder / binary)
    return binary
