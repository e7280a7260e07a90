"""onnxruntime-genai runs the stages as the weights say: as they are, on the CPU, and compiled, on the simulator."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from bluelm.errors import TargetError
from bluelm.text.tokenizer import Message
from compress.checkpoint.store import QuantizedCheckpoint
from eval.budget.limits import STRUCTURE
from eval.files import compiled as compiled_files
from eval.runner import held
from export.artifacts.artifact import Artifact
from export.lowering.ranges import calibrate
from export.npu_genai.export import export
from export.readback import differing, items, read_back
from pipeline.commands import generate
from targets.host.torch_runtime import TorchRuntime
from targets.registry import find
from targets.runners.runner import Runner, open_runner
from targets.runtime import open_runtime
from tests.packages import requires
from tests.support.checkpoints.rounded import rounded
from tests.support.damage import again

CONTEXT, CHUNK = 64, 16
TEXT = [1, *range(4, 60)]
KL = 1e-5  # of 16-bit activations on two blocks of the demo
SIMULATED = requires("libatomic1")
TEXTS = ("The sea is wide.", "你好，世界", "def f(x): return x")


@dataclass(frozen=True)
class Made:
    quantized: QuantizedCheckpoint
    artifact: Artifact
    weights: TorchRuntime

    def kl(self, runner: Runner, prefilled: int, decoded: int) -> NDArray[np.float64]:
        """Of the answer behind a prompt and behind each token after it, to the weights in float32."""
        tokens = TEXT[: prefilled + decoded]
        logits = self.weights.logits(tokens).astype(np.float64)[prefilled - 1 :]
        exact = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        return (np.exp(exact) * (exact - runner.distributions(tokens, prefilled))).sum(axis=-1)

    def expected(self) -> held.Expected:
        tokenizer = self.quantized.tokenizer()
        prompts = [tokenizer.encode(text * 3, bos=True)[:20] for text in TEXTS]
        return held.Expected(self.quantized.config, tokenizer, TEXTS, prompts, self.weights)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    place = tmp_path_factory.mktemp("genai")
    quantized = rounded(place / "quantized", blocks=2)
    windows = torch.tensor([[1, *range(at, at + 60)] for at in (4, 50, 300, 1000)])
    ranges = calibrate(quantized, windows)
    artifact = export(quantized, ranges, place / "onnx-npu-genai", context=CONTEXT, chunk=CHUNK)
    return Made(quantized, artifact, TorchRuntime(quantized, CONTEXT))


@pytest.fixture(scope="module")
def compiled(made: Made) -> Artifact:
    return find("snapdragon", runtime="qnn-genai").compile(made.artifact, made.artifact.folder.parent / "compiled")


def test_genai_runs_the_stages_on_the_cpu(made: Made) -> None:
    """Prompts below a window, of one, beyond it; up to the last slot of the context."""
    with open_runner(made.artifact) as runner:
        assert (runner.context, runner.vocab_size) == (CONTEXT, 6144)
        assert [runner.room(n) for n in (1, 16, 17, 48, 64)] == [48, 48, 32, 16, 0]
        for prefilled, decoded in ((1, 4), (15, 3), (16, 3), (17, 3), (40, 15), (48, 8)):
            assert made.kl(runner, prefilled, decoded).max() < KL
        tokenizer = made.quantized.tokenizer()
        assert runner.tokens(["[|Human|]:你好[|AI|]:"]) == [tokenizer.encode("[|Human|]:你好[|AI|]:", marks=True)]
        assert list(runner.chat([{"role": "user", "content": "你好"}]).tokens) == tokenizer.chat(
            [Message("user", "你好")]
        )
        assert runner.answer(TEXT[:10], 4, begin=2).ended and not runner.answer(TEXT[:10], 4, begin=5).ended


def test_the_gate_finds_nothing_wrong(made: Made) -> None:
    figures = held.figures(made.artifact, made.expected(), "npu")
    assert {f.name: f.value for f in figures if f.name in STRUCTURE and f.value > STRUCTURE[f.name][0]} == {}
    assert {f.how for f in figures} == {"emulated"}
    assert {f.by for f in figures} == {"onnxruntime-genai 0.18.0"}
    told = held.left_out(made.artifact.record.runner)  # pyright: ignore[reportArgumentType]
    assert "CPU kernels run its stages" in told[0]


def hurt(made: Made, place: Path, change: Callable[[dict[str, Any]], object]) -> Artifact:
    artifact = Artifact.open(Path(shutil.copytree(made.artifact.folder, place / "a")))
    config = json.loads(artifact.path("genai").read_text(encoding="utf-8"))
    change(config["model"]["decoder"])
    artifact.path("genai").write_text(json.dumps(config), encoding="utf-8")
    return again(artifact)


def missing_stage(decoder: dict[str, Any]) -> None:
    decoder["pipeline"][0]["decode_1"]["filename"] = "decode_3.onnx"


def other_window(decoder: dict[str, Any]) -> None:
    decoder["sliding_window"]["window_size"] = CHUNK // 2


def swapped_caches(decoder: dict[str, Any]) -> None:
    """What keys gave comes in as values, and the other way round: the same shapes, so that genai takes it."""
    names = decoder["outputs"]
    names["present_key_names"], names["present_value_names"] = names["present_value_names"], names["present_key_names"]


def no_mark_between(decoder: dict[str, Any]) -> None:
    """Prompts are filled up behind, where the first token of an answer stands."""
    decoder["sliding_window"]["alignment"] = "left"


@pytest.mark.parametrize("change", [missing_stage, other_window, swapped_caches, no_mark_between])
def test_damage_does_not_pass_in_genai(change: Callable[[dict[str, Any]], None], made: Made, tmp_path: Path) -> None:
    """It refuses the folder or the tokens, or what it answers shows."""
    figures = held.figures(hurt(made, tmp_path, change), made.expected(), "npu")
    assert {f.name for f in figures if f.name in STRUCTURE and f.value > STRUCTURE[f.name][0]}


def test_a_stage_that_is_not_there_is_refused_by_name(made: Made, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"onnxruntime-genai refuses the folder: .*decode_3"):
        open_runner(hurt(made, tmp_path, missing_stage))


@SIMULATED
def test_genai_runs_the_compiled_stages_on_the_simulator(compiled: Artifact, made: Made) -> None:
    """Genai itself loads Qualcomm's plug-in; our own loop answers the same."""
    with open_runner(compiled) as runner:
        assert runner.name == "onnxruntime-genai 0.18.0 with onnxruntime-qnn 2.5.0"
        assert made.kl(runner, 17, 2).max() < KL
        assert runner.answer(TEXT[:10], 2, begin=2).ended
    with open_runtime(compiled.folder, on="htp") as runtime:
        logits = runtime.logits(TEXT[:19]).astype(np.float64)
    exact = made.weights.logits(TEXT[:19]).astype(np.float64)
    both = [x - np.log(np.exp(x).sum(axis=-1, keepdims=True)) for x in (exact, logits)]
    assert (np.exp(both[0]) * (both[0] - both[1])).sum(axis=-1).max() < KL


@SIMULATED
def test_what_ships_is_held_against_what_was_compiled(compiled: Artifact, made: Made, tmp_path: Path) -> None:
    assert compiled.format == "qnn-genai" and compiled.record.compiled_from == made.artifact.format
    assert read_back(compiled, made.quantized).wrong == ()
    assert compiled_files.mismatches(compiled, "npu").value == 0
    told = json.loads(compiled.path("genai").read_text(encoding="utf-8"))["model"]["decoder"]["pipeline"][0]
    npu = {"backend_type": "htp", "soc_model": "57", "htp_arch": "75"}
    assert "session_options" not in told["front"]
    assert all(
        stage["session_options"]["provider_options"] == [{"QNN": npu}]
        for name, stage in told.items()
        if name != "front"
    )
    shutil.copytree(made.artifact.folder, tmp_path / "onnx-npu-genai")
    for at, change in enumerate((_on_the_cpu, _other_chip, _without_decode)):
        other = Artifact.open(Path(shutil.copytree(compiled.folder, tmp_path / f"compiled-{at}")))
        config = json.loads(other.path("genai").read_text(encoding="utf-8"))
        change(config["model"]["decoder"]["pipeline"][0])
        other.path("genai").write_text(json.dumps(config), encoding="utf-8")
        assert items.TELLS in differing(again(other), made.quantized)


def _on_the_cpu(stages: dict[str, Any]) -> None:
    del stages["decode_1"]["session_options"]


def _other_chip(stages: dict[str, Any]) -> None:
    stages["prefill_1"]["session_options"]["provider_options"][0]["QNN"]["soc_model"] = "69"


def _without_decode(stages: dict[str, Any]) -> None:
    del stages["decode_2"]


@SIMULATED
def test_generate_asks_genai(compiled: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    ask: dict[str, Any] = {"chat": False, "max_tokens": 2, "temperature": 0.0, "seed": 0}
    generate.answer_through(compiled.folder, "The sea", "onnxruntime-genai", **ask)
    said = capsys.readouterr()
    assert said.out.strip() and "onnxruntime-genai 0.18.0 with onnxruntime-qnn 2.5.0" in said.err
