"""The Kotlin app of a Gradle bundle: it compiles, and on a desktop's Java it answers as the artifact does.

Android's classes, and the runtimes' Java ones, are stood in for by `tests/android`; behind the latter the real
runtimes run the real artifact.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from bluelm.files import demo_checkpoint
from bluelm.tokenizer import Message, Tokenizer
from compress.store import QuantizedCheckpoint
from export import executorch, litert, onnx_cpu, onnx_genai, onnx_npu
from export.artifact import MANIFEST, Artifact
from export.bundle import build, project
from export.bundle.build import Input
from export.bundle.zip32 import FileSource
from export.ranges import calibrate
from pipeline.generate import ends, generate, until
from targets.runtime import open_runtime
from tests import bundles
from tests.rounded import rounded

APP = Path("export/bundle/templates/gradle/app/src/main/kotlin/org/bluelm/chat")
STAND_INS = Path("tests/android")
JSON = Path("/usr/share/java/com.android.json.jar")  # Android's own org.json
KOTLIN = [Path(f"/usr/share/java/kotlin-stdlib{part}.jar") for part in ("", "-jdk7")]
CONTEXT, CHUNK = 61, 8  # the last chunk does not fit: it is moved back over what is cached
QUESTIONS = ("你好", "Where is the sea?")
needs_kotlin = pytest.mark.skipif(
    not all([shutil.which("kotlinc"), shutil.which("javac"), JSON.exists()]),
    reason="apt-get install kotlin openjdk-17-jdk-headless libandroid-json-java",
)


@dataclass(frozen=True)
class App:
    """The compiled app."""

    classes: Path
    jar: Path

    def run(self, words: list[str], lines: str, **properties: object) -> list[str]:
        path = ":".join(map(str, [self.jar, self.classes, JSON, *KOTLIN]))
        options = [f"-D{name}={value}" for name, value in properties.items()]
        environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(Path.cwd())}
        command = ["java", "-Xshare:auto", *options, "-cp", path, "org.bluelm.chat.MainKt", *words]
        done = subprocess.run(command, input=lines, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> App:
    """Every Kotlin file of the template, all engines at once."""
    home = tmp_path_factory.mktemp("app")
    classes, sources, jar = home / "classes", home / "sources", home / "app.jar"
    sources.mkdir()
    java = [str(path) for path in sorted(STAND_INS.rglob("*.java"))]
    subprocess.run(["javac", "-d", str(classes), *java], check=True, capture_output=True)
    for path in (*APP.glob("*.kt"), STAND_INS / "Main.kt"):
        text, name = path.read_text(), path.name
        if name.startswith("__engine_"):
            engine = name.split("__")[1].removeprefix("engine_")
            assert "fun openEngine(" in text
            name, text = f"{engine}Engine.kt", text.replace("fun openEngine(", f"fun open{engine}(")
        (sources / name).write_text(text)
    path = ":".join(map(str, [classes, JSON, *KOTLIN]))
    command = ["kotlinc", *map(str, sorted(sources.iterdir())), "-cp", path, "-d", str(jar)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return App(classes, jar)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> QuantizedCheckpoint:
    return rounded(tmp_path_factory.mktemp("app") / "quantized", layers=2)


@needs_kotlin
def test_the_apps_tokenizer_is_ours(app: App) -> None:
    texts = [
        "你好，世界",
        "a  b\n c",
        "[|AI|]: x </s>",
        "🤖 emoji\u200b é",
        "12345 67",
        " ",
        "The quick brown fox. " * 5,
    ]
    lines = "".join(text.replace("\n", "\\n") + "\n" for text in texts)
    tokenizer = Tokenizer.from_folder(demo_checkpoint())
    said = app.run(["tokens", str(demo_checkpoint() / "tokenizer.model")], lines)
    for text, line in zip(texts, said, strict=True):
        plain, chat = ([int(t) for t in part.split(",") if t] for part in line.split("|"))
        assert plain == tokenizer.encode(text)
        assert chat == tokenizer.chat([Message("user", text)])


def pack(artifact: Artifact, folder: Path) -> Path:
    """The artifact as the payload of a bundle."""
    inputs = [
        Input(f"artifact/{f.path}", f.role, FileSource(artifact.folder / f.path), f.sha256) for f in artifact.files
    ]
    about = Input(f"artifact/{MANIFEST}", "artifact", FileSource(artifact.folder / MANIFEST))
    made = build.make(bundles.draft("folder"), [*inputs, about], bundles.development_keys(folder), folder / "x")
    build.verify(made)
    return made


def expected(artifact: Artifact) -> list[str]:
    """What the artifact answers to each question, likeliest tokens until the context is full."""
    tokenizer = Tokenizer.from_folder(artifact.folder)
    out: list[str] = []
    with open_runtime(artifact.folder) as runtime:
        for question in QUESTIONS:
            prompt = tokenizer.chat([Message("user", question)])
            new = until(generate(runtime, prompt, CONTEXT, lambda row: int(row.argmax())), ends(tokenizer, artifact))
            out.append(tokenizer.decode(list(new)))
    return out


def npu(quantized: QuantizedCheckpoint, folder: Path) -> Artifact:
    """The NPU's graphs, whose caches are int16; the CPU runs them here."""
    tokens = torch.randint(100, 3000, (4, CONTEXT), generator=torch.Generator().manual_seed(0))
    return onnx_npu.export(quantized, calibrate(quantized, tokens), folder, context=CONTEXT, chunk=CHUNK)


EXPORTS: dict[str, Callable[[QuantizedCheckpoint, Path], Artifact]] = {
    "onnx-cpu": lambda quantized, folder: onnx_cpu.export(quantized, folder, context=CONTEXT, chunk=CHUNK),
    "onnx-npu": npu,
    "onnx-genai": lambda quantized, folder: onnx_genai.export(quantized, folder, context=CONTEXT),
    "executorch": lambda quantized, folder: executorch.export(quantized, folder, context=CONTEXT, chunk=CHUNK),
    "litert": lambda quantized, folder: litert.export(quantized, folder, context=CONTEXT, chunk=CHUNK),
}


@needs_kotlin
@pytest.mark.parametrize("kind", EXPORTS)
def test_the_app_answers_as_its_artifact(kind: str, app: App, quantized: QuantizedCheckpoint, tmp_path: Path) -> None:
    artifact = EXPORTS[kind](quantized, tmp_path / "artifact")
    engine = project.runtimes()[project.runtime_of(artifact.format)[0]].engine
    folders = {"pack": pack(artifact, tmp_path), "files": tmp_path / "files"}
    said = app.run(["answer"], "".join(f"{q}\n" for q in QUESTIONS), engine=engine, **folders)
    for answer, line in zip(expected(artifact), said, strict=True):
        assert len(line) > 10
        assert answer.replace("\n", "\\n").startswith(line.rstrip("\ufffd"))
