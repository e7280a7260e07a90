"""The last check of a bundle: the artifact inside loads on its runtime and answers."""

from __future__ import annotations

import platform
import tempfile
from pathlib import Path

import numpy as np

from bluelm.errors import InputError, UnavailableError
from bluelm.tokenizer import Message, Tokenizer
from export.artifact import MANIFEST, Artifact
from export.bundle import folder as folders
from export.bundle.build import Verified
from targets.runtime import Place, open_runtime

QUESTION = "你好"
TOKENS = 8
# Where each format runs on this machine; the rest runs on phones alone.
PLACES: dict[str, Place] = {
    "onnx-cpu": "cpu",
    "onnx-npu": "cpu",
    "onnx-genai": "cpu",
    "gguf": "cpu",
    "coreml": "cpu" if platform.system() == "Darwin" else "interpreter",
    "executorch-xnnpack": "cpu",
    "executorch-coreml": "cpu" if platform.system() == "Darwin" else "interpreter",
    "executorch-qnn": "htp",
    "litert": "cpu",
}


def answer(verified: Verified) -> str:
    """Unpack the artifact, load it, let it answer greedily.

    Raises:
        InputError: the artifact does not load, or its logits are not finite.
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
        if artifact.format not in PLACES:
            raise _not_run(f"only {verified.manifest.target} runs a {artifact.format} artifact", "on that phone")
        return _generate(place, PLACES[artifact.format])


def _not_run(why: str, where: str) -> UnavailableError:
    fix = f"verify it {where}, or add --no-load: then only files and signature are checked"
    return UnavailableError(f"the artifact was not run, so it is not verified: {why}", fix=fix)


def _generate(folder: Path, on: Place) -> str:
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
