"""Methods: each one whole, none known by name elsewhere, and all that a new one has to bring."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch

from bluelm.checkpoint import Checkpoint
from bluelm.errors import InputError
from compress import methods
from compress.checkpoint import work
from compress.checkpoint.store import EMBEDDING_FILE, HEAD_FILE, QuantizedCheckpoint, block_file
from compress.cost import cost
from compress.methods.grid import choose_grid
from compress.methods.protocol import Method, Options
from compress.recipe import Recipe
from compress.widths.width import Widths
from eval.report import Report
from pipeline.cli import main
from pipeline.run.identity import slug, unusual
from pipeline.run.plan import recipe_in_words
from tests.support.checkpoints.shapes import tiny_checkpoint
from tests.support.command_line import LAX, QUICK
from tests.support.toy_method import ENTRY

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
NAMES = pytest.mark.parametrize("name", methods.names())
SMALL = ["--samples", "4", "--length", "32", "--context", "64"]


@NAMES
def test_what_an_entry_names_is_a_whole_method(name: str) -> None:
    entry, method = methods.entry(name), methods.method(name)
    assert isinstance(method, Method) and issubclass(method.options, Options)
    assert entry.title and entry.help and entry.help[-1] != "."
    asked = method.statistics(method.options())
    assert asked.inputs or not (asked.float_block or asked.float_stream), "these are of calibration text"
    assert asked.float_block == (type(method).fold is not Method.fold), "fold is asked for by float_block"
    assert set(method.defaults) <= set(Recipe.model_fields)
    assert bool(method.options.model_fields) == bool(method.options.section)


@NAMES
def test_it_chooses_codes_of_the_widths_asked_for(name: str) -> None:
    method = methods.method(name)
    options, x = method.options(), torch.randn(400, 64, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
    hessian = x.T @ x / len(x) if method.statistics(options).inputs else None
    solver = method.solver(hessian, options)
    json.dumps(dict(solver.note))
    for widths in (Widths(4, 32, True), Widths(8, -1, False)):
        found = solver.codes(solver.target(weight, None), widths, search=True)
        assert (found.bits, found.group_size, found.shape) == (widths.bits, widths.group_size, weight.shape)
        step = choose_grid(weight, widths.bits, widths.group_size, widths.symmetric).scales.float().max()
        assert (found.dequantize() - weight).abs().max() < 4 * step


@NAMES
def test_what_it_takes_is_told(name: str, tmp_path: Path) -> None:
    method, recipe = methods.method(name), Recipe.make({"method": name})
    options, widths = recipe.quantizer_options, Widths(4, 32, True)
    one, twice = (method.cost(out, 64, widths, options) for out in (4096, 8192))
    assert all(math.isfinite(term) and term >= 0 for term in astuple(one))
    assert (one.operations > 0) == recipe.reads_text
    assert (twice.operations, twice.loop_seconds) == (2 * one.operations, 2 * one.loop_seconds)
    assert twice.factorization_operations == one.factorization_operations
    checkpoint = Checkpoint.open(tiny_checkpoint(tmp_path / "model"))
    plain = Recipe.make({"method": "rtn", "grid": recipe.grid})
    assert (
        cost(checkpoint, recipe, on_disk=False, rate=1e9).seconds
        >= cost(checkpoint, plain, on_disk=False, rate=1e9).seconds
    )


@NAMES
def test_it_is_told_to_users(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"{name} ({methods.entry(name).help})" in methods.help_text()
    with pytest.raises(SystemExit):
        main(["quantize", "--help"])
    helped = re.sub(r"[│\s]+", " ", capsys.readouterr().out)
    assert f"{name} (" in helped
    assert not undocumented(name)


def undocumented(name: str) -> list[str]:
    """What docs/recipes.md says nothing of."""
    keys = methods.method(name).options.model_fields
    missing = [key for key in keys if not re.search(rf"^ *{key}: ", PAGE, re.MULTILINE)]
    return missing if f"**{name}**" in PAGE else [name, *missing]


def test_what_is_not_documented_is_found() -> None:
    with methods.added(ENTRY):
        assert undocumented("toy") == ["toy", "share"]


@NAMES
def test_a_recipe_of_it_is_named_and_reads_back(name: str) -> None:
    recipe = Recipe.make({"method": name})
    assert Recipe.make(recipe.model_dump(mode="json")) == recipe
    assert re.fullmatch(r"[a-z0-9-]+", slug(recipe))
    assert methods.entry(name).title in recipe_in_words(recipe)


def test_options_have_sections_of_their_own() -> None:
    kinds = methods.option_types()
    sections = [kind.section for kind in kinds]
    assert len(set(sections)) == len(sections) and not set(sections) & set(Recipe.model_fields)
    at_top = [key for kind in kinds if kind.at_top for key in kind.model_fields]
    assert len(set(at_top)) == len(at_top) and not set(at_top) & set(Recipe.model_fields)


def test_options_stand_at_the_top_as_before_or_under_their_method() -> None:
    top, section = Recipe.make({"damping": 0.02, "sweeps": 1}), Recipe.make({"gptq": {"damping": 0.02, "sweeps": 1}})
    assert top == section and top.digest() == section.digest()
    assert top.model_dump()["damping"] == 0.02 and "gptq" not in top.model_dump()
    assert "damping: 0.02" in top.to_yaml()


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"gptq": {"dampin": 1}}, "gptq in a recipe has no key 'dampin'\n  fix:   did you mean 'damping'"),
        ({"gptq": {"damping": 0}}, "damping = 0"),
        ({"gptq": 3}, "gptq is a table of keys and values, not 3"),
        ({"gptq": {"sweeps": 1}, "sweeps": 2}, "give it once"),
        ({"toy": {"share": 0.5}}, "no key 'toy'"),
        ({"method": "toy"}, "unknown method 'toy'; known methods: gptq, awq, awq+gptq, rtn"),
        ({"method": "rtn", "refine": 5}, "rtn reads no text to be refined on; choose gptq, awq, awq+gptq"),
    ],
)
def test_mistakes_in_them_are_named(values: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError) as error:
        Recipe.make(values)
    assert says in str(error.value)


def test_codes_that_came_with_a_checkpoint_cannot_be_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("method: given\n")
    with pytest.raises(InputError, match=r"cannot be asked for\n.*\n  fix:   give one of gptq"):
        Recipe.load(path)
    assert "given" not in methods.names() and Recipe.make({"method": "given"}).given


def test_an_unknown_method_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="unknown method 'magic'\n  fix:   known methods: gptq, awq"):
        methods.method("magic")
    with pytest.raises(InputError, match="already"), methods.added(methods.entry("rtn")):
        pass


def test_no_part_tells_one_method_from_another() -> None:
    """Nothing compares a method's name; no table maps names to anything; outside `compress/methods`."""
    found = list[str]()
    for package in ("calibration", "compress", "export", "targets", "eval", "pipeline"):
        for path in (ROOT / package).rglob("*.py"):
            if path.parent == ROOT / "compress" / "methods":
                continue
            found += [f"{path}:{line}" for line in told_apart(ast.parse(path.read_text(encoding="utf-8")))]
    assert not found
    assert list(told_apart(ast.parse("if recipe.method == 'rtn': pass"))) == [1]
    assert list(told_apart(ast.parse("x = {'gptq': 1, 'rtn': 2}"))) == [1]


def told_apart(tree: ast.AST) -> Iterator[int]:
    """Lines that compare `….method` with something, or have a table of two methods and no format of the same names."""
    known = set(methods.all_names())
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = (node.left, *node.comparators)
            literal = any(isinstance(part, ast.Constant) for side in sides for part in ast.walk(side))
            if literal and any(isinstance(side, ast.Attribute) and side.attr == "method" for side in sides):
                yield node.lineno
        elif isinstance(node, ast.Dict | ast.Tuple | ast.Set | ast.List):
            items = node.keys if isinstance(node, ast.Dict) else node.elts
            words = {item.value for item in items if isinstance(item, ast.Constant)}
            if len(words & known) > 1 and not words & {"compressed-tensors"}:  # formats have the names of methods
                yield node.lineno


# ---- a new method: one module


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    tiny_checkpoint(folder / "model")
    (folder / "toy.yaml").write_text("method: toy\ntoy: {share: 0.95}\n")
    (folder / "lax.yaml").write_text(LAX)
    return folder


def call(*arguments: str | Path) -> int:
    """The exit code of the command line with the toy's entry added."""
    with methods.added(ENTRY), pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    return int(left.value.code or 0)


def test_a_module_is_a_method_that_quantizes_and_resumes(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    common = ("quantize", place / "model", "--recipe", place / "toy.yaml", *SMALL[:4])
    assert call(*common, place / "whole") == 0
    pieces, most = list[str](), 2
    original = work.write_piece

    def counting(path: Path, *rest: Any) -> str:
        if len(pieces) == most:
            raise KeyboardInterrupt
        pieces.append(path.name)
        return original(path, *rest)

    monkeypatch.setattr(work, "write_piece", counting)
    assert call(*common, place / "halved") == 6
    most = 4
    assert call(*common, place / "halved") == 0
    whole, halved = (
        {path.name: path.read_bytes() for path in (place / name).iterdir()} for name in ("whole", "halved")
    )
    assert whole == halved
    assert pieces == [EMBEDDING_FILE, block_file(0), block_file(1), HEAD_FILE]  # none of them twice

    with methods.added(ENTRY):
        found, source = QuantizedCheckpoint.open(place / "whole"), Checkpoint.open(place / "model")
    exact = source.block(0)
    norm = "input_layernorm.weight"
    assert torch.equal(found.block(0)[norm], 2 * exact[norm])
    name, told = "model.layers.0.self_attn.q_proj", found.info["layers"]["model.layers.0.self_attn.q_proj"]
    assert (told["method"], told["share"], told["factor"]) == ("toy", 0.95, 2)
    spans = choose_grid(exact["self_attn.q_proj.weight"] / 2, 4, 32, True).scales.float()
    drawn = found.linear(name).scales.float() / spans
    rows = ((drawn - 0.95).abs() < 0.01).all(1)
    assert int((~rows).sum()) == told["rows_rounded"] < len(rows)
    assert torch.equal(drawn[~rows], torch.ones_like(drawn[~rows]))
    with pytest.raises(InputError, match="no key 'toy'"):  # without its entry
        QuantizedCheckpoint.open(place / "whole")


def test_it_is_planned_run_and_reported(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ("--target", "generic-arm64", "--model", place / "model", "--out", place, "--method", "toy")
    assert call("plan", *options, *SMALL) == 0
    told = capfd.readouterr().out
    assert "TOY 4-bit, groups of 32" in told and "peak memory" in told and "-toy-w4-g32-" in told
    whole = (*options, "--budget", place / "lax.yaml", "--name", "run", *QUICK, "--history", place / "history.db")
    assert call(*whole) == 0, capfd.readouterr().err
    report = Report.open(place / "run")
    assert report.passed and report.configuration["recipe"]["toy"] == {"share": 0.9}
    assert report.configuration["recipe"]["method"] == "toy"
    assert "toy" in (place / "run" / "report.html").read_text(encoding="utf-8")


def test_its_name_says_its_options_only_where_they_are_unusual() -> None:
    with methods.added(ENTRY):
        plain, other = (Recipe.load("w4-g32", method="toy", toy={"share": share}) for share in (0.9, 0.8))
        assert (slug(plain), unusual(plain, {})) == ("toy-w4-g32", "")
        assert len(unusual(other, {})) == 6 and plain.digest() != other.digest()
        assert Recipe.make(other.model_dump(mode="json")) == other
        assert "toy" not in Recipe().model_dump()
        assert "toy (spans drawn in by a share)" in methods.help_text()


def test_without_its_entry_it_is_no_method(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for arguments in (("--method", "toy"), ("--recipe", place / "toy.yaml")):
        with pytest.raises(SystemExit) as left:
            main(["quantize", str(place / "model"), str(place / "none"), *map(str, arguments)])
        assert left.value.code == 2
        assert "toy" in capfd.readouterr().err
    assert not (place / "none").exists()
