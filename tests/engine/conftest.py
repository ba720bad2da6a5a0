from collections.abc import Iterator

import pytest

import launch


@pytest.fixture(autouse=True)
def _nothing_runs_on() -> Iterator[None]:
    yield
    launch.end_all()
