"""A hub of each kind, for every test that asks for one."""

from __future__ import annotations

from collections.abc import Iterator

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
