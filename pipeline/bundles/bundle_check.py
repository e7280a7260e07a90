"""The last check of a bundle: the artifact inside loads on its runtime and generates.

A graph may be untrusted, and runtimes execute what it says, such as an endless loop. So it is loaded in a child
process with limits of time and memory.
"""

from __future__ import annotations

import os
import platform
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bluelm.errors import InputError, OutOfMemoryError, TargetError, UnavailableError
from bluelm.text.tokenizer import Message, Tokenizer
from eval.files.origin import origin
from export.artifacts.artifact import MANIFEST, Artifact
from export.bundle import folder as folders
from export.bundle.build import Verified
from targets.host.child import Child
from targets.runtime import Place, natural, open_runtime

QUESTION = "你好"
TOKENS = 8
# Limits: seconds and bytes at least, and for each byte of the artifact; a simulator of a phone's NPU takes longer.
SECONDS, SECONDS_A_BYTE, SIMULATED = 600.0, 300 / 1e9, 10
MEMORY, MEMORY_A_BYTE = 4 << 30, 4


@dataclass(frozen=True)
class Ask:
    """The child's one message: an artifact's folder, where it runs, and what it may take.

    Attributes:
        seconds: of each core together, for processes of the child's own as well.
        memory: private bytes of each process.
    """

    folder: str
    on: Place
    seconds: int
    memory: int


def answer(verified: Verified, limit_s: float | None = None) -> str:
    """Unpack the artifact, load it in a child process, let it answer greedily; what ran it, and what it said.

    Args:
        limit_s: seconds that it may take; None: by its size.

    Raises:
        InputError: the artifact does not load, or its logits are not finite; it takes more than the limits, or the
            process dies of it.
        UnavailableError: its runtime is not on this machine, or nothing but a phone can run it.
    """
    sources = {
        path.removeprefix("artifact/"): source
        for path, source in verified.sources.items()
        if path.startswith("artifact/")
    }
    if MANIFEST not in sources:
        raise InputError(f"the bundle holds no artifact/{MANIFEST}")
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        folders.extract(sources, place)
        artifact = Artifact.open(place)
        artifact.verify()
        on = _place(artifact)
        if on == "device":
            raise _not_run(f"only {verified.manifest.target} runs a {artifact.format} artifact", "on that phone")
        limit = limit_s or (SECONDS + artifact.bytes * SECONDS_A_BYTE) * (SIMULATED if on == "htp" else 1)
        memory = MEMORY + int(artifact.bytes * MEMORY_A_BYTE)
        ask = Ask(str(place), on, int(limit * (os.cpu_count() or 1)) + 1, memory)
        ran = origin(artifact, on)
        by = f"emulated by {ran.by}" if ran.how == "emulated" else f"in {ran.by}"
        return f"{by}: {_in_child(ask, limit, place.with_name(f'{place.name}.log'))!r}"


def _place(artifact: Artifact) -> Place:
    """Where this machine runs what ships; on a Mac Core ML itself."""
    if not artifact.record.runs_as_shipped:
        return "device"
    place = natural(artifact.format)
    return "cpu" if place == "interpreter" and platform.system() == "Darwin" else place


def _in_child(ask: Ask, limit_s: float, log: Path) -> str:
    child = Child("pipeline.bundles.bundle_worker", log)
    try:
        return child.call(ask, limit_s)
    except (TargetError, OutOfMemoryError) as error:
        if isinstance(error, TargetError) and not child.failed:
            raise
        problem = f"the artifact does not answer within {limit_s:g} s and {ask.memory >> 20} MiB: {error.problem}"
        fix = "if you trust it, give it more time with --load-limit, or check files and signature alone with --no-load"
        raise InputError(problem, fix=fix) from error
    finally:
        child.close()
        log.unlink(missing_ok=True)


def _not_run(why: str, where: str) -> UnavailableError:
    fix = f"verify it {where}, or add --no-load: then only files and signature are checked"
    return UnavailableError(f"the artifact was not run, so it is not verified: {why}", fix=fix)


def generate(folder: Path, on: Place) -> str:
    """What an artifact answers, in this process.

    Raises: see `answer`.
    """
    tokenizer = Tokenizer.from_folder(folder)
    try:
        runtime = open_runtime(folder, on)
    except UnavailableError as error:
        raise _not_run(error.problem, "where it is") from error
    except ModuleNotFoundError as error:
        raise _not_run(f"{error.name} is not installed", "where it is") from error
    with runtime:
        prompt = tokenizer.chat([Message("user", QUESTION)])
        logits = runtime.prefill(prompt)[-1]
        tokens: list[int] = []
        for _ in range(TOKENS):
            if not np.isfinite(logits).all():
                raise InputError("the artifact answers with numbers that are not finite", where=runtime.name)
            tokens.append(int(logits.argmax()))
            logits = runtime.decode(tokens[-1])
    return tokenizer.decode(tokens)
