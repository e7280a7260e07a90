"""`generate --with`, and a run where the runner is not installed."""

from __future__ import annotations

import importlib.metadata

import pytest

from bluelm.errors import InputError, UnavailableError
from bluelm.system.files import demo_checkpoint
from bluelm.text.tokenizer import Message
from compress.checkpoint.store import QuantizedCheckpoint
from eval import heldout
from eval.budget.budget import judge
from eval.budget.limits import Budget
from export.artifacts.artifact import Artifact
from export.gguf import export as gguf_file
from pipeline.commands.doctor import examine_machine
from pipeline.commands.generate import answer_through
from pipeline.judge import judging
from pipeline.judge.inspecting import Inspector
from pipeline.judge.judging import Subject
from pipeline.terminal import console
from targets.host.torch_runtime import TorchRuntime
from tests.support.checkpoints.rounded import rounded


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[QuantizedCheckpoint, Artifact]:
    place = tmp_path_factory.mktemp("with")
    quantized = rounded(place / "q", source=demo_checkpoint())
    return quantized, gguf_file.export(quantized, place / "a", context=64)


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp is not installed."""
    known = importlib.metadata.version

    def version(name: str) -> str:
        if name == "xllamacpp":
            raise importlib.metadata.PackageNotFoundError(name)
        return known(name)

    monkeypatch.setattr(importlib.metadata, "version", version)


def asked(artifact: Artifact, prompt: str, name: str = "llama.cpp", most: int = 3) -> None:
    answer_through(artifact.folder, prompt, name, chat=True, max_tokens=most, temperature=0, seed=0)


def test_it_answers_as_the_checkpoint_does(
    made: tuple[QuantizedCheckpoint, Artifact], capsys: pytest.CaptureFixture[str]
) -> None:
    quantized, artifact = made
    tokens, tokenizer = quantized.tokenizer().chat([Message("user", "你好")]), quantized.tokenizer()
    with TorchRuntime(quantized, 64) as runtime:
        for _ in range(3):
            tokens.append(int(runtime.logits(tokens)[-1].argmax()))
    asked(artifact, "你好")
    told = capsys.readouterr()
    assert told.out.strip() == tokenizer.decode(tokens[-3:]).strip() and "llama.cpp of xllamacpp" in told.err


def test_what_it_cannot_answer_is_bad_input(made: tuple[QuantizedCheckpoint, Artifact]) -> None:
    with pytest.raises(InputError, match="no room in the artifact's context of 64"):
        asked(made[1], "very long " * 80)
    with pytest.raises(InputError, match="the prompt is empty"):
        asked(made[1], " ")
    with pytest.raises(InputError, match="mlx does not open gguf artifacts"):
        asked(made[1], "hi", "mlx")


@pytest.mark.usefixtures("nowhere")
def test_where_it_is_not_installed_nothing_passes_in_its_place(made: tuple[QuantizedCheckpoint, Artifact]) -> None:
    quantized, artifact = made
    with pytest.raises(UnavailableError, match="not installed: xllamacpp") as error:
        asked(artifact, "hi")
    assert error.value.exit_code == 5 and "pip install" in str(error.value.fix)
    text = heldout.load((), quantized.tokenizer(), length=64)
    assert Inspector(None, quantized, text, 64).runner(artifact, "cpu") == []
    told = judging.not_known([Subject("cpu", artifact, "cpu", 64)], [])["cpu"]
    assert any(line.startswith("not judged in its runner, llama.cpp") for line in told)
    (check,) = judge(Budget(structure=False, two_sided=False, require_runner=True), [], ["cpu"]).failures
    assert check.note == "not judged in its runner"
    assert examine_machine(None, "gguf", console()) == 0  # the rest of the runtime works without it


def test_a_run_judges_in_the_runner(made: tuple[QuantizedCheckpoint, Artifact]) -> None:
    quantized, artifact = made
    text = heldout.load((), quantized.tokenizer(), length=64)
    found = {figure.name: figure for figure in Inspector(None, quantized, text, 64, room=False).runner(artifact, "cpu")}
    assert [found[name].value for name in found] == [0] * 4 and "runner_kl" not in found
    assert found["runner_token_mismatches"].n == len(text.texts) + 19
