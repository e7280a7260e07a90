"""ExecuTorch artifacts on this machine: the program runs in a child process, whose libraries want it
to themselves."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bluelm.errors import InputError
from export.artifacts.artifact import Artifact
from targets.arm64.xnnpack_messages import LoadProgram, RunTokens, Time, Timed, TokensRan
from targets.host.child import Child
from targets.runtime import RuntimeBase
from targets.tools import require

WORKER = "targets.arm64.xnnpack_worker"
LOAD_LIMIT_S = 300.0
STEP_LIMIT_S = 600.0


class XnnpackRuntime(RuntimeBase):
    """The cache lies in the program; this side only knows how many tokens it holds."""

    def __init__(self, artifact: Artifact, child: Child) -> None:
        self.name = f"{artifact.format} in ExecuTorch {artifact.producers.get('executorch', '')}".strip()
        self.vocab_size, self.context = artifact.model.vocab_size, artifact.context
        self._artifact, self._child, self._held = artifact, child, 0
        child.call(LoadProgram(str(artifact.path("model").resolve())), LOAD_LIMIT_S)

    def reset(self) -> None:
        self._held = 0

    def rewind(self, held: int) -> None:
        self._held = held

    def prefill(self, tokens: Sequence[int]) -> np.ndarray:
        return np.concatenate([ran.logits for ran in self._steps(tokens)])

    def blocks(self, tokens: Sequence[int]) -> np.ndarray:
        """Begin anew; the stream before the first block and behind each, float32 [layers + 1, n, hidden].

        Raises:
            InputError: the program is no debug build.
        """
        self.reset()
        streams = [ran.stream for ran in self._steps(tokens)]
        if any(stream is None for stream in streams):
            raise InputError(f"{self.name} does not show its blocks", fix="export a debug build of it")
        return np.concatenate([stream for stream in streams if stream is not None], axis=1)

    def _steps(self, tokens: Sequence[int]) -> list[TokensRan]:
        """What each chunk of the tokens gave."""
        self.check_tokens(tokens, self._held)
        steps: list[TokensRan] = []
        for start in range(0, len(tokens), self._artifact.chunk):
            part = [int(token) for token in tokens[start : start + self._artifact.chunk]]
            ran: TokensRan = self._child.call(RunTokens(part, self._held), STEP_LIMIT_S)
            steps.append(ran)
            self._held += len(part)
        return steps

    def decode_seconds(self, start: int, count: int) -> tuple[float, ...]:
        """Seconds of each of `count` decoded tokens, the pipe to the child not counted."""
        timed: Timed = self._child.call(Time(start, count), STEP_LIMIT_S)
        return timed.seconds

    def close(self) -> None:
        self._child.close()
        self._child.log.unlink(missing_ok=True)


def open_xnnpack(artifact: Artifact) -> XnnpackRuntime:
    """Load the program in a child process.

    Raises:
        UnavailableError: ExecuTorch is not installed.
        InputError: the program is damaged.
    """
    require("executorch")
    log = Path(tempfile.mkstemp(prefix="bluelm-executorch-", suffix=".log")[1])
    child = Child(WORKER, log)
    try:
        return XnnpackRuntime(artifact, child)
    except BaseException:
        child.close()
        raise
