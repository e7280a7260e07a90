"""A runner in an environment of its own: other versions than here, the rest from here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bluelm.errors import InputError, UnavailableError
from bluelm.system.files import demo_checkpoint
from export.gguf import export as gguf_file
from pipeline.cli import app
from targets import tools as table
from targets.runners import environment
from targets.runners.runner import named, open_runner, version_of
from tests.support.checkpoints.rounded import rounded

OTHER = "2026.9.11063"
LLAMA_CPP = environment.runners()["llama.cpp"]


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[table.Tool]]:
    """The table of tools, to change; an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = list(table.tools())
    monkeypatch.setattr(environment, "tools", lambda: found)
    yield found


def asked_for(rows: list[table.Tool], package: str, version: str) -> None:
    rows[:] = [row.model_copy(update={"version": version}) if row.name == package else row for row in rows]


@pytest.mark.linux
def test_another_version_runs_beside_the_one_that_is_here(rows: list[table.Tool], tmp_path: Path) -> None:
    here = version_of(LLAMA_CPP)
    artifact = gguf_file.export(rounded(tmp_path / "q", source=demo_checkpoint()), tmp_path / "a", context=64)
    asked_for(rows, "xllamacpp", OTHER)
    assert environment.site(LLAMA_CPP) is None and version_of(LLAMA_CPP) == here != OTHER
    made = environment.set_up("llama.cpp")
    assert environment.set_up("llama.cpp") == made == environment.folder(LLAMA_CPP)
    assert named(LLAMA_CPP) == f"llama.cpp of xllamacpp {OTHER}"
    with open_runner(artifact) as runner:
        assert runner.name == named(LLAMA_CPP) and runner.vocab_size == artifact.model.vocab_size
        assert len(runner.answer([1, 5, 6], 3).tokens) <= 3
        maps = Path(f"/proc/{runner._child._process.pid}/maps").read_text()  # pyright: ignore
    assert f"{made.resolve()}" in maps and "site-packages/numpy" in maps
    own = {path.name for path in (made / environment.SITE).iterdir()}
    assert "xllamacpp" in own and not {"numpy", "torch"} & own


def test_what_pip_cannot_get_leaves_nothing(rows: list[table.Tool], tmp_path: Path) -> None:
    asked_for(rows, "xllamacpp", "1999.1.1")
    with pytest.raises(UnavailableError, match=r"pip could not install xllamacpp==1999\.1\.1") as error:
        environment.set_up("llama.cpp")
    assert "No matching distribution" in str(error.value) and error.value.exit_code == 5
    assert not list((tmp_path / "cache" / "bluelm-export" / "runners").iterdir())


def test_a_runner_that_is_none_is_bad_input() -> None:
    with pytest.raises(InputError, match="no runner is called 'vllm'") as error:
        environment.set_up("vllm")
    assert "llama.cpp" in str(error.value.fix)
    assert CliRunner().invoke(app, ["doctor", "--setup", "vllm"]).exit_code == 2


def test_every_runner_asks_pip_for_versions_that_were_tried() -> None:
    for runner in environment.runners().values():
        wanted = environment.requirements(runner)
        assert wanted and wanted[0].startswith(f"{runner.package}==")
