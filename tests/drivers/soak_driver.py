"""The pipelines of the soak, each slow enough to have a middle, and what their output must be.

python soak_driver.py PIPELINE FOLDER PART [ADDRESS]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import numpy as np
from driver import rows_of, scored

# Ray types a UDF's argument as the union of all batch formats.
Batch: TypeAlias = Any

FILES, ROWS = 24, 150
IDS = FILES * ROWS
MOMENT_S = 0.15


def slowly(batch: Batch) -> Batch:
    time.sleep(MOMENT_S)
    return batch


def colour(batch: Batch) -> Batch:
    time.sleep(MOMENT_S)
    return {"id": batch["id"], "colour": np.array([f"c/{i % 3}" for i in batch["id"]])}


def refuse(row: dict[str, Any]) -> dict[str, Any]:
    time.sleep(MOMENT_S / 40)
    if row["id"] % 11 == 3:
        raise ValueError("eleven")
    return row


def load(key: str) -> Iterator[Batch]:
    for start in range(0, ROWS, 50):
        yield {"id": int(key) * ROWS + start + np.arange(50)}


class Pipeline:
    """A pipeline on ``folder``; ``parts`` drivers work on it at once, each on its own sources."""

    parts = 1

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoint, self.out = folder / "ckpt", folder / "out"

    def write_input(self) -> None:
        from conftest import write_file

        for number in range(FILES):
            path = self.folder / f"in{number % self.parts}/{number:05d}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, number * ROWS, (number + 1) * ROWS)

    def run(self, part: int) -> Any:
        raise NotImplementedError

    def expected(self) -> Iterator[dict[str, Any]]:
        return ({"id": i} for i in range(IDS))

    def dead(self) -> list[int]:
        return []

    def check(self) -> None:
        """Make sure that all rows are there once, and nothing else."""
        import pyarrow.parquet as pq

        from ray_resume import Checkpoint
        from ray_resume.testing import check_exactly_once

        check_exactly_once(self.checkpoint, self.expected())
        letters = Checkpoint(self.checkpoint).dead_letters()
        dead = [i for path in letters for i in pq.read_table(path)["id"].to_pylist()]
        assert sorted(dead) == self.dead()
        assert sorted(map(str, self.checkpoint.glob("dead-letters/*"))) == letters
        # Nothing is in the folder that is not listed, hidden files neither.
        inside = sorted(str(path) for path in self.out.rglob("*") if path.is_file())
        assert inside == Checkpoint(self.checkpoint).files()

    def _read(self, part: int) -> Any:
        return self._read_whole(part).select_columns(["id"])

    def _read_whole(self, part: int) -> Any:
        import ray

        from ray_resume import resumable_read

        # The other driver's files are none of this one's input, and may all be done before.
        gone = "keep" if self.parts > 1 else None
        return resumable_read(
            ray.data.read_parquet,
            str(self.folder / f"in{part}"),
            checkpoint=self.checkpoint,
            on_source_gone=gone,
        )


class Scored(Pipeline):
    """Filters, fans out, scores in an actor pool."""

    def run(self, part: int) -> Any:
        from ray_resume import resumable_write

        return resumable_write(scored(self._read(part)), self.out)

    def expected(self) -> Iterator[dict[str, Any]]:
        return ({"id": row, "score": score} for row, score in rows_of(IDS))


class Pair(Scored):
    """The same by two drivers at once, on one checkpoint and one folder."""

    parts = 2


class Merged(Pipeline):
    """Sources share many small files, which each run merges at its end."""

    options: ClassVar[dict[str, Any]] = {"target_file_bytes": 1 << 14, "commit_interval_s": 0.3}

    def run(self, part: int) -> Any:
        from ray_resume import resumable, resumable_write

        ds = self._read(part).map_batches(resumable(slowly), batch_size=50, num_cpus=0.5)
        return resumable_write(ds, self.out, **self.options)


class Alone(Merged):
    """Each source has files of its own."""

    options: ClassVar[dict[str, Any]] = {"file_per_source": True}


class Keys(Pipeline):
    """A key is a source, and the order of its rows is nobody's promise."""

    def write_input(self) -> None:
        return

    def run(self, part: int) -> Any:
        from ray_resume import resumable, resumable_read, resumable_write

        keys = [str(number) for number in range(FILES)]
        ds = resumable_read(load, keys=keys, checkpoint=self.checkpoint)
        ds = ds.map_batches(resumable(slowly), batch_size=50, num_cpus=0.5)
        return resumable_write(ds, self.out)


class Partitioned(Pipeline):
    """Lines of JSON in folders by a column."""

    def run(self, part: int) -> Any:
        from ray_resume import resumable, resumable_write

        ds = self._read(part).map_batches(resumable(colour), batch_size=50, num_cpus=0.5)
        return resumable_write(ds, self.out, format="json", partition_cols=["colour"])

    def expected(self) -> Iterator[dict[str, Any]]:
        return ({"id": i, "colour": f"c/{i % 3}"} for i in range(IDS))


class Letters(Pipeline):
    """Some rows become dead letters."""

    def run(self, part: int) -> Any:
        from ray_resume import resumable, resumable_write

        ds = self._read(part).map(resumable(refuse, on_error="dead_letter"), num_cpus=0.5)
        return resumable_write(ds, self.out)

    def expected(self) -> Iterator[dict[str, Any]]:
        return ({"id": i} for i in range(IDS) if i % 11 != 3)

    def dead(self) -> list[int]:
        return [i for i in range(IDS) if i % 11 == 3]


class Shared(Letters):
    """With a checkpoint that hosts share: known by what is in it, as a mount is by its kind."""

    def write_input(self) -> None:
        from ray_resume.checkpoint.location import Location

        super().write_input()
        Location(str(self.checkpoint), shared=True).open().ensure()


class SharedPair(Shared, Pair):
    """Two drivers at once on such a checkpoint."""

    run, expected, dead = Pair.run, Pair.expected, Pair.dead


class Tabled(Pipeline):
    """Writes into a table, which is published often."""

    kind = "iceberg"

    def write_input(self) -> None:
        from table_driver import datasink

        super().write_input()
        # Drivers that start at once would both make it.
        datasink(self.kind, self.out)

    def run(self, part: int) -> Any:
        from table_driver import datasink

        from ray_resume import resumable, resumable_write

        ds = self._read_whole(part).map_batches(resumable(slowly), batch_size=50, num_cpus=0.5)
        sink = datasink(self.kind, self.out)
        return resumable_write(ds, sink, commit_interval_s=0.2, publish_interval_s=0.3)

    def check(self) -> None:
        from table_driver import ids_in_table

        from ray_resume import Checkpoint

        assert ids_in_table(self.kind, self.out) == list(range(IDS))
        status = Checkpoint(self.checkpoint).status()
        assert (status.completed, status.live) == (FILES, 0)
        assert Checkpoint(self.checkpoint).check().ok
        assert not list((self.checkpoint / "publications").glob("*"))


class Delta(Tabled):
    """A Delta table."""

    kind = "delta"


class Lance(Tabled):
    """A Lance table."""

    kind = "lance"


class TabledPair(Tabled):
    """Two drivers at once, on one checkpoint and into one table."""

    parts = 2


class DeltaPair(Delta):
    """Two drivers at once."""

    parts = 2


class SharedTable(Tabled):
    """With a checkpoint that hosts share."""

    def write_input(self) -> None:
        from ray_resume.checkpoint.location import Location

        super().write_input()
        Location(str(self.checkpoint), shared=True).open().ensure()


PIPELINES: dict[str, Callable[[Path], Pipeline]] = {
    kind.__name__: kind
    for kind in (
        Scored,
        Pair,
        Merged,
        Alone,
        Keys,
        Partitioned,
        Letters,
        Shared,
        SharedPair,
        Tabled,
        Delta,
        Lance,
        TabledPair,
        DeltaPair,
        SharedTable,
    )
}


def main() -> None:
    import logging

    import ray
    from small_cluster import start_cluster

    name, folder, part, *address = sys.argv[1:]
    if address:
        ray.init(address=address[0], log_to_driver=False, logging_level=logging.ERROR)
    else:
        start_cluster(num_cpus=3)
    ray.data.DataContext.get_current().enable_progress_bars = False
    print(PIPELINES[name](Path(folder)).run(int(part)), flush=True)


if __name__ == "__main__":
    main()
