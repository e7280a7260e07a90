"""Checks of one artifact of a run that need no float model beside it: its files, its own weights, its blocks."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import cast

from bluelm.checkpoint import Checkpoint
from bluelm.text.tokenizer import Tokenizer
from compress.checkpoint.store import QuantizedCheckpoint
from compress.methods.rotate import as_quantized
from eval.accuracy import arithmetic, positions
from eval.accuracy.arithmetic import beside_twin
from eval.accuracy.compare import local_errors
from eval.accuracy.positions import Allowance, PositionPlan, Rows
from eval.accuracy.twins import Twin, twin_of
from eval.files import structure
from eval.files.compiled import Graphs, TwinCheck
from eval.heldout import HeldOut
from eval.measurement import Measurement
from eval.runner import held
from export.artifacts.artifact import Artifact, find_source
from targets.block_outputs import open_blocks
from targets.host.torch_runtime import TorchRuntime
from targets.runners.runner import runner_of
from targets.runtime import Place, Runtime

BLOCK_TOKENS = 64
SLOW: tuple[Place, ...] = ("htp", "interpreter", "arm64")
PREFILLED, DECODED = 4096, 256  # tokens of the context that are prefilled at most, and decoded
SLOWLY_PREFILLED, SLOWLY_DECODED = 1024, 16  # where a step takes a second


@dataclass(frozen=True)
class Inspector:
    """What the artifacts of one run are held against.

    Attributes:
        checkpoint: None: the artifacts' own weights are all that they are held against.
        quantized: None: codes and scales are not compared.
        room: whether the dequantized model may be held in memory.
    """

    checkpoint: Checkpoint | None
    quantized: QuantizedCheckpoint | None
    held_out: HeldOut
    context: int
    room: bool = True
    _expected: dict[PositionPlan, Rows] = field(
        default_factory=dict[PositionPlan, Rows], init=False, repr=False, compare=False
    )
    _allowances: list[tuple[PositionPlan, Twin, Allowance]] = field(
        default_factory=list[tuple[PositionPlan, Twin, Allowance]], init=False, repr=False, compare=False
    )

    def files(self, artifact: Artifact, subject: str) -> list[Measurement]:
        """What the files tell."""
        config, texts = self._model.config, self.held_out.texts
        return structure.files(artifact, config, self.tokenizer, self.quantized, texts, subject)

    def ending(self, artifact: Artifact, runtime: Runtime, subject: str) -> list[Measurement]:
        """Whether the end token ends an answer."""
        tokens = self._text(runtime.context)[: max(2, min(16, runtime.context // 2))]
        return [structure.end_token(artifact, self._model.config, runtime, tokens, subject)]

    def positions(self, artifact: Artifact, on: Place, runtime: Runtime, subject: str) -> list[Measurement]:
        """Answers over the whole context, in prefill and in decode, against the artifact's own weights."""
        plan = plan_positions(artifact, on)
        found = positions.run(runtime, self._text(artifact.context), plan, self._expected.get(plan))
        return positions.figures(found, self.allowance(artifact, on), subject)

    def blocks(self, artifact: Artifact, on: Place, subject: str) -> list[Measurement]:
        """Errors of blocks; [] where showing them would take long (`bluelm-export bisect` does)."""
        if self.quantized is None or not artifact.record.blocks_in_runs or on == "arm64":
            return []
        graphs = None
        if artifact.record.blocks == "source":
            if find_source(artifact) is None:
                return []
            graphs = TwinCheck(artifact, self.quantized, on)
        tokens = self._text(BLOCK_TOKENS)
        with (
            tempfile.TemporaryDirectory(prefix="bluelm-blocks-") as scratch,
            open_blocks(artifact, on, Path(scratch)) as runtime,
        ):
            found = [] if graphs is None else [graphs.figure(cast(Graphs, runtime), subject)]
            stream = runtime.blocks(tokens)
        twin = twin_of(artifact, on)
        own = local_errors(self.quantized, stream, self.context, (artifact.format, "dequantized"), True, twin)
        to_float = None
        if self.checkpoint is not None:
            exact = as_quantized(self.checkpoint, self.quantized.recipe)
            to_float = local_errors(exact, stream, self.context, (artifact.format, "float"), False, twin)
        return [*found, *structure.block_figures(to_float, own, subject)]

    def runner(self, artifact: Artifact, subject: str) -> list[Measurement]:
        """What the program that users open it with reads and answers; [] where that is not here."""
        if held.installed_version(artifact) is None:
            return []
        windows = self.held_out.windows[: held.PROMPTS]
        told = runner_of(artifact)
        room = artifact.context - 1 - (artifact.chunk if told.fills_up else 0)  # for an answer
        lengths = [min(n, room) for n in (held.LONG, *[held.PREFILLED + held.DECODED] * (held.PROMPTS - 1))]
        prompts = [window.tokens[:length].tolist() for window, length in zip(windows, lengths, strict=False)]
        weights = TorchRuntime(self.quantized, max(lengths)) if self.room and self.quantized is not None else None
        expected = held.Expected(self._model.config, self.tokenizer, self.held_out.texts, prompts, weights)
        return held.figures(artifact, expected, subject)

    def expect(self, subjects: Sequence[tuple[Artifact, Place]]) -> None:
        """Work out once what the artifacts' own weights answer in float32, and what rounding as each artifact's runtime
        does costs them; the model is let go behind it."""
        if not self.room or self.quantized is None:
            return
        asked = [(plan_positions(artifact, on), twin_of(artifact, on)) for artifact, on in subjects]
        missing = [(plan, twin) for plan, twin in asked if plan not in self._expected or self._cost(plan, twin) is None]
        for context in {plan.context for plan, _ in missing}:
            runtime, text = TorchRuntime(self.quantized, context), self._text(context)
            here = [(plan, twin) for plan, twin in missing if plan.context == context]
            rows = positions.reference(runtime, text, [plan for plan, _ in here])
            for plan, twin in here:
                self._expected[plan] = rows[plan.pieces]
                if twin is not None and self._cost(plan, twin) is None:
                    self._allowances.append((plan, twin, beside_twin(twin, runtime, text, plan, rows[plan.pieces])))

    def _cost(self, plan: PositionPlan, twin: Twin | None) -> Allowance | None:
        return next((cost for other, one, cost in self._allowances if (other, one) == (plan, twin)), None)

    def allowance(self, artifact: Artifact, on: Place) -> Allowance:
        """What its arithmetic may cost: beside its twin, and never less than its kind costs the demo model, since a
        twin does not tell all that a vendor's arithmetic does."""
        known = arithmetic.allowance(artifact)
        cost = self._cost(plan_positions(artifact, on), twin_of(artifact, on))
        return known if cost is None else cost.at_least(known)

    @property
    def given(self) -> bool:
        """Whether the codes came with the checkpoint, so that artifact and float model are read from the same."""
        return self.quantized is not None and self.quantized.recipe.given

    @property
    def _model(self) -> Checkpoint | QuantizedCheckpoint:
        """What tells the model's shape and tokenizer."""
        known = self.checkpoint or self.quantized
        assert known is not None, "there is nothing to compare artifacts with"
        return known

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's."""
        return self._model.tokenizer()

    def _text(self, length: int) -> list[int]:
        """So many tokens of held-out text, its windows one behind another (again from the first where they end)."""
        windows = itertools.cycle(self.held_out.windows)
        return list(itertools.islice((int(t) for window in windows for t in window.tokens), length))


def plan_positions(artifact: Artifact, on: Place) -> PositionPlan:
    """Which positions of an artifact are judged, for how long a step takes there."""
    slow = on in SLOW
    prefilled, decoded = (SLOWLY_PREFILLED, SLOWLY_DECODED) if slow else (PREFILLED, DECODED)
    chunk = artifact.chunk
    if chunk == artifact.context:  # no chunks, the text goes in as one: not a long one
        chunk = min(chunk, positions.AT_ONCE)
    seeks = bool(artifact.record.host_cache)  # its runtime can stand behind empty slots
    return positions.plan(artifact.context, chunk, prefilled, decoded, seeks=seeks, brief=slow)
