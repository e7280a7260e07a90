"""The Kotlin app of a Gradle bundle against the bundle's own artifact: `python -m benchmarks.app BUNDLE...`

Each BUNDLE is a folder that `bluelm-export bundle --format folder` made. The app is compiled, runs on this machine's
Java (`tests/kotlin_app.py`) and is asked; the artifact on its runtime is asked the same. `--kotlinc` names another
compiler, e.g. that of npm's package kotlin-compiler.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from bluelm.tokenizer import Message, Tokenizer
from export.artifact import Artifact
from export.bundle import build, project
from pipeline.bundle_check import PLACES
from pipeline.generate import ends, generate, until
from targets.runtime import open_runtime
from tests import kotlin_app

QUESTION = "你好，今天天气怎么样？"


def expected(folder: Path) -> str:
    """What the artifact answers until its context is full."""
    artifact, tokenizer = Artifact.open(folder), Tokenizer.from_folder(folder)
    prompt = tokenizer.chat([Message("user", QUESTION)])
    with open_runtime(folder, PLACES[artifact.format]) as runtime:
        new = generate(runtime, prompt, artifact.context, lambda row: int(row.argmax()))
        return tokenizer.decode(list(until(new, ends(tokenizer, artifact))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundles", nargs="*", type=Path)
    parser.add_argument("--kotlinc", nargs="+", default=["kotlinc"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        app = kotlin_app.build(Path(home), options.kotlinc)
        print("every engine compiles")
        for path in options.bundles:
            runtime = build.verify(path).manifest.runtime
            engine = project.runtimes()[runtime.name].engine
            (said,) = app.answer([QUESTION], engine, path.resolve(), Path(home) / path.name)
            same = expected(path / "artifact").startswith(said.rstrip("\ufffd")) and said
            print(f"{runtime.artifact_format} by {engine}: {len(said)} characters, {'the same' if same else 'OTHER'}")


if __name__ == "__main__":
    main()
