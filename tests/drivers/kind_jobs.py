"""A pipeline for each kind of input table, output format and processor, to be killed.

    python kind_jobs.py ADDRESS

runs them as `fault_jobs` runs its own.
"""

from __future__ import annotations

import os
import time
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import divided_outputs
import fault_jobs
import lake_tables
import ray
from conftest import write_file, write_source
from divided_outputs import DIVIDED, checked_files
from plain_writes import plainly
from ray.data import Dataset
from rows_of_files import live_rows, rows_in

from ray_resume import Checkpoint, RunSummary, resumable, resumable_read, resumable_write
from ray_resume.testing import rows_of

__all__ = ["KINDS", "Kind"]

# Each source has so many rows.
SOURCES, ROWS = 6, 10
LAST = (SOURCES - 1) * ROWS


@resumable(one_to_one=True)
def slow(batch: Any, gate: str = "") -> Any:
    """Take so long that sources are written in turns; the last waits for a file, for a while."""
    time.sleep(0.15)
    deadline = time.monotonic() + 20
    while LAST in batch["id"] and not os.path.exists(gate) and time.monotonic() < deadline:
        time.sleep(0.05)
    return batch


class Kind(fault_jobs.Job):
    """A pipeline that is compared with the same one of plain Ray Data.

    Attributes:
        options: of the format, in plain Ray Data, too.
        merging: options of `resumable_write` beside these.
        points: where a worker and the ledger of the first run die, and a worker of the second.
        gate: while this file is not there, the last source is not processed.
    """

    format = "parquet"
    options: ClassVar[dict[str, Any]] = {}
    merging: ClassVar[dict[str, Any]] = {}
    points = ("sink.before_drain", "ledger.committed", "sink.writing")

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.gate = folder / "gate"

    @abstractmethod
    def prepare(self) -> None:
        """Write the input."""

    @abstractmethod
    def change(self) -> None:
        """Change a source, and add one."""

    @abstractmethod
    def read(self, read: Callable[..., Dataset]) -> Dataset: ...

    def pipeline(self, ds: Dataset, _: Callable[[Any], Any]) -> Dataset:
        """Apply the stages. The argument is `resumable`, or a function that changes nothing."""
        return ds.map_batches(slow, batch_size=ROWS, fn_kwargs={"gate": str(self.gate)})

    def run(self) -> RunSummary:
        reader = partial(resumable_read, checkpoint=self.checkpoint)
        return resumable_write(
            self.pipeline(self.read(reader), resumable),
            self.folder / "out",
            format=self.format,
            commit_interval_s=0.05,
            **self.options,
            **self.merging,
        )

    def plain_rows(self) -> Counter[str]:
        """Write the same with plain Ray Data, and return the rows."""
        folder = self.folder / f"plain-{time.monotonic_ns()}"
        with plainly():
            ds = self.pipeline(self.read(lambda reader, *a, **k: reader(*a, **k)), lambda it: it)
            getattr(ds, f"write_{self.format}")(str(folder), **self.options)
        return Counter(row for path in folder.iterdir() for row in rows_in(path))

    def check(self) -> None:
        """The output has the rows of plain Ray Data, and the folder nothing else."""
        files = checked_files(self.folder)
        found = live_rows(self.checkpoint)
        assert found == Counter(row for path in files for row in rows_in(path))
        assert found == self.plain_rows()

    def check_committed(self, plain: Counter[str]) -> int:
        """Compare what is committed with the rows of plain Ray Data; return how many they are."""
        assert Checkpoint(self.checkpoint).check().ok
        found = live_rows(self.checkpoint)
        assert not found - plain
        counts = [one.rows for one in Checkpoint(self.checkpoint).sources("completed")]
        assert counts == [ROWS] * len(counts)
        assert found.total() == sum(counts)
        return found.total()


class _OfTable(Kind):
    """Reads a table; deletes and appends come between runs."""

    table: type[lake_tables.Table]

    def prepare(self) -> None:
        table = self.table(self.folder)
        for number in range(SOURCES):
            table.append(range(number * ROWS, number * ROWS + ROWS))

    def change(self) -> None:
        # One that is committed, and one that perhaps is not.
        for row in {min(row["id"] for row in rows_of(self.checkpoint)), 13}:
            self.table(self.folder).delete(row)
        self.table(self.folder).append(range(100, 105))

    def read(self, read: Callable[..., Dataset]) -> Dataset:
        made: Dataset = self.table(self.folder).read(read, override_num_blocks=2)
        return made


class OfLance(_OfTable):
    table = lake_tables.Lance


class OfDelta(_OfTable):
    table = lake_tables.Delta


class OfIceberg(_OfTable):
    table = lake_tables.Iceberg


class _OfFiles(Kind):
    """Reads Parquet files."""

    def prepare(self) -> None:
        write_source(self.folder / "in", files=SOURCES, rows=ROWS)

    def change(self) -> None:
        write_file(self.folder / "in/00001.parquet", 110, 115)
        write_file(self.folder / "in/new.parquet", 120, 125)

    def read(self, read: Callable[..., Dataset]) -> Dataset:
        return read(ray.data.read_parquet, str(self.folder / "in"), override_num_blocks=2)


class _AsDivided(_OfFiles):
    """Writes a format of which a file cannot hold any rows."""

    def pipeline(self, ds: Dataset, decorate: Callable[[Any], Any]) -> Dataset:
        made, _ = DIVIDED[self.format]
        return super().pipeline(ds, decorate).map_batches(made)


class _AsMerged(_AsDivided):
    merging: ClassVar[dict[str, Any]] = {"target_file_bytes": 1 << 20}
    points = ("sink.writing", "ledger.committed", "rewrite.copied")


class AsWebdataset(_AsMerged):
    format = "webdataset"


class AsNumpy(_AsMerged):
    format = "numpy"
    options = DIVIDED["numpy"][1]


class AsTfrecords(_AsMerged):
    format = "tfrecords"


class AsImages(_AsDivided):
    """A source has a file for each of its rows."""

    format = "images"
    options = DIVIDED["images"][1]
    points = ("sink.written", "ledger.committed", "sink.writing")


def ask(row: dict[str, Any]) -> dict[str, Any]:
    return {"payload": {"id": 0, "prompt": row["name"], "model": f"m{row['id']}"}}


def answer(row: dict[str, Any]) -> dict[str, Any]:
    return {"id": int(row["http_response"]["model"][1:]), "length": row["http_response"]["length"]}


class OfModel(_OfFiles):
    """Asks a server whose address is in the file ``url``."""

    points = ("stage.called", "ledger.committed", "stage.called")

    def pipeline(self, ds: Dataset, decorate: Callable[[Any], Any]) -> Dataset:
        from ray.data import llm

        url = (self.folder / "url").read_text()
        config = llm.HttpRequestProcessorConfig(url=url, batch_size=ROWS)
        processor = llm.build_processor(config, preprocess=ask, postprocess=answer)
        made: Dataset = decorate(processor)(super().pipeline(ds, decorate))
        return made


KINDS: dict[str, type[Kind]] = {
    kind.__name__: kind
    for kind in (
        OfLance,
        OfDelta,
        OfIceberg,
        AsWebdataset,
        AsNumpy,
        AsTfrecords,
        AsImages,
        OfModel,
    )
}
fault_jobs.JOBS.update(KINDS)


if __name__ == "__main__":
    # Workers of a cluster that another process has started do not find the module.
    cloudpickle: Any = ray.cloudpickle
    cloudpickle.register_pickle_by_value(divided_outputs)
    fault_jobs.main()
