"""Deduplicate documents: two resumable pipelines in a row, and a plain Ray shuffle between them.

A shuffle brings rows of all files together, so it stands in no resumable pipeline. Here it works
on a few bytes of each document, and its output is replaced as a whole by each run:

1. **hash**, resumable: each document gets a hash of its words. ``hashed/``
2. **group**, plain Ray Data: of each hash, all documents but the first. ``duplicates/``
3. **filter**, resumable: reads the checkpoint of step 1, and drops the duplicates. ``unique/``

Kill it as often as you like, in any step, by hand or with ``--crash-in``, and run it again::

    python examples/deduplicate.py --crash-in filter   # dies when a part is filtered
    python examples/deduplicate.py                     # goes on, and checks the result

Change a file in ``documents/``, add or remove one: the next run hashes what is new or changed. It
filters all of it again only if other documents are duplicates now.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import random
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray

from ray_resume import Checkpoint, CheckpointError, resumable, resumable_read, resumable_write

FILES, DOCUMENTS = 24, 200
STEPS = ("hash", "group", "filter")
# Stands for work that takes long, so that there is a middle to be killed in.
PAUSE_S = 0.1


def hash_of(text: str) -> str:
    """Return what is the same for texts that differ in case and spaces alone."""
    return hashlib.sha256(" ".join(text.lower().split()).encode()).hexdigest()


@resumable
def add_hash(batch: pa.Table) -> pa.Table:
    time.sleep(PAUSE_S)
    return batch.append_column("hash", pa.array(map(hash_of, batch["text"].to_pylist())))


class WithoutDuplicates:
    """Drops the documents whose ids are in a folder."""

    def __init__(self, folder: str) -> None:
        self.ids = pq.read_table(folder, columns=["id"])["id"]

    def __call__(self, batch: pa.Table) -> pa.Table:
        time.sleep(PAUSE_S)
        return batch.filter(pc.invert(pc.is_in(batch["id"], self.ids)))


def hash_documents(workdir: Path) -> Checkpoint:
    """Step 1: hash what is new or changed."""
    checkpoint = Checkpoint(workdir / "hashed-checkpoint")
    ds = resumable_read(
        ray.data.read_parquet,
        str(workdir / "documents"),
        checkpoint=checkpoint,
        on_source_gone="remove",
    )
    ds = ds.map_batches(add_hash, batch_format="pyarrow")
    resumable_write(ds, workdir / "hashed", require_complete=True, commit_interval_s=0.5)
    return checkpoint


def find_duplicates(hashed: Checkpoint, folder: Path) -> str:
    """Step 2: write the ids of all documents but the first of each hash; return their digest."""

    def all_but_first(group: pa.Table) -> pa.Table:
        return group.sort_by("id").slice(1).select(["id"])

    unfinished = folder.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    ds = ray.data.read_parquet(hashed.files()).select_columns(["hash", "id"])
    ds = ds.groupby("hash", num_partitions=4).map_groups(all_but_first, batch_format="pyarrow")
    found = pa.concat_tables([pa.table({"id": pa.array([], pa.int64())}), *tables_of(ds)])
    found = found.sort_by("id")
    # A kill leaves the old folder, none, or the new one, and the next run makes it anew.
    pq.write_table(found, unfinished / "ids.parquet")
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    return hashlib.sha256(str(found["id"].to_pylist()).encode()).hexdigest()[:16]


def tables_of(ds: ray.data.Dataset) -> list[pa.Table]:
    return [table for table in ray.get(ds.to_arrow_refs()) if len(table)]


def drop_duplicates(hashed: Checkpoint, duplicates: Path, digest: str, workdir: Path) -> None:
    """Step 3: filter what is new or changed; all of it, if other documents are duplicates now."""
    ds = resumable_read(
        ray.data.read_parquet,
        hashed,
        checkpoint=workdir / "unique-checkpoint",
        on_pipeline_change="restart",
    )
    ds = ds.map_batches(
        resumable(WithoutDuplicates, version=digest),
        fn_constructor_args=(str(duplicates),),
        batch_format="pyarrow",
        concurrency=1,
    )
    ds = ds.drop_columns(["hash"])
    resumable_write(ds, workdir / "unique", require_complete=True, commit_interval_s=0.5)


def write_documents(folder: Path) -> None:
    """Write documents of which a third are copies of others."""
    if folder.exists():
        return
    chance = random.Random(1)
    unfinished = folder.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for number in range(FILES):
        ids = range(number * DOCUMENTS, (number + 1) * DOCUMENTS)
        texts = [f"Document {chance.randrange(FILES * DOCUMENTS)}  of many" for _ in ids]
        pq.write_table(pa.table({"id": ids, "text": texts}), unfinished / f"{number:02}.parquet")
    unfinished.rename(folder)


def check(workdir: Path) -> None:
    """Exit with 1 unless the output has the first document of each hash, once."""
    firsts: dict[str, int] = {}
    documents = pq.read_table(workdir / "documents").sort_by("id").to_pylist()
    for row in documents:
        firsts.setdefault(hash_of(row["text"]), row["id"])
    written = pq.read_table(workdir / "unique")["id"].to_pylist()
    if sorted(written) != sorted(firsts.values()):
        sys.exit(f"WRONG: {len(written)} documents were written, {len(firsts)} are unique.")
    print(f"OK: {len(written):,} of {len(documents):,} documents are unique, each exactly once.")


def last_completed_at(checkpoint: Checkpoint) -> float | None:
    """Return when the last source was completed; None if none was."""
    try:
        return checkpoint.status().last_completed_at
    except CheckpointError:  # It is not made yet.
        return None


def crash_in(step: str | None, workdir: Path) -> None:
    """SIGKILL this process in the middle of a step, from a thread."""
    if step is None:
        return
    folder = workdir / "duplicates.unfinished"
    # An earlier run that was killed may have left it.
    shutil.rmtree(folder, ignore_errors=True)
    checkpoint = Checkpoint(
        workdir / ("hashed-checkpoint" if step == "hash" else "unique-checkpoint")
    )
    before = last_completed_at(checkpoint)

    def is_time() -> bool:
        return folder.exists() if step == "group" else last_completed_at(checkpoint) != before

    def wait() -> None:
        while not is_time():
            time.sleep(0.02)
        print(f"SIGKILL in the step {step}. Run it again to go on.", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, default=Path("deduplicate-run"))
    parser.add_argument("--crash-in", choices=STEPS, help="die in this step")
    options = parser.parse_args()
    workdir = options.workdir.absolute()
    write_documents(workdir / "documents")
    ray.init(log_to_driver=False, logging_level=logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    crash_in(options.crash_in, workdir)
    hashed = hash_documents(workdir)
    digest = find_duplicates(hashed, workdir / "duplicates")
    drop_duplicates(hashed, workdir / "duplicates", digest, workdir)
    ray.shutdown()
    check(workdir)


if __name__ == "__main__":
    main()
