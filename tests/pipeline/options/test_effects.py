"""What would change nothing, or could not be decided, is said before any work: exit 2 and nothing written."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from typer.main import get_command

from bluelm.errors import InputError
from bluelm.system.files import demo_checkpoint
from bluelm.text.tokenizer import Tokenizer
from compress.recipe import Recipe
from compress.widths.allocate import Allowed, check_room
from eval import heldout
from eval.budget.limits import Budget, DomainLimits
from eval.budget.sufficient import check_text, lacking
from pipeline import cli
from pipeline.cli import main
from pipeline.options.effects import EVALUATE, QUANTIZE, RUN, EvaluateFacts, Idle, RunFacts, refuse_idle
from targets.runtime import Place
from tests.support.checkpoints.shapes import tiny_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(demo_checkpoint())


def call(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as leaving:
        main([str(argument) for argument in arguments])
    return int(leaving.value.code or 0)


CPU = ("--target", "generic-arm64")
NPU = ("--target", "snapdragon")
NOWHERE = ("--target", "dimensity", "--runtime", "executorch-neuropilot")
AUTO = ("--bits", "auto", "--max-kl", "0.1")
IDLE: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "no NPU": ((*CPU, "--npu-tokens", "512"), ("--npu-tokens", "no NPU artifact", "--eval-tokens")),
    "no phone": ((*CPU, "--allow-other-soc"), ("--allow-other-soc", "no phone", "--device SERIAL")),
    "no phone to run on": ((*NPU, "--runner-config", "x.yaml"), ("--runner-config", "no phone")),
    "not judged": ((*NOWHERE, "--eval-tokens", "512"), ("--eval-tokens", "can run this artifact")),
    "not judged on a text": ((*NOWHERE, "--eval", "x.txt"), ("--eval ", "can run this artifact")),
    "no history of it": ((*NOWHERE, "--history", "x.sqlite"), ("--history", "can run this artifact")),
    "widths are chosen": ((*CPU, *AUTO, "--group-size", "64"), ("--group-size", "--bits auto")),
    "the head's width is chosen": ((*CPU, *AUTO, "--head-bits", "4"), ("--head-bits", "--bits auto")),
    "chunk above context": ((*CPU, "--context", "64", "--chunk", "65"), ("--chunk 65", "--context 64", "--chunk 64")),
    "too few tokens": ((*CPU, "--eval-tokens", "256"), ("--eval-tokens 256", "documents", "give --eval-tokens")),
    "too few tokens on the NPU": ((*NPU, "--npu-tokens", "256"), ("--npu-tokens 256", "give --npu-tokens")),
    "a size that cannot be": ((*CPU, "--bits", "auto", "--size", "10KB"), ("10,000 bytes are too few", "give --size")),
}  # fmt: skip


@pytest.mark.parametrize("way", [["--dry-run"], [], ["plan"]])
@pytest.mark.parametrize("name", IDLE)
def test_runs(name: str, way: list[str], model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    given, told = IDLE[name]
    out = tmp_path / "dist"
    assert call(*way, *given, "--model", model, "--out", out) == 2
    said = capfd.readouterr().err
    for words in ("error:", "fix:", *told):
        assert words in said
    assert not out.exists()


def test_the_remedies_work(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What the messages name instead is taken."""
    dry = ("--dry-run", "--model", model, "--out", tmp_path / "dist")
    for given in (
        (*CPU, "--eval-tokens", "256"),
        (*NPU, "--npu-tokens", "256"),
        (*CPU, "--bits", "auto", "--size", "10KB"),
    ):
        option = given[-2]
        assert call(*dry, *given) == 2
        enough = capfd.readouterr().err.partition(f"give {option} ")[2].split()[0]
        assert call(*dry, *given[:-1], enough) == 0
        capfd.readouterr()


def test_text_for_codes_that_read_none_is_a_warning(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = ("--model", model, "--out", tmp_path / "dist", "--dry-run", "--method", "rtn")
    assert call(*CPU, *out, "--samples", "4", "--activations", "bfloat16") == 0
    said = " ".join(capfd.readouterr().err.split())
    assert "--samples would change nothing" in said
    assert "--activations would change nothing" in said
    assert call(*NPU, *out, "--samples", "4") == 0  # ranges of activations are taken from text
    assert "change nothing" not in capfd.readouterr().err
    assert call("quantize", model, tmp_path / "q", "--dry-run", "--method", "rtn", "--seed", "4") == 0
    assert "--seed would change nothing" in " ".join(capfd.readouterr().err.split())


def test_options_that_a_sweep_shares_are_for_whom_they_concern(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    dry = ("--model", model, "--out", tmp_path / "dist", "--dry-run", "--shared-options")
    assert call(*CPU, *dry, "--npu-tokens", "512") == 0
    assert "--npu-tokens would change nothing" in " ".join(capfd.readouterr().err.split())


OTHERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "quantize, float ends": (
        ("quantize", "MODEL", "OUT", "--format", "gptq", "--head-bits", "4"), ("--head-bits", "float16"),
    ),
    "quantize, size": (("quantize", "MODEL", "OUT", "--bits", "auto", "--size", "10KB"), ("10,000 bytes are too few",)),
    "generate, seed": (("generate", "OUT", "--prompt", "a", "--seed", "1"), ("--seed", "--temperature")),
    "compare, length": (("compare", "MODEL", "MODEL", "--prompts", "0", "--length", "8"), ("--length", "--prompts 1")),
    "estimate, bits": (("estimate", "--artifact", "OUT", "--bits", "4"), ("--bits", "the artifact's own")),
    "estimate, context": (("estimate", "--artifact", "OUT", "--context", "4"), ("--context", "the artifact's own")),
    "history, subject": (("history", "--subject", "cpu"), ("--subject", "--metric NAME")),
    "verify, certificate": (("verify", "MODEL", "--manifest", "x", "--certificate", "ab"), ("--certificate", "bundle")),
    "bundle, certificate": (("bundle", "OUT", "--certificate", "x.pem"), ("--certificate", "--key FILE")),
    "sweep, jobs": (("sweep", "--targets", "snapdragon", "--ray", "local", "--jobs", "2"), ("--jobs", "Ray")),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_commands(name: str, model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    given, told = OTHERS[name]
    places = {"MODEL": model, "OUT": tmp_path / "out"}
    assert call(*(places.get(word, word) for word in given)) == 2
    said = capfd.readouterr().err
    for words in told:
        assert words in said
    assert list(tmp_path.iterdir()) == []


def names(command: str | None = None) -> set[str]:
    found = get_command(cli.app)
    if command is not None:
        found = found.commands[command]  # pyright: ignore[reportAttributeAccessIssue]
    return {option for parameter in found.params for option in parameter.opts[:1]}


def rows() -> Iterator[tuple[Idle, set[str]]]:
    yield from ((row, names()) for row in RUN)
    yield from ((row, names("quantize")) for row in QUANTIZE)
    yield from ((row, names("evaluate")) for row in EVALUATE)


def test_tables_name_options_that_there_are() -> None:
    for row, known in rows():
        assert set(row.options) <= known
    assert set(inspect.signature(cli._plan).parameters) >= {"context", "npu_tokens"}


def test_every_row_is_reached_by_some_run_and_not_by_all() -> None:
    recipes = [Recipe.make({"method": m}) for m in ("gptq", "rtn")] + [Recipe.make({"bits": "auto", "max_kl": 0.1})]
    facts = [
        RunFacts(recipe, place, place == "htp", given, phone, phone)
        for recipe in recipes for place in get_args(Place) for given in (False, True) for phone in (False, True)
    ]  # fmt: skip
    for row in RUN:
        assert {row.when(one) for one in facts} == {False, True}, row
    for row in EVALUATE:
        seen = {row.when(EvaluateFacts(r, frozenset(s))) for r in (False, True) for s in (("npu",), ("cpu",))}
        assert seen == {False, True}
    with pytest.raises(InputError):
        refuse_idle({"--npu-tokens"}, RUN, next(f for f in facts if f.place == "cpu"))


def texts(folder: Path, *documents: str) -> Path:
    path = folder / "mine.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


LONG = "The sea is wide and the land is far away from here, said the old sailor to his son. " * 40


@pytest.mark.parametrize(
    ("documents", "limits", "told"),
    [
        ([LONG], {"max_mean_kl": 0.01}, "1 documents, and max_mean_kl needs at least 4"),
        ([LONG] * 3, {"max_p99_kl": 0.01}, "3 documents"),
        (["The sea is wide."] * 4, {"min_top1_agreement": 0.95}, "and min_top1_agreement 0.95 needs at least 106"),
        ([LONG] * 4, {"domains": {"zh": DomainLimits(max_mean_kl=0.1)}}, "0 documents of zh"),
        ([LONG] * 4, {"max_mean_kl": 0.01, "min_top1_agreement": 0.95}, None),
        ([LONG] * 4, {"min_top1_agreement": 1.0}, None),
        ([LONG], {"max_prefill_decode_kl": 0.01}, None),
    ],
)
def test_text_that_limits_need(
    documents: list[str], limits: dict, told: str | None, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    held_out = heldout.load([texts(tmp_path, *documents)], tokenizer)
    budget = Budget(**limits)
    if told is None:
        check_text(held_out, budget, {"--eval-tokens": 16384})
        return
    with pytest.raises(InputError) as error:
        check_text(held_out, budget, {"--eval-tokens": 16384})
    assert told in error.value.problem
    assert str(tmp_path / "mine.jsonl") in str(error.value)


def test_the_number_that_would_do_does(tokenizer: Tokenizer) -> None:
    held_out = heldout.load([], tokenizer)
    budget = Budget(max_mean_kl=0.01, domains={"math": DomainLimits(max_mean_kl=0.02)})
    with pytest.raises(InputError) as error:
        check_text(held_out, budget, {"--npu-tokens": 256})
    enough = int((error.value.fix or "").split()[2])
    assert lacking(held_out.first(enough), budget) is None
    assert lacking(held_out.first(enough - 256), budget) is not None


def test_room_is_that_of_the_smallest_widths(model: Path) -> None:
    from bluelm.config import ModelConfig

    config, recipe = ModelConfig.from_folder(model), Recipe.make({"bits": "auto", "size": 1})
    with pytest.raises(InputError) as error:
        check_room(config, recipe, Allowed.all(recipe))
    least = int(error.value.problem.rpartition(" ")[2].replace(",", ""))
    check_room(config, recipe.model_copy(update={"size": least}), Allowed.all(recipe))
    with pytest.raises(InputError):
        check_room(config, recipe.model_copy(update={"size": least - 1}), Allowed.all(recipe))
