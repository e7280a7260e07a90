"""The Kotlin app of a Gradle bundle against the artifact in it, each asked the same.

    python -m benchmarks.bundles.app [BUNDLE ...] [--only FORMAT ...] [--kotlinc COMMAND ...]

The app is compiled and runs on this machine's Java (`tests/support/android/kotlin_app.py`). A BUNDLE is a folder that
`bluelm-export bundle --format folder` made; without one, the first two blocks of the demo model are lowered to every
FORMAT that the app has an engine for, as in `tests/export/bundle/test_app.py`. `--kotlinc` names another compiler.
Writes results/bundles/app.json.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks import pages
from compress.checkpoint.store import QuantizedCheckpoint
from export.artifacts.artifact import Artifact
from export.bundle import build, project
from export.executorch import xnnpack as executorch
from tests.export.bundle import test_app as app_test
from tests.support.android import kotlin_app
from tests.support.checkpoints.rounded import rounded

EXPORTS: dict[str, Callable[[QuantizedCheckpoint, Path], Artifact]] = {
    **app_test.EXPORTS,
    "executorch-xnnpack": lambda q, f: executorch.export(q, f, context=app_test.CONTEXT, chunk=app_test.CHUNK),
}
COLUMNS = ("artifact", "blocks", "context", "engine", "Kotlin", "questions", "characters", "the app's answers")


def asked(app: kotlin_app.App, artifact: Artifact, payload: Path, files: Path, kotlin: str) -> list[str]:
    """A row: what the app answers until the context is full, beside what the artifact itself does."""
    engine = project.runtimes()[project.runtime_of(artifact.format)[0]].engine
    questions = app_test.QUESTIONS[:1] if artifact.context == app_test.SHORT else app_test.QUESTIONS
    said = app.answer(questions, engine, payload, files)
    pairs = zip(said, app_test.expected(artifact, questions), strict=True)
    same = all(line and answer.startswith(line.rstrip("\ufffd")) for line, answer in pairs)
    shape = [str(artifact.model.num_layers), str(artifact.context), engine, kotlin, str(len(questions))]
    return [artifact.format, *shape, str(sum(map(len, said))), "as the artifact's" if same else "**OTHER**"]


def lowered(home: Path, formats: Sequence[str]) -> Iterator[tuple[Artifact, Path]]:
    """Artifacts of the demo's first two blocks, and the payload of a bundle of each."""
    quantized = rounded(home / "quantized", blocks=2)
    for kind in formats:
        artifact = EXPORTS[kind](quantized, home / kind / "artifact")
        yield artifact, app_test.pack(artifact, home / kind)


def bundled(bundles: Sequence[Path]) -> Iterator[tuple[Artifact, Path]]:
    """The artifacts of bundles, and the bundles."""
    for path in bundles:
        build.verify(path)
        yield Artifact.open(path / "artifact"), path.resolve()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="*", type=Path)
    parser.add_argument("--only", nargs="+", default=list(EXPORTS), choices=list(EXPORTS))
    parser.add_argument("--kotlinc", nargs="+", default=["kotlinc"])
    options = parser.parse_args()
    told = subprocess.run([*options.kotlinc, "-version"], capture_output=True, text=True, check=True)
    kotlin = re.findall(r"kotlinc-jvm (\S+)", told.stdout + told.stderr)[0]
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        app = kotlin_app.build(home, options.kotlinc)
        found = bundled(options.bundles) if options.bundles else lowered(home, options.only)
        for number, (artifact, payload) in enumerate(found):
            rows.append(asked(app, artifact, payload, home / f"files-{number}", kotlin))
            print(rows[-1], flush=True)
            pages.save_rows("app", "demo", COLUMNS, rows, key=5)


if __name__ == "__main__":
    main()
