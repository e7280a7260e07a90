"""A phone behind adb's protocol, sound and cool when a test begins."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.phones.phone import FakePhone, running_phone


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakePhone]:
    with running_phone(tmp_path_factory.mktemp("phone")) as phone:
        yield phone


@pytest.fixture
def phone(shared: FakePhone) -> FakePhone:
    shared.fault()
    shared.heat(0)
    return shared
