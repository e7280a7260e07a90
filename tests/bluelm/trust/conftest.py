"""A hub of each kind, and a folder to sign, for every test that asks for one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.trust.hub_server import Hub, serve
from tests.support.trust.hubs import FILES, REPO


@pytest.fixture(params=["huggingface", "modelscope"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def files() -> dict[str, bytes]:
    """What the hub has; a module may name others."""
    return FILES


@pytest.fixture
def hub(files: dict[str, bytes]) -> Iterator[Hub]:
    with serve(Hub(REPO, files)) as running:
        yield running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One that can be signed."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path / "model"
