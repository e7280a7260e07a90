"""A hub of each kind, for every test that asks for one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.bluelm.trust.hubs import FILES, REPO
from tests.support.hub_server import Hub, serve


@pytest.fixture(params=["huggingface", "modelscope"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve(Hub(REPO, FILES)) as running:
        yield running
