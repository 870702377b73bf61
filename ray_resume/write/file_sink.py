"""The file sink: each source's rows become files of its own, durable before they are drained.

Importable on workers: knows neither checkpoints nor lmdb. Each file gets a name that no other had
(`filenames`), so no attempt of a task ever touches another's file; which of them count is the
ledger's to say.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from typing import Any

from ray.data.block import Block, BlockAccessor
from ray.data.datasource import Datasink
from typing_extensions import override

from ray_resume.core.filenames import NAME_DIGEST_BYTES
from ray_resume.core.messages import Drain, Pack
from ray_resume.failpoints import failpoint
from ray_resume.raydata.blocks import concat_tables
from ray_resume.run.client import LedgerClient
from ray_resume.write.conformity import Conformity
from ray_resume.write.folder import Folder
from ray_resume.write.layout import Layout, unwritten
from ray_resume.write.packing import Packing
from ray_resume.write.source_rows import group_by_source

__all__ = ["FLUSH_BYTES", "FileSink"]

FLUSH_BYTES = 256 << 20
"""So many bytes of rows in memory are not kept in a write task, but written."""


class FileSink(Datasink[None]):
    """Writes files into a folder, and drains what it has written.

    Args:
        digests: ``NAME_DIGEST_BYTES`` bytes for each source number, one after another.
        packing: which sources share files; None: each has files of its own.
        commit_interval_s: rows wait at most so long before they are written.
    """

    def __init__(
        self,
        folder: Folder,
        layout: Layout,
        prefix: str,
        digests: bytes,
        client: LedgerClient,
        packing: Packing | None = None,
        commit_interval_s: float = math.inf,
    ) -> None:
        self._folder = folder
        self._layout = layout
        self._prefix = prefix
        self._digests = digests
        self._client = client
        self._packing = packing
        self._commit_interval_s = commit_interval_s

    @override
    def get_name(self) -> str:
        return "Resumable"

    @property
    @override
    def min_bytes_per_write(self) -> int | None:
        # So that Ray Data gathers enough blocks for a file; it then cannot fuse the write.
        return None if self._packing is None else self._packing.target_bytes

    @property
    def groups(self) -> int | None:
        """How many groups of sources share files; None if none does."""
        return None if self._packing is None else int(self._packing.groups[-1]) + 1

    @override
    def write(self, blocks: Iterable[Block], ctx: Any) -> None:
        """Write the rows of one task, each source's to files, and drain what is written.

        A *flush* writes what has gathered: when the oldest rows have waited for
        ``commit_interval_s``, when there are ``FLUSH_BYTES``, and at the end of the task. So a kill
        costs at most that, and memory is bounded by it. Rows that are to share files wait for the
        end of the task.

        Guarantees: when this returns, the files are durable and the ledger has counted them; if
        it does not, that is true of what it flushed before, and the other files are left-overs.

        Raises:
            ResumeError: a file cannot be written, or the types of two sources cannot be unified;
                the message names it, or them.
        """
        if self._packing is None:
            for some in _flushes(blocks, self._commit_interval_s, FLUSH_BYTES):
                self._flush(some)
        else:
            self._flush(blocks)

    def _flush(self, blocks: Iterable[Block]) -> None:
        rows = group_by_source(blocks)
        if not rows:
            return
        failpoint("sink.before_write")
        rows, failures = Conformity(self._layout, self._client).of(rows)
        events: list[Drain | Pack] = []
        alone = ([one] for some in rows for one in some.alone())
        for together in alone if self._packing is None else self._packing.packs(rows):
            drains = [drain for some in together for drain in some.drains()]
            digest = self._digest(drains[0].source) if len(drains) == 1 else None
            table = concat_tables([some.table for some in together])
            files = tuple(self._layout.write(self._folder, self._prefix, digest, table))
            events.append(
                Pack(tuple(drains), files) if len(drains) > 1 else drains[0]._replace(files=files)
            )
        try:
            self._folder.sync(name for event in events for name in event.files)
        except OSError as error:
            raise unwritten(f"folder {self._folder.uri}", error) from error
        failpoint("sink.before_drain")
        self._client.send(*events, *failures)
        failpoint("sink.after_drain")

    def _digest(self, source: int) -> bytes:
        return self._digests[source * NAME_DIGEST_BYTES : (source + 1) * NAME_DIGEST_BYTES]


def _flushes(
    blocks: Iterable[Block], longest_wait_s: float, most_bytes: int
) -> Iterator[list[Block]]:
    """Gather blocks until the first has waited for so long, or they have so many bytes."""
    held: list[Block] = []
    held_bytes, due = 0, math.inf
    for block in blocks:
        if not held:
            due = time.monotonic() + longest_wait_s
        held.append(block)
        held_bytes += BlockAccessor.for_block(block).size_bytes()
        if held_bytes >= most_bytes or time.monotonic() >= due:
            yield held
            held, held_bytes = [], 0
    if held:
        yield held
