"""What a GGUF file says wrongly, llama.cpp reads wrongly, and the gate in llama.cpp sees it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader

from compress.checkpoint.store import QuantizedCheckpoint
from eval.accuracy.metrics import log_softmax
from eval.budget.limits import STRUCTURE
from eval.measurement import Measurement
from eval.runner import held
from eval.runner.held import Expected
from export.artifacts.artifact import Artifact
from export.gguf import export as gguf_file
from targets.host.torch_runtime import TorchRuntime
from targets.runners.runner import open_runner
from tests.support.checkpoints.rounded import rounded
from tests.support.checkpoints.shapes import shortened
from tests.support.damage import again
from tests.support.gguf_files import rewrite

ENDS = [2, 9]
TEXTS = ("The sea is wide and the sky is blue.", "你好，今天天气怎么样？", "a total number of 12 models")
GGML = "tokenizer.ggml."


@dataclass(frozen=True)
class Made:
    quantized: QuantizedCheckpoint
    artifact: Artifact
    expected: Expected


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """One block of the demo, with a second end token."""
    from bluelm.system.files import demo_checkpoint

    place = tmp_path_factory.mktemp("runner")
    source = shortened(demo_checkpoint(), 1, place / "float")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"eos_token_id": ENDS}))
    quantized = rounded(place / "quantized", source=source)
    artifact = gguf_file.export(quantized, place / "artifact", context=64, about={"name": "small"})
    tokenizer = quantized.tokenizer()
    prompts = [tokenizer.encode(text * 3, bos=True)[:24] for text in TEXTS]
    return Made(quantized, artifact, Expected(quantized.config, tokenizer, TEXTS, prompts, TorchRuntime(quantized, 64)))


def faults(found: Iterable[Measurement]) -> dict[str, float]:
    """Figures beyond their limits."""
    figures = list(found)
    assert all(figure.by.startswith("llama.cpp of xllamacpp 20") and figure.how == "measured" for figure in figures)
    return {f.name: f.value for f in figures if f.name in STRUCTURE and f.value > STRUCTURE[f.name][0]}


def test_what_was_written_is_read_as_the_checkpoint_says(made: Made) -> None:
    by_name = {figure.name: figure for figure in held.figures(made.artifact, made.expected, "cpu")}
    assert faults(by_name.values()) == {}
    assert by_name["runner_kl"].n == 3 * 7 and 0 < by_name["runner_kl"].value < 3e-4
    assert by_name["runner_token_mismatches"].n == len(held.HARD) + 1 + len(TEXTS)
    assert by_name["runner_chat_mismatches"].n == 10


def kinds(file: dict[str, Any]) -> dict[str, Any]:
    """The marks of turns are plain pieces."""
    return {f"{GGML}token_type": [1 if index in (4, 5) else kind for index, kind in enumerate(file["token_type"])]}


def scores(file: dict[str, Any]) -> dict[str, Any]:
    """Two pieces merge in each other's turn."""
    first, second = (file["tokens"].index(piece) for piece in ("▁s", "ea"))
    values = list(file["scores"])
    values[first], values[second] = values[second], values[first]
    return {f"{GGML}scores": values}


FAULTS: dict[str, tuple[Any, str]] = {
    "kind of a piece": (kinds, "runner_token_mismatches"),
    "swapped scores": (scores, "runner_token_mismatches"),
    "space prefix": ({f"{GGML}add_space_prefix": True}, "runner_token_mismatches"),
    "no bos": ({f"{GGML}add_bos_token": False}, "runner_token_mismatches"),
    "another bos": ({f"{GGML}bos_token_id": 7}, "runner_token_mismatches"),
    "no template": ({"tokenizer.chat_template": None}, "runner_chat_mismatches"),
    "another template": (
        {"tokenizer.chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"}, "runner_chat_mismatches"
    ),
    "bos twice": (
        {"tokenizer.chat_template": "<s><s>{% for m in messages %}[|Human|]:{{ m.content }}[|AI|]:{% endfor %}"},
        "runner_chat_mismatches",
    ),
    "one end token of two": ({f"{GGML}eot_token_id": None}, "runner_end_faults"),
    "eps": ({"llama.attention.layer_norm_rms_epsilon": 1e-1}, "runner_kl_excess"),
    "rope base": ({"llama.rope.freq_base": 500.0}, "runner_kl_excess"),
    "context": ({"llama.context_length": 512}, "runner_refusals"),
    "kv heads": ({"llama.attention.head_count_kv": 2}, "runner_refusals"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_put_back_is_caught(fault: str, made: Made, tmp_path: Path) -> None:
    changes, figure = FAULTS[fault]
    shutil.copytree(made.artifact.folder, tmp_path / "a")
    path = tmp_path / "a" / "model.gguf"
    if callable(changes):
        named = {key.removeprefix(GGML): field for key, field in GGUFReader(path).fields.items()}
        changes = changes({name: named[name].contents() for name in ("tokens", "token_type", "scores")})
    values: Any = changes
    copy = Artifact.open(tmp_path / "a")
    rewrite(path, values)
    expected = made.expected if figure == "runner_kl_excess" else replace(made.expected, weights=None)
    assert figure in faults(held.figures(again(copy), expected, "cpu"))


def test_where_nobody_judged_it_is_said(made: Made) -> None:
    judged = Measurement(held.REFUSALS, 0, "", "measured", subject="cpu")
    assert held.not_judged(made.artifact, [judged]) == []
    (told,) = held.not_judged(made.artifact, [])
    assert told.startswith("not judged in its runner, llama.cpp") and "pip install" in told


def test_it_answers_until_an_end_token(made: Made) -> None:
    tokenizer = made.expected.tokenizer
    with open_runner(made.artifact) as runner, TorchRuntime(made.quantized, 64) as float_runtime:
        prompt = tokenizer.encode("The sea", bos=True)
        answer = runner.answer(prompt, 4)
        logits = float_runtime.logits([*prompt, *answer.tokens])[len(prompt) - 1 : -1]
        assert list(answer.tokens) == logits.argmax(-1).tolist()
        assert tokenizer.decode(answer.tokens).strip() == answer.text.strip()
        ends = runner.distributions(prompt, 2)[:, 2]
        wanted = log_softmax(float_runtime.logits(prompt)[1:])[:, 2]
        assert np.allclose(ends, wanted, atol=0.1)  # what ends an answer is as likely as it is
        assert [runner.answer(prompt, 4, begin=end).ended for end in ENDS] == [True, True]
