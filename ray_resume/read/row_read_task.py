"""The work of a read task whose sources are row ranges. `core.row_reading` has its rules.

Runs on workers: knows neither checkpoints nor lmdb.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ray_resume.core.messages import Failure, ReadFailure, Seal
from ray_resume.core.row_reading import RowFile, RowReading
from ray_resume.core.sources import SourceTable
from ray_resume.errors import SourceChangedError
from ray_resume.failpoints import failpoint
from ray_resume.raydata import blocks
from ray_resume.raydata.filereads import ReadTaskFactory, Selection
from ray_resume.read.inputs import ChangeCheck
from ray_resume.read.read_errors import is_transient, read_failure
from ray_resume.read.read_task import CHANGED, Attempts, SealReport, reads_of
from ray_resume.run.client import LedgerClient

__all__ = ["RowReadTask"]

logger = logging.getLogger("ray_resume")


@dataclass(frozen=True)
class RowReadTask:
    """Reads files from their start, emits rows of ranges that are wanted, and seals each range.

    Guarantees: as `ResumableReadTask`, for each range and for the end of each file. No further row
    of a file is read once all that is wanted of it is sealed.
    """

    __name__ = "ray_resume read"

    files: Sequence[RowFile]
    tasks: ReadTaskFactory
    left: Selection
    has_changed: ChangeCheck
    client: LedgerClient

    def __call__(self) -> Iterator[Any]:
        report = SealReport(self.client)
        sources = SourceTable.of([file.source for file in self.files])
        client = self.client
        for file, read in zip(self.files, reads_of(self.tasks, sources, self.left), strict=True):
            reading = RowReading(
                file, client.run_id, client.pass_number, client.register, time.time
            )
            attempts = Attempts(read, repeatable=True)
            yield from self._read(file, reading, attempts, report)
            if attempts.error is not None and is_transient(attempts.error):
                report.end()
                raise attempts.error
        report.end()

    def _read(
        self, file: RowFile, reading: RowReading, attempts: Attempts, report: SealReport
    ) -> Iterator[Any]:
        ended: list[Seal] = []
        for block in attempts:
            if report.is_due():
                # One check is for all that is sent: in a bucket it takes longer than short ranges.
                self._report(file, reading, ended, report)
                if reading.is_over:
                    return
                ended = []
                report.send_if_due()
            emission = reading.number(blocks.num_rows(block))
            if emission is not None:
                if emission.positions is not None:
                    block = blocks.take(block, emission.positions)
                yield blocks.with_tracking_columns(block, emission.sources, emission.tokens)
                failpoint("read.between_blocks")
            ended += reading.taken()
            if reading.is_over:
                break
        self._report(file, reading, ended, report)
        if reading.is_over:
            return
        if attempts.error is not None:
            self._fail(file, reading, attempts.error, report)
            return
        failpoint("read.before_end")
        self._report(file, reading, reading.end(), report)
        failpoint("read.after_end")

    def _report(
        self,
        file: RowFile,
        reading: RowReading,
        events: Sequence[Seal | Failure],
        report: SealReport,
    ) -> None:
        """Report ranges that were read; failures of all that is left, if the file has changed."""
        if not events:
            return
        try:
            # The check comes last: a change after it has no effect on the rows that were read.
            changed = self.has_changed(file.source)
        except Exception as error:
            report.add(*(read_failure(one.source, 0, one.rows, error) for one in events))
            self._fail(file, reading, error, report)
            return
        if changed:
            report.add(*(Failure(one.source, one.total, one.rows, CHANGED) for one in events))
            report.add(*reading.fail(CHANGED))
            return
        report.add(*events)

    def _fail(
        self, file: RowFile, reading: RowReading, error: Exception, report: SealReport
    ) -> None:
        """Report that the rest of the file could not be read."""
        if isinstance(error, SourceChangedError):
            report.add(*reading.fail(f"the read: {error}"))
            return
        failures: list[ReadFailure] = [
            read_failure(one.source, 0, reading.rows, error) for one in reading.fail("")
        ]
        report.add(*failures)
        if failures:
            logger.warning(
                "%s could not be read beyond row %d: %s. Its row ranges from there fail in this "
                "run, which goes on with the other sources.",
                file.source.source_id,
                reading.rows,
                failures[0].error,
            )
