"""Tasks of lm-evaluation-harness: what it computes on known answers, and a run that puts them to an artifact."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bluelm.checkpoint import Checkpoint
from bluelm.errors import InputError
from bluelm.model import Decoder
from bluelm.system.files import demo_checkpoint
from bluelm.system.progress import Silent
from bluelm.text.tokenizer import Tokenizer
from eval.report import Report
from eval.tasks import tasks
from eval.tasks.answers import Answers
from eval.tasks.harness_model import HarnessModel
from eval.tasks.tasks import TaskRequest, TaskSet
from pipeline.judge.judging_tasks import _ask
from targets.host.torch_runtime import TorchRuntime
from targets.runtime import RuntimeBase
from tests.support.checkpoints.shapes import tiny_checkpoint
from tests.support.command_line import call
from tests.support.files import task_files

SUBJECTS = {"agronomy": "BBAD", "anatomy": "B"}


class Scripted(RuntimeBase):
    """Writes one text behind whatever prompt, then the end token; counts how often it is asked."""

    def __init__(self, tokenizer: Tokenizer, text: str, context: int = 512) -> None:
        self.name, self.vocab_size, self.context = "scripted", tokenizer.vocab_size, context
        assert tokenizer.eos is not None
        self._answer = [*tokenizer.encode(text), tokenizer.eos]
        self._written = 0
        self.asked = 0

    def reset(self) -> None:
        self._written = 0

    def prefill(self, tokens: Sequence[int]) -> np.ndarray:
        self.asked += len(tokens) > 1
        rows = np.zeros((len(tokens), self.vocab_size), np.float32)
        rows[-1, self._answer[min(self._written, len(self._answer) - 1)]] = 9.0
        self._written += 1
        return rows


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(demo_checkpoint())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for subject, answers in SUBJECTS.items():
        task_files.cmmlu(folder / "cmmlu", subject, answers)
    task_files.gsm8k(folder / "text" / "gsm8k_test.jsonl", [18, 3, 18, 5])
    task_files.humaneval(folder / "text" / "HumanEval.jsonl.gz")
    return folder


@pytest.fixture(scope="module")
def loaded(data: Path) -> TaskSet:
    names = ("cmmlu_agronomy", "cmmlu_anatomy", "gsm8k", "humaneval")
    return tasks.load(TaskRequest(names, data, shots=1, run_code=True))


def answers(loaded: TaskSet, tokenizer: Tokenizer, text: str) -> tuple[tasks.Scores, HarnessModel]:
    assert tokenizer.eos is not None
    model = HarnessModel(Scripted(tokenizer, text), tokenizer, [tokenizer.eos])
    return tasks.ask(loaded, model), model


def test_choices(loaded: TaskSet, tokenizer: Tokenizer) -> None:
    """A model that always says B is right where the answer is B."""
    scores, _ = answers(loaded, tokenizer, " B")
    assert scores["cmmlu_agronomy"] == (1.0, 1.0, 0.0, 0.0)
    assert scores["cmmlu_anatomy"] == (1.0,)


def test_answers_and_programs(loaded: TaskSet, tokenizer: Tokenizer) -> None:
    scores, _ = answers(loaded, tokenizer, "It is 18.\n#### 18")
    assert scores["gsm8k, strict-match"] == (1.0, 0.0, 1.0, 0.0)
    assert scores["gsm8k, flexible-extract"] == (1.0, 0.0, 1.0, 0.0)
    assert scores["humaneval"] == (0.0, 0.0)
    scores, _ = answers(loaded, tokenizer, "    return a + b\nprint(1)")
    assert scores["humaneval"] == (1.0, 0.0), "the first program adds; the stop string ends it"


def test_a_group_is_the_mean_over_all_its_questions(loaded: TaskSet, tokenizer: Tokenizer) -> None:
    """5 questions, not 2 subjects, as the harness weighs them."""
    together = TaskSet(loaded.request, loaded.tasks, {"both": ("cmmlu_agronomy", "cmmlu_anatomy")}, "")
    scores, _ = answers(together, tokenizer, " B")
    found = {m.name: m for m in tasks.compare(together, scores, scores, "cpu", "")}
    assert found["task_score@both"].value == pytest.approx(3 / 5)
    assert found["task_score@both"].n == 5
    assert found["task_recovery@both"].value == 1.0


def test_recovery_and_its_error() -> None:
    """Ratio of paired means by the delta method, worked out by hand, and against many draws."""
    loaded = TaskSet(TaskRequest(("t",)), {}, {"t": ()}, "")
    generator = np.random.default_rng(0)
    ratios, errors = [], []
    for _ in range(400):
        expected = generator.random(200) < 0.6
        found = np.where(generator.random(200) < 0.9, expected, ~expected)
        figures = _recovery(loaded, expected, found)
        ratios.append(figures.value)
        errors.append(figures.error or 0.0)
    assert np.mean(errors) == pytest.approx(np.std(ratios), rel=0.1)
    by_hand = _recovery(loaded, np.array([1, 1, 0, 0]), np.array([1, 0, 0, 0]))
    assert by_hand.value == 0.5
    apart = np.array([0.5, -0.5, 0, 0])
    assert by_hand.error == pytest.approx(apart.std(ddof=1) / 2 / 0.5)
    same = _recovery(loaded, np.array([1, 0, 0, 0]), np.array([1, 0, 0, 0]))
    assert (same.value, same.error) == (1, pytest.approx(1 / 4 / 0.25)), "four alike answers prove little"


def _recovery(loaded: TaskSet, expected: np.ndarray, found: np.ndarray) -> Any:
    scores = [{"t": tuple(values.astype(float).tolist())} for values in (expected, found)]
    return next(m for m in _compare(loaded, *scores) if m.name == "task_recovery@t")


def _compare(loaded: TaskSet, expected: tasks.Scores, found: tasks.Scores) -> Any:
    named = {"t": type("Task", (), {"config": type("C", (), {"num_fewshot": 0})})()}
    return tasks.compare(TaskSet(loaded.request, named, {"t": ("t",)}, ""), expected, found, "cpu", "")  # pyright: ignore


def test_a_model_without_a_right_answer_has_no_recovery(loaded: TaskSet, tokenizer: Tokenizer) -> None:
    scores, _ = answers(loaded, tokenizer, " C")
    names = {m.name for m in tasks.compare(loaded, scores, scores, "cpu", "")}
    assert "task_score@humaneval" in names
    assert "task_recovery@humaneval" not in names


def test_likelihoods_are_the_models_own(tokenizer: Tokenizer) -> None:
    """Against the decoder run over the whole text; choices that share a question ask the runtime once."""
    from lm_eval.api.instance import Instance

    checkpoint = Checkpoint.open(demo_checkpoint())
    decoder = Decoder.from_weights(checkpoint)
    model = HarnessModel(TorchRuntime(checkpoint, 64), tokenizer, [2])

    def expected(context: str, text: str) -> tuple[float, bool]:
        whole, front = tokenizer.encode(context + text, bos=True), len(tokenizer.encode(context, bos=True))
        with torch.no_grad():
            rows = decoder(torch.tensor([whole]))[0].double().log_softmax(-1)[front - 1 : -1]
        targets = torch.tensor(whole[front:])
        return rows.gather(1, targets[:, None]).sum().item(), bool((rows.argmax(-1) == targets).all())

    pairs = [("The capital of France is", " Paris, of course."), ("答案：", " A"), ("答案：", " B")]
    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    for pair, (nats, greedy) in zip(pairs, model.loglikelihood(requests), strict=True):
        assert nats == pytest.approx(expected(*pair)[0], abs=1e-4)
        assert greedy == expected(*pair)[1]
    scripted = Scripted(tokenizer, " A")
    shared = HarnessModel(scripted, tokenizer, [2])
    shared.loglikelihood([Instance("loglikelihood", {}, ("答案：", f" {c}"), 0) for c in "ABCD"])
    assert scripted.asked == 1


def test_long_prompts_lose_their_front_and_it_is_told(loaded: TaskSet, tokenizer: Tokenizer) -> None:
    model = HarnessModel(Scripted(tokenizer, "x " * 90, context=48), tokenizer, [2])
    tasks.ask(TaskSet(loaded.request, {"gsm8k": loaded.tasks["gsm8k"]}, {"gsm8k": ("gsm8k",)}, ""), model)
    assert model.note == (
        "4 of 4 prompts lost their front: the context holds 48 tokens; 4 answers ended where the context was full"
    )
    fits = HarnessModel(Scripted(tokenizer, " B"), tokenizer, [2])
    assert fits.note == ""


def test_answers_are_kept_when_a_run_breaks_off(loaded: TaskSet, tokenizer: Tokenizer, tmp_path: Path) -> None:
    class Breaks(Scripted):
        def reset(self) -> None:
            super().reset()
            if self.asked == 5:
                raise KeyboardInterrupt

    chosen = TaskSet(loaded.request, {"gsm8k": loaded.tasks["gsm8k"], "cmmlu_agronomy": loaded.tasks["cmmlu_agronomy"]},
                     {"gsm8k": ("gsm8k",), "cmmlu_agronomy": ("cmmlu_agronomy",)}, "")  # fmt: skip
    whole, again = Scripted(tokenizer, " B", context=48), Scripted(tokenizer, " B", context=48)
    expected = _ask(chosen, whole, tokenizer, {2}, "a", tmp_path / "whole.jsonl", Silent())
    with pytest.raises(KeyboardInterrupt):
        _ask(chosen, Breaks(tokenizer, " B", context=48), tokenizer, {2}, "a", tmp_path / "kept.jsonl", Silent())
    assert _ask(chosen, again, tokenizer, {2}, "a", tmp_path / "kept.jsonl", Silent()) == expected
    assert "prompts lost their front" in expected[1]
    assert again.asked <= whole.asked - 4


class Bomb:
    """Runs code where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_answers_of_a_stranger_run_nothing(loaded: TaskSet, tokenizer: Tokenizer, tmp_path: Path) -> None:
    chosen = TaskSet(loaded.request, {"gsm8k": loaded.tasks["gsm8k"]}, {"gsm8k": ("gsm8k",)}, "")
    path, mark = tmp_path / "kept.jsonl", tmp_path / "ran"
    _ask(chosen, Scripted(tokenizer, " B", context=48), tokenizer, {2}, "a", path, Silent())
    for planted in (pickle.dumps(Bomb(mark)), b'["a", {"a": 1}]', b'["a", [1.0]]', b"no JSON", b'{"a": "b"}', b"\xff"):
        path.write_bytes(planted + b"\n")
        with pytest.raises(InputError):
            _ask(chosen, Scripted(tokenizer, " B", context=48), tokenizer, {2}, "a", path, Silent())
    assert not mark.exists()


def test_an_answer_that_a_kill_tore_is_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "kept.jsonl"
    with Answers(path) as kept:
        kept["a"], kept["b"], kept["c"] = "中文\n\u2028", (-1.5, True), (1, 2, 3)
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        with Answers(path) as kept:
            assert len(kept) == whole[:cut].count(b"\n")
            kept["d"] = 0.5
        with Answers(path) as kept:
            assert kept["d"] == 0.5 and ("a" not in kept or kept["a"] == "中文\n\u2028")
            assert "c" not in kept and ("b" not in kept or kept["b"] == (-1.5, True))


def test_nothing_is_cut_off_that_is_no_answer(tmp_path: Path) -> None:
    path = tmp_path / "kept.jsonl"
    for notes in (b"my notes", b'["a", "4"]\nmy notes'):
        path.write_bytes(notes)
        with pytest.raises(InputError, match="none of an answer's"):
            Answers(path)
        assert path.read_bytes() == notes


def test_bad_requests(data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--run-code"):
        tasks.load(TaskRequest(("humaneval",), data))
    with pytest.raises(InputError, match="no such folder"):
        tasks.load(TaskRequest(("gsm8k",), tmp_path / "none"))
    with pytest.raises(InputError, match="no data for the task cmmlu_ancient_chinese"):
        tasks.load(TaskRequest(("cmmlu",), data))


def test_a_run_asks_tasks_and_shows_them(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    tiny_checkpoint(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lax.yaml").write_text("max_perplexity_ratio: 3\nmax_runtime_kl: 0.01\n")
    quick = ["--samples", "4", "--length", "64", "--eval-tokens", "512", "--no-bundle", "--name", "run"]
    arguments = ["--target", "generic-arm64", "--model", "model", "--budget", "lax.yaml", *quick]
    chosen = ["--tasks", "cmmlu_agronomy", "gsm8k", "--task-data", str(data), "--task-limit", "2", "--task-shots", "1"]
    assert call(*arguments, *chosen) == 0
    told = capfd.readouterr()
    assert "Tasks (± one standard error)" in told.out
    assert "cmmlu_agronomy, CPU artifact" in told.out
    assert "it/s" not in told.err, "the harness's own bars"
    report = Report.open(tmp_path / "dist" / "run")
    figures = {m.name: m for m in report.measurements}
    assert figures["task_score@cmmlu_agronomy"].n == 2
    assert "task_reference@cmmlu_agronomy" in figures
    assert "1-shot, the first 2 questions of each task" in figures["task_score@cmmlu_agronomy"].note
    assert "no train set lies there" in figures["task_score@gsm8k, strict-match"].note
    page = (tmp_path / "dist" / "run" / "report.html").read_text()
    assert "<h2>Tasks</h2>" in page
    assert "| cmmlu\\_agronomy" in (tmp_path / "dist" / "run" / "summary.md").read_text().replace("_a", "\\_a")
    assert call(*arguments, *chosen) == 0
    assert "tasks: unchanged" in capfd.readouterr().err
    assert call(*arguments, "--task-limit", "2") == 2
    assert "--tasks" in capfd.readouterr().err
