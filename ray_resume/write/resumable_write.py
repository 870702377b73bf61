"""``resumable_write``: check the pipeline, say where its rows go, execute it.

The steps are in modules of their own: `raydata.plan` checks the pipeline, `write.targets` the sink
and its options, and `write.execution` arms and executes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow.fs import FileSystem
from ray.data import Dataset
from ray.data.datasource import Datasink

from ray_resume.errors import NonResumableError
from ray_resume.raydata import guards, plan
from ray_resume.read.datasource import ResumableDatasource
from ray_resume.run.summary import RunSummary
from ray_resume.udf.decorator import options_of
from ray_resume.write.execution import Execution
from ray_resume.write.targets import SinkOptions, target_of

__all__ = ["resumable_write"]


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
    file_per_source: bool = False,
    publish_interval_s: float = 300.0,
    require_complete: bool = False,
    progress: bool | None = None,
    concurrency: int | None = None,
    lease_wait_s: float | None = None,
    ray_remote_args: Mapping[str, Any] | None = None,
    **write_options: Any,
) -> RunSummary:
    """Write a resumable dataset, each source's rows exactly once. Run again after any crash.

    Sources that earlier runs completed are skipped before they are opened. With nothing left to
    do, no source is opened; the output is tidied if it is not clean.

    Args:
        ds: a dataset from ``resumable_read``, with decorated UDFs.
        sink: the folder for the output (a path, or a URI), created if missing. Or a
            ``ray.data.Datasink``; `ray_resume.write.datasinks` says what each guarantees. Or None
            if the last stage is decorated with ``@resumable(sink=True)``.
        format: ``"parquet"``, ``"json"`` (one line a row), ``"csv"``, ``"orc"``, ``"feather"``,
            ``"webdataset"``, ``"tfrecords"``, ``"numpy"``, ``"images"``. A WebDataset shard has no
            key twice: a row whose key repeats is in another file. A NumPy file has rows of one
            shape, and never objects. An image is a file of its own. A source with a row that such a
            file cannot hold fails alone; its error says why.
        partition_cols: columns that name subfolders, ``column=value/``, as Hive does, and by the
            same names as plain Ray Data. They are not in the files, so at least one other column
            must be there. A column of structs, lists or another nested type is refused.
        schema: the output's columns and types, partition columns included, as plain Ray Data's
            ``write_parquet`` takes it. Rows are cast to it. A source fails alone if a value would
            change, if it has a column that is not in it, or lacks one that is. Its error names the
            column. By default all Parquet, ORC and Feather files get one schema. It widens as rows
            come, where no value changes: null becomes any type, numbers become wider, times finer,
            structs get all fields. A missing column is null. Once the source that made a type wide
            is processed again, or gone, it becomes narrow again. The run writes files from before
            such changes again at its end, unless another run is at work (then that or the next one
            does). Other types are an error that names two sources, and so are integers beyond 2**53
            beside floats, whichever comes first. Columns of extension types stay as they are. A
            column that is null everywhere has the type null.
        commit_interval_s: finished rows wait at most so long in a write task before they are
            written, and their sources can be committed. A kill costs each worker so much work. Less
            makes more files. (Folders and tables; other datasinks get a task's rows in one call.)
        target_file_bytes: at the end of the run, merge files of at most half of this size into
            files of about this size, in bytes on disk. By default files are as many as with plain
            Ray Data, or more, since each write task writes one every ``commit_interval_s``.
        file_per_source: give each source files of its own. By default sources share files, as they
            do with plain Ray Data. They are committed one by one all the same. If one fails, the
            run removes its rows from such a file at its end.
        publish_interval_s: how often the *rows* of complete sources are published to a table
            (Lance, Iceberg, Delta, and any ``Datasink`` that overrides ``on_write_complete``) while
            the pipeline runs. A kill costs so much work. Each publication is a version of the
            table. In Lance, Iceberg and Delta it has a mark, so that no kill makes rows appear
            twice; other datasinks publish again what a kill caught between publishing and
            committing. How often *records* are published to a checkpoint that hosts share is an
            option of :class:`Checkpoint`, of the same name.
        require_complete: raise an ``IncompleteError`` at the end if sources are left failed,
            pending or quarantined: SLURM, Kubernetes and Ray Jobs must not take the job for done.
            Everything that is complete is committed, and the output is tidy. Without it, such a
            script ends with exit code 0, unless it calls ``RunSummary.raise_if_incomplete()``.
        progress: whether to show how far the run is, in lines of the log ``ray_resume`` (INFO): at
            the start, every 10 seconds, and at the end. On a terminal, a bar above those of Ray
            Data takes the place of the lines every 10 seconds (with ``tqdm``). None shows bar or
            lines only if ``DataContext.enable_progress_bars`` is set. Lines go to the console,
            or to the handlers of ``logging`` if you have configured any. ``True`` shows them even
            if the root logger's level hides INFO. Warnings are shown in any case.
        append: write into a folder that has data files of others; theirs are left alone. Do not
            pass it to write beside the output of a checkpoint that was removed: its rows would be
            there twice.
        filesystem: the pyarrow filesystem of ``sink``, inferred from it by default.
        concurrency: how many write tasks may run at once.
        lease_wait_s: how many seconds to wait for another run on the same sources to end. By
            default 25 more than a run that was killed may seem to be at work. A dead run seems so
            for 5 in a local directory, and 1.25 times ``lease_ttl_s`` where hosts share the
            checkpoint.
        ray_remote_args: passed to ``ray.remote`` for the write tasks. Behind an actor pool they ask
            for no CPU unless you pass ``num_cpus``, so that they never wait for the pool to end.
        write_options: the format's own: those of ``pyarrow.parquet.write_table`` (such as
            ``compression`` and ``row_group_size``), ``pyarrow.csv.WriteOptions``,
            ``pandas.DataFrame.to_json``, ``pyarrow.orc.write_table``,
            ``pyarrow.feather.write_feather``; ``encoder`` of ``Dataset.write_webdataset``,
            ``tf_schema`` of ``write_tfrecords``, ``column`` of ``write_numpy``, ``column`` and
            ``file_format`` of ``write_images``. With ``name_column``, the names of images end with
            its values, ``...~<value>.png``. Beside them, as in plain Ray Data,
            ``max_rows_per_file``, ``arrow_open_stream_args`` (``compression`` and
            ``buffer_size``), and ``arrow_parquet_args_fn`` and its like. Compressed JSON and CSV
            files are called ``*.json.gz``, ``*.csv.zst`` and so on, so that readers decompress
            them.

    Raises:
        NonResumableError: the pipeline cannot be resumed; raised before any task starts.
        IncompleteError: ``require_complete`` is set, and sources are left.
        ResumeError: the driver is a Ray Client, or the run's ledger died.
        CheckpointError: the checkpoint is in use, unreadable or bound to another folder; the
            folder has other data files, or misses files of completed sources.
        SourceChangedError: as ``on_source_change`` or ``on_source_gone`` of the read asked for, or
            because the input is another one than that of the runs before.
        Exception: a UDF raised it, as with plain Ray Data; complete sources are committed. Or a
            reader did, after all other sources were processed, if more sources than
            ``DataContext.max_errored_blocks`` could not be read. Their failed run is on record.
        KeyboardInterrupt: Ctrl-C; likewise. Uncaught, it ends the process with exit code 130.
        SystemExit: SIGTERM, with exit code 143, unless you have a handler of your own; likewise.
    """
    if isinstance(sink, Dataset) and isinstance(ds, (str, os.PathLike, Datasink)):
        raise NonResumableError(
            "The dataset is the first argument of resumable_write, and the sink the second: "
            f"resumable_write(ds, {ds!r:.80})."
        )
    options = SinkOptions(
        format=format,
        append=append,
        filesystem=filesystem,
        partition_cols=partition_cols,
        schema=schema,
        commit_interval_s=commit_interval_s,
        publish_interval_s=publish_interval_s,
        target_file_bytes=target_file_bytes,
        file_per_source=file_per_source,
        write_options=write_options,
    )
    # Ray may have been started since the read.
    guards.refuse_ray_client()
    chain = plan.validate(
        ds,
        resumable_datasource=ResumableDatasource,
        is_decorated=lambda udf: options_of(udf) is not None,
    )
    execution = Execution(
        chain,
        target_of(sink, chain, options),
        commit_interval_s=commit_interval_s,
        publish_interval_s=publish_interval_s,
        concurrency=concurrency,
        ray_remote_args=ray_remote_args or {},
        progress=progress,
    )
    summary = execution.run(lease_wait_s)
    if require_complete:
        summary.raise_if_incomplete()
    return summary
