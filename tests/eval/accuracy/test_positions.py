"""Positions over the whole context: the plan, what each way finds, and standing behind empty slots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bluelm.checkpoint import Checkpoint
from eval.accuracy import positions
from eval.accuracy.arithmetic import Allowance
from eval.accuracy.positions import PositionPlan, figures, plan, reference, run
from export.artifacts.artifact import Artifact
from export.onnx import cpu as onnx_cpu
from pipeline.judge.inspecting import plan_positions
from targets.host.torch_runtime import TorchRuntime
from targets.runtime import RuntimeBase, open_runtime
from tests.support.checkpoints.rounded import rounded
from tests.support.checkpoints.shapes import write_checkpoint

VOCAB, CONTEXT, CHUNK = 7, 64, 16


class Counting(RuntimeBase):
    """Logits that depend on every token before and on the position: sums in a cache of one number a slot.

    `wrong` changes the answer at a position: (position, whether it is decoded, logits) -> logits.
    """

    def __init__(self, wrong: Callable[[int, bool, np.ndarray], np.ndarray] | None = None) -> None:
        self.name, self.vocab_size, self.context = "counting", VOCAB, CONTEXT
        self._held: list[int] = []
        self._wrong = wrong or (lambda position, decoded, row: row)

    def reset(self) -> None:
        self._held = []

    def rewind(self, held: int) -> None:
        assert held <= len(self._held), "what is not held any more cannot be gone back to"
        del self._held[held:]

    def prefill(self, tokens: Sequence[int]) -> np.ndarray:
        return np.stack([self._row(token, False) for token in tokens])

    def decode(self, token: int) -> np.ndarray:
        return self._row(token, True)

    def _row(self, token: int, decoded: bool) -> np.ndarray:
        self.check_tokens([token], len(self._held))
        self._held.append(token)
        at = len(self._held) - 1
        row = np.sin(np.arange(VOCAB) * (at + 1.0) + sum(self._held)).astype(np.float32)
        return self._wrong(at, decoded, row)


TEXT = np.random.default_rng(0).integers(0, VOCAB, CONTEXT).tolist()


def judged(
    wrong: Callable[[int, bool, np.ndarray], np.ndarray], chosen: PositionPlan | None = None
) -> dict[str, float]:
    chosen = chosen or plan(CONTEXT, CHUNK, 4096, 4096, seeks=False)
    expected = reference(Counting(), TEXT, [chosen])[chosen.pieces]
    found = figures(run(Counting(wrong), TEXT, chosen, expected), Allowance(1e-4, 1e-3, 1e-3), "cpu")
    return {m.name: m.value for m in found}


def at(positions: Sequence[int], decoded: bool) -> Callable[[int, bool, np.ndarray], np.ndarray]:
    """Another answer at some positions, of decode or of prefill."""
    return lambda position, single, row: row[::-1] if position in positions and single == decoded else row


@settings(max_examples=200, deadline=None)
@given(
    context=st.integers(2, 40_000), chunk=st.integers(1, 512), decoded=st.integers(2, 300), seeks=st.booleans(),
    brief=st.booleans(),
)  # fmt: skip
def test_a_plan_takes_the_first_and_the_last_position_and_costs_what_it_may(
    context: int, chunk: int, decoded: int, seeks: bool, brief: bool
) -> None:
    chunk = min(chunk, context)
    chosen = plan(context, chunk, 1024, decoded, seeks=seeks, brief=brief)
    assert chosen.pieces[0][0] == 0
    assert chosen.pieces[-1][1] == context
    if seeks:
        assert sum(stop - start for start, stop in chosen.pieces) <= max(1024, 2 * chunk)
    singles = [i for span in chosen.decodes for i in range(*span)]
    assert len(set(singles)) == len(singles) <= decoded
    assert context - 1 in singles
    assert decoded < 4 or 0 in singles
    if decoded >= 32 and len(chosen.pieces) == 1:  # none of the context is left out for long
        gaps = np.diff([0, *sorted(singles)])
        assert gaps.max() <= 2 + context / (decoded / 2 - 8)
    kept = set(chosen.kept)
    assert {0, context - 1} <= kept
    spans = [*chosen.prompts, *chosen.decodes]
    assert all(set(range(*span)) <= kept for span in spans)
    assert sorted(span for piece in chosen.pieces for span, _ in chosen.inside(piece)) == sorted(spans)
    if not brief and 2 * chunk + 1 <= context and len(chosen.pieces) == 1 and chunk > 1:
        assert {(0, chunk - 1), (chunk - 1, 2 * chunk), (chunk + 1, 2 * chunk + 1)} <= set(chosen.prompts)


def test_a_sound_runtime_costs_nothing_and_every_position_is_judged() -> None:
    found = judged(lambda position, single, row: row)
    assert found["runtime_kl"] == found["position_kl_excess"] == found["prefill_decode_kl"] == 0
    assert found["prefill_coverage"] == found["decode_coverage"] == 1


@pytest.mark.parametrize("position", [0, 1, CHUNK - 1, CHUNK, CONTEXT // 2 + 3, CONTEXT - 1])
@pytest.mark.parametrize("decoded", [False, True])
def test_one_wrong_answer_is_seen_wherever_it_stands(position: int, decoded: bool) -> None:
    found = judged(at([position], decoded))
    assert found["position_kl_excess"] > 1


@pytest.mark.parametrize("decoded", [False, True])
def test_a_wrong_range_is_not_averaged_away(decoded: bool) -> None:
    """A cost of 4e-4 in one range of four is 1e-4 over all: what hides in the mean shows in the range."""

    def wrong(position: int, single: bool, row: np.ndarray) -> np.ndarray:
        return row * 1.04 if 32 <= position < 48 and single == decoded else row

    found = judged(wrong)
    name = "decode" if decoded else "prefill"
    ranges = {key: value for key, value in found.items() if key.startswith(f"runtime_kl@{name}")}
    assert ranges[f"runtime_kl@{name} 32-47"] == max(ranges.values()) == found["runtime_kl"]
    assert np.mean(list(ranges.values())) < found["runtime_kl"]
    assert found["runtime_kl_excess"] > 1


def test_an_answer_that_is_no_number_is_the_worst() -> None:
    nothing = judged(lambda position, single, row: row * np.nan if position == 50 and single else row)
    assert not nothing["position_kl_excess"] <= 1
    assert not nothing["prefill_decode_kl"] <= 1e-3


def test_without_a_reference_decode_is_held_against_prefill() -> None:
    chosen = plan(CONTEXT, CHUNK, 4096, 16, seeks=False)
    found = {m.name: m.value for m in figures(run(Counting(at([63], True)), TEXT, chosen, None), None, "cpu")}
    assert "runtime_kl" not in found
    assert found["prefill_decode_kl"] > 1e-3
    assert found["decode_coverage"] == 16 / CONTEXT


def test_a_long_context_is_judged_at_its_beginning_and_its_end_behind_empty_slots(tmp_path: Path) -> None:
    """Rope turns by differences: behind empty slots the answers are those of the beginning, also of an artifact."""
    quantized = rounded(tmp_path / "q", blocks=1)
    chosen = plan(512, 32, 128, 16, seeks=True)
    assert chosen.pieces == ((0, 64), (448, 512))
    text = np.random.default_rng(1).integers(4, 6000, 64).tolist()
    own = TorchRuntime(quantized, 512)
    expected = reference(own, text * 8, [chosen])[chosen.pieces]
    again = own.logits(text)
    for piece in chosen.pieces:
        rows = expected.logits[np.searchsorted(expected.at, np.arange(*piece))]
        np.testing.assert_allclose(rows, again, atol=1e-3)
    artifact = onnx_cpu.export(quantized, tmp_path / "a", context=512, chunk=32)
    with open_runtime(artifact.folder) as runtime:
        found = {
            m.name: m for m in figures(run(runtime, text * 8, chosen, expected), Allowance(1e-6, 1e-5, 1e-6), "cpu")
        }
    assert found["position_kl_excess"].value < 0.1
    assert found["runtime_kl_excess"].value < 0.1
    assert found["prefill_coverage"].value == 128 / 512
    assert "up to 511" in found["decode_coverage"].note
    assert positions.ROWS >= 128


def test_a_long_context_without_chunks_is_not_taken_at_once() -> None:
    """A GGUF file's chunk is its context."""
    long = Artifact.model_construct(format="gguf", context=32768, chunk=32768)
    chosen = plan_positions(long, "cpu")
    assert chosen.pieces == ((0, 2048), (30720, 32768))
    assert chosen.chunk == 512


def test_runtimes_go_back_to_what_they_held(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c")
    runtime = TorchRuntime(Checkpoint.open(folder), 32)
    tokens = list(range(4, 28))
    whole = runtime.logits(tokens)
    for held in (20, 9, 1, 0):
        runtime.rewind(held)
        np.testing.assert_allclose(runtime.decode(tokens[held]), whole[held], atol=1e-5)
