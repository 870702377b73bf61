"""The file sink: rows become output files, which are durable before the rows are drained.

Importable on workers: knows neither checkpoints nor lmdb. Each file gets a name that no other had
(`filenames`), so no attempt of a task ever touches another's file. The ledger says which of them
count.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from typing import Any

from ray.data.block import Block
from ray.data.datasource import Datasink
from typing_extensions import override

from ray_resume.core.filenames import NAME_DIGEST_BYTES
from ray_resume.core.messages import Drain, Failure
from ray_resume.core.tokens import MODULUS
from ray_resume.failpoints import failpoint
from ray_resume.run.client import LedgerClient
from ray_resume.write.conformity import Conformity
from ray_resume.write.flushes import flushes
from ray_resume.write.folder import Folder
from ray_resume.write.layout import Layout, unwritten
from ray_resume.write.new_files import UnwritableRowsError
from ray_resume.write.source_rows import SourceRows, group_by_source

__all__ = ["FileSink"]


class FileSink(Datasink[None]):
    """Writes files into a folder, and drains what it has written.

    Args:
        digests: ``NAME_DIGEST_BYTES`` bytes for each source number, one after another.
        commit_interval_s: rows wait at most so long before they are written.
    """

    def __init__(
        self,
        folder: Folder,
        layout: Layout,
        prefix: str,
        digests: bytes,
        client: LedgerClient,
        commit_interval_s: float = math.inf,
        *,
        file_per_source: bool = False,
    ) -> None:
        self._folder = folder
        self._layout = layout
        self._prefix = prefix
        self._digests = digests
        self._client = client
        self._commit_interval_s = commit_interval_s
        self._file_per_source = file_per_source

    @override
    def get_name(self) -> str:
        return "Resumable"

    @override
    def write(self, blocks: Iterable[Block], ctx: Any) -> None:
        """Write the rows of one task to files, and drain what is written.

        A *flush* writes what has gathered: when the oldest rows have waited for
        ``commit_interval_s``, when there are `flushes.FLUSH_BYTES`, and at the end of the task. So
        a kill costs at most that, and memory is bounded by it. The rows of a flush are in one file
        (for each partition, and each schema), sorted by source.

        Guarantees: when this returns, the files are durable and the ledger has counted them. If it
        raises, that is true of the flushes before; the other files are leftovers.

        Raises:
            ResumeError: a file cannot be written, or the types of two sources cannot be unified;
                the message names it, or them.
        """
        for some in flushes(blocks, self._commit_interval_s):
            self._flush(some)
            # They would stay in memory while the next ones gather.
            del some

    def _flush(self, blocks: Iterable[Block]) -> None:
        rows = group_by_source(blocks)
        if not rows:
            return
        failpoint("sink.before_write")
        rows, failures = Conformity(self._layout, self._client).of(rows)
        if self._file_per_source:
            rows = [one for some in rows for one in some.alone()]
        drains: list[Drain] = []
        left = deque(rows)
        while left:
            some = left.popleft()
            digest = self._digest(int(some.sources[0])) if len(some) == 1 else None
            try:
                parts = self._layout.write_files(self._folder, self._prefix, digest, some)
            except UnwritableRowsError as error:
                # The files that are written already become leftovers.
                if len(some) == 1:
                    failures.append(self._unwritable(some, error))
                else:
                    left.extendleft(some.alone())
                continue
            drains += [drain._replace(parts=tuple(parts[drain.source])) for drain in some.drains()]
        try:
            self._folder.sync({part.file for drain in drains for part in drain.parts})
        except OSError as error:
            raise unwritten(f"folder {self._folder.uri}", error) from error
        failpoint("sink.before_drain")
        self._client.send(*drains, *failures)
        failpoint("sink.after_drain")

    def _unwritable(self, one: SourceRows, error: UnwritableRowsError) -> Failure:
        (drain,) = one.drains()
        text = f"Rows of {self._client.name_of(drain.source)} cannot be written: {error}"
        return Failure(drain.source, -drain.delta % MODULUS, drain.rows, text)

    def _digest(self, source: int) -> bytes | None:
        # A range of rows that was found in this pass has none yet.
        start = source * NAME_DIGEST_BYTES
        return self._digests[start : start + NAME_DIGEST_BYTES] or None
