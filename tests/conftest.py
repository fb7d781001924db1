"""What all tests share: workers that start at once, and collections of garbage that pass over the libraries."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from secateur.measure import compare
from tests.forking import Forking


@pytest.fixture(scope="session")
def forking() -> Iterator[Forking]:
    """A `python` that has the large libraries imported."""
    with tempfile.TemporaryDirectory() as folder, Forking(Path(folder)) as server:
        yield server


@pytest.fixture(scope="module", autouse=True)
def workers_start_at_once(request: pytest.FixtureRequest, forking: Forking) -> Iterator[None]:
    """The fresh processes that open folders are forked, but in modules that say ``FRESH_INTERPRETERS = True``."""
    with pytest.MonkeyPatch.context() as patch:
        if not getattr(request.module, "FRESH_INTERPRETERS", False):
            patch.setattr(compare, "sys", forking)  # `sys.executable` is all it takes from there
        yield


@pytest.fixture(scope="module", autouse=True)
def libraries_are_no_garbage() -> None:
    """A collection looks at a million objects of libraries otherwise, and training makes eight of them."""
    gc.collect()
    gc.freeze()
