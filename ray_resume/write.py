"""``resumable_write``: check the pipeline, arm it, run it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pyarrow.fs import FileSystem
from ray.data import Dataset

from ray_resume import plan, stage
from ray_resume.datasource import ArmedDatasource, ResumableDatasource
from ray_resume.directory import CheckpointDirectory
from ray_resume.errors import CheckpointError, NonResumableError
from ray_resume.formats import checked_format
from ray_resume.listing import resolve
from ray_resume.run import LEASE_WAIT_S, Pass, Run, RunPlan
from ray_resume.sink import FileSink, Folder, Layout
from ray_resume.summary import RunSummary

__all__ = ["resumable_write"]

_TARGET_BLOCK_BYTES = 128 << 20


def resumable_write(
    ds: Dataset,
    sink: str | Path,
    *,
    format: str = "parquet",
    append: bool = False,
    filesystem: FileSystem | None = None,
    partition_cols: Sequence[str] | None = None,
    concurrency: int | None = None,
    lease_wait_s: float = LEASE_WAIT_S,
    ray_remote_args: Mapping[str, Any] | None = None,
    **write_options: Any,
) -> RunSummary:
    """Write a resumable dataset, each source's rows exactly once. Run again after any crash.

    Sources that earlier runs completed are skipped before they are opened. With nothing left to
    do, nothing runs and nothing is written.

    Args:
        ds: a dataset from ``resumable_read``, with decorated UDFs.
        sink: the folder for the output, created if missing: a path, or a URI.
        format: ``"parquet"``, ``"json"`` (one line a row), ``"csv"``, ``"orc"``, ``"feather"``.
        partition_cols: columns that name subfolders, ``column=value/``, as Hive does.
        append: write into a folder that has data files of others; theirs are left alone.
        filesystem: the pyarrow filesystem of ``sink``, inferred from it by default.
        concurrency: how many write tasks may run at once.
        lease_wait_s: how many seconds to wait for another run on the same sources to end. A
            killed driver's ledger lives on for a few.
        ray_remote_args: passed to ``ray.remote`` for the write tasks.
        write_options: the format's own: those of ``pyarrow.parquet.write_table`` (such as
            ``compression`` and ``row_group_size``), ``pyarrow.csv.WriteOptions``,
            ``pandas.DataFrame.to_json``, ``pyarrow.orc.write_table``,
            ``pyarrow.feather.write_feather``.

    Raises:
        NonResumableError: the pipeline cannot be resumed; raised before any task starts.
        CheckpointError: the checkpoint is in use, unreadable or bound to another folder; the
            folder has other data files, or misses files of completed sources.
        SourceChangedError: as ``on_source_change="error"`` of the read asked for.
        Exception: what a UDF raised, as with plain Ray Data. What was complete is committed.
    """
    chain = plan.chain_of(
        ds,
        resumable_datasource=ResumableDatasource,
        is_decorated=lambda udf: stage.options_of(udf) is not None,
    )
    layout = Layout(
        checked_format(format, write_options), dict(write_options), tuple(partition_cols or ())
    )
    folder = _folder(sink, filesystem)
    datasource = chain.datasource
    assert isinstance(datasource, ResumableDatasource)
    directory = CheckpointDirectory(datasource.checkpoint)

    def run_pass(this: Pass) -> None:
        source = ArmedDatasource(datasource, this.sources, this.numbers, this.client)
        armed = plan.arm(
            chain,
            source,
            source.preferred_read_tasks(ds.context.target_max_block_size or _TARGET_BLOCK_BYTES),
            lambda method, udf: stage.armed(udf, this.client, method),
            lambda expression: stage.armed_predicate(expression, this.client),
        )
        armed.write_datasink(
            FileSink(folder, layout, this.file_prefix, this.digests, this.client),
            ray_remote_args=dict(ray_remote_args or {}),
            concurrency=concurrency,
        )

    run = Run(
        RunPlan(
            directory=directory,
            sources=datasource.sources,
            folder=folder,
            append=append,
            signature=chain.signature(),
            max_failed_runs=datasource.options.max_failed_runs,
            on_source_change=datasource.options.on_source_change,
        )
    )
    return run.execute(run_pass, lease_wait_s=lease_wait_s)


def _folder(sink: str | Path, filesystem: FileSystem | None) -> Folder:
    if not isinstance(sink, (str, os.PathLike)):
        raise NonResumableError(
            f"resumable_write writes into a folder in this version, not into a "
            f"{type(sink).__name__}. Give the folder's path."
        )
    inferred, (path,) = resolve(sink, filesystem)
    folder = Folder(inferred, path, path if "://" not in os.fspath(sink) else os.fspath(sink))
    if folder.is_local:
        folder = Folder(inferred, os.path.abspath(path), os.path.abspath(path))
        if os.path.exists(path) and not os.path.isdir(path):
            raise CheckpointError(f"The output folder {path} is a file. Give another folder.")
    return folder
