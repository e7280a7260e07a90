"""Records of formats: whole, true of what they name, and all that a new runtime has to bring."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from bluelm.errors import InputError
from eval.report import Report
from export import formats
from export.artifacts.artifact import Artifact
from export.bundle import project
from export.formats import Record, Without
from targets.backend import Backend
from targets.phones.programs import load_program
from targets.socs import table
from targets.tools import tools
from tests.support.checkpoints.shapes import tiny_checkpoint
from tests.support.command_line import LAX, bluelm, environment

RECORDS = pytest.mark.parametrize("record", formats.records().values(), ids=lambda record: record.name)


def paths(record: Record) -> Iterator[str]:
    """Every import path of a record."""
    yield from (path for path in (record.backend, record.reader, record.ends) if isinstance(path, str))
    yield from (run.opener for run in record.runs.values())
    yield from (path for path in (record.rebuild, record.open_up) if path is not None)
    if not isinstance(record.runner, Without):
        yield record.runner.opener
        yield from (path for path in (record.runner.allowance, record.runner.leaves_out) if path is not None)


def test_every_module_of_records_is_read() -> None:
    there = {path.stem for path in Path("export/formats").glob("*.py") if "\nRECORDS = " in path.read_text("utf-8")}
    assert there == set(formats.MODULES)


@RECORDS
def test_what_a_record_names_is_there(record: Record) -> None:
    for path in paths(record):
        assert callable(formats.function(path)), path
    assert {*record.tools, *record.optional_tools} <= {tool.name for tool in tools()}
    assert set(record.targets) <= set(table().targets)
    if not isinstance(record.app, Without):
        assert record.app in project.runtimes()
    if not isinstance(record.device_program, Without):
        assert load_program(record.device_program).decode
    if record.compiled_from is not None:
        assert formats.record(record.compiled_from).lowered_as == record.compiled_from
    assert (record.blocks == "source") == (record.compiled_from is not None)
    assert (record.blocks == "rewritten") == bool(record.graphs) == (record.open_up is not None)
    assert (record.blocks == "built again") == (record.rebuild is not None)


@RECORDS
def test_what_a_record_lacks_has_a_reason(record: Record) -> None:
    for field in fields(record):
        value = getattr(record, field.name)
        if isinstance(value, Without):
            assert len(value.reason.split()) > 3 and value.reason[-1] != ".", field.name
        may_lack = "Without" in str(field.type)
        assert not may_lack or value not in (False, ()), f"{field.name}: say why as `Without(reason)`"
    assert record.runs or not record.blocks


def test_nothing_that_decides_how_strictly_a_format_is_judged_may_be_forgotten() -> None:
    """A record without it is no record. What has a default is asked for by another field (above), or only offers."""
    given = {field.name for field in fields(Record) if field.default is not MISSING}
    assert given == {"optional_tools", "compiled_from", "float_widths", "graphs", "open_up", "rebuild"}
    with pytest.raises(TypeError, match="encodings"):
        replace_without(formats.record("onnx-npu"), "encodings")


def replace_without(record: Record, name: str) -> Record:
    """A record made anew with one field forgotten."""
    return Record(**{field.name: getattr(record, field.name) for field in fields(record) if field.name != name})


@RECORDS
def test_doctor_asks_for_what_runs_it(record: Record) -> None:
    known = {*record.tools, *record.optional_tools, "bluelm-export"}
    if record.targets:
        assert {run.package for run in record.runs.values()} <= known
    assert isinstance(record.runner, Without) or {record.runner.package, *record.runner.needs} <= known


@RECORDS
def test_a_target_offers_it_and_its_backend_is_one(record: Record) -> None:
    if isinstance(record.backend, Without):
        assert not record.targets
        return
    assert record.targets
    backend: Backend = formats.function(record.backend)()
    assert record.cache_widths
    assert callable(backend.check) and callable(backend.lower) and callable(backend.compile)


def test_every_default_runtime_is_offered_by_its_target() -> None:
    for name, row in table().targets.items():
        assert name in formats.record(row.runtime).targets


def test_every_tool_and_app_is_somebodys() -> None:
    rows = formats.records().values()
    assert {tool.name for tool in tools()} == {name for row in rows for name in (*row.tools, *row.optional_tools)}
    assert set(project.runtimes()) == {row.app for row in rows if not isinstance(row.app, Without)}


def test_packages_that_run_formats_are_extras_or_dependencies() -> None:
    told = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    lists = [told["dependencies"], *told["optional-dependencies"].values()]
    known = {requirement.split("[")[0].split("==")[0].split(">")[0].strip() for one in lists for requirement in one}
    used = {run.package for row in formats.records().values() for run in row.runs.values()}
    assert used - {"bluelm-export"} <= known


def test_an_unknown_format_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="unknown format 'onnx'"):
        formats.record("onnx")
    with pytest.raises(InputError, match="already"), formats.added(formats.record("gguf")):
        pass


def test_no_layer_keeps_a_table_of_formats_of_its_own() -> None:
    """A literal that maps two or more formats to something stands in `export/formats` alone."""
    import ast

    known, found = set(formats.names()), list[str]()
    for package in ("bluelm", "calibration", "compress", "export", "targets", "eval", "pipeline"):
        for path in Path(package).rglob("*.py"):
            if path.parent == Path("export/formats"):
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                items = node.keys if isinstance(node, ast.Dict) else getattr(node, "elts", [])
                named = {i.value for i in items if isinstance(i, ast.Constant) and i.value in known}
                if len(named) > 1:
                    found.append(f"{path}:{getattr(node, 'lineno', 0)}: {sorted(named)}")
    assert not found


# ---- a new runtime: one package and one record


def toy(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command line with the toy's record added."""
    program = (
        "from export.formats import added\nfrom tests.support.toy import RECORD\nfrom pipeline.cli import main\n"
        "with added(RECORD):\n    main()"
    )
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment(cwd))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the toy that passed, but for what its file does not tell, which the budget accepts."""
    folder = tmp_path_factory.mktemp("toy")
    tiny_checkpoint(folder / "model")
    lax = LAX.replace("min_decode_tokens_per_s: {at_least: 0.001, where: host}\n", "")  # torch's, of no phone
    (folder / "lax.yaml").write_text(lax + "accept_not_known: [toy]\n")
    common = ["--target", "generic-arm64", "--runtime", "toy", "--model", "model", "--budget", "lax.yaml"]
    done = toy(
        *common, "--name", "toy", "--samples", "4", "--length", "64", "--eval-tokens", "512", "--no-bundle", cwd=folder
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "dist" / "toy"


def test_a_package_and_a_record_are_a_runtime(run: Path) -> None:
    """It is lowered, read back, judged position by position and block by block, and its figures are emulated."""
    report = Report.open(run)
    by_name = {(m.name, m.subject): m for m in report.measurements}
    assert report.passed
    assert by_name["weight_mismatches", "cpu"].value == 0
    assert by_name["runtime_kl_excess", "cpu"].value < 1 and by_name["block_error_excess", "cpu"].value < 1
    assert by_name["mean_kl", "cpu"].how == "emulated" and "toy phone" in by_name["mean_kl", "cpu"].by
    assert "toy" in toy("targets", cwd=run).stdout


def test_damage_in_it_is_found(run: Path) -> None:
    (artifact,) = run.glob("*/artifact.json")
    path = artifact.parent / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.mlp.down_proj.scales"
    save_file(tensors | {name: tensors[name] * 1.05}, path)
    done = toy("evaluate", str(run), "--budget", "../lax.yaml", cwd=run.parent)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "FAIL max_weight_mismatches" in done.stdout
    save_file(tensors, path)


def test_without_its_record_it_is_no_runtime(run: Path) -> None:
    done = bluelm("--target", "generic-arm64", "--runtime", "toy", "--model", "model", cwd=run.parent.parent)
    assert done.returncode == 2
    assert "has no runtime 'toy'" in done.stderr
    (artifact,) = run.glob("*/artifact.json")
    with pytest.raises(InputError, match="unknown format 'toy'"):
        Artifact.open(artifact.parent)
