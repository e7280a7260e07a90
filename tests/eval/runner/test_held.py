"""What a finished artifact says wrongly, its own program reads wrongly, and the gate in that program sees it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from compress.checkpoint.store import QuantizedCheckpoint
from eval.accuracy.metrics import log_softmax
from eval.budget.limits import STRUCTURE
from eval.measurement import Measurement
from eval.runner import held
from eval.runner.held import Expected
from export.artifacts.artifact import Artifact
from export.coreai import export as coreai
from export.executorch import xnnpack as executorch
from export.gguf import export as gguf_file
from export.litert_lm import export as litert_lm
from export.mlx import export as mlx
from export.onnx import genai
from targets.host.child import Child
from targets.host.torch_runtime import TorchRuntime
from targets.runners import child as runners
from targets.runners.child import ChildRunner
from targets.runners.runner import open_runner
from tests.support.checkpoints.rounded import rounded
from tests.support.checkpoints.shapes import shortened, write_checkpoint
from tests.support.damages.runners import KL, SEEN
from tests.support.files.tokenizers import write_tokenizer

ENDS, CONTEXT, LONG = [2, 9], 512, 256
TEXTS = ("The sea is wide and the sky is blue.", "你好，今天天气怎么样？", "a total number of 12 models")
NAMES = {
    "gguf": "llama.cpp of xllamacpp 20", "onnx-genai": "onnxruntime-genai 0.", "mlx": "mlx-lm 0.",
    "executorch-xnnpack": "TextLLMRunner of executorch 1.", "litert-lm": "LiteRT-LM of litert-lm-api 0.",
    "coreai": "transformers and Core AI",
    "coreai-ane": "transformers and Core AI",
}  # fmt: skip
RUNTIMES = {"executorch-xnnpack": "executorch 1.", "litert-lm": "ai-edge-litert 2."}
"""What tells probabilities where the runner does not."""
SLOW_TO_START = {f"targets.runners.{name}worker" for name in ("text_llm_runner.", "litert_lm.", "coreai_")}
PROBABILITIES = ("runner_kl", "runner_kl_excess", "runner_top1_agreement")


LLAMA = {"architecture": "LlamaForCausalLM", "layer_norm": False, "eos_token_id": 320, "max_position_embeddings": 512}
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}\n"
    "    {%- if loop.first and message['role'] == 'system' %}<<{{ message['content'].strip() }}>>\n"
    "    {%- else %}{{ '[' + message['role'] + ']' }}{{ message['content'] | trim }}{{ eos_token }}{% endif %}\n"
    "{%- endfor %}{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)


@dataclass(frozen=True)
class Made:
    quantized: QuantizedCheckpoint
    artifacts: dict[str, Artifact]
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
    artifacts = {
        "gguf": gguf_file.export(quantized, place / "gguf", context=CONTEXT, about={"name": "small"}),
        "onnx-genai": genai.export(quantized, place / "genai", context=CONTEXT),
        "mlx": mlx.export(quantized, place / "mlx", context=CONTEXT),
        "executorch-xnnpack": executorch.export(quantized, place / "pte", context=CONTEXT),
        "litert-lm": litert_lm.export(quantized, place / "litertlm", context=CONTEXT),
        "coreai": coreai.export(quantized, place / "coreai", context=CONTEXT),
        "coreai-ane": coreai.export_static(quantized, place / "coreai-ane", context=CONTEXT, chunk=32),
    }
    tokenizer = quantized.tokenizer()
    prompts = [tokenizer.encode(text * 3, bos=True)[:24] for text in TEXTS]
    prompts.append(tokenizer.encode(" ".join(TEXTS) * 20, bos=True)[:LONG])
    weights = TorchRuntime(quantized, CONTEXT)
    return Made(quantized, artifacts, Expected(quantized.config, tokenizer, TEXTS, prompts, weights))


class Shared:
    """A child that outlives its runner."""

    def __init__(self, child: Child) -> None:
        self.call, self.tail = child.call, child.tail

    def close(self) -> None:
        """It stays."""


@pytest.fixture(scope="module", autouse=True)
def shared() -> Iterator[None]:
    """A process that imports for seconds opens one artifact after another."""
    held: dict[str, Child] = {}

    def child(module: str, log: Path, python: str, core: int | None) -> Child | Shared:
        assert python == sys.executable and core is None
        if module not in SLOW_TO_START:
            return Child(module, log)
        if module not in held or held[module].failed:
            held[module] = Child(module, log)
        return Shared(held[module])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runners, "Child", child)
        yield
    for one in held.values():
        one.close()


def faults(kind: str, found: Iterable[Measurement]) -> dict[str, float]:
    """Figures beyond their limits."""
    figures = list(found)
    for figure in figures:
        tells = RUNTIMES.get(kind, NAMES[kind]) if figure.name in PROBABILITIES else NAMES[kind]
        assert figure.by.startswith(tells) and figure.how == ("emulated" if kind.startswith("coreai") else "measured")
    return {f.name: f.value for f in figures if f.name in STRUCTURE and f.value > STRUCTURE[f.name][0]}


@pytest.mark.parametrize(
    ("kind", "largest"),
    [
        ("gguf", 3e-4),
        ("onnx-genai", 1e-9),
        ("mlx", 1e-6),
        ("executorch-xnnpack", 3e-4),
        ("litert-lm", 3e-4),
        ("coreai", 1e-5),
        ("coreai-ane", 1e-5),
    ],
)  # fmt: skip
def test_what_was_written_is_read_as_the_checkpoint_says(kind: str, largest: float, made: Made) -> None:
    by_name = {figure.name: figure for figure in held.figures(made.artifacts[kind], made.expected, "cpu")}
    assert faults(kind, by_name.values()) == {}
    assert by_name["runner_kl"].n == 4 * 7 and 0 < by_name["runner_kl"].value < largest
    assert by_name["runner_token_mismatches"].n == len(held.HARD) + 1 + len(TEXTS)
    assert by_name["runner_chat_mismatches"].n == 10


@pytest.mark.parametrize("fault", SEEN)
def test_a_fault_put_back_is_caught(fault: str, made: Made, tmp_path: Path) -> None:
    kind, figure, change = SEEN[fault]
    shutil.copytree(made.artifacts[kind].folder, tmp_path / "a")
    hurt = change(Artifact.open(tmp_path / "a"))
    expected = made.expected if figure == KL else replace(made.expected, weights=None)
    assert figure in faults(kind, held.figures(hurt, expected, "cpu"))


def test_where_nobody_judged_it_is_said(made: Made) -> None:
    judged = Measurement(held.REFUSALS, 0, "", "measured", subject="cpu")
    (misread,) = held.not_judged(made.artifacts["gguf"], [judged])
    assert misread.startswith("where llama.cpp misreads it") and "`</s>`" in misread
    (told,) = held.not_judged(made.artifacts["gguf"], [])
    assert told.startswith("not judged in its runner, llama.cpp") and "pip install" in told
    front, closed, misread = held.not_judged(made.artifacts["onnx-genai"], [judged])
    assert "without what begins them" in front and "closed: its template" in closed and "blanks alone" in misread
    other, first = held.not_judged(made.artifacts["executorch-xnnpack"], [judged])
    assert "are not TextLLMRunner's but the runtime's" in other and "ends at once goes on" in first
    closed, scores = held.not_judged(made.artifacts["litert-lm"], [judged])
    assert "closed, with an answer asked for" in closed and "it scores tokens" in scores


@pytest.mark.parametrize("kind", NAMES)
def test_it_answers_until_an_end_token(kind: str, made: Made) -> None:
    tokenizer = made.expected.tokenizer
    with open_runner(made.artifacts[kind]) as runner, TorchRuntime(made.quantized, 64) as float_runtime:
        prompt = tokenizer.encode("The sea", bos=True)
        answer = runner.answer(prompt, 4)
        logits = float_runtime.logits([*prompt, *answer.tokens])[len(prompt) - 1 : -1]
        assert list(answer.tokens) == logits.argmax(-1).tolist()
        assert tokenizer.decode(answer.tokens).strip() == answer.text.strip()
        ends = runner.distributions(prompt, 2)[:, 2]
        wanted = log_softmax(float_runtime.logits(prompt)[1:])[:, 2]
        assert np.allclose(ends, wanted, atol=0.1)  # what ends an answer is as likely as it is
        assert [runner.answer(prompt, 4, begin=end).ended for end in ENDS] == [True, True]
        assert not runner.answer(prompt, 1, begin=prompt[-1]).ended


def test_a_tokenizer_json_and_its_template_in_litert_lm(tmp_path: Path) -> None:
    """Of Llama 3's form: contents come as parts, the begin token once, the names of tokens are not known there."""
    source = write_checkpoint(tmp_path / "float", tokenizer=False, vocab=384, layers=1, bos_token_id=None, **LLAMA)
    write_tokenizer(source, "llama-bpe")
    settings = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    quantized = rounded(tmp_path / "quantized", source=source)
    tokenizer = quantized.tokenizer()
    prompts = [tokenizer.encode(text * 3, bos=True)[:60] for text in TEXTS]
    expected = Expected(quantized.config, tokenizer, TEXTS, prompts, TorchRuntime(quantized, CONTEXT))
    artifact = litert_lm.export(quantized, tmp_path / "a", context=128, chunk=16)
    found = {figure.name: figure for figure in held.figures(artifact, expected, "cpu")}
    assert faults("litert-lm", found.values()) == {}
    assert found["runner_chat_mismatches"].n == 10 and found["runner_kl"].value < 1e-3


BEGIN = "{{ bos_token }}"
TOLD = "{% if tools %}{% for tool in tools %}<tool>{{ tool | tojson }}</tool>\n{% endfor %}{% endif %}"


@pytest.fixture(scope="module")
def with_tools(tmp_path_factory: pytest.TempPathFactory) -> tuple[QuantizedCheckpoint, Expected]:
    """One block with a template that knows tools."""
    place = tmp_path_factory.mktemp("tools")
    source = write_checkpoint(place / "float", tokenizer=False, vocab=323, layers=1, bos_token_id=None, **LLAMA)
    write_tokenizer(source, "llama-bpe")
    settings = json.loads((source / "tokenizer_config.json").read_text())
    told = {"chat_template": TEMPLATE.replace(BEGIN, BEGIN + TOLD)}
    (source / "tokenizer_config.json").write_text(json.dumps(settings | told))
    quantized = rounded(place / "quantized", source=source)
    tokenizer = quantized.tokenizer()
    return quantized, Expected(quantized.config, tokenizer, TEXTS[:1], [tokenizer.encode(TEXTS[0] * 3)[:40]], None)


EXPORTS: dict[str, Callable[..., Artifact]] = {
    "gguf": gguf_file.export, "onnx-genai": genai.export, "mlx": mlx.export, "executorch-xnnpack": executorch.export,
    "litert-lm": litert_lm.export, "coreai": coreai.export, "coreai-ane": coreai.export_static,
}  # fmt: skip


@pytest.mark.parametrize("kind", NAMES)
def test_tools_are_told_as_the_template_tells_them(
    kind: str, with_tools: tuple[QuantizedCheckpoint, Expected], tmp_path: Path
) -> None:
    quantized, expected = with_tools
    artifact = EXPORTS[kind](quantized, tmp_path / "a", context=CONTEXT)
    found = {figure.name: figure for figure in held.figures(artifact, expected, "cpu")}
    assert faults(kind, found.values()) == {}, [figure.note for figure in found.values()]
    assert found["runner_chat_mismatches"].n == 12


def test_tools_that_a_template_leaves_out_are_missed(
    with_tools: tuple[QuantizedCheckpoint, Expected], tmp_path: Path
) -> None:
    quantized, expected = with_tools
    artifact = genai.export(quantized, tmp_path / "a", context=CONTEXT)
    settings = artifact.folder / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace("{% if tools %}", "{% if false %}"))
    found = {figure.name: figure for figure in held.figures(artifact, expected, "cpu")}
    assert found["runner_chat_mismatches"].value == 2 and "How warm" in found["runner_chat_mismatches"].note


def test_scores_that_are_not_those_of_the_file_are_told(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    told = ChildRunner.scores
    monkeypatch.setattr(ChildRunner, "scores", lambda *asked: told(*asked) + 0.1)
    expected = replace(made.expected, texts=TEXTS[:1], weights=None)
    found = {figure.name: figure for figure in held.figures(made.artifacts["litert-lm"], expected, "cpu")}
    assert found[held.REFUSALS].value == 2 * held.DECODED and "scores token" in found[held.REFUSALS].note
