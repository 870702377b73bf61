"""The file sink: each source's rows become files of its own, durable before they are drained.

Importable on workers: knows neither checkpoints nor lmdb. A file is called
``<checkpoint>-<run>-<source's digest>-<random>.parquet``. The random part is drawn for each
write, so no attempt of a task ever touches another's file; which of them count is the ledger's to
say.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.fs import FileSelector, FileSystem, LocalFileSystem
from ray.data.block import Block, BlockAccessor
from ray.data.datasource import Datasink

from ray_resume import batches, plan
from ray_resume.client import LedgerClient
from ray_resume.ledger import Drain
from ray_resume.lineage import MODULUS, token_sum

__all__ = ["FileSink", "Folder", "OutputName", "check_write_options"]

DIGEST_BYTES = 8
"""How much of a source's digest is in a file name: to tell files apart by eye, not to identify."""


@dataclass(frozen=True)
class OutputName:
    """The name of an output file, and whose it is."""

    checkpoint: str
    run_id: str
    rest: str

    @classmethod
    def parse(cls, name: str) -> OutputName | None:
        """Read a name, hidden or not; None if it is not one of ours."""
        parts = name.removeprefix(".").split("-", 2)
        if len(parts) != 3 or len(parts[0]) != 8 or len(parts[1]) != 12:
            return None
        return cls(*parts)


@dataclass(frozen=True)
class Folder:
    """The folder that a checkpoint's output goes to."""

    filesystem: FileSystem
    path: str
    uri: str

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, LocalFileSystem)

    def create(self) -> None:
        """Create the folder if it is missing."""
        self.filesystem.create_dir(self.path, recursive=True)

    def names(self) -> list[str]:
        """List the files in it by their relative path, subfolders too; none if it is missing."""
        base = self.path.rstrip("/") + "/"
        selector = FileSelector(self.path, allow_not_found=True, recursive=True)
        return [
            info.path.removeprefix(base)
            for info in self.filesystem.get_file_info(selector)
            if info.is_file
        ]

    def remove(self, name: str) -> None:
        """Remove a file; not an error if it is gone."""
        with contextlib.suppress(FileNotFoundError):
            self.filesystem.delete_file(f"{self.path}/{name}")

    def write(self, name: str, table: pa.Table, options: Mapping[str, Any]) -> None:
        """Write a Parquet file. It has its final name only when it is whole and durable.

        On a local file system the name survives a power cut after :meth:`sync`.
        """
        if not self.is_local:
            # An object appears when its upload is closed, whole or not at all.
            with self.filesystem.open_output_stream(f"{self.path}/{name}") as stream:
                pq.write_table(table, stream, **options)
            return
        hidden = f"{self.path}/.{name}"
        try:
            with open(hidden, "xb") as file:
                pq.write_table(table, file, **options)
                file.flush()
                os.fsync(file.fileno())
            os.rename(hidden, f"{self.path}/{name}")
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(hidden)
            raise

    def sync(self) -> None:
        """Make the names written so far survive a power cut."""
        if self.is_local:
            descriptor = os.open(self.path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


class FileSink(Datasink[None]):
    """Writes Parquet files into a folder, and drains what it has written.

    Args:
        digests: ``DIGEST_BYTES`` bytes for each source number, one after another.
    """

    def __init__(
        self,
        folder: Folder,
        options: Mapping[str, Any],
        prefix: str,
        digests: bytes,
        client: LedgerClient,
    ) -> None:
        self._folder = folder
        self._options = dict(options)
        self._prefix = prefix
        self._digests = digests
        self._client = client

    def get_name(self) -> str:
        return "Resumable"

    def write(self, blocks: Iterable[Block], ctx: Any) -> None:
        """Write the rows of one task, one file for each source among them, then drain them all.

        Guarantees: when this returns, the files are durable and the ledger has counted them; if
        it does not, they are left-overs, and the rows count for nobody.
        """
        parts: dict[int, list[pa.Table]] = {}
        sums: dict[int, int] = {}
        for block in blocks:
            for source, table, total in _by_source(BlockAccessor.for_block(block).to_arrow()):
                parts.setdefault(source, []).append(table)
                sums[source] = (sums.get(source, 0) + total) % MODULUS
        if not parts:
            return
        drains = []
        for source, tables in parts.items():
            table = plan.concat_tables(tables)
            name = self._name(source)
            self._folder.write(name, table, self._options)
            drains.append(Drain(source, -sums[source] % MODULUS, table.num_rows, (name,)))
        self._folder.sync()
        self._client.send(*drains)

    def _name(self, source: int) -> str:
        digest = self._digests[source * DIGEST_BYTES : (source + 1) * DIGEST_BYTES].hex()
        return f"{self._prefix}-{digest}-{secrets.token_hex(8)}.parquet"


def check_write_options(options: Mapping[str, Any]) -> None:
    """Make sure that pyarrow knows ``options``, before any work has been done.

    Raises:
        ValueError: it does not.
    """
    try:
        pq.write_table(
            pa.table({"x": pa.array([1], pa.int64())}), pa.BufferOutputStream(), **options
        )
    except (TypeError, ValueError, KeyError, pa.ArrowException, OSError) as error:
        raise ValueError(
            f"resumable_write got options that Parquet files are not written with: {error}"
        ) from error


def _by_source(block: pa.Table) -> Iterator[tuple[int, pa.Table, int]]:
    table, sources, tokens = batches.detach(block)
    if len(sources) == 0:
        return
    if sources[0] == sources[-1] and np.all(sources == sources[0]):
        yield int(sources[0]), table, token_sum(tokens)
        return
    for source, part, positions in batches.split(table, sources):
        yield source, part, token_sum(tokens[positions])
