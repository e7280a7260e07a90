"""The checkpoint and the sound artifact of a module whose `made` lowers them once."""

from __future__ import annotations

import pytest

from compress.checkpoint.store import QuantizedCheckpoint
from export.artifacts.artifact import Artifact


@pytest.fixture
def model(request: pytest.FixtureRequest) -> QuantizedCheckpoint:
    return request.module.made()[0]


@pytest.fixture
def sound(request: pytest.FixtureRequest) -> Artifact:
    return request.module.made()[1]
