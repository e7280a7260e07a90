"""Budget files: what is wrong and where; what is extended, targets and sizes are laid over one another; the schema."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from bluelm.errors import InputError
from eval.budget.budget_file import DEFAULT_BUDGET, SCHEMA, json_schema, load
from eval.budget.limits import AtMost

LAYERED = """
extends: default
max_mean_kl: 0.02
max_p99_kl: 0.2
sizes:
  - {up_to: 4B, max_mean_kl: 0.03}
  - {up_to: 1.5B, max_mean_kl: 0.04}
targets:
  snapdragon:
    max_artifact_bytes: 2 GB
    min_decode_tokens_per_s: {at_least: 20}
    sizes: [{up_to: 2B, max_artifact_bytes: 1 GB}]
  SM8750: {max_p99_kl: 0.3}
  qnn-context: {max_p99_kl: null, max_artifact_bytes: 3 GB}
"""


def write(folder: Path, text: str, name: str = "budget.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("max_mean_k: 0.1", ["unknown key", "did you mean max_mean_kl?"]),
        ("zzz: 0.1", ["unknown key", "known keys: max_perplexity_ratio"]),
        ("min_decode_tokens_per_s: {at_lest: 3}", ["at_lest", "did you mean at_least?"]),
        ("min_decode_tokens_per_s: {at_least: 3, accept: guessed}", ["accept", "guessed"]),
        ("targets: {snapdragon: {max_mean_k: 0.1}}", ["targets.snapdragon.max_mean_k", "did you mean max_mean_kl?"]),
        ("targets: {snapdragn: {max_mean_kl: 0.1}}", ["unknown target", "did you mean snapdragon?"]),
        ("domains: {zh: {max_p99_k: 1}}", ["domains.zh.max_p99_k", "max_mean_kl"]),
        ("sizes: [{max_mean_kl: 0.1}]", ["lacks a value", "up_to"]),
        ("sizes: [{up_to: huge, max_mean_kl: 0.1}]", ["up_to", "huge"]),
        ("extends: nowhere.yaml", ["cannot be read", "nowhere.yaml"]),
        ("extends: budget.yaml", ["in a cycle"]),
        ('extends: "\\0"', ["cannot be read"]),
        ("max_mean_kl: " + "9" * 5000, ["not YAML that can be read", "characters"]),
        ("max_mean_kl: 2024-99-99", ["max_mean_kl", "2024-99-99"]),
        ("max_mean_kl: soon", ["max_mean_kl", "soon"]),
        ("max_mean_kl: -1", ["max_mean_kl", "greater than 0"]),
        ("min_top1_agreement: 96", ["min_top1_agreement", "less than or equal to 1"]),
        ("confidence: 95", ["confidence", "less than 1"]),
        ("max_memory_bytes: 3 parsecs", ["max_memory_bytes", "parsecs"]),
        ("max_mean_kl: null", ["no limits"]),
        ("", ["no limits"]),
        ("- 3", ["no limits"]),
        ("a: [", ["not YAML", "line 2, column 1"]),
    ],
)
def test_a_bad_budget_says_what_is_wrong_and_where(tmp_path: Path, text: str, told: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        load(write(tmp_path, text))
    assert ".yaml" in str(caught.value)
    for words in told:
        assert words in str(caught.value)


def test_a_diamond_of_budgets_is_not_read_without_end(tmp_path: Path) -> None:
    """Each extends the next one twice: 22 levels are four million files."""
    for level in range(22):
        (tmp_path / f"{level}.yaml").write_text(f"extends: [{level + 1}.yaml, {level + 1}.yaml]\n")
    (tmp_path / "22.yaml").write_text("max_mean_kl: 0.1\n")

    with pytest.raises(InputError, match="more than 64 files"):
        load(tmp_path / "0.yaml")
    assert load(tmp_path / "18.yaml").max_mean_kl == load(tmp_path / "22.yaml").max_mean_kl


def test_a_missing_budget_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        load(tmp_path / "none.yaml")


def test_sizes_are_read_with_units(tmp_path: Path) -> None:
    assert load(write(tmp_path, "max_memory_bytes: 1.5 GiB")).max_memory_bytes == 1.5 * 2**30


@pytest.mark.parametrize(
    ("names", "parameters", "kl", "p99", "size"),
    [
        ((), None, 0.02, 0.2, 4e9),
        ((), 1.5e9, 0.04, 0.2, 4e9),  # no larger than: the first row that holds it
        ((), 1.6e9, 0.03, 0.2, 4e9),
        ((), 7e9, 0.02, 0.2, 4e9),
        (("onnx-genai", "generic-arm64", "any"), 7e9, 0.02, 0.2, 4e9),
        (("litert", "snapdragon", "SM8650"), 7e9, 0.02, 0.2, 2e9),
        (("litert", "snapdragon", "SM8650"), 1e9, 0.04, 0.2, 1e9),
        (("qnn-context", "snapdragon", "SM8650"), 7e9, 0.02, None, 2e9),  # the target counts behind the runtime
        (("qnn-context", "snapdragon", "sm8750"), 7e9, 0.02, 0.3, 2e9),  # the chip last
    ],
)
def test_targets_and_sizes_are_laid_over(
    tmp_path: Path, names: tuple[str, ...], parameters: float | None, kl: float, p99: float | None, size: float
) -> None:
    budget = load(write(tmp_path, LAYERED), names=names, parameters=parameters)
    assert (budget.max_mean_kl, budget.max_p99_kl, budget.max_artifact_bytes) == (kl, p99, size)
    assert budget.confidence == 0.95  # the default's
    speed = budget.min_decode_tokens_per_s
    assert speed is not None
    assert speed.accept == ("measured", "estimated")  # a part of a mapping leaves the rest
    assert speed.at_least == (20 if "snapdragon" in names else 5)


def test_another_number_leaves_what_is_accepted(tmp_path: Path) -> None:
    write(tmp_path, "max_mean_kl: {at_most: 0.1, accept: [measured]}", "a.yaml")
    found = load(write(tmp_path, "extends: a.yaml\nmax_mean_kl: 0.2")).max_mean_kl
    assert isinstance(found, AtMost)
    assert (found.at_most, found.accept) == (0.2, ("measured",))
    again = load(write(tmp_path, "extends: default\nmax_mean_kl: {at_most: 0.3, accept: measured}")).max_mean_kl
    assert isinstance(again, AtMost)
    assert (again.at_most, again.accept) == (0.3, ("measured",))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("max_mean_kl: {at_least: 0.1}", "max_mean_kl.at_least"),
        ("max_mean_kl: {accept: [measured]}", "lacks a value"),
        ("max_mean_kl: {at_most: 0.1, accept: [guessed]}", "max_mean_kl.accept"),
        ("max_mean_kl: {at_most: 0.1, accept: []}", "max_mean_kl.accept"),
        ("domains: {zh: {max_mean_kl: {at_most: -1}}}", "domains.zh.max_mean_kl.at_most"),
        ("min_top1_agreement: {at_least: 2}", "min_top1_agreement.at_least"),
        ("max_mean_kl: soon", "key max_mean_kl"),
    ],
)
def test_a_limit_with_a_mapping_is_checked_as_one_without(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(InputError) as caught:
        load(write(tmp_path, text))
    assert told in str(caught.value)


def test_the_default_s_speed_limit_holds_from_half_a_billion_on() -> None:
    assert load(DEFAULT_BUDGET, parameters=0.5e9).min_decode_tokens_per_s is None
    assert load(DEFAULT_BUDGET, parameters=0.6e9).min_decode_tokens_per_s is not None
    assert load(DEFAULT_BUDGET, names=("onnx-cpu",), parameters=7e9).min_decode_tokens_per_s is None


def test_the_later_of_two_files_counts(tmp_path: Path) -> None:
    write(tmp_path, "max_mean_kl: 0.1\nmax_p99_kl: 0.5", "a.yaml")
    write(tmp_path, "extends: a.yaml\nmax_mean_kl: 0.2", "b.yaml")
    budget = load(write(tmp_path, "extends: [a.yaml, b.yaml]\ntwo_sided: false"))
    assert (budget.max_mean_kl, budget.max_p99_kl, budget.two_sided) == (0.2, 0.5, False)


def test_the_published_schema_is_the_code_s(tmp_path: Path) -> None:
    assert json.loads(SCHEMA.read_text(encoding="utf-8")) == json.loads(json_schema())
    check = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))
    for good in (DEFAULT_BUDGET.read_text(encoding="utf-8"), LAYERED):
        assert not list(check.iter_errors(yaml.safe_load(good)))
    for bad in ("max_mean_k: 1", "targets: {snapdragon: {max_mean_kl: soon}}", "sizes: [{max_mean_kl: 1}]"):
        assert list(check.iter_errors(yaml.safe_load(bad)))


def test_a_format_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "budget.yaml"
    path.write_text("accept_not_known: [onnx-cpu, onxx]\n")
    with pytest.raises(InputError, match="unknown format 'onxx'"):
        load(path)


@pytest.mark.parametrize(("ci", "runtime", "text", "required"), [
    ("true", "gguf", "max_mean_kl: 1", True),
    ("true", "onnx-genai", "max_mean_kl: 1", True),
    ("true", "litert", "max_mean_kl: 1", False),
    ("true", "gguf", "max_mean_kl: 1\nrequire_runner: false", False),
    ("", "gguf", "max_mean_kl: 1", False),
    ("", "litert", "require_runner: true", True),
])  # fmt: skip
def test_in_ci_the_runner_of_a_runtime_that_has_one_is_required(
    ci: str, runtime: str, text: str, required: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CI", ci)
    assert load(write(tmp_path, text), names=(runtime, "snapdragon")).require_runner is required


@pytest.mark.parametrize(
    ("parameters", "ratio", "kl", "top1", "speed"),
    [
        (8e6, 1.02, 0.01, 0.95, False),  # nothing is known of models this small: as of the largest
        (134_515_008, 1.12, 0.15, 0.82, False),
        (1.1e9, 1.04, 0.04, 0.9, True),
        (7e9, 1.03, 0.035, 0.915, True),
        (13e9, 1.02, 0.01, 0.95, True),
        (None, 1.02, 0.01, 0.95, True),
    ],
)
def test_the_default_budget_asks_what_models_of_that_size_can_do(
    parameters: float | None, ratio: float, kl: float, top1: float, speed: bool
) -> None:
    budget = load(DEFAULT_BUDGET, parameters=parameters)
    assert (budget.max_perplexity_ratio, budget.max_mean_kl, budget.min_top1_agreement) == (ratio, kl, top1)
    assert (budget.min_decode_tokens_per_s is not None) == speed
