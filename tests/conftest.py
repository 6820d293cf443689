"""Shared by all tests: a private home, and a check that no process outlives a test."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import standin
from tests.home import Home


@pytest.fixture
def home() -> Iterator[Home]:
    """A home of its own; whatever the test left alive is ended by pid."""
    place = Home()
    try:
        yield place
    finally:
        place.close()


@pytest.fixture(scope="session")
def card_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled card without a GPU."""
    missing = standin.why_not()
    if missing:
        pytest.skip(missing)
    return standin.build(standin.shared_directory(tmp_path_factory.getbasetemp()))


@pytest.fixture
def card(card_library: Path, tmp_path: Path) -> standin.StandIn:
    """A 6 GB card that nobody uses yet."""
    return standin.StandIn(tmp_path, card_library)
