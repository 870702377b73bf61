"""``resumable_write``: check the pipeline, arm it, run it."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow.fs import FileSystem
from ray.data import Dataset
from ray.data.datasource import Datasink
from ray.exceptions import RayError, RayTaskError

from ray_resume.checkpoint.backend import CheckpointBackend
from ray_resume.core.output_schema import is_agreeable
from ray_resume.core.planning import Listing
from ray_resume.core.sources import SourceTable
from ray_resume.errors import NonResumableError, ResumeError
from ray_resume.raydata import guards, plan, rewrite
from ray_resume.raydata.datasinks import GATHERS_BY_SIZE
from ray_resume.raydata.pacing import pace
from ray_resume.raydata.pool_watch import watch_pools
from ray_resume.raydata.signature import described_values, signature_of
from ray_resume.read.datasource import ArmedDatasource, ResumableDatasource
from ray_resume.read.overlap import refuse_overlap
from ray_resume.run.output import Output
from ray_resume.run.pass_loop import Pass
from ray_resume.run.run import Run, RunPlan
from ray_resume.run.summary import RunSummary
from ray_resume.udf.decorator import options_of
from ray_resume.udf.stage import instrument, instrument_predicate
from ray_resume.write.datasinks import (
    DiscardSink,
    WrappedDatasink,
    check_datasink,
    publishes_on_complete,
    title_of,
    write_result,
)
from ray_resume.write.file_sink import FileSink
from ray_resume.write.folder import Folder, folder_at
from ray_resume.write.formats import TYPED, checked_format
from ray_resume.write.layout import Layout
from ray_resume.write.output import FolderOutput
from ray_resume.write.packing import Packing, groups_of
from ray_resume.write.partitions import checked_columns, partitions_of
from ray_resume.write.retyping import retype_output

__all__ = ["resumable_write"]

logger = logging.getLogger("ray_resume")

_TARGET_BLOCK_BYTES = 128 << 20

# Beyond so many, a read task for each source would cost more than it tells.
_MOST_ISOLATED = 1000

# How often a task is executed again whose worker died: nodes come and go, but a row that kills its
# worker kills the next one too.
_RETRIES = 3
_RETRIES_ALONE = 1

# Rows may wait so long in each step of a task, before they wait in the sink.
_LONGEST_WAIT_IN_STEP_S = 1.0

# How many sources may share files, where nobody knows how large they are.
_GROUP_OF_UNKNOWN_SIZE = 500


def resumable_write(
    ds: Dataset,
    sink: str | Path | Datasink[Any] | None = None,
    *,
    format: str = "parquet",
    append: bool = False,
    filesystem: FileSystem | None = None,
    partition_cols: Sequence[str] | None = None,
    schema: pa.Schema | None = None,
    commit_interval_s: float = 10.0,
    target_file_bytes: int | None = None,
    concurrency: int | None = None,
    lease_wait_s: float | None = None,
    ray_remote_args: Mapping[str, Any] | None = None,
    **write_options: Any,
) -> RunSummary:
    """Write a resumable dataset, each source's rows exactly once. Run again after any crash.

    Sources that earlier runs completed are skipped before they are opened. With nothing left to
    do, nothing runs and nothing is written.

    Args:
        ds: a dataset from ``resumable_read``, with decorated UDFs.
        sink: the folder for the output, created if missing (a path, or a URI); or a
            ``ray.data.Datasink``, see `ray_resume.write.datasinks` for what each guarantees; or
            None if the last stage is decorated with ``@resumable(sink=True)``.
        format: ``"parquet"``, ``"json"`` (one line a row), ``"csv"``, ``"orc"``, ``"feather"``.
        partition_cols: columns that name subfolders, ``column=value/``, as Hive does, and by the
            same names as plain Ray Data. They are not in the files, so at least one other column
            must be there. A column of structs, lists or another nested type is refused.
        schema: the output's columns and types, partition columns included, as plain Ray Data's
            ``write_parquet`` takes it. Rows are cast to it. A source with a value that would
            change, a column that is not in it, or without one that is, fails alone; its error
            names the column. By default all Parquet, ORC and Feather files get one schema, which
            widens as rows come, where no value changes: null becomes any type, numbers and times
            become wider or finer, structs get all fields, a missing column is null. Files that
            were written before that are written again at the end of the run, unless another run
            is at work (then at the end of that or the next). Other types are an error that names
            two sources. Columns of extension types stay as they are. A column that is null
            everywhere has the type null.
        commit_interval_s: finished rows wait at most so long in a write task before they are
            written, and their sources can be committed: what a kill costs each worker. Less makes
            more files of sources that take longer than that.
        target_file_bytes: let sources that are smaller than this share files of about this size,
            in bytes of their rows in memory, as Arrow holds them. By default each source has files
            of its own. Sources that share a file are completed in one step, or all done again.
        append: write into a folder that has data files of others; theirs are left alone. Do not
            pass it to write beside the output of a checkpoint that was removed: its rows would be
            there twice.
        filesystem: the pyarrow filesystem of ``sink``, inferred from it by default.
        concurrency: how many write tasks may run at once.
        lease_wait_s: how many seconds to wait for another run on the same sources to end. By
            default 25 more than a run that was killed may seem to be at work: 5 in a local
            directory, 1.25 times ``lease_ttl_s`` where hosts share the checkpoint.
        ray_remote_args: passed to ``ray.remote`` for the write tasks. Behind an actor pool they ask
            for no CPU unless you pass ``num_cpus``, so that they never wait for the pool to end.
        write_options: the format's own: those of ``pyarrow.parquet.write_table`` (such as
            ``compression`` and ``row_group_size``), ``pyarrow.csv.WriteOptions``,
            ``pandas.DataFrame.to_json``, ``pyarrow.orc.write_table``,
            ``pyarrow.feather.write_feather``; beside them ``max_rows_per_file``,
            ``arrow_open_stream_args`` (``compression`` and ``buffer_size``), and
            ``arrow_parquet_args_fn`` and its like, as in plain Ray Data. Compressed JSON and CSV
            files are called ``*.json.gz``, ``*.csv.zst`` and so on, so that readers decompress
            them.

    Raises:
        NonResumableError: the pipeline cannot be resumed; raised before any task starts.
        ResumeError: the driver is a Ray Client, or the run's ledger died.
        CheckpointError: the checkpoint is in use, unreadable or bound to another folder; the
            folder has other data files, or misses files of completed sources.
        SourceChangedError: as ``on_source_change`` or ``on_source_gone`` of the read asked for, or
            because the input is another one than that of the runs before.
        Exception: what a UDF raised, as with plain Ray Data. What was complete is committed. Or
            what a reader raised, after all other sources were processed, if more sources than
            ``DataContext.max_errored_blocks`` could not be read. Their failed run is on record.
        KeyboardInterrupt: Ctrl-C; likewise. Uncaught, it ends the process with exit code 130.
        SystemExit: SIGTERM, with exit code 143, unless you have a handler of your own; likewise.
    """
    if isinstance(sink, Dataset) and isinstance(ds, (str, os.PathLike, Datasink)):
        raise NonResumableError(
            "The dataset is the first argument of resumable_write, and the sink the second: "
            f"resumable_write(ds, {ds!r:.80})."
        )
    if not commit_interval_s > 0:
        raise ValueError(f"commit_interval_s must be more than 0 seconds, not {commit_interval_s}")
    # Ray may have been started since the read.
    guards.refuse_ray_client()
    chain = plan.validate(
        ds,
        resumable_datasource=ResumableDatasource,
        is_decorated=lambda udf: options_of(udf) is not None,
    )
    optimized = chain.optimized()
    datasource = optimized.datasource
    assert isinstance(datasource, ResumableDatasource)
    target = _target(
        sink,
        chain,
        filesystem,
        append,
        format,
        checked_columns(partition_cols),
        _checked_schema(schema),
        commit_interval_s,
        target_file_bytes,
        write_options,
    )
    if datasource.options.policies.removes and not isinstance(target.output, FolderOutput):
        raise NonResumableError(
            'on_source_gone="remove" removes output files of ray_resume, and this pipeline writes '
            f'to {target.output.uri}. Pass on_source_gone="keep", and remove the rows there.'
        )

    begun = False

    def run_pass(this: Pass) -> None:
        nonlocal begun
        begun = True
        source = ArmedDatasource(datasource, this.sources, this.plan.sources, this.client)
        target_bytes = ds.context.target_max_block_size or _TARGET_BLOCK_BYTES
        read_tasks = source.preferred_read_tasks(target_bytes)
        sink_of_pass = target.datasink(this)
        if chain.read_tasks is not None:
            read_tasks = chain.read_tasks
        elif isinstance(sink_of_pass, FileSink) and not GATHERS_BY_SIZE:
            # What shares a file must come from one task then.
            read_tasks = min(read_tasks, sink_of_pass.groups or read_tasks)
        if this.plan.isolated and len(this.sources) <= _MOST_ISOLATED:
            read_tasks = len(this.sources)
        retries = _RETRIES_ALONE if this.plan.isolated else _RETRIES
        armed = rewrite.arm(
            optimized,
            source,
            read_tasks,
            retries,
            lambda method, udf: instrument(udf, this.client, method),
            lambda expression: instrument_predicate(expression, this.client),
        )
        pace(armed, min(_LONGEST_WAIT_IN_STEP_S, commit_interval_s))
        watch_pools(armed)
        guards.allow_write(armed)
        if armed.context.max_errored_blocks >= 0:
            armed.context.max_errored_blocks += this.plan.ignore_crashes
        remote_args = {"max_retries": retries, **(ray_remote_args or {})}
        if optimized.ends_in_actors:
            # If actors and reads have taken all CPUs, Ray lets writes wait for a CPU until the
            # reads are over, and nothing can be committed before.
            remote_args.setdefault("num_cpus", 0)
        with _ours_first():
            armed.write_datasink(sink_of_pass, ray_remote_args=remote_args, concurrency=concurrency)

    signature = signature_of(
        optimized,
        read=datasource.options.reader.text,
        read_udfs=datasource.options.reader.udfs,
        predicates=datasource.predicates,
        columns=datasource.selected_columns,
        input_names=datasource.column_names,
        write=target.described,
    )
    storage = datasource.checkpoint.open()
    run = Run(
        RunPlan(
            storage=storage,
            listing=Listing(
                datasource.sources,
                datasource.input.sources,
                datasource.options.ids,
                datasource.options.files,
                datasource.options.shard,
            ),
            policies=datasource.options.policies,
            output=target.output,
            publish=target.publish,
            signature=signature.text,
            code=signature.code,
            max_errored_blocks=ds.context.max_errored_blocks,
        )
    )
    has_ended_well = False
    try:
        summary = run.execute(run_pass, lease_wait_s=lease_wait_s)
        has_ended_well = True
        return summary
    except Exception as error:
        # As plain Ray Data does, but once for a run: what its passes completed was published.
        if begun and target.failed is not None:
            target.failed(error)
        raise
    finally:
        # A run that was refused leaves the output alone: its folder or its layout may be wrong.
        if target.ended is not None and (begun or has_ended_well):
            try:
                target.ended(storage)
            except (ResumeError, RayError, OSError) as error:
                logger.warning("The output's files may differ in their types: %s", error)


@contextlib.contextmanager
def _ours_first() -> Iterator[None]:
    """Raise an error of ray_resume's own as it is, not below the frames of the task it ended."""
    try:
        yield
    except RayTaskError as error:
        cause = error.cause
        if not isinstance(cause, ResumeError):
            raise
        # Ray adds lines to it about retries, which there are none of.
        message = str(cause).partition("\nFailed to apply UDF transform")[0]
        raise type(cause)(message) from None


@dataclass(frozen=True)
class _Target:
    """Where the rows go: the run's side of it, and the datasink of each pass.

    ``described`` stands for it at the end of the pipeline's signature.
    """

    described: str
    output: Output
    datasink: Callable[[Pass], Datasink[Any]]
    publish: Callable[[Sequence[bytes], int], None] | None = None
    # What is called with the error that ended the run after its first pass began.
    failed: Callable[[Exception], None] | None = None
    # What is to be done to the output when the run is over, well or not.
    ended: Callable[[CheckpointBackend], None] | None = None


def _target(
    sink: Any,
    chain: plan.Chain,
    filesystem: FileSystem | None,
    append: bool,
    format: str,
    partition_columns: tuple[str, ...],
    schema: pa.Schema | None,
    commit_interval_s: float,
    target_file_bytes: int | None,
    options: Mapping[str, Any],
) -> _Target:
    _check_stage_sinks(chain, sink)
    if sink is None:
        return _Target(
            "", Output(f"sink=True: {chain.operators[-1].name}"), lambda _: DiscardSink()
        )
    if isinstance(sink, Datasink):
        if (
            options
            or partition_columns
            or schema is not None
            or format != "parquet"
            or target_file_bytes is not None
        ):
            raise TypeError(
                "format, partition_cols, schema, target_file_bytes and write options are for "
                "folders alone."
            )
        check_datasink(sink)
        publish = None
        if publishes_on_complete(sink):

            def publish(results: Sequence[bytes], rows: int) -> None:
                sink.on_write_complete(write_result(results, rows))

        return _Target(
            type(sink).__name__,
            Output(title_of(sink)),
            lambda this: WrappedDatasink(sink, this.client),
            publish,
            sink.on_write_failed,
        )
    layout = Layout(checked_format(format, options), partition_columns, schema)
    known = chain.schema() if schema is None else schema
    if known is not None:
        # What is wrong with the columns is known before anything starts.
        list(partitions_of(known.empty_table(), partition_columns))
    if target_file_bytes is not None and target_file_bytes < 1:
        raise ValueError(f"target_file_bytes must be at least 1, not {target_file_bytes}")
    retried = tuple(chain.dataset.context.retried_io_errors)
    folder = dataclasses.replace(_folder(sink, filesystem), retried_errors=retried)
    assert isinstance(chain.datasource, ResumableDatasource)
    refuse_overlap(
        chain.datasource.options.inputs,
        "output folder",
        folder.filesystem.type_name,
        folder.path,
        folder.uri,
    )

    def file_sink(this: Pass) -> FileSink:
        packing = None
        # What is executed again was held up by a neighbour, perhaps: now each is on its own.
        if target_file_bytes is not None and not this.plan.isolated:
            packing = _packing(chain.datasource, this.sources, target_file_bytes)
        return FileSink(
            folder, layout, this.file_prefix, this.digests, this.client, packing, commit_interval_s
        )

    described = described_values([], options, shown={"compression"})
    if partition_columns:
        described = [f"partition_cols=[{', '.join(partition_columns)}]", *described]
    if schema is not None:
        described.append(f"schema={', '.join(f'{one.name}: {one.type}' for one in schema)}")
    text = f"write_{format}({', '.join(described)})" if described else f"write_{format}"

    def retype(storage: CheckpointBackend) -> None:
        if layout.format.name in TYPED:
            retype_output(storage, folder, layout)

    return _Target(text, FolderOutput(folder, append=append), file_sink, ended=retype)


def _checked_schema(schema: Any) -> pa.Schema | None:
    if schema is None:
        return None
    if not isinstance(schema, pa.Schema):
        raise TypeError(f"schema must be a pyarrow.Schema, not a {type(schema).__name__}")
    if not is_agreeable(schema):
        raise ValueError("schema has two columns of one name")
    return schema.remove_metadata()


def _packing(datasource: Any, sources: SourceTable, target_bytes: int) -> Packing:
    sizes = datasource.input.sizes_bytes(sources)
    if sizes is None or not sizes.any():
        sizes = np.full(len(sources), float(-(-target_bytes // _GROUP_OF_UNKNOWN_SIZE)))
    return Packing(target_bytes, groups_of(sizes, target_bytes))


def _check_stage_sinks(chain: plan.Chain, sink: Any) -> None:
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


def _folder(sink: Any, filesystem: FileSystem | None) -> Folder:
    if not isinstance(sink, (str, os.PathLike)):
        raise NonResumableError(
            f"resumable_write writes into a folder or a ray.data.Datasink, not into a "
            f"{type(sink).__name__}."
        )
    return folder_at(sink, filesystem)
