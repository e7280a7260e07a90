"""Checkpoints whose codes came with them: misread ones are refused, and cannot pass where they were not."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from bluelm.checkpoint import Checkpoint
from bluelm.errors import InputError
from bluelm.system.files import demo_checkpoint
from bluelm.system.progress import Silent
from compress.engine import quantize
from compress.formats.adopt import adopt, given_recipe
from compress.formats.packed import PackedCheckpoint, offset
from compress.formats.write import write
from compress.recipe import Recipe
from eval import heldout
from eval.accuracy.metrics import log_softmax
from eval.accuracy.sanity import GUESS, reference_to_guess, unigram_perplexity
from eval.budget.budget import judge
from eval.budget.limits import Budget
from pipeline.judge.inspecting import Inspector
from pipeline.run.given import check_foresees
from targets.host.torch_runtime import TorchRuntime
from tests.support.checkpoints.packed import V1, gptq, write_packed
from tests.support.command_line import call


def gptq_folder(folder: Path, *, symmetric: bool = True, bits: int = 4, misread: bool = False) -> Path:
    """The demo in another tool's folder; `misread`: under the other version's name, and nothing said of sym."""
    made = Recipe.make({"method": "rtn", "symmetric": symmetric, "bits": bits})
    checkpoint = Checkpoint.open(demo_checkpoint())
    write(quantize(checkpoint, None, made, folder / "codes"), checkpoint, folder / "gptq", "gptq")
    if misread:
        (folder / "gptq" / "quantize_config.json").unlink()  # says the same once more
        path = folder / "gptq" / "config.json"
        config = json.loads(path.read_text())
        said = config["quantization_config"]
        del said["sym"]
        said["checkpoint_format"] = {"gptq": "gptq_v2", "gptq_v2": "gptq"}[said["checkpoint_format"]]
        path.write_text(json.dumps(config))
    return folder / "gptq"


@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_points_that_are_misread_show_in_the_codes_mean(symmetric: bool, tmp_path: Path) -> None:
    sound = PackedCheckpoint.open(gptq_folder(tmp_path / "a", symmetric=symmetric))
    found = [weight for weight in (sound.linear(name) for name in sound.survey) if weight is not None]
    assert max(abs(offset(weight.weight)) for weight in found) < 0.05
    wrong = PackedCheckpoint.open(gptq_folder(tmp_path / "b", symmetric=symmetric, misread=True))
    with pytest.raises(InputError, match="zero points are misread") as caught:
        given_recipe(wrong, Recipe())
    assert "checkpoint_format" in str(caught.value)


def perplexity(folder: Path, text: heldout.HeldOut) -> np.ndarray:
    """Nats of the judged tokens of one window."""
    window = text.windows[0]
    rows = np.flatnonzero(window.judged[1:])
    logs = log_softmax(TorchRuntime(PackedCheckpoint.open(folder), 256).logits(window.tokens.tolist()))
    return -logs[rows, window.tokens[1:][rows]]


@pytest.mark.parametrize("misread", [False, True])
def test_a_misread_reference_cannot_pass(misread: bool, tmp_path: Path) -> None:
    """Whatever its artifacts are held against: it foresees text worse than somebody who counts tokens."""
    text = heldout.load([], Checkpoint.open(demo_checkpoint()).tokenizer())
    folder = gptq_folder(tmp_path, symmetric=False, misread=misread)
    found = reference_to_guess(perplexity(folder, text), text.windows, 6144, "cpu")
    assert (found.value > 1.5) if misread else (found.value < 0.2)
    assert "unigram guess" in found.note
    checks = {check.name: check for check in judge(Budget(max_mean_kl=1.0), [found], ["cpu"]).checks}
    assert checks[f"max_{GUESS}"].passed != misread


def test_a_checkpoint_is_tried_before_anything_is_built(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Random weights foresee nothing: the run ends with 2, and made no artifact."""
    packed = PackedCheckpoint.open(gptq_folder(tmp_path / "demo"))
    text = heldout.load([], packed.tokenizer())
    check_foresees(packed, text, 6144, Silent())
    write_packed(tmp_path / "m", gptq, V1 | {"group_size": 32}, group=32, symmetric=True, shape={"vocab": 6144})
    run = tmp_path / "run"
    arguments = ["--target", "generic-arm64", "--model", str(tmp_path / "m"), "--out", str(run), "--context", "128",
                 "--chunk", "32"]  # fmt: skip
    assert call(*arguments) == 2
    said = " ".join(capfd.readouterr().err.split())
    assert "predicts text no better than guessing" in said and "unigram guess" in said
    assert not list(run.rglob("artifact.json")) and not list(run.rglob("quantized.json"))


def test_judging_asks_it_of_codes_that_came_with_the_checkpoint_alone(tmp_path: Path) -> None:
    packed = PackedCheckpoint.open(gptq_folder(tmp_path))
    theirs = adopt(packed, given_recipe(packed, Recipe()), tmp_path / "theirs")
    ours = quantize(Checkpoint.open(demo_checkpoint()), None, Recipe.make({"method": "rtn"}), tmp_path / "ours")
    text = heldout.load([], ours.tokenizer())
    assert Inspector(packed, theirs, text, 256).given
    assert not Inspector(Checkpoint.open(demo_checkpoint()), ours, text, 256).given


def test_the_unigram_guess_is_its_formula() -> None:
    tokens = [3, 3, 3, 1, 0, 3, 1]
    count = Counter(tokens)
    nats = [-math.log((count[token] - 1 + 1) / (len(tokens) - 1 + 5)) for token in tokens]
    found = unigram_perplexity(np.array(tokens), 5)
    assert found == pytest.approx(math.exp(sum(nats) / len(nats)))


def test_on_a_short_text_the_uniform_guess_is_the_better_one() -> None:
    text = heldout.load([], Checkpoint.open(demo_checkpoint()).tokenizer())
    window = heldout.Window(np.arange(10), np.ones(10, dtype=bool), "a", np.zeros(10, dtype=np.int64))
    assert "uniform guess" in reference_to_guess(np.ones(9), [window], 10, "cpu").note
    assert "unigram guess" in reference_to_guess(np.ones(9), text.windows, 6144, "cpu").note
