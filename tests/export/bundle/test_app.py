"""The Kotlin app of a Gradle bundle: it compiles, and on a desktop's Java it answers as the artifact does."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bluelm.system.files import demo_checkpoint
from bluelm.text.sentencepieces import ModelProto
from bluelm.text.templates import FILE
from bluelm.text.tokenizer import Message, Tokenizer
from compress.checkpoint.store import QuantizedCheckpoint
from export.artifacts.artifact import MANIFEST, Artifact
from export.bundle import build, project
from export.bundle.build import Input
from export.bundle.zip32 import FileSource
from export.executorch import xnnpack
from export.litert import export as litert
from export.litert_lm import export as litert_lm
from export.lowering.ranges import calibrate
from export.onnx import cpu as onnx_cpu
from export.onnx import genai as onnx_genai
from export.onnx import npu as onnx_npu
from pipeline.bundles.chats import chat_note, check_app, tokenizer_note
from pipeline.commands.generate import ends, generate, until
from targets.registry import find
from targets.runners.runner import open_runner
from targets.runtime import natural, open_runtime
from tests.packages import requires
from tests.support import bundles
from tests.support.android import kotlin_app
from tests.support.checkpoints.rounded import rounded
from tests.support.files.tokenizers import ROWS, write_tokenizer

PART = 2 << 20  # bytes: the head is a part of its own
CONTEXT, SHORT, CHUNK = 61, 18, 8  # the last chunk does not fit: it is moved back over what is cached
QUESTIONS = ("你好", "Where is the sea?")
needs_kotlin = requires("kotlin", "default-jdk-headless", "libandroid-json-java", "libatomic1")


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> kotlin_app.App:
    return kotlin_app.build(tmp_path_factory.mktemp("app"))


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> QuantizedCheckpoint:
    return rounded(tmp_path_factory.mktemp("app") / "quantized", blocks=2)


CHATML = (
    "{% for m in messages %}{{ '<|begin|>' + m.role + '\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|begin|>assistant\n' }}{% endif %}"
)
TEXTS = (
    "你好，世界",
    "a  b\n c",
    "[|AI|]: x </s>",
    "<|end|> plain-added \r\n\n  <|begin|>",
    "🤖 emoji\u200b é\u0301 It's ſ",
    "12345 67 ½ ٣",
    " ",
    "The quick brown fox. " * 5,
)


@needs_kotlin
@pytest.mark.parametrize("kind", ["demo", "dummy prefix", "qwen2", "llama-bpe"])
def test_the_apps_tokenizers_are_ours(kind: str, app: kotlin_app.App, tmp_path: Path) -> None:
    if kind in ("qwen2", "llama-bpe"):
        write_tokenizer(tmp_path, kind)
        (tmp_path / FILE).write_text(CHATML)
    else:
        model = ModelProto.FromString((demo_checkpoint() / "tokenizer.model").read_bytes())
        model.normalizer_spec.add_dummy_prefix = kind == "dummy prefix"
        (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
        (tmp_path / "config.json").write_text('{"model_type": "BlueLM"}')
    tokenizer = Tokenizer.from_folder(tmp_path)
    check_app(tokenizer, project.runtimes()["onnxruntime"], "gradle")
    turns = chat_note(tokenizer, ())
    lines = "".join(text.replace("\n", "\\n") + "\n" for text in TEXTS)
    said = app.run(["tokens", str(tokenizer.source), turns.first, turns.answer], lines)
    for text, line in zip(TEXTS, said, strict=True):
        plain, chat = ([int(t) for t in part.split(",") if t] for part in line.split("|"))
        assert plain == tokenizer.encode(text)
        assert chat == tokenizer.chat([Message("user", text)])


def pack(artifact: Artifact, folder: Path) -> Path:
    """The artifact as the payload of a bundle."""
    inputs = [
        Input(f"artifact/{f.path}", f.role, FileSource(artifact.folder / f.path), f.sha256) for f in artifact.files
    ]
    about = Input(f"artifact/{MANIFEST}", "artifact", FileSource(artifact.folder / MANIFEST))
    draft = bundles.draft("folder").model_copy(update={"tokenizer": tokenizer_note(artifact)})
    made = build.make(draft, [*inputs, about], bundles.development_keys(folder), folder / "x")
    build.verify(made)
    return made


def expected(artifact: Artifact, questions: Sequence[str]) -> list[str]:
    """What the artifact answers to each question, likeliest tokens until the context is full."""
    tokenizer = Tokenizer.from_folder(artifact.folder)
    out: list[str] = []
    with open_runtime(artifact.folder, natural(artifact.format)) as runtime:
        for question in questions:
            prompt = tokenizer.chat([Message("user", question)])
            new = until(
                generate(runtime, prompt, artifact.context, lambda row: int(row.argmax())), ends(tokenizer, artifact)
            )
            out.append(tokenizer.decode(list(new)))
    return out


def npu(quantized: QuantizedCheckpoint, folder: Path) -> Artifact:
    """The NPU's graphs in parts, with caches of int16; the CPU runs them here."""
    tokens = torch.randint(100, 3000, (4, CONTEXT), generator=torch.Generator().manual_seed(0))
    ranges = calibrate(quantized, tokens)
    made = onnx_npu.export(quantized, ranges, folder, context=CONTEXT, chunk=CHUNK, part_bytes=PART)
    assert len(made.paths("prefill")) > 1
    return made


def executorch_qnn(quantized: QuantizedCheckpoint, folder: Path) -> Artifact:
    """The NPU's graphs in one program, on the NPU's simulator: slow, so of few tokens."""
    tokens = torch.randint(100, 3000, (4, CONTEXT), generator=torch.Generator().manual_seed(0))
    target, graphs = find("snapdragon", runtime="executorch-qnn"), folder.with_name("onnx-npu")
    lowered = onnx_npu.export(
        quantized, calibrate(quantized, tokens), graphs, context=SHORT, chunk=CHUNK, part_bytes=PART
    )
    assert len(lowered.paths("prefill")) > 1
    return target.compile(lowered, folder)


EXPORTS: dict[str, Callable[[QuantizedCheckpoint, Path], Artifact]] = {
    "onnx-cpu": lambda quantized, folder: onnx_cpu.export(quantized, folder, context=CONTEXT, chunk=CHUNK),
    "onnx-npu": npu,
    "onnx-genai": lambda quantized, folder: onnx_genai.export(quantized, folder, context=CONTEXT),
    "executorch-qnn": executorch_qnn,
    "litert": lambda quantized, folder: litert.export(quantized, folder, context=CONTEXT, chunk=CHUNK),
}


@needs_kotlin
@pytest.mark.parametrize("kind", EXPORTS)
def test_the_app_answers_as_its_artifact(
    kind: str, app: kotlin_app.App, quantized: QuantizedCheckpoint, tmp_path: Path
) -> None:
    artifact = EXPORTS[kind](quantized, tmp_path / "artifact")
    engine = project.runtimes()[project.runtime_of(artifact.format)[0]].engine
    questions = QUESTIONS[:1] if artifact.context == SHORT else QUESTIONS
    said = app.answer(questions, engine, pack(artifact, tmp_path), tmp_path / "files")
    for answer, line in zip(expected(artifact, questions), said, strict=True):
        assert len(line) > (3 if artifact.context == SHORT else 10)
        assert answer.startswith(line.rstrip("\ufffd"))


ENDING: dict[str, Callable[[QuantizedCheckpoint, Path], Artifact]] = {
    "executorch-xnnpack": lambda quantized, folder: xnnpack.export(quantized, folder, context=160, chunk=CHUNK),
    "onnx-genai": lambda quantized, folder: onnx_genai.export(quantized, folder, context=160),
    "litert-lm": lambda quantized, folder: litert_lm.export(quantized, folder, context=160, chunk=CHUNK),
}


@needs_kotlin
@pytest.mark.parametrize("kind", ENDING)
def test_a_conversation_in_the_runtimes_own_api(
    kind: str, app: kotlin_app.App, quantized: QuantizedCheckpoint, tmp_path: Path
) -> None:
    """Two questions whose answers end: the second goes on behind the first, as a chat of the whole is answered by the
    runtime; marks in what is asked are data."""
    tokenizer = Tokenizer.from_folder(quantized.folder)
    zero = tokenizer.pieces.id("0")
    assert zero is not None
    config = replace(quantized.config, eos_token_ids=(zero,))  # what the model says all the time
    artifact = ENDING[kind](replace(quantized, config=config), tmp_path / "artifact")
    facts = project.runtimes()[project.runtime_of(kind)[0]]
    asked = ("Where is the sea?", "1 [|AI|]: 你好")
    said = app.answer(asked, facts.engine, pack(artifact, tmp_path), tmp_path / "files")
    runner, chat = open_runner(artifact), list[Message]()
    for question, line in zip(asked, said, strict=True):
        chat.append(Message("user", question.replace("[|", "[\u200b|")))
        found = runner.answer(tokenizer.chat(chat), 120)
        assert found.ended and (line, len(line) > 10) == (found.text, True)
        chat.append(Message("assistant", line))


@needs_kotlin
def test_the_app_of_a_model_with_a_tokenizer_json_and_a_template_of_its_own(
    app: kotlin_app.App, tmp_path: Path
) -> None:
    """A Qwen2: the manifest says what its files say, and the app chats so, in the runtime's API or in its own loop."""
    from tests.support.checkpoints import families

    source = families.qwen2(tmp_path / "source", rows=ROWS)
    write_tokenizer(source, "qwen2")
    (source / FILE).write_text(CHATML)
    quantized = rounded(tmp_path / "quantized", source=source)
    artifact = onnx_genai.export(quantized, tmp_path / "artifact", context=64)
    about = tokenizer_note(artifact)
    assert (about.kind, about.template, about.front) == ("tokenizer.json", CHATML, ())
    assert about.chat is not None and about.chat.next == "<|end|>\n<|begin|>user\n"
    assert set(about.marks) == {"<|end|>", "<|begin|>"} and "artifact/tokenizer.json" in about.files
    tokenizer = Tokenizer.from_folder(source)
    prompt = tokenizer.chat([Message("user", "Tell me")])
    (line,) = app.answer(("Tell me",), "GenAi", pack(artifact, tmp_path), tmp_path / "files")
    library: Any = importlib.import_module("onnxruntime_genai")
    stream = library.Tokenizer(library.Model(str(artifact.folder))).create_stream()  # it drops half characters
    found = open_runner(artifact).answer(prompt, 64 - len(prompt))
    assert line == "".join(map(stream.decode, found.tokens)) and len(line) > 10
    own = onnx_cpu.export(quantized, tmp_path / "own", context=64, chunk=CHUNK)
    (line,) = app.answer(("Tell me",), "Onnx", pack(own, tmp_path / "loop"), tmp_path / "files")
    (wanted,) = (
        text.replace("\ufffd", "") for text in expected(own, ("Tell me",))
    )  # Java counts half characters otherwise
    assert len(line) > 10 and wanted == line.replace("\ufffd", "")
