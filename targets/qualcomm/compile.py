"""Compiles an onnx-npu artifact for a Snapdragon's NPU (HTP) into offline context binaries.

Both graphs of a part go into one binary that holds the weights once: that is what ships. Qualcomm's x86 simulator
cannot load a binary with shared weights ("feature not supported"), so the same graphs are compiled a second
time, each into a binary of its own, and those are what the simulator runs and the judge judges.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from bluelm.errors import TargetError
from bluelm.system.files import atomic_folder, sha256
from bluelm.system.progress import Progress, Silent, Task
from export.artifacts.artifact import Artifact, ArtifactFile, Given, NodeCount, list_files
from export.artifacts.package import bits_per_weight
from export.onnx.decoder import GRAPHS
from export.onnx.reader import read_model
from targets.host.child import Child
from targets.qualcomm.border import binary_of
from targets.qualcomm.messages import BinaryContents, Chip, Compile, Compiled, Describe

WORKER = "targets.qualcomm.worker"
COMPILE_LIMIT_S = 3600.0
NOTE = (
    "The shipped context binary holds both graphs and the weights once. The x86 simulator cannot load such a "
    "binary, so the simulator's files hold the same graphs compiled one by one."
)
CARRIED = ("embedding", "tokenizer", "config", "front", "runner")
GIVEN = "simulator-given"
"""Role of the dumps of what the compiler was given, graph by graph; `GIVEN`-shipped of the form that ships, where the
simulator has another."""


@dataclass(frozen=True)
class Form:
    """A format of contexts that onnxruntime loads.

    Attributes:
        name: of its record.
        more: (what was compiled, the new folder, the compiler's settings) -> role by path of files that it writes.
    """

    name: str
    more: Callable[[Artifact, Path, Mapping[str, str]], dict[str, str]]


CONTEXT = Form("qnn-context", lambda artifact, folder, settings: {})


@dataclass
class Made:
    """What compiling told, beside the files that it wrote.

    Attributes:
        nodes: what the NPU took, by graph. settings: of the compiler. dumps: what it was given, in order of the graphs.
    """

    nodes: dict[str, NodeCount] = field(default_factory=dict[str, NodeCount])
    settings: dict[str, str] = field(default_factory=dict[str, str])
    dumps: list[Path] = field(default_factory=list[Path])


def compile_contexts(
    artifact: Artifact,
    chip: Chip,
    target: str,
    soc: str,
    folder: Path,
    progress: Progress | None = None,
    limit_s: float = COMPILE_LIMIT_S,
    form: Form = CONTEXT,
) -> Artifact:
    """Compile both graphs of every part; a new artifact in `folder`. The compiler's log stays beside it,
    `<folder>.compile.log`.

    Args:
        form: what becomes of the contexts.

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
        simulator = compile_graphs(artifact, chip, temporary / "simulator", log, task, limit_s=limit_s)
        shipped = compile_graphs(artifact, chip, temporary, log, task, share=True, limit_s=limit_s)
        _complete(artifact, temporary, target, soc, shipped, simulator, form)
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
) -> Made:
    """Compile every graph into an EPContext wrapper of its name in `folder`, a binary and a dump beside it.

    Args:
        share: the two graphs of a part go into one binary, which holds the weights once.
    """
    made = Made()
    for part in zip(*(artifact.paths(name) for name in GRAPHS), strict=True):
        child = Child(WORKER, log)
        try:
            for graph in part:
                task.advance(note=graph.stem + (", weights shared" if share else ""))
                source, wrapper = str(graph.resolve()), str((folder / graph.name).resolve())
                dump = (folder / f"{graph.stem}.json").resolve()
                message = Compile(source, wrapper, chip, share=share, last=graph == part[-1], dump=str(dump))
                made.nodes[graph.stem], made.settings = _compile(child, message, limit_s)
                made.dumps.append(dump)
        finally:
            child.close()
    return made


def binary_contents(binaries: Sequence[Path]) -> list[BinaryContents]:
    """What compiled binaries say of themselves.

    Raises:
        InputError: a file is no compiled binary.
        UnavailableError: onnxruntime-qnn is not installed.
    """
    with tempfile.NamedTemporaryFile(prefix="bluelm-qnn-", suffix=".log") as log:
        child = Child(WORKER, Path(log.name))
        try:
            return [child.call(Describe(str(path.resolve())), COMPILE_LIMIT_S) for path in binaries]
        finally:
            child.close()


def given(
    artifact: Artifact, compiler: str, settings: dict[str, dict[str, str]], made: Sequence[ArtifactFile]
) -> Given:
    """The record of what the compiler made of an onnx-npu artifact."""
    read = {*graphs_of(artifact), *artifact.paths("weights")}
    files = {str(path.relative_to(artifact.folder)): sha256(path) for path in sorted(read)}
    return Given(compiler=compiler, settings=settings, files=files, made={file.path: file.sha256 for file in made})


def _compile(child: Child, message: Compile, limit_s: float) -> tuple[NodeCount, dict[str, str]]:
    """One graph, and the compiler's settings; checks that the NPU took all of it."""
    try:
        compiled: Compiled = child.call(message, limit_s)
    except TargetError as error:
        raise _explain(error, message, child.log, limit_s) from None
    wrapper = read_model(Path(message.target))
    rest = [node.name for node in wrapper.graph.node if node.op_type != "EPContext"]
    graph = read_model(Path(message.source))
    wanted = [node.op_type for node in graph.graph.node]
    missing = {kind for kind in wanted if compiled.kinds.get(kind, 0) < wanted.count(kind)}
    if rest or missing:
        raise TargetError(
            f"the NPU left nodes to the CPU: {', '.join(rest) or ', '.join(sorted(missing))}",
            where=message.source,
            fix=f"see {child.log}",
        )
    return NodeCount(on_npu=len(wanted), in_graph=len(wanted), kinds=_count(wanted)), compiled.settings


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


def _complete(
    artifact: Artifact, temporary: Path, target: str, soc: str, shipped: Made, simulator: Made, form: Form
) -> None:
    """Check what the compiler wrote, bring the host's files along, write artifact.json."""
    roles: dict[str, str] = {}
    graphs = {file.path: file.role for file in artifact.files if file.role in GRAPHS}
    for wrappers in zip(*(artifact.paths(name) for name in GRAPHS), strict=True):
        names = [wrapper.name for wrapper in wrappers]
        roles |= {name: graphs[name] for name in names} | {_shared_binary(temporary, names): "context"}
    roles |= {f"simulator/{name}": f"simulator-{role}" for name, role in graphs.items()}  # in order of execution
    binaries = {f"simulator/{name}": "simulator-context" for name in _binaries(temporary / "simulator", graphs)}
    made = list_files(temporary, roles | binaries)
    dumps = {str(path.relative_to(temporary.resolve())): GIVEN for path in simulator.dumps}
    for path in shipped.dumps:
        moved = path.rename(temporary.resolve() / "simulator" / f"{path.stem}.shipped.json")
        dumps[str(moved.relative_to(temporary.resolve()))] = f"{GIVEN}-shipped"
    carried = carry(artifact, temporary) | form.more(artifact, temporary, shipped.settings)
    files = (*made, *list_files(temporary, carried | dumps))
    contents = binary_contents([temporary / file.path for file in made if file.role.endswith("context")])
    (compiler,) = {told.compiler for told in contents}
    settings = {"shipped": shipped.settings, "simulator": simulator.settings}
    record = given(artifact, compiler, settings, made)
    notes = (*artifact.notes, NOTE)
    about = {"format": form.name, "target": target, "soc": soc, "nodes": shipped.nodes, "notes": notes}
    compiled_from(artifact, files, ("onnxruntime", "onnxruntime-qnn"), given=record, **about).save(temporary)


def carry(artifact: Artifact, folder: Path) -> dict[str, str]:
    """Copy what the host needs beside the graphs into `folder`; its roles by path."""
    carried = {file.path: file.role for file in artifact.files if file.role in CARRIED}
    for path in carried:
        (folder / path).parent.mkdir(exist_ok=True)
        shutil.copyfile(artifact.folder / path, folder / path)
    return carried


def compiled_from(
    artifact: Artifact, files: tuple[ArtifactFile, ...], packages: Sequence[str], **about: object
) -> Artifact:
    """The description of what `packages` made of the artifact: its own, with other files and what else is new."""
    producers = artifact.producers | {name: version(name) for name in packages}
    weights = bits_per_weight(files, artifact.parameters)
    return artifact.model_copy(update={"files": files, "producers": producers, "bits_per_weight": weights, **about})


def _binaries(folder: Path, wrappers: Iterable[str]) -> list[str]:
    """Names of the files with compiled code that the wrappers in `folder` name."""
    return sorted({path.name for name in wrappers if (path := binary_of(folder / name)) is not None})


def _shared_binary(folder: Path, wrappers: Sequence[str]) -> str:
    """The one binary that both wrappers of a part name.

    Raises:
        TargetError: they name different ones.
    """
    binaries = _binaries(folder, wrappers)
    if len(binaries) != 1:
        raise TargetError("the compiler did not put both graphs into one binary", where=binaries)
    return binaries[0]
