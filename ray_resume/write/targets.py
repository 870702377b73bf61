"""Where a pipeline's rows go: the user's ``sink`` and options become a target, all of it checked.

Runs in the driver, before anything starts. A target has a datasink for each pass, which workers
run, and the run's side of the output.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
from pyarrow.fs import FileSystem
from ray.data.datasource import Datasink

from ray_resume.checkpoint.backend import CheckpointBackend
from ray_resume.core.file_count import moved_again
from ray_resume.core.output_schema import is_agreeable
from ray_resume.errors import CheckpointError, NonResumableError
from ray_resume.raydata.plan import Chain
from ray_resume.raydata.signature import described_values
from ray_resume.read.datasource import ResumableDatasource
from ray_resume.read.overlap import refuse_overlap
from ray_resume.run.output import Output
from ray_resume.run.pass_loop import Pass
from ray_resume.run.table import Table
from ray_resume.udf.decorator import options_of
from ray_resume.write.datasinks import (
    DiscardSink,
    WrappedDatasink,
    check_datasink,
    publishes_on_complete,
    title_of,
)
from ray_resume.write.file_sink import FileSink
from ray_resume.write.flushes import table_intervals
from ray_resume.write.folder import Folder, folder_at
from ray_resume.write.formats import TYPED, UNPARTITIONED, checked_format
from ray_resume.write.layout import Layout
from ray_resume.write.output import FolderOutput
from ray_resume.write.partitions import checked_columns, partitions_of
from ray_resume.write.retyping import retype_output
from ray_resume.write.rewrite_tasks import copy_in_tasks
from ray_resume.write.tables import DatasinkTable
from ray_resume.write.tidying import tidy_output

__all__ = ["SinkOptions", "Target", "target_of"]

# How long a run that is over waits for another before it leaves files to it, to be tidied. The
# ledger's process of the run itself may take a moment to go.
_TIDY_WAIT_S = 5.0


@dataclass(frozen=True)
class SinkOptions:
    """The arguments of ``resumable_write`` that say how to write, as the user gave them.

    Raises:
        ValueError: an interval is not more than 0.
    """

    format: str
    append: bool
    filesystem: FileSystem | None
    partition_cols: Sequence[str] | None
    schema: Any
    commit_interval_s: float
    publish_interval_s: float
    target_file_bytes: int | None
    file_per_source: bool
    write_options: Mapping[str, Any]

    def __post_init__(self) -> None:
        for name in ("commit_interval_s", "publish_interval_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be more than 0 seconds, not {getattr(self, name)}")


@dataclass(frozen=True)
class Target:
    """The destination of the rows: the run's side of it, and the datasink of each pass.

    Args:
        described: stands for the target at the end of the pipeline's signature.
        output: what a run verifies before it starts, and cleans up.
        datasink: makes the datasink that a pass writes to.
        table: the sink, if it shows rows only once they are published.
        failed: takes the error that ended the run after its first pass began.
        ended: does what is left to do to the output when the run is over, well or not; returns the
            new file of each old one that was rewritten.
    """

    described: str
    output: Output
    datasink: Callable[[Pass], Datasink[Any]]
    table: Table | None = None
    failed: Callable[[Exception], None] | None = None
    ended: Callable[[CheckpointBackend], Mapping[str, str]] | None = None


def target_of(sink: Any, chain: Chain, options: SinkOptions) -> Target:
    """Return the target that ``sink`` and ``options`` ask for.

    Args:
        sink: a folder, a datasink, or None for a last stage that is decorated with ``sink=True``.
        chain: the pipeline, before Ray optimizes it.

    Raises:
        NonResumableError: the pipeline cannot write there and be resumed.
        CheckpointError: the folder cannot be opened, or is part of the input.
        ResumeError: the partition columns do not fit the rows.
        TypeError: an option has the wrong type, or is not for this kind of sink.
        ValueError: an option has a value that it cannot have.
    """
    columns = checked_columns(options.partition_cols)
    schema = _checked_schema(options.schema)
    _check_stage_sinks(chain, sink)
    if sink is None:
        name = chain.operators[-1].name
        target = Target("", Output(f"sink=True: {name}"), lambda _: DiscardSink())
    elif isinstance(sink, Datasink):
        _refuse_folder_options(options)
        target = _datasink_target(sink, options)
    else:
        target = _folder_target(sink, chain, options, columns, schema)
    _check_removal(chain, target)
    return target


def _datasink_target(sink: Datasink[Any], options: SinkOptions) -> Target:
    check_datasink(sink)
    # It is of no account to a datasink that shows rows at once: these do not wait in it.
    in_sink_s, _ = table_intervals(options.commit_interval_s, options.publish_interval_s)
    return Target(
        type(sink).__name__,
        Output(title_of(sink)),
        lambda this: WrappedDatasink(sink, this.client, in_sink_s),
        DatasinkTable(sink) if publishes_on_complete(sink) else None,
        sink.on_write_failed,
    )


def _folder_target(
    sink: Any,
    chain: Chain,
    options: SinkOptions,
    partition_columns: tuple[str, ...],
    schema: pa.Schema | None,
) -> Target:
    file_format = checked_format(options.format, options.write_options)
    if partition_columns and file_format.name in UNPARTITIONED:
        raise ValueError(
            f"{file_format.name} files have no partition_cols, as with plain Ray Data. Leave it "
            "out, or write Parquet, for example."
        )
    layout = Layout(file_format, partition_columns, schema)
    known = chain.schema() if schema is None else schema
    if known is not None:
        # A column that cannot name folders is an error before anything starts.
        list(partitions_of(known.empty_table(), partition_columns))
    target_bytes = options.target_file_bytes
    if target_bytes is not None and target_bytes < 1:
        raise ValueError(f"target_file_bytes must be at least 1, not {target_bytes}")
    if target_bytes is not None and options.file_per_source:
        raise ValueError(
            "file_per_source gives each source files of its own, and target_file_bytes merges "
            "files of several sources. Pass one of the two."
        )
    if target_bytes is not None and not file_format.has_rows_apart:
        raise ValueError(
            f"target_file_bytes merges files row by row, and {options.format} files with these "
            "options do not have one line for each row. Leave out target_file_bytes, or them."
        )
    if target_bytes is not None and file_format.has_one_row_a_file:
        raise ValueError(
            "target_file_bytes merges files, and each image has a file of its own. Leave it out, "
            'or write format="webdataset".'
        )
    folder = _folder(sink, chain, options.filesystem)

    def file_sink(this: Pass) -> FileSink:
        return FileSink(
            folder,
            layout,
            this.file_prefix,
            this.digests,
            this.client,
            options.commit_interval_s,
            # A file that cannot be cut into rows cannot be rewritten if one of its sources fails.
            file_per_source=options.file_per_source or not file_format.has_rows_apart,
        )

    assert isinstance(chain.datasource, ResumableDatasource)
    output = FolderOutput(folder, append=options.append)
    tidy = partial(
        _tidy_at_end,
        output=output,
        layout=layout,
        target_bytes=target_bytes,
        datasource=chain.datasource,
    )
    return Target(
        _described(options, partition_columns, schema),
        output,
        file_sink,
        ended=tidy,
    )


def _tidy_at_end(
    storage: CheckpointBackend,
    *,
    output: FolderOutput,
    layout: Layout,
    target_bytes: int | None,
    datasource: ResumableDatasource,
) -> Mapping[str, str]:
    """Give the files of a folder one schema, and tidy them, when a run is over.

    Returns:
        The new file of each old one that was rewritten.
    """
    folder, shard = output.folder, datasource.options.shard
    schema, seen = None, output.seen_at_end
    moved: Mapping[str, str] = {}
    agreed = storage.schemas().read() if layout.format.name in TYPED else None
    if agreed is not None and agreed.stale:
        moved = retype_output(storage, folder, layout)
        agreed, seen = storage.schemas().read(), None
    if agreed is not None:
        schema = layout.whole_schema(agreed)
    copy = copy_in_tasks(folder, layout, schema)
    tidied = tidy_output(
        storage,
        folder,
        copy,
        seen=seen,
        target_file_bytes=target_bytes,
        max_rows=layout.format.max_rows,
        own=datasource.sources.digests,
        shard=shard,
        wait_s=_TIDY_WAIT_S,
    )
    moved = moved_again(moved, tidied.moved)
    if shard is None:
        return moved
    # Files that shards share are tidied by the last run. As long as another shard is at work, this
    # run is refused, and does not wait.
    with contextlib.suppress(CheckpointError):
        tidied = tidy_output(
            storage,
            folder,
            copy,
            seen=None if tidied.moved else seen,
            wait_s=0,
        )
        moved = moved_again(moved, tidied.moved)
    return moved


def _described(
    options: SinkOptions, partition_columns: Sequence[str], schema: pa.Schema | None
) -> str:
    """Return how the pipeline's signature names a write into a folder."""
    described = described_values([], options.write_options, shown={"compression"})
    if partition_columns:
        described = [f"partition_cols=[{', '.join(partition_columns)}]", *described]
    if schema is not None:
        described.append(f"schema={', '.join(f'{one.name}: {one.type}' for one in schema)}")
    name = f"write_{options.format}"
    return f"{name}({', '.join(described)})" if described else name


def _folder(sink: Any, chain: Chain, filesystem: FileSystem | None) -> Folder:
    """Return the output folder, which must not be part of the input."""
    if not isinstance(sink, (str, os.PathLike)):
        raise NonResumableError(
            f"resumable_write writes into a folder or a ray.data.Datasink, not into a "
            f"{type(sink).__name__}."
        )
    retried = tuple(chain.dataset.context.retried_io_errors)
    folder = dataclasses.replace(folder_at(sink, filesystem), retried_errors=retried)
    assert isinstance(chain.datasource, ResumableDatasource)
    refuse_overlap(
        chain.datasource.options.inputs,
        "output folder",
        folder.filesystem.type_name,
        folder.path,
        folder.uri,
    )
    return folder


def _checked_schema(schema: Any) -> pa.Schema | None:
    if schema is None:
        return None
    if not isinstance(schema, pa.Schema):
        raise TypeError(f"schema must be a pyarrow.Schema, not a {type(schema).__name__}")
    if not is_agreeable(schema):
        raise ValueError("schema has two columns of one name")
    return schema


def _refuse_folder_options(options: SinkOptions) -> None:
    """Make sure that a datasink got no options that are for folders.

    Raises:
        TypeError: it did.
    """
    if (
        options.write_options
        or options.partition_cols
        or options.schema is not None
        or options.format != "parquet"
        or options.target_file_bytes is not None
        or options.file_per_source
    ):
        raise TypeError(
            "format, partition_cols, schema, target_file_bytes, file_per_source and write options "
            "are for folders alone."
        )


def _check_stage_sinks(chain: Chain, sink: Any) -> None:
    """Make sure that ``sink`` or the last stage takes the rows, and no stage before it does.

    Raises:
        NonResumableError: neither or both do, or a stage before the last does.
    """
    sinks = [
        operator
        for operator in chain.operators
        if (options := options_of(getattr(operator, "fn", None))) and options.sink
    ]
    if sink is None and not sinks:
        raise NonResumableError(
            "resumable_write got no sink, and the last stage is not decorated with "
            "@resumable(sink=True). Give a folder or a Datasink."
        )
    if sinks and (sink is not None or sinks[0] is not chain.operators[-1]):
        chain.refuse(
            sinks[0],
            f"{sinks[0].name} is decorated with @resumable(sink=True), so nothing comes after it.",
            "Make it the last operator, and call resumable_write(ds) without a sink.",
        )


def _check_removal(chain: Chain, target: Target) -> None:
    """Make sure that output can be removed where the read asks for it.

    Raises:
        NonResumableError: the rows are in a system that ray_resume cannot remove them from.
    """
    assert isinstance(chain.datasource, ResumableDatasource)
    policies = chain.datasource.options.policies
    if policies.removes and not isinstance(target.output, FolderOutput):
        asked = "" if policies.on_source_gone else ", the default for this input,"
        raise NonResumableError(
            f'on_source_gone="remove"{asked} removes output files of ray_resume, and this pipeline '
            f'writes to {target.output.uri}. Pass on_source_gone="keep", and remove the rows there.'
        )
