"""Snapdragons through ExecuTorch: a .pte whose two methods are HTP graphs, run here on Qualcomm's simulator.

ExecuTorch's delegate takes no operator for weights in groups, so the .pte holds the float16 numbers that codes and
scales stand for: right, but four times as large as qnn-context, which is the default for that reason.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil

from bluelm.config import ModelConfig
from bluelm.errors import TargetError
from bluelm.files import atomic_folder
from bluelm.progress import Silent
from compress.recipe import Recipe
from export.artifact import Artifact
from export.debug import DEBUG_NOTE
from export.mobile_package import MODEL, describe_steps
from targets.backend import Lowering, Uncompiled
from targets.cached_runtime import CachedRuntime, Feeds, Step
from targets.child import Child, next_core
from targets.executorch_qnn_messages import Load, Lower, Lowered
from targets.executorch_qnn_messages import Step as Run
from targets.legality import weight_bytes
from targets.runtime import Place
from targets.socs import Soc
from targets.tools import require

MASK_VALUE = -100.0  # far below every score, and exact in float16
WORKER = "targets.executorch_qnn_worker"
WEIGHTS_NOTE = "weights are float16: the numbers that codes and scales stand for"
LOWER_LIMIT_S, STEP_LIMIT_S = 3600.0, 900.0
MIB = 2**20
LOWERING = 14  # bytes of memory for a byte of float16 weights: for 1.6 GB of them 21 GB were not enough


@dataclass
class ExecutorchQnnBackend(Uncompiled):
    """float16 weights and activations on HTP."""

    soc: Soc | None = None
    debug: bool = False
    """Whether the program gives the output of each block as well."""
    needs_ranges = False
    place: Place = "htp"

    def check(self, soc: Soc, config: ModelConfig, recipe: Recipe, context: int, chunk: int) -> None:
        super().check(soc, config, recipe, context, chunk)
        half = recipe.model_copy(update={"bits": 16, "head_bits": 16})
        block, head = weight_bytes(config, half)
        total, limit = config.num_layers * block + head, (soc.context_binary_mib or 2048) * MIB
        if total > limit:
            raise TargetError(
                f"{total / MIB:.0f} MiB of float16 weights do not fit one graph of {soc.name} ({limit // MIB} MiB)",
                fix="use --runtime qnn-context, which keeps 4 bits, or executorch-xnnpack",
            )
        needed, available = LOWERING * total, psutil.virtual_memory().available
        if needed > available:
            raise TargetError(
                f"lowering takes about {needed / 1e9:.0f} GB of memory (an estimate), "
                f"{available / 1e9:.0f} GB are available",
                fix="use --runtime qnn-context, which keeps 4 bits, or lower on a larger machine",
            )

    def lower(self, job: Lowering) -> Artifact:
        assert self.soc is not None, "the registry fills the chip in"
        child = start()
        try:
            with (
                (job.progress or Silent()).task("lower to ExecuTorch for HTP", 1) as task,
                atomic_folder(job.folder) as new,
            ):
                source, path = str(job.quantized.folder.resolve()), str((new / MODEL).resolve())
                message = Lower(source, path, job.context, job.chunk, self.soc.id, self.debug)
                lowered: Lowered = child.call(message, LOWER_LIMIT_S)
                left = [f"{name}: {operator}" for name, found in lowered.left.items() for operator in found]
                if left:
                    raise TargetError(f"HTP refuses operators: {', '.join(left)}", where=child.log)
                describe_steps(
                    new,
                    "executorch-qnn",
                    job.quantized,
                    context=job.context,
                    chunk=job.chunk,
                    mask_value=MASK_VALUE,
                    producers=("executorch", "onnxruntime-qnn"),
                    notes=(WEIGHTS_NOTE, *([DEBUG_NOTE] if self.debug else [])),
                )
                task.advance()
        finally:
            child.close()
        return Artifact.open(job.folder)


class ExecutorchQnnRuntime(CachedRuntime):
    """Both methods on the simulator, in a child process; nothing falls back to the CPU."""

    def __init__(self, artifact: Artifact, child: Child) -> None:
        from export.executorch_static import input_names, output_names

        name = f"{artifact.format} on the HTP simulator"
        super().__init__(name, artifact, self._step("prefill"), self._step("decode"))
        self._child = child
        shown = DEBUG_NOTE in artifact.notes
        names = tuple(input_names(artifact.model)), tuple(output_names(artifact.model, debug=shown))
        child.call(Load(str(artifact.path("model").resolve()), *names), STEP_LIMIT_S)

    def close(self) -> None:
        self._child.close()
        self._child.log.unlink(missing_ok=True)

    def _step(self, method: str) -> Step:

        def run(feeds: Feeds) -> Mapping[str, np.ndarray]:
            return self._child.call(Run(method, feeds), STEP_LIMIT_S)

        return run


def open_executorch_qnn(artifact: Artifact) -> ExecutorchQnnRuntime:
    """Load the program on the simulator.

    Raises:
        UnavailableError: ExecuTorch or onnxruntime-qnn is not installed.
        InputError: the program is damaged.
    """
    child = start(next_core())
    try:
        return ExecutorchQnnRuntime(artifact, child)
    except BaseException:
        child.close()
        raise


def start(core: int | None = None) -> Child:
    """A child process with Qualcomm's libraries where ExecuTorch looks for an SDK.

    Args:
        core: see `Child`.

    Raises:
        UnavailableError: a package is not installed.
    """
    require("executorch", "onnxruntime-qnn", "py-cpuinfo")
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
