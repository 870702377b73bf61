"""Pipelines that are refused: what the message says, and that nothing was started."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import ray
from conftest import snapshot
from ray.data import Dataset

from ray_resume import NonResumableError, resumable_read, resumable_write

PIPELINE = "examples/deduplicate.py"
DECORATE = "Put @resumable on it"
SAY_IT = "with a @resumable UDF"
READ = "Read with resumable_read("


class Refusal(NamedTuple):
    """A pipeline of a resumable dataset and a plain one, and the parts of its refusal.

    Attributes:
        build: makes it.
        named: how the message calls what is refused.
        where: the place of it.
        way_out: what to do.
    """

    build: Callable[[Dataset, Dataset], Dataset]
    named: str
    where: str
    way_out: str

    def check(self, source: Path, folder: Path) -> None:
        """Make sure that the message says it, before anything is started or written."""
        ds = resumable_read(ray.data.read_parquet, str(source), checkpoint=folder / "ckpt")
        pipeline = self.build(ds, ray.data.read_parquet(str(source)))
        before = snapshot(folder)
        with pytest.raises(NonResumableError) as caught:
            resumable_write(pipeline, folder / "out")
        message = str(caught.value)
        assert self.named in message
        assert self.where in message
        assert self.way_out in message
        assert "internal" not in message.lower()
        assert caught.value.__cause__ is None
        assert snapshot(folder) == before
