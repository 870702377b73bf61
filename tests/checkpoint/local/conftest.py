"""Each test closes the files of writers that it opened."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ray_resume.checkpoint.local import lmdb_file


@pytest.fixture(autouse=True)
def _nothing_stays_open() -> Iterator[None]:
    yield
    assert not lmdb_file._own
