"""Other people's datasinks, wrapped so that what they have written is drained.

Importable on workers. Two kinds, told apart by whether ``on_write_complete`` is overridden:

* **durable in write** (SQL and so Snowflake, Mongo, ClickHouse, BigQuery, Kafka, turbopuffer, ...):
  the rows are there when ``write`` returns. Promise: at least once. A source that did not complete,
  because of a crash, a torn task or a failed row, is written again.
* **published** (Lance, Iceberg, Delta, ...): ``write`` runs once for each source in a flush, and
  the ledger keeps its result. Every ``publish_interval_s`` and at the end of a pass,
  ``on_write_complete`` gets the results of complete sources alone, and then they are committed. A
  crash before it redoes what was not published, and publishes nothing twice. In a crash between
  the two, it matters whether the table's own transaction has a place for a mark
  (`raydata.table_marks`). With marks (Lance, Iceberg, Delta), the next run finds the mark and
  commits: exactly once. Without, it publishes that one publication again: at least once, with a
  warning. `run.publisher` names the one case that marks do not cover: a driver that is paused.
"""

from __future__ import annotations

import copy
import math
import os
import pickle
import re
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

from ray import cloudpickle
from ray.data.block import Block
from ray.data.datasource import Datasink, WriteResult
from typing_extensions import override

from ray_resume.core.tokens import SOURCE_COLUMN, TOKEN_COLUMN
from ray_resume.errors import NonResumableError
from ray_resume.failpoints import failpoint
from ray_resume.raydata.datasinks import WRITE_UUID_KWARG_NAME, is_file_datasink
from ray_resume.raydata.whole_imports import import_library_of
from ray_resume.run.client import LedgerClient
from ray_resume.write.flushes import flushes
from ray_resume.write.source_rows import group_by_source

__all__ = [
    "DiscardSink",
    "WrappedDatasink",
    "check_datasink",
    "publishes_on_complete",
    "title_of",
    "write_result",
]

_WIPING_MODES = {"overwrite", "create", "error", "errorifexists", "ignore"}

# The attributes that say where Ray's own datasinks write to. None has an address with credentials
# in it, since a checkpoint keeps their values.
_PLACES: dict[str, tuple[str, ...]] = {
    "_BaseLanceDatasink": ("uri",),
    "BigQueryDatasink": ("project_id", "dataset"),
    "ClickHouseDatasink": ("_table",),
    "DeltaDatasink": ("_path",),
    "IcebergDatasink": ("table_identifier",),
    "KafkaDatasink": ("topic",),
    "MongoDatasink": ("database", "collection"),
    "SQLDatasink": ("sql",),
    "TurbopufferDatasink": ("namespace",),
}

# What Ray's own datasinks for files are here.
_FORMATS = {
    "CSVDatasink": '"csv"',
    "ImageDatasink": '"images", column=...',
    "JSONDatasink": '"json"',
    "NumpyDatasink": '"numpy", column=...',
    "ORCDatasink": '"orc"',
    "ParquetDatasink": '"parquet"',
    "TFRecordDatasink": '"tfrecords"',
    "WebDatasetDatasink": '"webdataset"',
}


def check_datasink(datasink: Datasink[Any]) -> None:
    """Make sure that a resumable pipeline may write to ``datasink``.

    Raises:
        NonResumableError: it writes files in a folder; or it does not wait until rows are durable;
            or it wipes the table or insists on an empty one at its start. On a resume that would
            destroy or refuse earlier runs' rows.
    """
    name = type(datasink).__name__
    if is_file_datasink(datasink):
        known = (
            _FORMATS[kind.__name__] for kind in type(datasink).__mro__ if kind.__name__ in _FORMATS
        )
        raise NonResumableError(
            f"{name} writes files whose names a second attempt would write again. Give the folder "
            f"itself: resumable_write(ds, folder, format={next(known, '...')})."
        )
    if getattr(datasink, "overwrite_table", False):
        raise NonResumableError(
            f"{name} has overwrite_table=True, which would delete on each resume what earlier runs "
            "have written. Use overwrite_table=False, and empty the table once, before the first "
            "run."
        )
    # Kafka's datasink: its `write` waits until all messages are delivered, as the producer says.
    settings = getattr(datasink, "producer_config", None) or {}
    for setting in ("acks", "request.required.acks"):
        if str(settings.get(setting)) == "0":
            raise NonResumableError(
                f"{name} has {setting}=0, with which rows count as delivered before a broker has "
                "them: a broker that fails would lose rows of completed sources. Leave it out."
            )
    for attribute in ("mode", "_mode"):
        mode = getattr(datasink, attribute, None)
        # Some enums say it by their value, others, such as ClickHouse's, by their name.
        for said in (getattr(mode, "value", mode), getattr(mode, "name", mode)):
            if str(said).lower() in _WIPING_MODES:
                raise NonResumableError(
                    f"{name} is in mode {str(said).lower()!r}, which runs again on each resume "
                    "and would wipe or refuse what earlier runs have written. Use its append mode, "
                    "and create or empty the table once, before the first run."
                )


def title_of(datasink: Datasink[Any]) -> str:
    """Name ``datasink`` for people and for the checkpoint, with its place where that is known.

    Two datasinks with one name count as the same if they are not Ray's own.
    """
    known = (_PLACES[kind.__name__] for kind in type(datasink).__mro__ if kind.__name__ in _PLACES)
    places = (_place(attribute, datasink) for attribute in next(known, ()))
    return " ".join(["datasink", datasink.get_name(), ".".join(places)]).strip()


def _place(attribute: str, datasink: Datasink[Any]) -> str:
    place = str(getattr(datasink, attribute, ""))
    if attribute == "sql":
        table = re.search(r"\binto\s+([^\s(]+)", place, re.IGNORECASE)
        return table[1] if table else ""
    if attribute in ("uri", "_path") and "://" not in place:
        return os.path.abspath(place)
    return place


def publishes_on_complete(datasink: Datasink[Any]) -> bool:
    """Say whether the rows become visible only in ``on_write_complete``."""
    return type(datasink).on_write_complete is not Datasink.on_write_complete


def write_result(results: Sequence[bytes], rows: int) -> WriteResult[Any]:
    """Make what ``on_write_complete`` gets of what `WrappedDatasink` has sent."""
    # They come from this run's own workers through its own ledger, never from a checkpoint.
    return WriteResult(rows, 0, [pickle.loads(result) for result in results])


class WrappedDatasink(Datasink[None]):
    """Writes through ``inner``, without the two columns, and drains what it has written.

    Args:
        commit_interval_s: rows that are to be published wait at most so long before they are
            written. Other datasinks get all rows of a task in one call, as in plain Ray Data.
    """

    def __init__(
        self, inner: Datasink[Any], client: LedgerClient, commit_interval_s: float = math.inf
    ) -> None:
        self._inner = inner
        self._client = client
        self._commit_interval_s = commit_interval_s
        self._publishes_on_complete = publishes_on_complete(inner)

    @override
    def get_name(self) -> str:
        return self._inner.get_name()

    @property
    @override
    def supports_distributed_writes(self) -> bool:
        return self._inner.supports_distributed_writes

    @property
    @override
    def min_rows_per_write(self) -> int | None:
        # Lance asks for a million rows. Until so many have come, no source could be published, and
        # a kill would cost them all. Each source is written by itself anyway.
        return None if self._publishes_on_complete else self._inner.min_rows_per_write

    @property
    @override
    def min_bytes_per_write(self) -> int | None:
        return None if self._publishes_on_complete else self._inner.min_bytes_per_write

    @override
    def on_write_start(self, schema: Any = None) -> None:
        for name in (SOURCE_COLUMN, TOKEN_COLUMN):
            if schema is not None and name in schema.names:
                schema = schema.remove(schema.get_field_index(name))
        self._inner.on_write_start(schema)

    @override
    def write(self, blocks: Iterable[Block], ctx: Any) -> None:
        if not self._publishes_on_complete:
            self._flush(blocks, ctx)
            return
        import_library_of(self._inner)
        for some in flushes(blocks, self._commit_interval_s):
            self._flush(some, ctx)

    def _flush(self, blocks: Iterable[Block], ctx: Any) -> None:
        rows = group_by_source(blocks)
        if not rows:
            return
        failpoint("datasink.before_write")
        drains = [drain for some in rows for drain in some.drains()]
        if self._publishes_on_complete:
            # Each source is published or not on its own, so each has a result of its own.
            alone = (one.table for some in rows for one in some.alone())
            results = [self._inner.write(iter([table]), _fresh(ctx)) for table in alone]
            drains = [
                drain._replace(results=(cloudpickle.dumps(result),))  # type: ignore[no-untyped-call]
                for drain, result in zip(drains, results, strict=True)
            ]
        else:
            self._inner.write((some.table for some in rows), ctx)
        failpoint("datasink.before_drain")
        self._client.send(*drains)
        failpoint("datasink.after_drain")


class DiscardSink(Datasink[None]):
    """The end of a pipeline whose last stage is ``@resumable(sink=True)``."""

    @override
    def write(self, blocks: Iterable[Block], ctx: Any) -> None:
        for _ in blocks:
            pass


def _fresh(ctx: Any) -> Any:
    # Datasinks name what they write by this; one write for each source must not clash.
    fresh = copy.copy(ctx)
    fresh.kwargs = {**ctx.kwargs, WRITE_UUID_KWARG_NAME: uuid.uuid4().hex}
    return fresh
