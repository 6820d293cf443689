"""Shared by all tests: a private home, and a check that no process outlives a test."""

from collections.abc import Iterator

import pytest

from tests.home import Home


@pytest.fixture
def home() -> Iterator[Home]:
    """A home of its own; whatever the test left alive is ended by pid."""
    place = Home()
    try:
        yield place
    finally:
        place.close()
