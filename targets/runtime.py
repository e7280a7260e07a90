"""What a model is to whoever runs it: prefill, decode and reset, with logits as the answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, Protocol, Self

import numpy as np

from bluelm.errors import InputError, UnavailableError
from export.artifact import Artifact

Place = Literal["cpu", "htp", "arm64", "interpreter", "gpu", "ane", "device"]
"""Where an artifact runs; `device`: on a phone alone, nothing here can load it."""


class Runtime(Protocol):
    """One model, loaded, with one KV cache.

    Attributes:
        name: what runs, for reports.
        vocab_size: columns of the logits.
        context: tokens that the cache holds.
    """

    name: str
    vocab_size: int
    context: int

    def reset(self) -> None:
        """Forget all tokens."""
        ...

    def rewind(self, held: int) -> None:
        """Forget all but the first `held` tokens, of those that the cache holds."""
        ...

    def prefill(self, tokens: Sequence[int]) -> np.ndarray:
        """Take tokens behind those that the cache holds; float32 [n, vocab], a row for each.

        Raises:
            InputError: more tokens than the context holds, or a token that the vocabulary lacks.
        """
        ...

    def decode(self, token: int) -> np.ndarray:
        """Take one token; float32 [vocab]."""
        ...

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Reset, then prefill."""
        ...

    def close(self) -> None:
        """Free what is held outside this process. A runtime is a context manager that closes itself."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...


class RuntimeBase:
    """The part of `Runtime` that follows from prefill, reset and rewind."""

    name: str
    vocab_size: int
    context: int

    def reset(self) -> None:
        raise NotImplementedError

    def rewind(self, held: int) -> None:
        raise NotImplementedError

    def prefill(self, tokens: Sequence[int]) -> np.ndarray:
        raise NotImplementedError

    def decode(self, token: int) -> np.ndarray:
        return self.prefill([token])[0]

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        self.reset()
        return self.prefill(tokens)

    def close(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def check_tokens(self, tokens: Sequence[int], held: int) -> None:
        """InputError unless the vocabulary has the tokens and the cache, holding `held`, has room."""
        if len(tokens) == 0:
            raise InputError("no tokens to prefill", where=self.name)
        if held + len(tokens) > self.context:
            raise InputError(
                f"{held} + {len(tokens)} tokens do not fit a context of {self.context}",
                where=self.name,
                fix="shorten the text or export with a larger context",
            )
        for token in tokens:
            if not 0 <= token < self.vocab_size:
                raise InputError(f"token {token} is outside the vocabulary of {self.vocab_size}", where=self.name)


def open_runtime(folder: Path, on: Place = "cpu") -> Runtime:
    """Load an artifact.

    Args:
        on: `cpu` for onnx-cpu, onnx-genai, executorch-xnnpack, litert, gguf and, as a slow reference,
            onnx-npu; `arm64` for onnx-cpu, onnx-genai and litert: as arm64 code under qemu; `htp` for onnx-npu
            (compiled in memory), qnn-context and executorch-qnn: Qualcomm's simulator of its NPU, in a child process;
            `interpreter` for coreml and executorch-coreml anywhere, and `cpu`, `gpu`, `ane` on a Mac.

    Raises:
        InputError: no artifact, or one that cannot run there.
        UnavailableError: the runtime is not installed, or nothing here can run such an artifact.
        TargetError: the runtime refuses the artifact.
    """
    artifact = Artifact.open(folder)
    runtimes = _runtimes()
    if (artifact.format, on) not in runtimes:
        places = [place for kind, place in runtimes if kind == artifact.format]
        if not places:
            raise only_on_device(artifact)
        raise InputError(
            f"a {artifact.format} artifact does not run on {on!r}",
            where=folder,
            fix=f"it runs on {' or '.join(map(repr, places))}",
        )
    return runtimes[artifact.format, on](artifact)


def only_on_device(artifact: Artifact) -> UnavailableError:
    """The error for an artifact that nothing here can run."""
    return UnavailableError(
        f"only a phone can run this {artifact.format} artifact: nothing was measured, so it has not passed",
        where=artifact.folder,
        fix=f"run it on a phone with {artifact.soc or 'its chip'}, or choose a --runtime that is judged here",
    )


def _runtimes() -> dict[tuple[str, Place], Callable[[Artifact], Runtime]]:
    """Imported here: each brings libraries that the others do not need."""
    from targets.apple import open_interpreter, open_mac
    from targets.emulator import open_emulated
    from targets.executorch_coreml import open_executorch_coreml
    from targets.executorch_qnn import open_executorch_qnn
    from targets.executorch_runtime import open_executorch
    from targets.genai_runtime import open_genai
    from targets.gguf_runtime import open_gguf
    from targets.litert_runtime import open_litert
    from targets.onnx_runtime import open_cpu
    from targets.qnn_runtime import open_htp

    return {
        ("onnx-cpu", "cpu"): open_cpu,
        ("onnx-npu", "cpu"): open_cpu,
        ("onnx-npu", "htp"): open_htp,
        ("qnn-context", "htp"): open_htp,
        ("executorch-xnnpack", "cpu"): open_executorch,
        ("executorch-qnn", "htp"): open_executorch_qnn,
        ("litert", "cpu"): open_litert,
        ("litert", "arm64"): open_emulated("litert", ("model",)),
        ("onnx-cpu", "arm64"): open_emulated("onnx", ("prefill", "decode")),
        ("onnx-genai", "arm64"): open_emulated("onnx", ("model", "model")),
        ("onnx-genai", "cpu"): open_genai,
        ("gguf", "cpu"): open_gguf,
        ("coreml", "interpreter"): open_interpreter,
        ("coreml", "cpu"): lambda artifact: open_mac(artifact, "cpu"),
        ("coreml", "gpu"): lambda artifact: open_mac(artifact, "gpu"),
        ("coreml", "ane"): lambda artifact: open_mac(artifact, "ane"),
        ("executorch-coreml", "interpreter"): open_executorch_coreml,
        ("executorch-coreml", "cpu"): lambda artifact: open_executorch_coreml(artifact, "cpu"),
        ("executorch-coreml", "gpu"): lambda artifact: open_executorch_coreml(artifact, "gpu"),
        ("executorch-coreml", "ane"): lambda artifact: open_executorch_coreml(artifact, "ane"),
    }
